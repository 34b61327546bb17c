"""The common shape of simulated training curves, and runs that follow it, or a wrong schedule, or cannot be told."""

import dataclasses
import json
import math

import numpy as np
import pytest
from simulated_runs import best_params, sweep, training_curve, training_loss

from bloomjax.errors import BadInput
from bloomjax.frontier_fits import fit_isoflop
from bloomjax.loss_curves import FRACTIONS, Profile, check, fit_profile, smooth, thin
from bloomjax.scaling_fits import Fit, fit_kaplan, fit_parametric
from bloomjax.scaling_laws import BESIROGLU
from bloomjax.scaling_runs import Curve, final_runs


def law_of(curves) -> Fit:
    """Through JSON, as `check` gets it."""
    found = fit_parametric(final_runs(curves), num_starts=1125, num_bootstrap=100)
    details = found.details | {"profile": fit_profile(curves, found.law).record()}
    record = dataclasses.replace(found, details=details).record()
    return Fit.from_record(json.loads(json.dumps(record)))


@pytest.fixture(scope="module")
def laws() -> list[Fit]:
    """Of four sweeps."""
    return [law_of(sweep(seed)) for seed in range(4)]


def larger_run(number: int) -> tuple[float, float, np.random.Generator]:
    """Size and length of a run with up to 5 times the compute of the sweep's largest."""
    rng = np.random.default_rng(1000 + number)
    flops = 8.1e19 * 5 ** rng.uniform(0, 1)
    params = best_params(flops) * np.exp(rng.uniform(-0.7, 0.7))
    return params, flops / 6 / params, rng


@pytest.mark.parametrize(
    "change", [{"mean": None}, {"mean": [1.0]}, {"centre": "x"}, {"slope": {}}]
)
def test_a_damaged_profile_is_one_line(change):
    curves = sweep(0)
    good = fit_profile(curves, BESIROGLU).record()
    assert Profile.from_record(good).record() == good
    with pytest.raises(BadInput, match="the profile of the law is damaged"):
        Profile.from_record(good | change)


# ---- smoothing ----


def test_smoothing_keeps_a_line_and_quiets_noise():
    line = np.linspace(4, 2, 1000)
    assert np.allclose(smooth(line)[30:-30], line[30:-30], atol=1e-12)
    noise = np.random.default_rng(0).standard_normal(20_000)
    assert math.isclose(smooth(noise)[100:-100].std(), (2 * math.sqrt(math.pi) * 10) ** -0.5, rel_tol=0.1)  # fmt: skip
    # The last value, which fits rest on, is no noisier than sqrt(2) of that.
    ends = [smooth(np.random.default_rng(n).standard_normal(600))[-1] for n in range(400)]
    assert np.std(ends) < 1.6 * (2 * math.sqrt(math.pi) * 10) ** -0.5
    assert smooth(np.array([3.0]))[0] == 3.0


def test_thinning_keeps_the_ends():
    curve = Curve("x", 1e8, np.arange(1.0, 1001), np.arange(1001.0, 1, -1))
    thinned = thin(curve, 50)
    assert len(thinned.tokens) == 50
    assert (thinned.tokens[0], thinned.tokens[-1], thinned.loss[-1]) == (1.0, 1000.0, 2.0)
    assert thin(thinned, 50) is thinned


# ---- the common shape ----


def test_the_shape_falls_to_one_and_is_the_same_for_a_larger_run(laws):
    profile = Profile.from_record(laws[0].details["profile"])
    assert profile.fractions.tolist() == list(FRACTIONS) and profile.num_runs == 25
    assert np.all(np.diff(profile.mean) < 0) and abs(profile.mean[-1]) < 0.01
    params, tokens, _ = larger_run(0)
    quiet = training_loss(params, tokens, np.random.default_rng(0), run_noise=0, step_noise=0)
    law = laws[0].law
    end = law.loss(params, tokens)
    measured = np.log((quiet[[499, 749, 999]] - law.E) / (end - law.E))
    mean, spread = profile.at(np.array([0.5, 0.75, 1.0]), math.log(6 * params * tokens))
    assert np.all(np.abs(measured - mean) < 3 * spread), (measured, mean, spread)


def test_a_shape_needs_matched_runs():
    curves = sweep(0, budgets=(1e18,))
    law = fit_parametric(final_runs(sweep(0)), num_starts=1125, num_bootstrap=20).law
    assert fit_profile(curves, law).num_runs == 5
    long = [dataclasses.replace(curve, schedule_tokens=3 * curve.tokens[-1]) for curve in curves]
    with pytest.raises(BadInput, match="at least 4 runs with a matched cosine, got 3"):
        fit_profile([*curves[:3], *long], law)


# ---- check ----

WRONG = {
    "a cosine four times too long": dict(stretch=4.0),
    "a cosine that ends after 40 % of the run": dict(stretch=0.4),
    "a fifth of the learning rate": dict(peak=0.2),
}


@pytest.mark.parametrize("what", WRONG)
def test_slow_runs_are_flagged_and_good_ones_are_not(laws, what):
    """20 of 20 each, at the end of the run; nothing but the loss tells."""
    good, slow = [], []
    for number in range(20):
        params, tokens, rng = larger_run(number)
        law = laws[number % 4]
        good.append(check(training_curve(params, tokens, rng), tokens, law))
        slow.append(check(training_curve(params, tokens, rng, **WRONG[what]), tokens, law))
    assert [verdict.verdict for verdict in good] == ["on its curve"] * 20
    assert [verdict.verdict for verdict in slow] == ["slow"] * 20
    for verdict in good:
        low, high = verdict.interval
        assert low < verdict.loss < high and verdict.fraction == 1
    for verdict in slow:
        assert verdict.loss > verdict.interval[1]
        assert verdict.end_projected > verdict.end_interval[1]


