"""Fits recover what was planted; gradients and objective against scipy; warnings where runs cannot support a fit."""

import dataclasses
import json
import math
import os
import time

import numpy as np
import pytest
from scipy import optimize, special
from simulated_runs import LAW, chinchilla_range, horizons, isoflop, sweep, training_curve

from bloomjax import frontier_fits, scaling_fits
from bloomjax.errors import BadInput
from bloomjax.frontier_fits import fit_envelope, fit_isoflop
from bloomjax.minimise import minimise_all
from bloomjax.scaling_fits import (
    Fit,
    KaplanForm,
    SumOfPowers,
    fit_kaplan,
    fit_parametric,
    fit_repetition,
    objective,
    start_grid,
)
from bloomjax.scaling_laws import (
    BESIROGLU,
    CHINCHILLA,
    CHINCHILLA_ROUNDED,
    DataConstrainedLaw,
    KaplanLaw,
    ParametricLaw,
)
from bloomjax.scaling_runs import Runs, final_runs, read_curves

# A table of the 240 runs that Besiroglu et al. read off Figure 4 of Chinchilla; they have no licence, so they are not
# here. Theirs (svg_extracted_data.csv, 245 rows) and one with our column names will do.
POINTS = "BLOOMJAX_CHINCHILLA_POINTS"


def fit(runs, **options) -> Fit:
    return fit_parametric(runs, **({"num_starts": 1125, "num_bootstrap": 100} | options))


# ---- the minimiser ----


def test_all_starts_find_the_minimum_of_a_bent_valley():
    def valley(points, weights):
        x, y = points.T
        scale = weights[:, 0]
        value = scale * ((1 - x) ** 2 + 100 * (y - x * x) ** 2)
        slope = [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)]
        return value, np.stack(slope, 1) * scale[:, None]

    rng = np.random.default_rng(0)
    starts = rng.uniform(-2, 2, (50, 2))
    weights = rng.uniform(0.1, 10, (50, 1))
    points, values = minimise_all(valley, starts, lambda active: weights[active])
    assert np.allclose(points, 1, atol=1e-4)
    assert values.max() < 1e-9
    assert np.all(starts != points)  # the starts are left as they were


@pytest.mark.parametrize("kind", ["powers", "shares", "kaplan"])
def test_gradients(kind):
    runs = chinchilla_range(0, num=20)
    rng = np.random.default_rng(1)
    if kind == "kaplan":
        function, point = KaplanForm(runs), np.array([3.0, 2.0, 0.7, 0.1])
    else:
        shares = rng.uniform(0.01, 1, 20) if kind == "shares" else None
        function = SumOfPowers(runs, shares)
        point = np.array([-1.5, -1.8, 0.6, 0.3, 0.4] + [0.1] * (kind == "shares"))
    weights = rng.uniform(0, 3, (1, 20))
    gradient = function(point[None], weights)[1][0]
    for number in range(len(point)):
        # Huber's corner is at 1e-3: a wider step would straddle it.
        step = np.eye(len(point))[number] * 1e-7
        ends = [function((point + sign * step)[None], weights)[0][0] for sign in (1, -1)]
        assert math.isclose((ends[0] - ends[1]) / 2e-7, gradient[number], rel_tol=1e-4)


def test_the_objective_is_the_published_one():
    """Sum of Huber(1e-3) of LSE(a - alpha log N, b - beta log D, e) - log L, by scipy."""
    runs = chinchilla_range(3)
    terms = [
        np.log(406.4) - 0.34 * np.log(runs.params),
        np.log(410.7) - 0.28 * np.log(runs.tokens),
        np.full(len(runs), np.log(1.69)),
    ]
    expected = special.huber(1e-3, special.logsumexp(terms, axis=0) - np.log(runs.loss)).sum()
    assert math.isclose(objective(CHINCHILLA_ROUNDED, runs), expected, rel_tol=1e-10)
    function = SumOfPowers(runs)
    point = np.log([406.4, 410.7, 1.69]).tolist() + [0.34, 0.28]
    ours = function(function.shift(np.array([point]), -1), np.ones((1, len(runs))))[0][0]
    assert math.isclose(ours * 1e-3, expected, rel_tol=1e-10)


