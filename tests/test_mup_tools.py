"""tools/coordinate_check.py and tools/rate_transfer.py: what they measure, what they conclude, true runs of both."""

import json
import sys

import numpy as np
import pytest
import reference_bloom
import tiny_run
from reference_bloom import jit
from tiny_run import REPOSITORY

from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.mup import MuP
from bloomjax.scaling_laws import ParametricLaw
from bloomjax.schedules import BatchSchedule, CosineSchedule

sys.path.insert(0, str(REPOSITORY / "tools"))
import coordinate_check
import rate_transfer
import scaling_sweep
import width_models
from coordinate_check import KINDS, Check
from rate_transfer import Sweep

WIDTHS = [16, 32, 64, 128]


@pytest.fixture
def run(tiny_text, tmp_path, capsys):
    """run(tool, *flags): exit code, stdout and stderr, with the configuration of tiny_run."""
    *_, gin_file, _ = tiny_run.command(tiny_text, tmp_path / "run")

    def call(tool, *flags):
        with pytest.raises(SystemExit) as end:
            tool.main([tool.__name__, gin_file, f"--gin.MODEL_DIR='{tmp_path}'", *flags])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


# ---- what is measured ----


def test_activations_equal_float64():
    """Of a muP model with heads twice as large as the base's, by the float64 BLOOM."""
    shape = {"vocab_size": 40, "emb_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 96}
    model = Bloom(BloomConfig(**shape, dtype="float32", mup=MuP(16, 4)))
    params = reference_bloom.random_params(**shape, seed=3)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 7), np.int32)
    got = {
        kind: np.asarray(x)
        for kind, x in jit(lambda p: coordinate_check.activations(model, p, tokens))(params).items()
    }
    p = reference_bloom.to_float64(params)
    first = {name: {k: x[0] for k, x in part.items()} for name, part in p["layers"].items()}
    x = reference_bloom._layer_norm(p["embedding"][tokens], p["embedding_norm"], np)
    h = reference_bloom._layer_norm(x, first["attention_norm"], np)
    q, k, _ = np.moveaxis(
        np.einsum("bld,dchk->blchk", h, first["qkv"]["kernel"]) + first["qkv"]["bias"], 2, 0
    )
    scores = np.einsum("blhk,bshk->bhls", q, k) * 4**0.5 / 8  # sqrt(base K) / K
    seen = [scores[:, :, i, j] for i in range(7) for j in range(i + 1)]
    mlp = reference_bloom._layer_norm(
        x + reference_bloom._attention(h, _scaled(first), np), first["mlp_norm"], np
    )
    want = {
        "embedding": x,
        "q": q,
        "attention": np.stack(seen, axis=-1),
        "mlp": mlp @ first["mlp_in"]["kernel"] + first["mlp_in"]["bias"],
    }
    for kind, value in want.items():
        here = got[kind] if kind == "embedding" else got[kind][0]
        np.testing.assert_allclose(here, value, rtol=1e-4, atol=1e-5, err_msg=kind)
    last = reference_bloom._layer_norm(got["residual"].astype(np.float64), p["final_norm"], np)
    np.testing.assert_allclose(got["logits"], last @ p["embedding"].T / 2, rtol=1e-4, atol=1e-5)
    out = p["layers"]["out"]
    assert got["context"].shape == (2, 2, 7, 4, 8) and out["bias"].shape == (2, 32)
    own = np.einsum("blhk,hkd->bld", got["context"][0], out["kernel"][0]) + out["bias"][0]
    np.testing.assert_allclose(
        own, reference_bloom._attention(h, _scaled(first), np), rtol=1e-4, atol=1e-5
    )


def _scaled(layer):
    q = np.array([0.5**0.5, 1, 1]).reshape(3, 1, 1)
    return layer | {"qkv": {name: q * x for name, x in layer["qkv"].items()}}


