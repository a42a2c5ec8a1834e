"""Settings of all tests: several devices, and no silent conversion of dtypes or ranks."""

import collections
import os
import zlib

import chex

# Most of the time of these tests is compilation, and most of that LLVM's: what XLA decides stays as
# it is.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
chex.set_n_cpu_devices(8)  # before any JAX operation: afterwards the number of devices is fixed

import jax  # noqa: E402

# also where a GPU plugin is installed, which test_traffic compiles with
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402

PROGRAMS = {
    "test_batch_size.py",
    "test_claims.py",
    "test_collectives.py",
    "test_datasets.py",
    "test_drawing.py",
    "test_failure.py",
    "test_files.py",
    "test_fluctuations.py",
    "test_measures.py",
    "test_noisy_labels.py",
    "test_notebooks.py",
    "test_speed.py",
    "test_tasks.py",
    "test_train_imagenet.py",
    "test_training_epoch.py",
}
"""The tests that need more than the extra test-core installs."""


SAMPLED = {
    f"test_{name}.py"
    for name in (
        "affine", "checkpoints", "convert_peers", "cross_iteration", "denormalize", "devices",
        "equations", "every_layer", "every_method", "explicit_meshes", "flax_differences",
        "flax_parity", "folding", "group_plus", "identities", "inference", "laws", "layers",
        "linen", "loops", "memory", "methods", "moments", "moving_average", "nnx", "normalize",
        "passes", "probe", "probe_hooks", "rounding", "running", "switchable", "together",
        "transforms", "values", "weights",
    )
}  # fmt: skip
"""Tests of many cases, each of which compiles: of the cases of a test the default run takes one in
`PARTS`, the slow run half as many, and the run of the rest the others."""

PARTS = 9


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    cases = collections.Counter(item.nodeid.split("[")[0] for item in items)
    for item in items:
        many = cases[item.nodeid.split("[")[0]] >= 3 and item.path.name in SAMPLED
        # By a hash of its name, so that no parameter has one value in all of a part.
        drawn = zlib.crc32(item.nodeid.encode()) if many else 0
        if drawn % PARTS:
            slow = drawn % PARTS == 1 and drawn % 2
            item.add_marker(pytest.mark.slow if slow else pytest.mark.rest)


def pytest_addoption(parser):
    parser.addoption(
        "--without-programs",
        action="store_true",
        help="leave out the tests of benchmarks and notebooks, which need the extra 'test'",
    )


def pytest_ignore_collect(collection_path, config):
    left_out = config.getoption("--without-programs") and collection_path.name in PROGRAMS
    return left_out or None  # None leaves the decision to pytest


@pytest.fixture
def x64():
    """The test runs in double precision."""
    with jax.enable_x64(True):
        yield
