"""Temperature and UniMax against values worked out by hand, and what they refuse."""

import math
from fractions import Fraction

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.mixture_weights import (
    TemperatureWeights,
    UniMaxWeights,
    check_weights,
    covering,
    find_table,
    normalised,
    temperature_weights,
    unimax_weights,
)
from bloomjax.tasks import ablations, roots
from bloomjax.tasks.languages import ROOTS_TOKENS, ROOTS_WEIGHTS

SIZES = {"a": 16, "b": 1, "c": 81}


def close(got, expected, rel=1e-14):
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert math.isclose(got[name], float(value), rel_tol=rel), (name, got[name], value)


def test_temperature_by_hand():
    # Fourth roots: 2, 1, 3. Square roots: 4, 1, 9.
    close(temperature_weights(SIZES, 4), {"a": 2 / 6, "b": 1 / 6, "c": 3 / 6})
    close(TemperatureWeights(alpha=0.25)(SIZES), {"a": 2 / 6, "b": 1 / 6, "c": 3 / 6})
    close(TemperatureWeights(temperature=2)(SIZES), {"a": 4 / 14, "b": 1 / 14, "c": 9 / 14})
    close(TemperatureWeights(alpha=1)(SIZES), {"a": 16 / 98, "b": 1 / 98, "c": 81 / 98})
    close(TemperatureWeights(alpha=2)({"x": 3, "y": 1}), {"x": 0.9, "y": 0.1})
    far = temperature_weights(SIZES, 1e9)
    close(far, dict.fromkeys(SIZES, 1 / 3), rel=1e-8)


def test_unimax_by_hand():
    # 120 tokens over three: b has room for 4 x 1; 116 over two: a for 4 x 16 > 58.
    expected = {"a": Fraction(58, 120), "b": Fraction(4, 120), "c": Fraction(58, 120)}
    close(unimax_weights(SIZES, max_epochs=4, budget_tokens=120), expected)
    # 4, then 64, and the rest for c.
    expected = {"a": Fraction(64, 300), "b": Fraction(4, 300), "c": Fraction(232, 300)}
    close(unimax_weights(SIZES, max_epochs=4, budget_tokens=300), expected)
    # A short run: all alike. A run of all epochs: shares of the text.
    close(unimax_weights(SIZES, 4, 12), dict.fromkeys(SIZES, Fraction(1, 3)))
    close(unimax_weights(SIZES, 4, 4 * 98), {name: n / 98 for name, n in SIZES.items()})
    # Half epochs; equal sizes.
    sizes = {"p": 10, "q": 2, "r": 10}
    expected = {"p": Fraction(5, 11), "q": Fraction(1, 11), "r": Fraction(5, 11)}
    close(unimax_weights(sizes, 0.5, 11), expected)


