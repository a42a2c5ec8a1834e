"""The normalizations the benchmarks compare: each row is a name and the method it stands for."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxnorm import Method, methods
from jaxnorm.methods import batch_group_count

NUM_GROUPS = 4
"""Groups of group normalization, at every channel count."""


class Row(NamedTuple):
    """A normalization under comparison.

    Attributes:
        label: what tables and figures call it.
        at: (batch_size, num_channels) -> the method, where batch_size examples are normalized together.
    """

    label: str
    at: Callable[[int, int], Method]


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
