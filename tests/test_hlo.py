"""Collectives of compiled programs: how many, of what, and how long the chains are in which they
depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import Array, collectives, total

SUM = ("all-reduce", (Array("f32", (3,)),), 8)


def found(f, *args):
    """The collectives of a function of one device's part, compiled for 8 devices."""
    mesh = Mesh(np.array(jax.devices()), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return collectives(jax.jit(mapped).lower(*args).compile().as_text())


def kinds(found):
    return [(one.code, one.arrays, one.group_size) for one in found]


def total_of(x):
    return lax.psum(x, "i")


X = np.arange(3, dtype="f4")


def test_a_program_without_collectives():
    assert found(jnp.sin, X) == []
    assert total([]) == (0, 0, 0, 0, 0, 0)


def test_dependent_sums_make_a_chain():
    chain = found(lambda x: total_of(jnp.sin(total_of(jnp.sin(total_of(x))))), X)
    assert kinds(chain) == [SUM] * 3
    assert [one.depth for one in chain] == [1, 2, 3]
    assert total(chain) == (3, 36, 3, 0, 0, 0)


def test_independent_sums_are_sent_together():
    """Arrays of one collective count once, with all their bytes; a chain follows each element of a
    tuple for itself."""
    together = found(lambda x, y: total_of((x, y)), X, np.arange(5, dtype="f4"))
    assert [sorted(array.shape for array in one.arrays) for one in together] == [[(3,), (5,)]]
    assert total(together) == (1, 32, 1, 0, 0, 0)


def test_kinds_and_groups_of_devices():
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    (one,) = found(lambda x: lax.psum(x, "i", axis_index_groups=pairs), X)
    assert (one.code, one.group_size, one.bytes) == ("all-reduce", 2, 12)
    assert found(lambda x: lax.psum(x, "i", axis_index_groups=[[i] for i in range(8)]), X) == []
    (one,) = found(lambda x: lax.all_gather(x, "i", axis_index_groups=pairs), X)
    assert (one.code, one.group_size, one.bytes) == ("all-gather", 2, 24)
    (one,) = found(lambda x: lax.psum_scatter(x, "i"), np.ones((8, 2), "f4"))
    assert (one.code, one.group_size, one.bytes) == ("reduce-scatter", 8, 64)
    (one,) = found(lambda x: lax.ppermute(x, "i", [(0, 1), (1, 0)]), X)
    assert (one.code, one.group_size, one.bytes) == ("collective-permute", 2, 12)
    (one,) = found(lambda x: lax.all_to_all(x, "i", 0, 0), np.ones((8, 2), "f4"))
    assert (one.code, one.group_size, one.bytes) == ("all-to-all", 8, 64)


def test_branches_count_apart():
    """What follows a branch depends on the predicate, and on what went in; not on collectives in
    the branch."""

    def f(x):
        first = total_of(x)
        second = lax.cond(
            first[0] > 0, lambda t: total_of(jnp.sin(total_of(jnp.sin(t)))), jnp.cos, first
        )
        return total_of(jnp.sin(second))

    always = [one for one in found(f, X) if not one.conditional]
    branch = [one for one in found(f, X) if one.conditional]
    assert [one.depth for one in always] == [1, 2]
    assert [one.depth for one in branch] == [2, 3]
    assert total(found(f, X)) == (2, 24, 2, 0, 2, 24)


def test_what_a_branch_does_not_read_makes_no_chain():
    def f(x, y):
        return lax.cond(
            x[0] > 0,
            lambda a, b: (jnp.sin(a), b),
            lambda a, b: (a, jnp.sin(b)),
            total_of(jnp.sin(total_of(x))),
            y,
        )

    def g(x, y):
        a, b = f(x, y)
        return a, total_of(b)

    assert sorted(one.depth for one in found(g, X, X)) == [1, 1, 2]


def test_loops_count_once():
    loop = found(lambda x: lax.fori_loop(0, 10, lambda i, t: jnp.sin(total_of(t)), total_of(x)), X)
    assert sorted(one.depth for one in loop) == [1, 2]
    assert not any(one.conditional for one in loop)


@pytest.mark.parametrize(
    "bit", (lambda x: x[0] > 0, lambda x: (x[0] > 0).astype("i4")), ids=("boolean", "integer")
)
def test_one_bit(bit):
    (one,) = found(lambda x: lax.pmax(bit(x).astype("i4"), "i") > 0, X)
    assert one.predicate
    assert not any(one.predicate for one in found(total_of, X[:1]))
    assert total([one]) == (0, 0, 1, 1, 0, 0)


STARTED_APART = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%wrapped (c: f32[1,128]) -> f32[1,16] {
  %c = f32[1,128]{1,0:T(8,128)} parameter(0)
  ROOT %reduce-scatter.1 = f32[1,16]{1,0:T(8,128)} reduce-scatter(%c), \
replica_groups=[1,8]<=[8], dimensions={1}, to_apply=%sum
}

ENTRY %main (p: f32[1,128], q: bf16[128]) -> f32[1,16] {
  %p = f32[1,128]{1,0:T(8,128)} parameter(0)
  %q = bf16[128]{0:T(256)(2,1)} parameter(1)
  %start = (f32[1,128]{1,0:T(8,128)}, bf16[128]{0:T(256)(2,1)}) all-reduce-start(%p, %q), \
replica_groups={}, to_apply=%sum
  %done = (f32[1,128]{1,0:T(8,128)S(1)}, bf16[128]{0:T(256)(2,1)}) all-reduce-done(%start)
  %get-tuple-element = f32[1,128]{1,0:T(8,128)S(1)} get-tuple-element(%done), index=0
  %begin = ((f32[1,128]{1,0}), f32[1,16]{1,0}, u32[]{:S(2)}) \
async-start(%get-tuple-element), calls=%wrapped
  %update = ((f32[1,128]{1,0}), f32[1,16]{1,0}, u32[]{:S(2)}) async-update(%begin), calls=%wrapped
  ROOT %async-done = f32[1,16]{1,0:T(8,128)} async-done(%update), calls=%wrapped
}
"""


def test_collectives_that_start_and_end_apart_count_once():
    """As on TPUs; what the CPU compiles does neither."""
    found = collectives(STARTED_APART)
    assert [(one.code, one.group_size, one.bytes, one.depth) for one in found] == [
        ("all-reduce", 8, 512 + 256, 1),
        ("reduce-scatter", 8, 512, 2),
    ]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['i'=2,'j'=4] {'j'}", 4),
        ("mesh['i'=2,'j'=4] {'j','i'}", 8),
        ("mesh['i'=2,'j'=4] {'j':(1)2}", 2),
    ],
)
def test_groups_of_devices(groups, size):
    """All ways of writing them that XLA has."""
    first, _ = collectives(STARTED_APART.replace("replica_groups={}", f"replica_groups={groups}"))
    assert first.group_size == size


def test_text_that_is_no_compiled_program():
    with pytest.raises(
        ValueError, match="compiled HLO module, which has an ENTRY. Got 'module @jit_f'"
    ):
        collectives("module @jit_f")
    with pytest.raises(ValueError, match="Unknown groups of devices: replica_groups=everyone"):
        collectives(STARTED_APART.replace("replica_groups={}", "replica_groups=everyone"))
