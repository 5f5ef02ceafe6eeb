"""Matching of queries against scipy's; what losses of sets do with empty slots, and on a mesh."""

import itertools

import jax
import numpy as np
import pytest
import scipy.optimize

from vitpyramid.heads import set_prediction
from vitpyramid.train.sharding import batch_sharding, make_mesh

match = jax.jit(set_prediction.match)


def scipy_match(cost, valid):
    """As `match`, of one image."""
    query = np.full(len(valid), len(cost))
    row, column = scipy.optimize.linear_sum_assignment(np.asarray(cost, np.float64)[:, valid])
    query[np.flatnonzero(valid)[column]] = row
    return query


def totals(cost, query):
    """Sum of the costs of an image's matches, and how many there are; no query is taken twice."""
    there = query < len(cost)
    assert len(set(query[there])) == there.sum()
    return cost[query[there], np.flatnonzero(there)].sum(), there.sum()


# Fewer boxes than queries, as many, more.
@pytest.mark.parametrize(("q", "g"), [(12, 5), (9, 9), (5, 9), (40, 30)])
def test_scipy(q, g):
    rng = np.random.default_rng(q)
    n = 300
    # Full, mostly empty, empty: of 30 slots the search is over 30 or 16.
    for integers, share in itertools.product((False, True), (1.0, 0.3, 0.0)):
        cost = rng.normal(size=(n, q, g)) * rng.choice([0.1, 1, 10], (n, 1, 1))
        if integers:
            cost = rng.integers(-3, 4, (n, q, g))
        valid = rng.random((n, g)) < share
        if share < 1:
            valid &= valid.cumsum(axis=1) <= 16
        given = np.where(valid[:, None], cost, rng.choice([0, -1e30, np.nan, np.inf], (n, 1, g)))
        with jax.enable_x64(not integers):
            found = np.asarray(match(given, valid))
        for i in range(n):
            expected = scipy_match(cost[i], valid[i])
            if integers:  # full of ties, which any optimum solves; whole numbers are exact in float32
                assert totals(cost[i], found[i]) == totals(cost[i], expected)
            else:
                assert (found[i] == expected).all()


def test_costs_that_are_no_numbers():
    """The search ends, with a query for every box."""
    cost = np.full((2, 5, 3), np.nan)
    cost[1] = np.inf
    cost[1, 3, 1] = 7.0
    found = np.asarray(match(cost, np.ones((2, 3), bool)))
    assert all(len(set(row)) == 3 and max(row) < 5 for row in found.tolist()) and found[1, 1] == 3


def test_each_device_matches_its_own_images():
    """As on one device, and none waits for another."""
    rng = np.random.default_rng(0)
    cost, valid = rng.normal(size=(3, 8, 12, 5)), rng.random((8, 5)) < 0.7
    mesh = make_mesh(2)
    split = jax.device_put(valid, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = match.lower(cost, split).compile()
    assert "while" in compiled.as_text() and "all-reduce" not in compiled.as_text()
    assert (compiled(cost, split) == match(cost, valid)).all()
