"""The gradient noise scale of gradients whose covariance is known."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from bloomjax.errors import BadInput
from bloomjax.noise_scale import NoiseRecorder, NoiseScale, averaged, noise_and_signal, verdict

_TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(_TOOLS))  # as for a tool that is run
_SPEC = importlib.util.spec_from_file_location("noise_scale_tool", _TOOLS / "noise_scale.py")
assert _SPEC and _SPEC.loader
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)

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


def test_averages_by_step():
    terms = [(2, 8.0, 2.0), (4, 8.0, 2.0), (6, 8.0, -100.0)]
    assert averaged(terms) == [(2, pytest.approx(4.0)), (4, pytest.approx(4.0))]


def record(step, **entries):
    return {"step": step, "grad_norm": 1.0, "batch_size": 8} | entries


def test_records_of_a_run():
    """Norms become terms: of 2 and 8 samples, noise (4 - 1) / (1/2 - 1/8) = 8 and signal (8 - 2 x 4) / 6 = 0."""
    recorder, other = NoiseRecorder(), NoiseRecorder()
    records = []
    for step, part_norm in enumerate((2.0, 1.5, 1.25), 1):
        records.append(record(step, part_norm=part_norm, part_samples=2.0))
        recorder.note(records[-1])
    assert records[0] == record(
        1, gradient_noise=8.0, gradient_signal=0.0, noise_scale_samples=None
    )
    mean_of = {
        key: np.mean([r[key] for r in records]) for key in ("gradient_noise", "gradient_signal")
    }
    expected = mean_of["gradient_noise"] / mean_of["gradient_signal"]
    assert records[2]["noise_scale_samples"] == pytest.approx(expected, rel=0.02)
    # Another process goes on where they end.
    other.begin(records)
    following = [record(4, part_norm=1.5, part_samples=2.0) for _ in range(2)]
    recorder.note(following[0])
    other.note(following[1])
    assert following[0] == following[1]


def test_records_without_terms():
    recorder = NoiseRecorder()
    for entries in (
        {}, {"part_norm": math.nan, "part_samples": 2.0}, {"part_norm": 1.0, "part_samples": 8.0},
        {"part_norm": 1.0, "part_samples": 2.0, "grad_norm": math.inf},
    ):  # fmt: skip
        found = record(1, **entries)
        recorder.note(found)
        assert found == record(1) | {k: v for k, v in entries.items() if k == "grad_norm"}
    found = record(
        2, language="sw", language_samples=8, language_norm=1.0, language_part_norm=2.0,
        language_part_samples=2.0,
    )  # fmt: skip
    recorder.note(found)
    assert found == record(2, noise_by_language={"sw": {"noise": 8.0, "signal": 0.0}})


# ---- the tool ----


def a_run(folder, records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def test_the_tool(command, tmp_path):
    """A noise scale of 40 samples under a ramp from 8 to 80 in the end."""
    records = [record(step, loss=3.0) for step in range(2)]
    for step in range(2, 42):
        size = 8 if step < 22 else 128
        records.append(record(step, batch_size=size, gradient_noise=80.0, gradient_signal=2.0))
    records[20]["noise_by_language"] = {"sw": {"noise": 9.0, "signal": 3.0}}
    records[30]["noise_by_language"] = {"hi": {"noise": 9.0, "signal": -3.0}}
    folder, picture = a_run(tmp_path / "run", records), tmp_path / "noise.png"
    code, out, err = command(tool, folder, f"--plot={picture}")
    assert (code, err) == (0, "") and picture.stat().st_size > 10_000
    lines = out.splitlines()
    assert "8           40  small: 6.00 x the fewest steps, 1.20 x the fewest samples" in lines[1]
    assert "128           40  wasteful: 1.31 x the fewest steps, 4.20 x" in lines[10]
    assert lines[-2].split() == ["sw", "3", "1"] and lines[-1] == "no signal seen yet in: hi"
    code, out, _ = command(tool, folder, "--json")
    found = json.loads(out)
    assert found["steps"] == list(range(2, 42)) and found["batch_size_samples"][-1] == 128
    assert found["noise_scale_samples"] == pytest.approx([40.0] * 40)


def test_steps_without_noise_or_batch_size_are_left_out(tmp_path):
    folder = a_run(tmp_path / "run", [
        record(1, gradient_noise=-1.0, gradient_signal=1.0),
        record(2, gradient_noise=9.0, gradient_signal=1.0),
        {k: v for k, v in record(3, gradient_noise=1.0, gradient_signal=1.0).items() if k != "batch_size"},
    ])  # fmt: skip
    found = tool.read(Path(folder), 0.0)
    assert (found["steps"], found["noise_scale_samples"]) == ([2], [9.0])
    for scale in (-0.5, 0.0):
        with pytest.raises(BadInput, match="no verdict on a noise scale of"):
            verdict(scale, 32)


def test_nothing_measured_is_one_line(command, tmp_path):
    folder = a_run(tmp_path / "run", [record(1, loss=3.0)])
    for words, arguments in (
        ("has no gradient noise: the run needs two microbatches", [folder]),
        ("it has no metrics.jsonl", [str(tmp_path)]),
        ("give the MODEL_DIR", []),
        ("pictures end in .png", [folder, "--plot=noise.txt"]),
    ):
        code, out, err = command(tool, *arguments)
        assert (code, out) == (1, "") and words in err and err.count("\n") == 1


def test_verdicts():
    assert verdict(100.0, 1000.0) == "wasteful: 1.10 x the fewest steps, 11.00 x the fewest samples"
    assert verdict(1000.0, 100.0).startswith("small: 11.00 x the fewest steps")
    assert verdict(100.0, 100.0).startswith("about right: 2.00 x the fewest steps, 2.00 x")


def test_bad_input():
    with pytest.raises(BadInput, match="needs two batch sizes, got 8 and 8 samples"):
        noise_and_signal(1.0, 1.0, 8, 8)
    with pytest.raises(BadInput, match=r"must lie in \[0, 1\), got 1.0"):
        NoiseScale(decay=1.0)
