"""The gradient noise scale of gradients whose covariance is known."""

import math

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.noise_scale import NoiseScale, averaged, noise_and_signal, verdict

DIM, B, NUM_PARTS = 200, 64, 8
STD = np.linspace(0.1, 2, DIM)  # of each coordinate of one sample's gradient
G = np.full(DIM, 0.15)
TRUE_NOISE, TRUE_SIGNAL = float(np.sum(STD**2)), float(np.sum(G**2))


def norms(rng):
    """Mean squared norm of the mean gradients of the parts, and that of the whole batch."""
    parts = G + rng.standard_normal((NUM_PARTS, DIM)) * STD / math.sqrt(B / NUM_PARTS)
    return np.mean(np.sum(parts**2, 1)), np.sum(parts.mean(0) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_a_known_covariance_comes_out_within_a_tenth(seed):
    rng, scale = np.random.default_rng(seed), NoiseScale(decay=0.998)
    for _ in range(2000):
        scale.add(*noise_and_signal(*norms(rng), B / NUM_PARTS, B))
    assert scale.samples == pytest.approx(TRUE_NOISE / TRUE_SIGNAL, rel=0.1)
    assert scale.noise / scale.weight == pytest.approx(TRUE_NOISE, rel=0.05)


def test_both_terms_are_without_bias():
    """Averages of ratios would not be: of single steps some signals are negative."""
    rng = np.random.default_rng(0)
    terms = np.array([noise_and_signal(*norms(rng), B / NUM_PARTS, B) for _ in range(4000)])
    error = terms.std(0) / math.sqrt(len(terms))
    assert np.all(np.abs(terms.mean(0) - (TRUE_NOISE, TRUE_SIGNAL)) < 4 * error)


def test_averages_begin_unbiased_and_pass_over_nan():
    scale = NoiseScale(decay=0.9)
    assert scale.samples is None
    scale.add(6.0, 2.0)
    assert scale.samples == pytest.approx(3.0)
    scale.add(math.nan, 1.0)
    scale.add(6.0, math.inf)
    assert scale.samples == pytest.approx(3.0)
    scale.add(6.0, -1000.0)
    assert scale.samples is None  # no signal to be seen yet


def test_from_records():
    records = [
        {"step": 1, "loss": 3.0}, {"step": 2, "gradient_noise": 8.0, "gradient_signal": 2.0},
        {"step": 3, "gradient_noise": 8.0, "gradient_signal": 2.0}, {"step": 4, "gradient_noise": None},
    ]  # fmt: skip
    assert averaged(records) == [(2, pytest.approx(4.0)), (3, pytest.approx(4.0))]


def test_verdicts():
    assert verdict(100.0, 1000.0) == "wasteful: 1.10 x the fewest steps, 11.00 x the fewest samples"
    assert verdict(1000.0, 100.0).startswith("small: 11.00 x the fewest steps")
    assert verdict(100.0, 100.0).startswith("about right: 2.00 x the fewest steps, 2.00 x")


def test_bad_input():
    with pytest.raises(BadInput, match="needs two batch sizes, got 8 and 8 samples"):
        noise_and_signal(1.0, 1.0, 8, 8)
    with pytest.raises(BadInput, match=r"must lie in \[0, 1\), got 1.0"):
        NoiseScale(decay=1.0)
