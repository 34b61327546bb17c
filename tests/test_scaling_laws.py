"""Laws against their minima by search, the published tables, and the published code's numbers; tables of runs."""

import json
import math

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.scaling_laws import (
    BESIROGLU,
    CHINCHILLA,
    CHINCHILLA_ROUNDED,
    CHINCHILLA_TABLE,
    DATA_CONSTRAINED,
    KAPLAN,
    KAPLAN_BATCH,
    KAPLAN_FRONTIER,
    DataConstrainedLaw,
    FrontierLaw,
    ParametricLaw,
    ShareLaw,
    batch_cost,
    named_laws,
    table_law,
)
from bloomjax.scaling_runs import Curve, Runs, final_runs, read_curves

GOPHER_FLOPS = 5.76e23


# ---- optima ----


@pytest.mark.parametrize("law", [CHINCHILLA, CHINCHILLA_ROUNDED, BESIROGLU, KAPLAN], ids=str)
@pytest.mark.parametrize("flops", [1e18, GOPHER_FLOPS])
def test_the_optimum_is_the_lowest_loss_of_its_budget(law, flops):
    best = law.optimum(flops)
    assert best.flops == flops
    assert math.isclose(6 * best.params * best.tokens, flops, rel_tol=1e-12)
    sizes = best.params * np.geomspace(0.01, 100, 4001)
    losses = law.loss(sizes, flops / 6 / sizes)
    assert losses.argmin() == 2000
    assert math.isclose(best.loss, losses.min(), rel_tol=1e-12)


