"""Measurements of a training run that leave it as it is: why a normalization helps or fails.

Pure functions of arrays, `Moments` and of the user's own loss, which run under `jit`. What goes
into a layer and comes out of it is read by `record_norms` of `jaxnorm.linen` and `jaxnorm.nnx`, and
changed by their `alter_norms`.
"""

from jaxnorm.probe._landscape import AlongGradient as AlongGradient
from jaxnorm.probe._landscape import along_gradient as along_gradient
from jaxnorm.probe._landscape import gradient_change as gradient_change
from jaxnorm.probe._depth import effective_learning_rates as effective_learning_rates
from jaxnorm.probe._depth import l2_by_layer as l2_by_layer
from jaxnorm.probe._noise import noise as noise
from jaxnorm.probe._noise import sensitivity as sensitivity
from jaxnorm.probe._statistics import StatisticsSpread as StatisticsSpread
from jaxnorm.probe._statistics import statistics_spread as statistics_spread
from jaxnorm.probe._statistics import RangeExcess as RangeExcess
from jaxnorm.probe._statistics import range_excess as range_excess
from jaxnorm.probe._power import ChannelPower as ChannelPower
from jaxnorm.probe._power import channel_power as channel_power
from jaxnorm.probe._calls import NormCall as NormCall
from jaxnorm.probe._table import NormRow as NormRow
from jaxnorm.probe._table import NormTable as NormTable
