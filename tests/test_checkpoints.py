"""What every method remembers goes through orbax and comes back, in linen and nnx."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compiled import jit
from flax import nnx as fnnx
from helpers import data
from registry import SHAPE, STATEFUL


def saved_and_restored(folder, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


@pytest.mark.parametrize("entry", STATEFUL, ids=str)
def test_linen(entry, tmp_path):
    """After a step of training, into variables of another initialization: the next step, too."""
    layer, x = entry.in_linen(), jnp.asarray(data(*SHAPE, dtype="f4"))
    call = entry.options | entry.by_example(len(x))

    def first(seed):
        return layer.init(jax.random.key(seed), x, use_running_average=True, **call)

    @jit
    def step(variables, x):
        options = {"use_running_average": False, "mutable": ["batch_stats"], **call}
        y, updates = layer.apply(variables, x, **options)
        return y, {**variables, **updates}

    variables = step(jit(first)(0), x)[1]
    restored = saved_and_restored(tmp_path, variables, jax.eval_shape(lambda: first(1)))
    chex.assert_trees_all_equal(restored, variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, variables)
    chex.assert_trees_all_equal(step(restored, x + 1), step(variables, x + 1))


@pytest.mark.parametrize("entry", STATEFUL, ids=str)
def test_nnx(entry, tmp_path):
    """Into a model that was never allocated."""
    x, layer = jnp.asarray(data(*SHAPE, dtype="f4")), entry.in_nnx()
    call = entry.options | entry.by_example(len(x))
    step = fnnx.jit(lambda layer, x: layer(x, use_running_average=False, **call))
    step(layer, x)
    fresh = fnnx.eval_shape(entry.in_nnx)
    restored = saved_and_restored(tmp_path, fnnx.state(layer), fnnx.state(fresh))
    fnnx.update(fresh, restored)
    chex.assert_trees_all_equal(*(fnnx.to_pure_dict(fnnx.state(t)) for t in (fresh, layer)))
    np.testing.assert_array_equal(step(fresh, x + 1), step(layer, x + 1))