def test_the_early_sign(laws):
    """A third into the run: a low learning rate shows, a cosine too long does not yet, no good run is flagged."""
    verdicts = {"good": [], "low": [], "long": []}
    excess = []
    for number in range(10):
        params, tokens, rng = larger_run(number)
        for name, schedule in (("good", {}), ("low", dict(peak=0.2)), ("long", dict(stretch=4.0))):
            curve = training_curve(params, tokens, rng, done=0.35, **schedule)
            verdict = check(curve, tokens, laws[number % 4])
            verdicts[name].append(verdict.verdict)
            if name == "good":
                excess.append(verdict.loss / verdict.expected - 1)
    assert verdicts["low"] == ["slow"] * 10
    assert "slow" not in verdicts["good"] and "better than predicted" not in verdicts["good"]
    assert "slow" not in verdicts["long"]
    # The shape of a larger run is that of the sweep with its trend in compute; without it, this is above 3 %.
    assert abs(np.mean(excess)) < 0.015


def test_effective_size(laws):
    """A run that was trained as one of a third of its parameters passes for that."""
    params, tokens, rng = larger_run(3)
    curve = dataclasses.replace(training_curve(params / 3, tokens, rng), params=params)
    verdict = check(curve, tokens, laws[0])
    assert verdict.verdict == "slow"
    assert verdict.effective_params == pytest.approx(params / 3, rel=0.2)
    assert params / 3 < verdict.hidden_params < params


def test_the_band_is_there_for_a_picture(laws):
    params, tokens, rng = larger_run(4)
    verdict = check(training_curve(params, tokens, rng), tokens, laws[0])
    fractions, expected, low, high = verdict.band
    assert fractions.tolist() == list(FRACTIONS)
    assert np.all(low < expected) and np.all(expected < high)
    assert (expected[-1], low[-1], high[-1]) == (verdict.end_predicted, *verdict.end_interval)


def test_a_run_too_good_is_said(laws):
    params, tokens, rng = larger_run(5)
    curve = training_curve(params, tokens, rng)
    better = dataclasses.replace(curve, loss=curve.loss * 0.95)
    assert check(better, tokens, laws[0]).verdict == "better than predicted"


def test_kaplans_law_will_do_and_odd_replicates_do_no_harm(laws):
    curves = sweep(0)
    found = fit_kaplan(final_runs(curves), num_bootstrap=50)
    details = found.details | {"profile": fit_profile(curves, found.law).record()}
    params, tokens, rng = larger_run(5)
    curve = training_curve(params, tokens, rng)
    low = training_curve(params, tokens, rng, peak=0.05)
    kaplan = dataclasses.replace(found, details=details)
    assert check(curve, tokens, kaplan).verdict in ("on its curve", "cannot tell")
    assert check(low, tokens, kaplan).verdict == "slow"
    samples = laws[0].samples.copy()
    samples[:3] = [3.0, 1e5, 1e5, -40.0, -40.0]  # overflows
    odd = dataclasses.replace(laws[0], samples=samples)
    assert check(curve, tokens, odd).verdict == "on its curve"


def test_where_the_loss_cannot_tell(laws):
    law = laws[0]
    params, tokens, rng = larger_run(6)
    start = check(training_curve(params, tokens, rng, done=0.03), tokens, law)
    assert (start.verdict, start.expected) == ("cannot tell", None)
    assert start.reasons == ["3.0% of the run is done; the law says nothing before 5%"]
    early = check(training_curve(params, tokens, rng, done=0.06), tokens, law)
    assert early.verdict == "cannot tell"
    assert "the band is so wide that" in early.reasons[0] and early.hidden_params < params / 4
    far = check(training_curve(50 * params, 50 * tokens, rng), 50 * tokens, law)
    assert far.verdict == "cannot tell" and "times those of the largest run" in far.reasons[0]
    curve = training_curve(params, tokens, rng)
    below = check(dataclasses.replace(curve, loss=curve.loss - 1.5), tokens, law)
    assert below.verdict == "cannot tell" and "below the E =" in below.reasons[0]


def test_what_is_known_of_the_schedule_is_remarked(laws):
    params, tokens, rng = larger_run(7)
    curve = training_curve(params, tokens, rng)
    assert check(curve, tokens, laws[0]).remarks == []
    long = dataclasses.replace(curve, schedule_tokens=4 * tokens)
    assert "its cosine ends after 4 times the run" in check(long, tokens, laws[0]).remarks[0]
    unknown = dataclasses.replace(curve, schedule_tokens=None)
    assert check(unknown, tokens, laws[0]).remarks == ["where its cosine ends is not known"]


def test_without_curves_only_the_end_can_be_compared():
    ends = [dataclasses.replace(c, tokens=c.tokens[-1:], loss=c.loss[-1:]) for c in sweep(0)]
    law = law_of(ends)
    params, tokens, rng = larger_run(8)
    half = check(training_curve(params, tokens, rng, done=0.5), tokens, law)
    assert half.verdict == "cannot tell" and "only the end can be compared" in half.reasons[0]
    assert check(training_curve(params, tokens, rng), tokens, law).verdict == "on its curve"


def test_laws_that_say_no_loss(laws):
    params, tokens, rng = larger_run(9)
    curve = training_curve(params, tokens, rng)
    frontier = fit_isoflop(final_runs(sweep(0)), num_bootstrap=20)
    with pytest.raises(BadInput, match="approach 3 or kaplan; this is approach 2"):
        check(curve, tokens, frontier)
    bare = dataclasses.replace(laws[0], details={})
    with pytest.raises(BadInput, match="fewer than 4 runs with a matched cosine"):
        check(curve, tokens, bare)