def test_the_published_starts():
    whole, part = start_grid(4500), start_grid(1125)
    assert whole.shape == (4500, 5) and part.shape == (1125, 5)
    rows = set(map(tuple, whole.tolist()))
    assert len(rows) == 4500 and set(map(tuple, part.tolist())) < rows
    assert [sorted(set(column)) for column in whole.T.tolist()] == [
        [0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25], [-1, -0.5, 0, 0.5, 1], [0, 0.5, 1, 1.5, 2], [0, 0.5, 1, 1.5, 2],
    ]  # fmt: skip
    with pytest.raises(BadInput, match="4500 or 1125, got 100"):
        start_grid(100)


# ---- approach 3 ----


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_approach_3_recovers_what_was_planted(seed):
    """240 runs of Chinchilla's range, 0.5 % noise: every constant inside its bootstrap interval."""
    started = time.process_time()
    found = fit_parametric(chinchilla_range(seed), num_starts=1125)
    assert time.process_time() - started < 60
    for name, value in dataclasses.asdict(LAW).items():
        low, high = found.interval[name]
        assert low < value < high, (name, found.values[name], (low, high))
        assert low < found.values[name] < high
    assert 0.004 < found.residual_std < 0.006
    low, high = found.details["params_exponent_interval"]
    assert low < LAW.params_exponent < high and high - low < 0.08
    assert not found.warnings


def test_the_intervals_cover_as_often_as_they_say():
    """20 sets of runs, 5 constants: 95 of 100 expected inside; 85 is four standard deviations off."""
    inside = 0
    for seed in range(100, 120):
        runs = chinchilla_range(seed)
        function = SumOfPowers(runs)
        start = np.array([[*np.log([LAW.A, LAW.B, LAW.E]), LAW.alpha, LAW.beta]])
        whole = np.ones((1, len(runs)))
        best = minimise_all(function, function.shift(start, -1), lambda _, w=whole: w)[0][0]
        replicates = scaling_fits.bootstrap_points(function, best, len(runs), 200, seed)
        samples = scaling_fits.constants_of(function.shift(replicates, 1))
        low, high = scaling_fits.ends(samples, 0.95)
        true = np.array(dataclasses.astuple(LAW))
        inside += int(np.sum((low < true) & (true < high)))
    assert 85 <= inside <= 100


def test_all_4500_starts_find_the_same():
    runs = chinchilla_range(4, num=60)
    few, many = fit(runs), fit(runs, num_starts=4500)
    assert many.details["num_starts"] == 4500
    assert np.allclose(list(few.values.values()), list(many.values.values()), rtol=1e-5)
    assert many.details["objective"] == pytest.approx(few.details["objective"], rel=1e-9)


def test_the_minimum_is_one_for_scipy_too():
    runs = chinchilla_range(5, num=80)
    found = fit(runs)

    def value(point):
        law = ParametricLaw(*np.exp(point[:3]), *point[3:])
        return objective(law, runs) * 1e3

    start = [*np.log([found.values[name] for name in "EAB"]), found.values["alpha"], found.values["beta"]]  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(3):
        near = np.array(start) * (1 + 0.02 * rng.standard_normal(5))
        other = optimize.minimize(value, near, method="Nelder-Mead", options={"maxiter": 4000})
        assert other.fun >= found.details["objective"] * 1e3 * (1 - 1e-6)


def test_a_fit_is_the_same_again_and_survives_json():
    runs = chinchilla_range(6, num=40)
    found = fit(runs, num_bootstrap=30)
    assert fit(runs, num_bootstrap=30).record() == found.record()
    record = json.loads(json.dumps(found.record()))
    assert list(record)[:6] == ["approach", "E", "A", "B", "alpha", "beta"]
    assert set(record["interval"]) == {"E", "A", "B", "alpha", "beta"}
    again = Fit.from_record(record)
    assert again.law == found.law and again.record() == found.record()
    assert len(again.residuals) == 40
    same = dataclasses.replace(found, residual_names=("twin",) * 40)  # names need not differ
    assert Fit.from_record(json.loads(json.dumps(same.record()))).record() == same.record()
    with pytest.raises(BadInput, match="not a law"):
        Fit.from_record({"approach": "3"})


