"""The normalizations the benchmarks compare: each row is a name and the method it stands for."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxnorm import Method, methods

NUM_GROUPS = 4
"""Groups of group normalization, at every channel count."""

BATCH_ENOUGH = 16
"""Number of examples from which BGN keeps every channel apart, and so is BN."""


class Row(NamedTuple):
    """A normalization under comparison.

    Attributes:
        label: what tables and figures call it.
        at: (batch_size, num_channels) -> the method, where batch_size examples are normalized together.
    """

    label: str
    at: Callable[[int, int], Method]


def batch_group_count(batch_size: int, num_channels: int) -> int:
    """Number of channel groups G of batch group normalization: the largest divisor of C not above C * batch_size / 16.

    A group then pools batch_size * C / G >= 16 pairs of an example and a channel, as many as BN pools from 16 examples.
    From 16 examples on, G = C and the method is BN. (Fewer than 16 pairs where C < 16 / batch_size: there G = 1.)

    The rule is ours. The paper chooses G by the batch size too, by a rule that we could not read.

    >>> [batch_group_count(batch_size, 48) for batch_size in (2, 4, 8, 16, 32)]
    [6, 12, 24, 48, 48]

    Reference: Batch Group Normalization, 2020, arXiv:2012.02782.
    """
    limit = max(1, num_channels * min(batch_size, BATCH_ENOUGH) // BATCH_ENOUGH)
    return max(count for count in range(1, limit + 1) if num_channels % count == 0)


def _batch_group_norm(batch_size: int, num_channels: int) -> Method:
    num_groups = batch_group_count(batch_size, num_channels)
    return methods.batch_norm() if num_groups == num_channels else methods.batch_group_norm(num_groups)


METHODS: Mapping[str, Row] = MappingProxyType(
    {
        "batch": Row("BatchNorm", lambda batch_size, num_channels: methods.batch_norm()),
        "batch_group": Row("BatchGroupNorm", _batch_group_norm),
        "group": Row(f"GroupNorm({NUM_GROUPS})", lambda batch_size, num_channels: methods.group_norm(NUM_GROUPS)),
        "layer": Row("LayerNorm", lambda batch_size, num_channels: methods.layer_norm()),
        "positional": Row("PositionalNorm", lambda batch_size, num_channels: methods.positional_norm()),
        "rms": Row("RMSNorm", lambda batch_size, num_channels: methods.rms_norm()),
        "instance": Row("InstanceNorm", lambda batch_size, num_channels: methods.instance_norm()),
    }
)
