"""Parameters and statistics of normalization layers from other libraries, and back.

Arrays go in and out by their names, as plain dicts; none of the libraries is needed. `from_torch`
and its relatives convert one layer, `load_model` and `dump_model` a whole model with its
convolutions and dense layers, and `settings` says with which method a layer goes on as it was.

Arrays that have a counterpart are copied bit for bit with their dtype. What has none is computed
from what there is, and each function says what that is.
"""

from jaxnorm.convert._arrays import Layer as Layer
from jaxnorm.convert._torch import from_torch as from_torch
from jaxnorm.convert._torch import to_torch as to_torch
from jaxnorm.convert._haiku import from_haiku as from_haiku
from jaxnorm.convert._haiku import to_haiku as to_haiku
from jaxnorm.convert._equinox import from_equinox as from_equinox
from jaxnorm.convert._equinox import to_equinox as to_equinox
from jaxnorm.convert._keras import from_keras as from_keras
from jaxnorm.convert._keras import to_keras as to_keras
from jaxnorm.convert._sbx import from_sbx as from_sbx
from jaxnorm.convert._sbx import to_sbx as to_sbx
from jaxnorm.convert._settings import settings as settings
from jaxnorm.convert._model import load_model as load_model
from jaxnorm.convert._model import dump_model as dump_model