def test_residuals_are_counted_against_the_constants_they_were_fitted_with():
    """Two of a power law of N, whose law of D follows; four of Kaplan's L(N, D)."""
    curves = sweep(0)
    runs = final_runs(curves)
    for found, num_free in (
        (fit_isoflop(isoflop(LAW, 0), num_bootstrap=20), 2),
        (fit_kaplan(runs, num_bootstrap=20), 4),
        (fit(runs, num_bootstrap=20), 5),
    ):
        expected = math.sqrt(np.sum(found.residuals**2) / (len(found.residuals) - num_free))
        assert found.residual_std == pytest.approx(expected, rel=1e-12)


def test_a_damaged_law_is_one_line():
    record = fit(chinchilla_range(0, num=20), num_bootstrap=20).record()
    for change, line in (
        ({"approach": "9"}, "there is no approach '9'"),
        ({"names": ["E", "A"]}, "not a law of `fit --json`"),
        ({"approach": "2"}, "not a law of `fit --json`"),
    ):
        with pytest.raises(BadInput, match=line):
            Fit.from_record(record | change)


def test_interval_of_what_follows_from_a_law():
    found = fit(chinchilla_range(7, num=120))
    low, high = found.interval_of(lambda law: law.optimum(1e22).params)
    assert low < LAW.optimum(1e22).params < high < 2 * low


def test_degenerate_replicates_are_left_out_of_an_interval():
    found = fit(chinchilla_range(7, num=40), num_bootstrap=20)
    samples = found.samples.copy()
    samples[:10, 3] = -0.2
    odd = dataclasses.replace(found, samples=samples)
    low, high = odd.interval_of(lambda law: law.optimum(1e22).params)
    assert low < high < math.inf
    none = dataclasses.replace(found, samples=samples[:10])
    assert math.isnan(none.interval_of(lambda law: law.optimum(1e22).params)[0])


def test_an_outlier_is_named_and_hardly_moves_the_fit():
    runs = chinchilla_range(8, num=80)
    loss = runs.loss.copy()
    loss[17] *= 1.3
    found = fit(Runs.of(runs.params, runs.tokens, loss))
    assert any("run 18 by +2" in warning for warning in found.warnings), found.warnings
    assert abs(found.values["alpha"] - fit(runs).values["alpha"]) < 0.01


# ---- the 240 runs of Chinchilla ----


def test_the_runs_of_chinchilla():
    """Objective values and constants of the replication; set BLOOMJAX_CHINCHILLA_POINTS to a table of the runs."""
    path = os.environ.get(POINTS)
    if not path:
        pytest.skip(f"set {POINTS} to the table of Besiroglu et al. (docs/scaling_laws.md)")
    with open(path, encoding="utf-8") as file:
        header = file.readline()
    theirs = {"Model Size": "params", "Training FLOP": "flops"}
    runs = final_runs(read_curves(path, theirs if "Model Size" in header else None)[0])
    if len(runs) == 245:  # of which they leave the five worst out
        kept = np.argsort(runs.loss)[:240]
        runs = Runs.of(runs.params[kept], runs.tokens[kept], runs.loss[kept])
    assert len(runs) == 240
    assert math.isclose(objective(CHINCHILLA_ROUNDED, runs), 0.004121, abs_tol=5e-7)
    to_four_digits = ParametricLaw(1.6934, 406.4, 410.7, 0.3392, 0.2849)
    assert math.isclose(objective(to_four_digits, runs), 0.0012353, abs_tol=5e-8)
    assert math.isclose(objective(CHINCHILLA, runs), 0.0012312, abs_tol=5e-8)
    assert math.isclose(objective(BESIROGLU, runs), 0.0010228, abs_tol=5e-8)
    started = time.process_time()
    found = fit_parametric(runs, num_starts=1125)
    assert time.process_time() - started < 60
    assert math.isclose(found.details["objective"], 0.00101827, abs_tol=2e-8)
    expected = {"E": 1.81724, "A": 477.84, "B": 2143.86, "alpha": 0.34731, "beta": 0.36718}
    for name, value in expected.items():
        assert math.isclose(found.values[name], value, rel_tol=5e-4), name
    assert found.details["params_exponent"] == pytest.approx(0.5139, abs=2e-4)
    # Their standard errors: .026 of E, .015 of alpha, .021 of beta.
    for name, error in {"E": 0.026, "alpha": 0.015, "beta": 0.021}.items():
        low, high = found.interval[name]
        assert math.isclose((high - low) / (2 * 1.96), error, rel_tol=0.25), name


# ---- approach 2 ----

