"""What tests of every kind share: arrays to try, and how close two results are."""

import chex
import numpy as np


def data(*shape, seed=0, dtype="f8"):
    """Numbers about 0.5 of standard deviation 2."""
    return np.random.default_rng(seed).normal(0.5, 2, shape).astype(dtype)


def close(got, want, tolerance=1e-11, atol=None):
    """Trees of the same arrays, up to a relative and an absolute tolerance."""
    atol = tolerance if atol is None else atol
    chex.assert_trees_all_close(got, want, rtol=tolerance, atol=atol)
