"""The functions of the core as users call them, also for arrays on meshes with explicit axes.

Inside of the library they call each other as they are, so that a call enters such a mesh once.
"""

from jaxnorm._core import averages, pooling, running
from jaxnorm._core import denormalize as _denormalize
from jaxnorm._core import moments as _moments
from jaxnorm._core import normalize as _normalize
from jaxnorm._core.meshes import in_explicit_meshes

moments = in_explicit_meshes(_moments.moments)
pool = in_explicit_meshes(pooling.pool)
merge = in_explicit_meshes(pooling.merge)
blend = in_explicit_meshes(pooling.blend)
normalize = in_explicit_meshes(_normalize.normalize)
denormalize = in_explicit_meshes(_denormalize.denormalize)
norm = in_explicit_meshes(_normalize.norm)
update_running = in_explicit_meshes(running.update_running)
update_cumulative = in_explicit_meshes(averages.update_cumulative)
update_averaged = in_explicit_meshes(averages.update_averaged)
