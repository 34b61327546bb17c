"""Laws by language: planted shares, transfer rates and mixtures come back; the best shares against a search."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import optimize
from simulated_runs import chinchilla_range

from bloomjax.errors import BadInput
from bloomjax.language_laws import (
    advise,
    best_shares,
    fit_languages,
    fit_share,
    fit_transfer,
    transfers,
)
from bloomjax.scaling_fits import Fit, fit_parametric
from bloomjax.scaling_laws import ParametricLaw, ShareLaw
from bloomjax.scaling_runs import Curve, Runs

PLANTED = {
    "en": ShareLaw(ParametricLaw(1.5, 300, 1500, 0.33, 0.35), 0.06),
    "sw": ShareLaw(ParametricLaw(1.8, 350, 1200, 0.33, 0.33), 0.15),
    "ml": ShareLaw(ParametricLaw(1.2, 250, 1800, 0.32, 0.36), 0.10),
}
PARAMS, TOKENS = 1e9, 2e10


def mixed_runs(num=40, noise=0.004, shares=None) -> list[Curve]:
    """Runs on mixtures of all languages, held-out loss of each."""
    rng = np.random.default_rng(0)
    curves = []
    for number in range(num):
        params = np.exp(rng.uniform(np.log(5e7), np.log(2e9)))
        tokens = np.exp(rng.uniform(np.log(1e9), np.log(6e10)))
        drawn = np.maximum(rng.dirichlet([1, 1, 1]), 0.01) if shares is None else np.array(shares)
        for (language, law), share in zip(PLANTED.items(), drawn / drawn.sum(), strict=True):
            loss = law.loss(params, tokens, share) * np.exp(noise * rng.standard_normal())
            curves.append(
                Curve(
                    f"run {number}", params, np.array([tokens]), np.array([loss]),
                    language=language, share=float(share),
                )
            )  # fmt: skip
    return curves


@pytest.fixture(scope="module")
def fits() -> dict[str, Fit]:
    return fit_languages(mixed_runs(), num_bootstrap=100)


def test_what_a_share_is_worth_is_recovered(fits):
    for language, law in PLANTED.items():
        found = fits[language]
        assert found.approach == "share"
        low, high = found.interval["gamma"]
        assert low < law.gamma < high and high - low < 0.01
        assert math.isclose(
            found.law.loss(PARAMS, TOKENS, 0.2), law.loss(PARAMS, TOKENS, 0.2), rel_tol=0.01
        )


def test_the_advised_mixture_is_the_planted_one(fits):
    advice = advise(fits, PARAMS, TOKENS)
    expected = best_shares(PLANTED, PARAMS, TOKENS)
    assert math.isclose(sum(item.share for item in advice.values()), 1)
    for language, item in advice.items():
        low, high = item.interval
        assert low < expected[language] < high and high - low < 0.05
        law = PLANTED[language]
        assert math.isclose(
            item.transferred_tokens,
            law.transferred_tokens(PARAMS, TOKENS, item.share),
            abs_tol=0.1 * TOKENS,
        )
        assert not item.is_capped


def search(objective) -> np.ndarray:
    """Shares with the lowest `objective`, by scipy over a softmax."""

    def value(x):
        powers = np.exp(x - x.max())
        return objective(powers / powers.sum())

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 5000}
    found = optimize.minimize(value, np.zeros(3), method="Nelder-Mead", options=options)
    powers = np.exp(found.x - found.x.max())
    return powers / powers.sum()


@pytest.mark.parametrize("weights", [None, {"en": 1.0, "sw": 2.0, "ml": 0.5}])
def test_the_best_shares_are_those_of_a_search(weights):
    laws = list(PLANTED.values())
    alone = np.array([law.loss(PARAMS, TOKENS, 1.0) for law in laws])
    worth = 1 / alone if weights is None else np.array(list(weights.values()))

    def objective(shares):
        losses = [law.loss(PARAMS, TOKENS, s) for law, s in zip(laws, shares, strict=True)]
        return worth @ np.array(losses)

    expected = search(objective)
    found = best_shares(PLANTED, PARAMS, TOKENS, weights=weights)
    assert list(found) == list(PLANTED)
    assert np.allclose(list(found.values()), expected, atol=1e-5)


def test_little_text_caps_a_share_and_the_rest_moves_up():
    free = best_shares(PLANTED, PARAMS, TOKENS)
    capped = best_shares(PLANTED, PARAMS, TOKENS, unique_tokens={"sw": 5e8})
    assert capped["sw"] == pytest.approx(4 * 5e8 / TOKENS)
    assert sum(capped.values()) == pytest.approx(1)
    assert capped["en"] > free["en"] and capped["ml"] > free["ml"]
    # The uncapped ones are balanced: equal gain of the objective for a bit more of each.
    gains = [
        PLANTED[name].gamma * capped[name] ** (-PLANTED[name].gamma - 1) for name in ("en", "ml")
    ]
    assert math.isclose(gains[0], gains[1], rel_tol=1e-6)


def test_a_cap_is_said(fits):
    advice = advise(fits, PARAMS, TOKENS, unique_tokens={"sw": 5e8}, max_epochs=2)
    assert advice["sw"].is_capped and not advice["en"].is_capped
    assert advice["sw"].share == pytest.approx(2 * 5e8 / TOKENS)


def test_too_little_text_in_all():
    with pytest.raises(BadInput, match="all text together is 6% of 2e.10 tokens at 4 epochs"):
        best_shares(PLANTED, PARAMS, TOKENS, unique_tokens=dict.fromkeys(PLANTED, 1e8))


def test_one_share_in_all_runs_tells_nothing_about_shares():
    found = fit_languages(mixed_runs(shares=(0.5, 0.3, 0.2)), num_bootstrap=30)
    assert all(each.approach == "3" for each in found.values())
    assert any("cannot be told (train some runs with another mixture)" in w for w in found["sw"].warnings)  # fmt: skip
    with pytest.raises(BadInput, match="no language has runs at different shares"):
        advise(found, PARAMS, TOKENS)


def test_a_language_that_gains_nothing():
    flat = PLANTED | {"xx": ShareLaw(PLANTED["en"].base, 0.0)}
    with pytest.raises(BadInput, match="gamma of xx is not above 0"):
        best_shares(flat, PARAMS, TOKENS)
    rng = np.random.default_rng(0)
    runs = chinchilla_range(0, num=40)
    found = fit_share(runs, rng.uniform(0.05, 0.9, 40), num_bootstrap=50)
    assert abs(found.values["gamma"]) < 0.01
    assert any("a larger share may bring nothing" in warning for warning in found.warnings)


# ---- transfer ----


def test_transfer_rates_are_recovered():
    """Each token of `a` is worth 0.3 of the target, each of `b` disturbs by 0.05."""
    law = ParametricLaw(1.5, 300, 1500, 0.33, 0.35)
    rng = np.random.default_rng(0)
    alone = chinchilla_range(0, noise=0.002, law=law)
    mono = fit_parametric(alone, num_starts=1125, num_bootstrap=50)
    num = 60
    params = np.exp(rng.uniform(np.log(1e8), np.log(5e9), num))
    own, a, b = (np.exp(rng.uniform(np.log(1e9), np.log(2e10), num)) for _ in range(3))
    loss = law.loss(params, own + 0.3 * a - 0.05 * np.minimum(b, own))
    b = np.minimum(b, own)
    loss = loss * np.exp(0.0005 * rng.standard_normal(num))
    found = fit_transfer(mono, params, own, {"a": a, "b": b}, loss)
    assert found.rates["a"] == pytest.approx(0.3, abs=0.08)
    assert found.rates["b"] == pytest.approx(-0.05, abs=0.08)
    assert found.interval["a"][0] < 0.3 < found.interval["a"][1]
    assert found.interval["b"][0] < -0.05 < found.interval["b"][1]
    assert len(found.effective_tokens) == num and not found.warnings


def test_transfer_rates_of_a_table():
    """A language with runs by itself gets the rates of its other runs; one without gets none."""
    law, rng = ParametricLaw(1.5, 300, 1500, 0.33, 0.35), np.random.default_rng(0)
    curves = []
    for number in range(60):
        share = 1.0 if number % 2 else float(rng.uniform(0.2, 0.8))
        params, tokens = np.exp(rng.uniform(np.log(1e8), np.log(5e9))), np.exp(rng.uniform(22, 25))
        worth = tokens * (share + 0.3 * (1 - share))
        for name, part in (("sw", share), ("en", 1 - share)):
            if part:
                loss = np.array([law.loss(params, worth)])
                curve = Curve(
                    str(number), params, np.array([tokens]), loss, language=name, share=part
                )
                curves.append(curve)
    found = transfers(curves)
    assert set(found) == {"sw"}
    assert found["sw"].rates["en"] == pytest.approx(0.3, abs=0.02)


def test_runs_no_monolingual_one_could_match_are_left_out():
    law = ParametricLaw(1.5, 300, 1500, 0.33, 0.35)
    mono = fit_parametric(chinchilla_range(0, num=60, law=law), num_starts=1125, num_bootstrap=20)
    params, own = np.full(4, 1e9), np.array([1e9, 2e9, 4e9, 8e9])
    other = np.array([1e9, 3e9, 2e9, 5e9])
    loss = np.array([law.loss(1e9, own[0]), law.loss(1e9, own[1]), 1.4, law.loss(1e9, own[3])])
    found = fit_transfer(mono, params, own, {"x": other}, loss, num_bootstrap=20)
    assert any(w.startswith("1 of 4 runs are better than the language alone") for w in found.warnings)  # fmt: skip
    assert len(found.effective_tokens) == 3
    with pytest.raises(BadInput, match="transfer from 3 languages needs more than 3 usable runs, got 3"):  # fmt: skip
        fit_transfer(mono, params, own, {"x": other, "y": own, "z": other}, loss)


# ---- bad input ----


def test_a_table_without_languages_or_shares():
    curves = mixed_runs(num=8)
    with pytest.raises(BadInput, match="run 0 has no language; the table needs the columns"):
        fit_languages([dataclasses.replace(curve, language=None) for curve in curves])
    with pytest.raises(BadInput, match="language en: run 0 has no share"):
        fit_languages([dataclasses.replace(curve, share=None) for curve in curves])


def test_too_few_runs_of_a_language():
    with pytest.raises(BadInput, match="language en: a law with shares needs at least 7 runs, got 6"):  # fmt: skip
        fit_languages(mixed_runs(num=6))
    runs = Runs.of([1e8] * 8, np.geomspace(1e9, 1e10, 8), np.linspace(4, 3, 8))
    with pytest.raises(BadInput, match="all 8 runs have params = 1e.08; several are needed"):
        fit_share(runs, np.linspace(0.1, 0.9, 8))