PLANTED = {
    0.51: LAW,
    0.45: ParametricLaw(1.7, 400, 400, 0.34, 0.28),
    0.67: ParametricLaw(1.7, 400, 2e6, 0.30, 0.60),
}


@pytest.mark.parametrize("exponent", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_approach_2_recovers_planted_exponents(exponent, seed):
    law = PLANTED[exponent]
    assert round(law.params_exponent, 2) == exponent
    found = fit_isoflop(isoflop(law, seed))
    low, high = found.interval["a"]
    assert low < law.params_exponent < high and high - low < 0.03
    assert found.values["a"] + found.values["b"] == pytest.approx(1)
    assert not found.warnings
    for budget in found.details["budgets"]:
        assert math.isclose(budget["params"], law.optimum(budget["flops"]).params, rel_tol=0.12)
        assert budget["params_interval"][0] < budget["params"] < budget["params_interval"][1]
    best = found.law.optimum(1e20)
    assert math.isclose(6 * best.params * best.tokens, 1e20, rel_tol=1e-9)


def test_budgets_that_give_no_minimum_are_left_out_and_named():
    runs = isoflop(LAW, 0, noise=0.0, budgets=np.geomspace(1e19, 1e21, 4))
    cheap = runs.flops < 2e19
    keep = ~cheap | (runs.params < 0.9 * LAW.optimum(1e19).params)  # its minimum is now outside
    lonely = Runs.of(
        np.append(runs.params[keep], 1e9), np.append(runs.tokens[keep], 1e9),
        np.append(runs.loss[keep], 3.0),
    )  # fmt: skip
    found = fit_isoflop(lonely)
    assert len(found.details["budgets"]) == 3
    assert any("lies outside its sizes" in warning for warning in found.warnings)
    assert any("1 of 5 budgets have fewer than 4 sizes" in warning for warning in found.warnings)
    assert any("3 budgets: an exponent needs four" in warning for warning in found.warnings)


def test_a_parabola_upside_down_is_no_minimum():
    law = LAW
    runs = isoflop(law, 0, noise=0.0, budgets=(1e19, 1e20, 1e21))
    loss = np.where(runs.flops < 2e19, 6 - runs.loss, runs.loss)
    found = fit_isoflop(Runs.of(runs.params, runs.tokens, loss))
    assert any("the loss has no minimum in size" in warning for warning in found.warnings)
    with pytest.raises(BadInput, match="needs two budgets or more .* found 0"):
        fit_isoflop(Runs.of(runs.params, runs.tokens, 6 - runs.loss))


def test_no_replicate_with_a_minimum_is_one_line(monkeypatch):
    nowhere = lambda parabola, residuals, rng, num: np.full(num, np.nan)  # noqa: E731
    monkeypatch.setattr(frontier_fits._Parabola, "resample", nowhere)
    with pytest.raises(BadInput, match="none of the 100 bootstrap replicates has a minimum"):
        fit_isoflop(isoflop(LAW, 0), num_bootstrap=100)


def test_budgets_close_together_say_little():
    runs = isoflop(LAW, 0, budgets=np.geomspace(1e20, 4e20, 4))
    assert any("span a factor 4 only" in warning for warning in fit_isoflop(runs).warnings)


# ---- approach 1 ----


@pytest.mark.parametrize("exponent", PLANTED)
def test_approach_1_recovers_planted_exponents(exponent):
    law = PLANTED[exponent]
    found = fit_envelope(horizons(law, seed=0), num_bootstrap=100)
    assert abs(found.values["a"] - law.params_exponent) < 0.05
    low, high = found.interval["a"]
    assert low < law.params_exponent < high
    assert found.details["num_best_sizes"] == 7  # the smallest and the largest are never counted
    assert not found.warnings


def test_a_size_that_differs_in_its_last_digits_is_one_size():
    """As where N comes from rounded flops / 6D."""
    curves = horizons(LAW, 0)
    rng = np.random.default_rng(0)
    factors = 1 + 1e-5 * rng.standard_normal(len(curves))
    rounded = [
        dataclasses.replace(curve, params=curve.params * factor)
        for curve, factor in zip(curves, factors, strict=True)
    ]
    clean, found = (fit_envelope(each, num_bootstrap=50) for each in (curves, rounded))
    assert found.values["a"] == pytest.approx(clean.values["a"], abs=1e-3)
    assert found.details["num_best_sizes"] == clean.details["num_best_sizes"] == 7
    assert found.warnings == clean.warnings == ()


def test_the_envelope_needs_curves_and_sizes():
    curves = horizons(LAW, 0)
    ends = [dataclasses.replace(c, tokens=c.tokens[-1:], loss=c.loss[-1:]) for c in curves]
    with pytest.raises(BadInput, match="needs training curves: a column run"):
        fit_envelope(ends)
    with pytest.raises(BadInput, match="at least 3 sizes, these curves have 2"):
        fit_envelope(curves[:8])
    few = fit_envelope(horizons(LAW, 0, sizes=5), num_bootstrap=50)
    assert any("only 3 sizes are the best anywhere" in warning for warning in few.warnings)
    with pytest.raises(BadInput, match="at no budget is the best size between others for two"):
        fit_envelope(horizons(LAW, 0, sizes=4))


def test_curves_of_one_horizon_a_size_are_warned_of():
    found = fit_envelope(sweep(0), num_bootstrap=20)
    assert warned(found, "most sizes have fewer than 3 lengths of run")


def test_three_approaches_agree_on_one_sweep():
    """On curves that answer to their schedule; approach 3 gives .507 (.35 / .69)."""
    curves = sweep(0)
    runs = final_runs(curves)
    third = fit_parametric(runs, num_starts=1125, num_bootstrap=50)
    second = fit_isoflop(runs, num_bootstrap=50)
    assert abs(third.details["params_exponent"] - 0.507) < 0.04
    assert abs(second.values["a"] - 0.507) < 0.04
    rng = np.random.default_rng(1)
    curves = [
        training_curve(params, 20 * params * factor, rng)
        for params in np.geomspace(3e7, 3e9, 9)
        for factor in (0.5, 1, 2, 4)
    ]
    first = fit_envelope(curves, num_bootstrap=50)
    assert abs(first.values["a"] - 0.507) < 0.08


# ---- Kaplan ----


def test_kaplans_law_is_recovered():
    """Each constant in its interval; the form fits runs of its own kind to the noise."""
    law = KaplanLaw(alpha_N=0.076, N_c=6.4e13, alpha_D=0.103, D_c=1.8e13)
    found = fit_kaplan(chinchilla_range(0, law=law), num_bootstrap=100)
    for name, value in dataclasses.asdict(law).items():
        low, high = found.interval[name]
        assert low < value < high, name
    assert found.details["params_exponent"] == pytest.approx(0.103 / 0.179, abs=0.02)
    assert not found.warnings and found.residual_std < 0.006


def test_kaplans_compute_law():
    """Runs of the best size only lie on (C_c / C)^alpha_C."""
    flops = np.geomspace(1e18, 1e22, 12)
    alpha, scale = 0.05, 3.1e8
    loss = (scale * 8.64e19 / flops) ** alpha
    params = 0.3 * flops**0.5
    worse = Runs.of(
        np.append(params, params * 3), np.append(flops / 6 / params, flops / 6 / params / 3),
        np.append(loss, loss * 1.1),
    )  # fmt: skip
    found = fit_kaplan(worse, num_bootstrap=20)
    assert found.values["alpha_C"] == pytest.approx(alpha, rel=1e-6)
    assert found.values["C_c"] == pytest.approx(scale, rel=1e-4)


def test_a_form_that_does_not_fit_is_said():
    found = fit_kaplan(chinchilla_range(0), num_bootstrap=20)
    assert any("the law misses the runs by" in warning for warning in found.warnings)
    assert any("the residuals are no noise" in warning for warning in found.warnings)


# ---- repeated data ----


def repeated_runs(decay, seed=0, noise=0.002):
    rng = np.random.default_rng(seed)
    law = DataConstrainedLaw(CHINCHILLA, *decay)
    params = np.exp(rng.uniform(np.log(1e8), np.log(6e9), 60))
    unique = np.exp(rng.uniform(np.log(2e8), np.log(4e9), 60))
    tokens = unique * np.exp(rng.uniform(0, np.log(60), 60))
    loss = law.loss(params, tokens, unique) * np.exp(noise * rng.standard_normal(60))
    return Runs(params, tokens, loss, unique)


def test_what_repetition_is_worth_is_recovered():
    found = fit_repetition(repeated_runs((15.0, 5.0)), CHINCHILLA, num_bootstrap=20)
    assert found.values["tokens_decay"] == pytest.approx(15, rel=0.1)
    assert found.values["params_decay"] == pytest.approx(5, rel=0.25)
    low, high = found.interval["tokens_decay"]
    assert low < 15 < high
    assert found.law == DataConstrainedLaw(CHINCHILLA, **found.values)
    assert Fit.from_record(json.loads(json.dumps(found.record()))).law == found.law


def test_repetition_needs_repetition():
    with pytest.raises(BadInput, match="three runs or more whose tokens exceed unique_tokens; found 0"):  # fmt: skip
        fit_repetition(chinchilla_range(0, num=10), CHINCHILLA)


# ---- what the runs cannot support ----


def subset(runs: Runs, keep) -> Runs:
    return Runs.of(runs.params[keep], runs.tokens[keep], runs.loss[keep])


def warned(found: Fit, text: str) -> bool:
    return any(text in warning for warning in found.warnings)


def test_a_small_range_is_warned_of():
    runs = chinchilla_range(0, num=120)
    narrow = subset(runs, (runs.params > 5e8) & (runs.params < 2e9))
    found = fit(narrow)
    assert warned(found, "params spans a factor") and not warned(found, "tokens spans a factor")
    assert warned(found, "below 10 its exponent and E cannot be told apart")
    short = subset(runs, (runs.tokens > 5e9) & (runs.tokens < 3e10))
    assert warned(fit(short), "tokens spans a factor")


def test_sizes_and_lengths_that_move_together_are_warned_of():
    params = np.geomspace(1e8, 1e10, 30)
    loss = LAW.loss(params, 20 * params) * np.exp(0.003 * np.random.default_rng(0).standard_normal(30))  # fmt: skip
    found = fit(Runs.of(params, 20 * params, loss))
    assert warned(found, "params and tokens move together (correlation 1.00)")


def test_a_cosine_that_does_not_end_with_the_run_is_warned_of():
    curves = [dataclasses.replace(c, schedule_tokens=c.tokens[-1]) for c in sweep(0)]
    assert not warned(fit(final_runs(curves)), "cosine")
    twice = 2 * curves[3].tokens[-1]
    curves[3] = dataclasses.replace(curves[3], schedule_tokens=twice, name="odd")
    found = fit(final_runs(curves))
    assert warned(found, "1 of 25 runs have a cosine that does not end within 25 % of the run")
    assert warned(found, "(such as odd)")


def test_text_seen_too_often_is_warned_of():
    runs = chinchilla_range(0, num=30)
    seen = dataclasses.replace(runs, unique_tokens=runs.tokens / np.where(np.arange(30) < 2, 5, 3))
    assert warned(fit(seen), "2 of 30 runs saw their text more than 4 times")


def test_degenerate_exponents_are_warned_of():
    runs = chinchilla_range(0, num=60)
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(60))
    flat = 2.0 + 400 * runs.params**-0.34  # tokens do not matter
    found = fit(Runs.of(runs.params, runs.tokens, flat * noise))
    assert warned(found, "beta"), found.warnings
    endless = 30 * runs.params**-0.05 + 40 * runs.tokens**-0.06  # no E in sight
    found = fit(Runs.of(runs.params, runs.tokens, endless * noise))
    assert warned(found, "do not extrapolate the loss"), found.warnings


def test_few_runs_are_warned_of_and_too_few_refused():
    runs = chinchilla_range(0)
    assert warned(fit(subset(runs, slice(0, 12))), "12 runs for 5 constants")
    with pytest.raises(BadInput, match="approach 3 needs at least 6 runs, got 5"):
        fit(subset(runs, slice(0, 5)))
    with pytest.raises(BadInput, match="approach kaplan needs at least 6 runs, got 3"):
        fit_kaplan(subset(runs, slice(0, 3)))
    with pytest.raises(BadInput, match="approach 2 needs at least 8 runs, got 2"):
        fit_isoflop(subset(runs, slice(0, 2)))


@pytest.mark.parametrize("name", ["params", "tokens"])
@pytest.mark.parametrize("fitter", [fit, fit_kaplan])
def test_identical_sizes_or_lengths_are_refused(name, fitter):
    runs = chinchilla_range(0, num=10)
    same = dataclasses.replace(runs, **{name: np.full(10, 2e9)})
    with pytest.raises(BadInput, match=rf"all 10 runs have {name} = 2e\+09; .* needs several {name}"):  # fmt: skip
        fitter(same)
