"""Compiles for TPUs that are not there: chips of a slice of any size, as devices that programs can
be compiled for."""

import os
from collections.abc import Sequence
from functools import cache
from importlib import util
from typing import Any

from jax.experimental import topologies


def unavailable() -> str | None:
    """Why programs cannot be compiled for TPUs here, if they cannot."""
    return (
        None
        if util.find_spec("libtpu")
        else "compiling for TPUs needs libtpu: pip install 'jaxnorm[tpu]'"
    )


@cache
def chips(topology: str) -> Sequence[Any]:
    """The devices of a slice, in the order of JAX's device ids.

    Args:
        topology: generation and shape, `v5e:2x4` to `v5e:16x16`, `v5p:4x4x4` to `v5p:16x16x16`.

    Returns:
        The devices: one for each chip, also where a chip has two cores.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
    """
    import libtpu  # pyright: ignore[reportMissingImports]  # may be installed or not

    # libtpu asks the cloud which slice it is on, for minutes where there is none, unless it is
    # told. And it lets only one process at a time have the TPU, which is none here.
    told = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    told |= {
        "TPU_WORKER_ID": "0",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in told.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