LAWS = [CHINCHILLA, BESIROGLU, KAPLAN, KAPLAN_FRONTIER, table_law(1), table_law(2)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_budget_size_and_length_lead_to_the_same_optimum(law):
    best = law.optimum(3e22)
    for other in (law.optimum_of_params(best.params), law.optimum_of_tokens(best.tokens)):
        assert np.allclose(other[:3], best[:3], rtol=1e-9)


@pytest.mark.parametrize("law", [CHINCHILLA, KAPLAN], ids=str)
def test_the_size_of_a_loss(law):
    assert math.isclose(law.params_for(law.loss(3e9, 6e10), 6e10), 3e9, rel_tol=1e-9)
    assert law.params_for(law.loss(1e30, 6e10) - 0.01, 6e10) == math.inf


def test_the_length_of_a_loss():
    assert math.isclose(CHINCHILLA.tokens_for(CHINCHILLA.loss(3e9, 6e10), 3e9), 6e10, rel_tol=1e-9)
    assert CHINCHILLA.tokens_for(CHINCHILLA.E, 3e9) == math.inf


def test_gopher_and_175b():
    """67B, 63B and 40B for Gopher's budget; 3.7T and 4.3T tokens for 175B (arXiv 2203.15556)."""
    by_name = named_laws("chinchilla")
    sizes = {name: law.optimum(GOPHER_FLOPS).params / 1e9 for name, law in by_name.items()}
    assert {name: round(size) for name, size in sizes.items()} == {
        "approach 1": 68, "approach 2": 63, "approach 3": 40,
    }  # fmt: skip
    assert abs(sizes["approach 1"] / 67 - 1) < 0.02
    # With the rounded constants 40B becomes 32B.
    assert round(CHINCHILLA_ROUNDED.optimum(GOPHER_FLOPS).params / 1e9) == 32
    tokens = [by_name[f"approach {n}"].optimum_of_params(175e9).tokens / 1e12 for n in (1, 2)]
    assert np.allclose(tokens, [3.7, 4.3], rtol=0.015)


def test_besiroglu_at_gophers_budget():
    """Their refit with the exact minimum: 73.2B parameters, 1.312T tokens, 17.9 a parameter."""
    best = ParametricLaw(1.81722, 477.83, 2143.42, 0.34731, 0.36717).optimum(GOPHER_FLOPS)
    assert math.isclose(best.params, 73.2e9, rel_tol=1e-3)
    assert math.isclose(best.tokens, 1.312e12, rel_tol=1e-3)
    assert round(best.tokens / best.params, 1) == 17.9


def test_published_exponents():
    """Table 2 of arXiv 2203.15556."""
    assert round(table_law(1).params_exponent, 2) == 0.50
    assert round(table_law(2).params_exponent, 2) == 0.49
    assert round(CHINCHILLA.params_exponent, 2) == 0.46


def test_table_rows_and_the_slip_in_it():
    assert len(CHINCHILLA_TABLE) == 27
    ratios = {
        (row.approach, row.params): row.flops / (6 * row.params * row.tokens)
        for row in CHINCHILLA_TABLE
    }
    assert math.isclose(ratios.pop((3, 175e9)), 0.1, rel_tol=1e-6)
    assert all(0.95 < ratio < 1.05 for ratio in ratios.values())
    for approach in (1, 2):  # the power law goes through all rows but the 67B one
        for row in CHINCHILLA_TABLE:
            if row.approach == approach and row.params != 67e9:
                ours = table_law(approach).optimum_of_params(row.params)
                assert math.isclose(ours.flops, row.flops, rel_tol=0.012), row
                assert math.isclose(ours.tokens, row.tokens, rel_tol=0.014), row


def test_kaplan():
    """arXiv 2001.08361: 1.3e9 parameters and 2.0e10 tokens for a PF-day; the batch at loss 2."""
    for petaflop_days in (1.0, 1e4):  # C_min; what the run costs is 6ND
        params, tokens = 1.3e9 * petaflop_days**0.73, 2.0e10 * petaflop_days**0.27
        best = KAPLAN_FRONTIER.optimum(6 * params * tokens)
        assert np.allclose(best[:2], (params, tokens), rtol=1e-12)
    best = KAPLAN_FRONTIER.optimum(1e21)
    assert math.isclose(6 * best.params * best.tokens, best.flops, rel_tol=1e-12)
    assert math.isclose(KAPLAN_BATCH.inverse(2.0), 2.1e8 / 2 ** (1 / 0.21), rel_tol=1e-12)
    # The joint law has the single ones as its limits.
    assert math.isclose(KAPLAN.loss(1e9, 1e30), (6.4e13 / 1e9) ** 0.076, rel_tol=1e-6)
    assert math.isclose(KAPLAN.loss(1e30, 1e10), (1.8e13 / 1e10) ** 0.103, rel_tol=1e-6)


def test_the_critical_batch_grows_as_the_loss_falls():
    sizes = [KAPLAN_BATCH.inverse(loss) for loss in (4.0, 3.0, 2.0)]
    assert sizes == sorted(sizes)
    assert batch_cost(sizes[0], sizes[0]) == (2.0, 2.0)
    small, large = batch_cost(1.0, 1e3), batch_cost(1e6, 1e3)
    assert small.tokens_factor < 1.01 < 1000 < small.steps_factor
    assert large.steps_factor < 1.01 < 1000 < large.tokens_factor


# ---- repeated data ----


def test_data_constrained_values_of_its_authors():
    """huggingface/datablations, README: the two models of Figure 1."""
    assert math.isclose(DATA_CONSTRAINED.loss(6.34e9, 242e9, 25e9), 2.2256440889984477, rel_tol=1e-12)  # fmt: skip
    assert math.isclose(DATA_CONSTRAINED.loss(8.67e9, 178e9, 25e9), 2.2269634075087867, rel_tol=1e-12)  # fmt: skip


def test_data_constrained_optimum():
    """Their grid search from 8.67e9 x 178e9 ends at 227B tokens, 9.1 epochs, 6.8B parameters."""
    flops = 6 * 8.67e9 * 178e9
    best = DATA_CONSTRAINED.optimum(flops, 25e9)
    assert (round(best.tokens / 1e9), round(best.params / 1e9, 1)) == (227, 6.8)
    assert round(best.tokens / 25e9, 1) == 9.1
    sizes = best.params * np.geomspace(0.5, 2, 401)
    losses = DATA_CONSTRAINED.loss(sizes, flops / 6 / sizes, 25e9)
    assert losses.argmin() == 200


def test_with_text_enough_repetition_changes_nothing():
    best = DATA_CONSTRAINED.optimum(1e21, 1e15)
    assert np.allclose(best, DATA_CONSTRAINED.base.optimum(1e21), rtol=1e-6)
    assert DATA_CONSTRAINED.effective_tokens(5e9, 1e10) == 5e9


def test_repeated_tokens_count_less_and_less():
    law = DataConstrainedLaw(CHINCHILLA, tokens_decay=15.0, params_decay=5.0)
    worth = [law.effective_tokens(epochs * 1e9, 1e9) / 1e9 for epochs in (1, 2, 4, 16, 1e6)]
    assert worth[0] == 1
    assert 1.9 < worth[1] < 2 and 3.6 < worth[2] < 4 and worth[3] < 12
    assert math.isclose(worth[4], 16, rel_tol=1e-9)


# ---- shares ----


def test_a_share_of_one_is_the_language_alone():
    law = ShareLaw(CHINCHILLA, gamma=0.1)
    assert law.loss(1e9, 1e10, 1.0) == CHINCHILLA.loss(1e9, 1e10)
    assert math.isclose(law.effective_tokens(1e9, 1e10, 1.0), 1e10, rel_tol=1e-9)
    assert abs(law.transferred_tokens(1e9, 1e10, 1.0)) < 10


def test_transfer_is_what_a_flat_gamma_leaves():
    """Where a smaller share costs nothing, the others are worth all that they took."""
    helped, disturbed = ShareLaw(CHINCHILLA, 0.0), ShareLaw(CHINCHILLA, 0.3)
    assert math.isclose(helped.transferred_tokens(1e9, 1e10, 0.25), 0.75e10, rel_tol=1e-6)
    assert disturbed.transferred_tokens(1e9, 1e10, 0.25) < 0


# ---- bad numbers ----


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("ask", ["optimum", "optimum_of_params", "optimum_of_tokens"])
@pytest.mark.parametrize("law", [CHINCHILLA, KAPLAN, KAPLAN_FRONTIER], ids=lambda x: type(x).__name__)  # fmt: skip
def test_a_budget_is_a_number_above_0(law, ask, value):
    with pytest.raises(BadInput, match="above 0"):
        getattr(law, ask)(value)


def test_a_degenerate_law_advises_nothing():
    for law in (ParametricLaw(1.7, 400, 400, -0.1, 0.3), KAPLAN.__class__(0.07, 1e13, -0.1, 1e13)):
        with pytest.raises(BadInput, match="advises no size"):
            law.optimum(1e20)


def test_names_of_laws():
    with pytest.raises(BadInput, match="no law 'chinchila'; there are: chinchilla, "):
        named_laws("chinchila")
    assert isinstance(named_laws("kaplan")["frontier"], FrontierLaw)


# ---- tables of runs ----


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


ROWS = [(1e8, 2e9, 3.1), (2e8, 4e9, 2.9), (4e8, 1e10, 2.7)]


@pytest.mark.parametrize(
    "columns", ["params,tokens", "params,flops", "flops,tokens", "params,tokens,flops"]
)
@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_two_of_three_columns_are_enough(tmp_path, columns, kind):
    names = columns.split(",")
    rows = []
    for params, tokens, loss in ROWS:
        every = {"params": params, "tokens": tokens, "flops": 6 * params * tokens, "loss": loss}
        rows.append({name: every[name] for name in [*names, "loss"]})
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        text = "\n".join(lines)
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    curves, shared, remarks = read_curves(write(tmp_path, f"runs.{kind}", text))
    runs = final_runs(curves)
    assert np.allclose(np.stack([runs.params, runs.tokens, runs.loss], 1), ROWS, rtol=1e-12)
    assert shared == {} and remarks == []


def test_rows_of_one_run_are_its_curve(tmp_path):
    text = """run,params,tokens,loss,schedule_tokens,unique_tokens,vocabulary,loss_kind
a,1e8,3e9,3.0,3e9,1e9,v1,train
a,1e8,1e9,3.5,3e9,1e9,v1,train
b,2e8,2e9,3.1,8e9,,v1,validation
"""
    curves, shared, remarks = read_curves(write(tmp_path, "runs.csv", text))
    assert [curve.name for curve in curves] == ["a", "b"]
    assert curves[0].tokens.tolist() == [1e9, 3e9] and curves[0].loss.tolist() == [3.5, 3.0]
    assert [curve.is_matched for curve in curves] == [True, False]
    runs = final_runs(curves)
    assert runs.unique_tokens.tolist() == [1e9, 2e9]
    assert runs.matched == (True, False)
    assert shared == {"vocabulary": "v1"}
    assert remarks == ["runs differ in loss_kind: train, validation"]


def test_columns_can_be_renamed(tmp_path):
    path = write(tmp_path, "runs.csv", "N,D,final\n1e8,2e9,3.1\n")
    (curve,), _, _ = read_curves(path, {"N": "params", "D": "tokens", "final": "loss"})
    assert (curve.params, curve.tokens[-1], curve.loss[-1]) == (1e8, 2e9, 3.1)
    # One that has the name already makes way.
    path = write(tmp_path, "both.csv", "small,params,tokens,loss\n1e8,2e8,2e9,3.1\n")
    assert read_curves(path, {"small": "params"})[0][0].params == 1e8
    path = write(tmp_path, "runs.csv", "N,D,final\n1e8,2e9,3.1\n")
    with pytest.raises(BadInput, match="has no column M; it has: D, N, final"):
        read_curves(path, {"M": "params"})


BAD_TABLES = {
    "params,tokens\n1e8,2e9\n": "has no column loss; it has: params, tokens",
    "params,loss\n1e8,3\n": "has no column 1 of tokens, flops; it has: loss, params",
    "N,D,loss\n1e8,2e9,3\n": r"no column params and tokens \(or flops for one of them\); it has: D, N, loss",
    "params,tokens,loss\n1e8,2e9,nan\n": "line 2: loss is nan",
    "params,tokens,loss\n1e8,2e9,3\n1e8,2e9,inf\n": "line 3: loss is inf",
    "run,params,tokens,loss\na,1e8,1e9,nan\na,1e8,2e9,3\n": "line 2: loss is nan",
    "params,tokens,loss\n1e8,2e9,-3\n": "line 2: loss is -3; every run needs a number above 0",
    "params,tokens,loss\n1e8,2e9,\n": "line 2 lacks flops, loss",
    "params,tokens,loss\n1e8,many,3\n": "line 2: tokens is 'many', not a number",
    "params,tokens,loss\n1e8,1.2e18,3\n": r"tokens is 1.2e\+18, 1.2e\+10 a parameter; are these FLOPs",
    "params,flops,loss\n1e8,2e9,3\n": "does the column flops hold tokens",
    "flops,tokens,loss\n2e9,1e18,3\n": "are the columns flops and tokens swapped",
    "params,tokens,flops,loss\n1e8,2e9,2e9,3\n": "x 6 x params x tokens in the middle row; units are mixed up",
    "run,params,tokens,loss\na,1e8,2e9,3\na,2e8,4e9,3\n": r"the run a has params from 1e\+08 to 2e\+08",
    "params,tokens,loss,share\n1e8,2e9,3,30\n": "share is 30.0; shares lie between 0 and 1",
    "params,tokens,loss\n1.3,26,3\n": r"params is 1.3; are these millions or billions\?",
    "params,tokens,loss\n": "has no rows",
    "": "has no rows",
}


@pytest.mark.parametrize("text", BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_bad_tables_are_one_line(tmp_path, text):
    with pytest.raises(BadInput, match=BAD_TABLES[text]) as error:
        read_curves(write(tmp_path, "runs.csv", text))
    assert "\n" not in str(error.value) and "runs.csv" in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = write(tmp_path, "runs.csv", "\ufeffparams,tokens,loss\n1e8,2e9,3\n")
    assert read_curves(path)[0][0].params == 1e8


def test_no_table(tmp_path):
    with pytest.raises(BadInput, match="none.csv cannot be read: No such file"):
        read_curves(tmp_path / "none.csv")
    with pytest.raises(BadInput, match="is not a table"):
        read_curves(write(tmp_path, "runs.json", '[{"params": 1,'))
    with pytest.raises(BadInput, match="has no rows"):
        read_curves(write(tmp_path, "runs.json", '{"params": 1}'))


def test_flops_that_are_somewhat_off_are_remarked(tmp_path):
    text = "params,tokens,flops,loss\n1e8,2e9,1.2e18,3\n1e8,4e9,2.4e18,3\n1e8,8e9,1.6e19,3\n"
    _, _, remarks = read_curves(write(tmp_path, "runs.csv", text))
    assert remarks == [
        "flops is not 6 x params x tokens in 1 rows (up to a factor 3.33); the column is not used: C is 6ND throughout"
    ]
    near = text.replace("1.6e19", "5.0e18")  # 4 % more than 6ND
    assert "up to a factor 1.04" in read_curves(write(tmp_path, "runs.csv", near))[2][0]
    assert not read_curves(write(tmp_path, "runs.csv", text.replace("1.6e19", "4.85e18")))[2]


def test_runs_check_their_numbers():
    with pytest.raises(BadInput, match="run 2: loss is nan"):
        Runs.of([1e8, 1e8], [1e9, 1e9], [3.0, math.nan])
    with pytest.raises(BadInput, match="tokens has the shape"):
        Runs.of([1e8, 1e8], [1e9], [3.0, 3.0])


def test_where_a_cosine_ends():
    def matched(ratio):
        return Curve("x", 1e8, np.array([1e9]), np.array([3.0]), ratio * 1e9).is_matched

    assert [matched(ratio) for ratio in (0.7, 0.8, 1.0, 1.25, 1.3)] == [False, True, True, True, False]  # fmt: skip
    assert Curve("x", 1e8, np.array([1e9]), np.array([3.0])).is_matched is None