def test_a_base_at_other_widths():
    base = width_models.Base(
        BloomConfig(40, 2, 32, 4, init_std=0.02, expected_params=7), MuP(32, 4),
        *[None] * 5,  # pyright: ignore
    )  # fmt: skip
    wide = base.at(128, "mup", "head_dim")
    assert (wide.emb_dim, wide.num_heads, wide.head_dim, wide.mlp_dim) == (128, 4, 32, 512)
    assert wide.mup == MuP(32, 4) and wide.expected_params is None and wide.dtype == "float32"
    wide = base.at(128, "sp", "num_heads")
    assert (wide.num_heads, wide.head_dim, wide.init_std, wide.mup) == (16, 8, 0.02, None)
    assert base.at(128, "sp_fan_in", "head_dim").init_std == 0.01
    for width, grow in ((126, "head_dim"), (100, "num_heads"), (4, "num_heads")):
        with pytest.raises(BadInput, match=f"--widths: {width} is no multiple of"):
            base.at(width, "mup", grow)


# ---- what is concluded ----


def planted(change, size):
    """A check of two steps in which every kind goes as the width to these powers, `q` to the opposite ones."""
    powers = np.where(np.array(KINDS) == "q", -1, 1)
    widths = np.array(WIDTHS, float)[:, None, None]
    steps = np.array([0.0, 0.5, 1.0])[:, None]
    return Check(
        "mup", WIDTHS, widths ** (size * powers) + 0 * steps, steps * widths ** (change * powers)
    )


def test_slopes_are_the_planted_ones():
    check = planted(0.7, -0.4)
    assert check.slopes("change") == pytest.approx({k: -0.7 if k == "q" else 0.7 for k in KINDS})
    assert check.slopes("size") == pytest.approx({k: 0.4 if k == "q" else -0.4 for k in KINDS})
    bad = check.not_flat(0.25)
    assert bad["q"] == "its change shrinks" and bad["mlp"] == "its change grows"
    assert set(bad) == set(KINDS)
    assert planted(0.2, -0.3).not_flat(0.25) == {"q": "its size grows"}
    assert planted(0.2, 0.2).not_flat(0.25) == {}
    text = "\n".join(coordinate_check.report(check, 0.25))
    assert "NOT FLAT: embedding, q," in text and "+0.70   -0.40  its change grows" in text
    assert (
        "flat (|slope| up to 0.25 over a factor 8)"
        in coordinate_check.report(planted(0, 0), 0.25)[-1]
    )


def test_where_the_best_rate_is():
    rates = rate_transfer.parse_rates("-6:0")
    assert rates == [2.0**power for power in range(-6, 1)]
    x = np.arange(-6, 1)
    rows = [(x - best) ** 2 + 1.0 for best in (-2.3, -2.6, -3.4, -4.8)]
    rows[1][-1] = np.inf
    sweep = Sweep("mup", WIDTHS, rates, np.stack(rows))
    assert sweep.best == [4, 3, 3, 1] and sweep.moves == -3 and sweep.at_edge == []
    assert sweep.exact() == pytest.approx([-2.3, -2.6, -3.4, -4.8])
    assert sweep.cost == pytest.approx(2.8**2 - 0.2**2)
    text = "\n".join(rate_transfer.report(sweep))
    assert "moves by -3 steps of the grid" in text and text.count("*") == 4 and "2^-2.30" in text
    around = [
        (x - best) ** 2 + 1.0 for best in (-3, -4, -2)
    ]  # one step from the narrowest's, two apart
    assert Sweep("mup", WIDTHS[:3], rates, np.stack(around)).moves == 2
    edge = Sweep("mup", WIDTHS[:2], rates[:5], np.stack(rows[:2])[:, :5])
    assert edge.at_edge == [16] and "give other --rates" in rate_transfer.report(edge)[-1]
    found = json.loads(rate_transfer.as_json([sweep]))["mup"]
    assert found["losses"][1][-1] is None and found["moves"] == -3