def test_unimax_is_the_most_even_under_the_cap():
    """Against the level at which water stands: the share is min(level, cap), found by bisection."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = {f"l{i}": float(n) for i, n in enumerate(np.exp(rng.normal(0, 3, 47)))}
        epochs = float(rng.uniform(0.5, 8))
        budget = float(rng.uniform(0.01, 1)) * epochs * sum(sizes.values())
        caps = np.array([epochs * n for n in sizes.values()])
        low, high = 0.0, float(caps.max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(caps, middle).sum() < budget else (low, middle)
        got = unimax_weights(sizes, epochs, budget)
        np.testing.assert_allclose(list(got.values()), np.minimum(caps, high) / budget, rtol=1e-9)
        assert math.isclose(sum(got.values()), 1, rel_tol=1e-12)
        assert all(got[n] * budget <= epochs * sizes[n] * (1 + 1e-12) for n in sizes)


def test_order_of_the_languages_does_not_matter():
    for function in (TemperatureWeights(alpha=0.3), UniMaxWeights(max_epochs=4, budget_tokens=200)):
        turned = dict(reversed(SIZES.items()))
        assert function(turned) == function(SIZES)
        assert list(function(turned)) == list(turned)


def test_roots():
    total = sum(n**0.3 for n in ROOTS_TOKENS.values())
    close(roots.ROOTS_TEMPERATURE_WEIGHTS, {k: n**0.3 / total for k, n in ROOTS_TOKENS.items()})
    unimax = roots.ROOTS_UNIMAX_WEIGHTS
    epochs = {name: w * 366e9 / ROOTS_TOKENS[name] for name, w in unimax.items()}
    assert math.isclose(sum(unimax.values()), 1, rel_tol=1e-12)
    assert all(value < 4 + 1e-9 for value in epochs.values())
    assert math.isclose(epochs["tum"], 4) and math.isclose(epochs["as"], 4)
    # Those that are not at the cap are alike.
    level = {round(w, 12) for name, w in unimax.items() if epochs[name] < 4 - 1e-9}
    assert len(level) == 1 and max(level) == round(max(unimax.values()), 12)
    for table in (roots.ROOTS_TEMPERATURE_WEIGHTS, unimax):
        assert list(table) == list(ROOTS_WEIGHTS)
        assert table["tum"] > 3 * ROOTS_WEIGHTS["tum"] and table["en"] < ROOTS_WEIGHTS["en"]


def test_sizes_of_a_table():
    name = "bloomjax.tasks.languages:ROOTS_TOKENS"
    store = {"en": 5, "tum": 5}
    got = TemperatureWeights(alpha=0.5, num_tokens=name)(store)
    ratio = math.sqrt(ROOTS_TOKENS["en"] / ROOTS_TOKENS["tum"])
    close(got, {"en": ratio / (1 + ratio), "tum": 1 / (1 + ratio)})
    got = UniMaxWeights(max_epochs=1, budget_tokens=10, num_tokens={"en": 8, "tum": 2, "x": 1})
    close(got(store), {"en": 0.8, "tum": 0.2})
    with pytest.raises(BadInput, match="ROOTS_TOKENS gives no weight to: de, xx$"):
        TemperatureWeights(alpha=0.5, num_tokens=name)({"en": 1, "de": 2, "xx": 3})


def test_the_pile():
    weights = ablations.PILE_WEIGHTS
    assert len(weights) == 22 and math.isclose(sum(weights.values()), 1, abs_tol=1e-9)
    # A weight is the share of the size after repetition (1254.20 GiB); the table rounds to 0.01 %.
    total = sum(c.num_gib * c.num_epochs for c in ablations.PILE)
    assert math.isclose(total, 1254.20, abs_tol=0.1)
    assert math.isclose(sum(c.num_gib for c in ablations.PILE), 825.18, abs_tol=0.1)
    for component in ablations.PILE:
        share = component.num_gib * component.num_epochs / total
        assert math.isclose(share, component.weight, abs_tol=6e-5), component.name


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, "1", None, True])
def test_weights_must_be_positive(bad):
    for function in (check_weights, normalised, lambda w: temperature_weights(w, 2)):
        with pytest.raises(BadInput, match=f"must be a positive number: 'x' has {bad!r}$"):
            function({"y": 1.0, "x": bad})
    with pytest.raises(BadInput, match="number of tokens must be a positive number: 'x'"):
        unimax_weights({"y": 1, "x": bad}, 1, 1)
    for name in ("alpha", "temperature"):
        if bad is not None:
            with pytest.raises(BadInput, match=f"{name} must be a positive number, got"):
                TemperatureWeights(**{name: bad})
    for name in ("max_epochs", "budget_tokens"):
        with pytest.raises(BadInput, match=f"{name} must be a positive number, got"):
            UniMaxWeights(**({"max_epochs": 1, "budget_tokens": 1} | {name: bad}))
        with pytest.raises(BadInput, match=f"{name} must be a positive number, got"):
            unimax_weights(SIZES, **({"max_epochs": 1, "budget_tokens": 1} | {name: bad}))


def test_many_bad_weights_are_counted():
    with pytest.raises(BadInput, match="'e' has 0, and 7 more$"):
        check_weights(dict.fromkeys("abcdefghijkl", 0))


def test_other_bad_input():
    with pytest.raises(BadInput, match="there is no weight$"):
        check_weights({})
    with pytest.raises(BadInput, match="their sum is infinite"):
        normalised({"a": 1e308, "b": 1e308})
    with pytest.raises(BadInput, match="temperature 0.001 is too low"):
        temperature_weights(SIZES, 0.001)
    with pytest.raises(BadInput, match="temperature 0.0001 is too low"):  # a share of 0
        temperature_weights({"a": 1.0, "b": 0.1}, 1e-4)
    for arguments in ({}, {"alpha": 0.5, "temperature": 2}):
        with pytest.raises(BadInput, match="give either alpha or temperature"):
            TemperatureWeights(**arguments)
    with pytest.raises(
        BadInput, match="4 epochs of the 3 languages are 392 tokens, less than budget_tokens=393;"
    ):
        unimax_weights(SIZES, 4, 393)
    with pytest.raises(BadInput, match="my table gives no weight to: c$"):
        covering({"a": 1, "b": 2}, ["a", "c"], "my table")
    assert covering({"a": 1, "b": 2}, ["b"], "my table") == {"b": 2}


def test_tables_are_found_by_name():
    assert find_table("bloomjax.tasks.languages:ROOTS_WEIGHTS") is ROOTS_WEIGHTS
    for name in ("bloomjax.tasks.languages", "bloomjax.nowhere:X", "bloomjax.errors:X", ":", ""):
        with pytest.raises(BadInput, match=f"'{name}' is not 'module:NAME' of a dict"):
            find_table(name)
    with pytest.raises(BadInput, match="is not a dict but a str"):
        find_table("bloomjax.tasks.languages:CODE")


@pytest.mark.parametrize("name", ["temperature", "unimax"])
def test_the_overlays_make_them(name):
    from bloomjax import config

    mine = (("bloomjax.mixture_weights", ("TemperatureWeights", "UniMaxWeights")),)
    known = config.CONFIGURABLES
    configurables = known if mine[0] in known else known + mine
    function = config.build("TrainData.weights", f"ablations/{name}.gin", (), configurables)
    sizes = {"large": 200e9, "small": 1e9}
    ratio = 200**0.3
    expected = {
        "temperature": {"large": ratio / (1 + ratio), "small": 1 / (1 + ratio)},
        "unimax": {"large": 362 / 366, "small": 4 / 366},
    }
    close(function(sizes), expected[name], rel=1e-12)


@pytest.mark.parametrize("name", ["oscar", "c4", "pile"])
def test_the_overlays_of_data_sets(name, tmp_path):
    from bloomjax import config

    path = tmp_path / "run.gin"
    path.write_text(f"include '176b.gin'\ninclude 'ablations/{name}.gin'\nVOCABULARY = 'v.json'\n")
    mixture = {"oscar": ablations.OSCAR, "c4": ablations.C4, "pile": ablations.PILE_MIXTURE}[name]
    assert config.build("prepare.mixture_or_task_name", path) == mixture
    assert config.build("prepare.task_module", path) == ablations.__name__
    assert config.build("TrainData.store_dir", path) == f"runs/{mixture}_data/tokens"
    weights = config.build("TrainData.weights", path)
    assert weights == ("bloomjax.tasks.ablations:PILE_WEIGHTS" if name == "pile" else None)
    if weights:
        assert find_table(weights) is ablations.PILE_WEIGHTS