@pytest.mark.parametrize(
    "tool, flag, message",
    [
        (coordinate_check, "--widths=64", "--widths=64: give two or more, such as 64,128,256,512"),
        (coordinate_check, "--widths=16,x", "--widths=16,x: give two or more"),
        (coordinate_check, "--widths=30,60", "--widths: 30 is no multiple of 4, see --grow"),
        (coordinate_check, "--parametrizations=ntk", "--parametrizations=ntk: there are sp, "),
        (coordinate_check, "--tolerance=0", "--tolerance and --learning_rate must be above 0"),
        (coordinate_check, "--plot=x.doc", "--plot=x.doc: pictures end in .png"),
        (coordinate_check, "--gin.STORE_DIR='no/store'", "no/store"),
        (rate_transfer, "--rates=-4:-5", "--rates=-4:-5: give two powers of two, such as -11:-4"),
        (rate_transfer, "--rates=0.1", "--rates=0.1: give two powers"),
    ],
)
def test_bad_input_is_a_line(run, tool, flag, message):
    code, out, err = run(tool, flag)
    assert (code, out, err.count("\n")) == (1, "", 1) and message in err


@pytest.mark.parametrize("mup, exponent", [(None, -0.61), (MuP(32, 4), 0.0)])
def test_an_isoflop_sweep_leaves_the_rate_to_mup(mup, exponent):
    base = scaling_sweep.Base(
        BloomConfig(320, 2, 32, 4, mup=mup),
        BatchSchedule(8),
        CosineSchedule(3e-3, 3e-4, 40, 400),
        16,
    )
    law = ParametricLaw(1.8, 400.0, 400.0, 0.34, 0.28)
    runs, _ = scaling_sweep.plan(base, law, [1e12], 4, 4.0, "runs")
    assert len({run.shape.emb_dim for run in runs}) > 1
    for planned in runs:
        want = 3e-3 * (planned.shape.emb_dim / 32) ** exponent
        assert planned.overlay["CosineSchedule.peak"] == pytest.approx(want, rel=1e-3)


# ---- true runs ----


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["head_dim", "num_heads"])
def test_mup_is_flat_and_standard_is_not(run, tmp_path, grow):
    flags = "--widths=16,32,128", f"--grow={grow}", "--learning_rate=0.01"
    plot = tmp_path / "c.png"
    code, out, err = run(coordinate_check, *flags, "--json", f"--plot={plot}")
    assert (code, err) == (0, "") and plot.stat().st_size > 10_000
    found = json.loads(out)
    assert found["mup"]["not_flat"] == {}
    for kind in ("mlp", "residual", "logits"):
        assert found["sp"]["not_flat"][kind] == "its change grows"
    assert np.shape(found["mup"]["change"]) == (3, 11, len(KINDS))


@pytest.mark.slow
def test_a_learning_rate_left_out_is_not_flat(run, monkeypatch):
    """The check sees a muP without its learning rates."""
    monkeypatch.setattr("bloomjax.mup.Widths.rate", lambda self, path: 1.0)
    code, out, _ = run(coordinate_check, "--widths=16,32,128", "--parametrizations=mup")
    assert code == coordinate_check.EXIT_NOT_FLAT and "NOT FLAT: " in out


@pytest.mark.slow
def test_the_best_rate_stays(run, tmp_path):
    flags = f"--widths={WIDTHS[0]},{WIDTHS[-1]}", "--rates=-9:-3", "--steps=60"
    plot = tmp_path / "t.png"
    code, out, err = run(rate_transfer, *flags, "--json", f"--plot={plot}")
    assert (code, err) == (0, "") and plot.stat().st_size > 10_000
    found = json.loads(out)
    assert abs(found["mup"]["moves"]) <= 1 and found["sp"]["moves"] <= -2
    assert not found["mup"]["at_edge"]
