"""tools/ablate.py: what it calls noise, by hand; which runs it starts; what it refuses; one comparison as a whole."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import REPOSITORY, SEQUENCE_LENGTH

from bloomjax import config, results_table
from bloomjax.data import held_out_key
from bloomjax.errors import BadInput
from bloomjax.model_dir import open_model_dir
from bloomjax.objectives import PrefixLM
from bloomjax.token_store import TokenStore

sys.path.insert(0, str(REPOSITORY / "tools"))
import ablate
import ablate_lengths
import ablate_plan
import ablate_plots
import ablate_table
from ablate_table import Result, Row, Task


@pytest.fixture
def base(tiny_text, tmp_path):
    """Gin file of the run of tiny_run.py."""
    tiny_run.command(tiny_text, tmp_path)
    return shutil.copy(tiny_text.folder / "run.gin", tmp_path / "base.gin")


@pytest.fixture
def plan(base, tmp_path):
    """plan(overlays, seeds, tokens=None): runs into tmp_path/out."""

    def call(overlays, seeds=(1,), tokens=None):
        found = []

        def planned():
            words = ablate_plan.parse_overlays(overlays)
            found.extend(ablate_plan.plan(words, seeds, tmp_path / "out", tokens))

        with pytest.raises(SystemExit) as end:
            config.call(planned, ["test", f"--gin_file={base}"])
        assert end.value.code == 0
        return found

    return call


# ---- noise, by hand ----


def test_two_overlays_are_students_t_test():
    """t = 4 / 2^0.5 with 2 degrees of freedom, whose distribution function is 1/2 + t / (2 (2 + t^2)^0.5)."""
    verdict = ablate_table.judge({"a": [5.0, 7.0], "b": [1.0, 3.0]})
    t = 4 / math.sqrt(2)
    assert verdict.p == {("b", "a"): pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)}
    assert verdict.smallest == pytest.approx(4.302653 * math.sqrt(2), rel=1e-4)  # t of 97.5 %
    assert verdict.text() == "within noise"


def test_three_overlays_of_two_seeds_have_the_limit_of_tukeys_table():
    """q(0.05; 3 means, 3 degrees of freedom) = 5.91."""
    groups = {"a": [1.00, 1.02], "b": [1.03, 1.05], "c": [1.10, 1.12]}
    verdict = ablate_table.judge(groups)
    deviation = math.sqrt(0.0002)
    assert verdict.smallest == pytest.approx(5.91 * deviation / math.sqrt(2), rel=1e-3)
    assert verdict.differing == [("a", "c"), ("b", "c")]  # 0.10 and 0.07; a and b are 0.03 apart
    assert verdict.text() == "a < c, b < c"


def test_what_cannot_be_tested_is_not():
    assert ablate_table.judge({"a": [1.0], "b": [2.0]}).text() == "not tested"
    assert ablate_table.judge({"a": [1.0, 2.0]}).text() == "not tested"
    assert ablate_table.judge({"a": [1.0, 1.0], "b": [1.0, 1.0]}).text() == "within noise"
    assert ablate_table.judge({"a": [2.0, 2.0], "b": [1.0, 1.0]}).text() == "b < a"
    assert ablate_table.judge({"a": [2.0, 2.1], "b": [math.nan, 1.0]}).text() == "not tested"
    # A run that failed, or diverged, leaves the test of the others as it is.
    groups = {"a": [5.0, 7.0], "b": [1.0, 3.0]}
    alone, beside = (
        ablate_table.judge(groups | more) for more in ({}, {"c": [9.0], "d": [math.nan, 1.0]})
    )
    assert beside.p == alone.p and beside.smallest == alone.smallest
    assert beside.text() == "within noise (not tested: c, d)"


def test_cells_have_mean_and_deviation():
    row = Row("loss", {"a": [1.0, 3.0], "b": [2.0], "c": None})
    assert [row.cell(name) for name in "abc"] == ["2.000 ± 1.414", "2.000", "-"]
    assert Row("parameters", {"a": [1e6, 1e6]}, digits=0, is_tested=False).cell("a") == "1,000,000"


def result(overlay, seed, loss, **changes):
    shown = dict(
        step=5, params=1000, flops_per_token=6e3, tokens=640, tokens_per_second=1e4, bits_per_byte=loss / 2,
        loss_by_language={"aa": loss - 1, "bb": loss + 1}, curve=[(640, loss)], tasks={}, left_out=[],
    )  # fmt: skip
    return Result(overlay=overlay, seed=seed, loss=loss, **(shown | changes))


def with_lengths(overlay, seed, at_16, at_32):
    lengths = {
        "training_length": 16, "lengths": {"16": at_16, "32": at_32}, "num_tokens": 96, "languages": ["aa"],
        "left_out": ["bb"],
    }  # fmt: skip
    return result(overlay, seed, at_16, lengths=lengths)


def test_the_change_at_a_length_is_tested_by_seed():
    """One degree of freedom, Cauchy's distribution: p = 2 / pi * atan(1 / t)."""
    far = [with_lengths("x", 1, 4.0, 4.3), with_lengths("x", 2, 5.0, 5.5)]
    line = ablate_table.change_words("x", "32", far)  # t = 0.4 / 0.1
    p = 2 / math.pi * math.atan(1 / 4)
    assert (
        line == f"x: +0.4000 nats at 2 times the training length, within noise (paired by seed, p = {p:.2g})"
    )  # fmt: skip
    near = [with_lengths("x", 1, 4.0, 4.39), with_lengths("x", 2, 5.0, 5.41)]  # t = 40
    assert "worse (paired by seed, p = 0.016)" in ablate_table.change_words("x", "32", near)
    ends = [with_lengths("x", 1, 4.0, "16 positions are learned, 32 tokens need more")]
    assert ablate_table.change_words("x", "32", ends).endswith("32 tokens need more")


def test_the_table_has_a_row_a_quantity():
    groups = {
        "a": [with_lengths("a", 1, 4.0, 3.9), with_lengths("a", 2, 4.2, 4.1)],
        "b": [with_lengths("b", 1, 5.0, "too long"), with_lengths("b", 2, 5.2, "too long")],
    }
    groups["a"] = [dataclasses.replace(r, tasks={Task("boolq", "acc"): 0.5}) for r in groups["a"]]
    rows = ablate_table.rows(groups)
    lines = ablate_table.markdown(list(groups), rows).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:5]] for line in lines}  # fmt: skip
    assert cells["held-out loss"] == ["4.1000 ± 0.1414", "5.1000 ± 0.1414", "a < b"]
    assert cells["bits per byte"][:2] == ["2.0500 ± 0.0707", "2.5500 ± 0.0707"]
    assert cells["change at 32"] == ["-0.1000 ± 0.0000", "-", "not tested"]
    assert cells["boolq (acc)"][:2] == ["0.500 ± 0.000", "-"]
    assert cells["loss in bb"][:2] == ["5.100 ± 0.141", "6.100 ± 0.141"]
    assert len({len(line) for line in lines}) == 1  # aligned
    groups["b"] = [dataclasses.replace(r, bits_per_byte=None) for r in groups["b"]]
    table = ablate_table.markdown(list(groups), ablate_table.rows(groups))
    bits = next(line for line in table.splitlines() if "bits per byte" in line)
    assert bits.split("|")[3].strip() == "-"
    said = "\n".join(ablate_table.remarks(groups, rows))
    assert "without bb, too short" in said and "b: no loss at 32 tokens: too long" in said


def test_results_of_tasks_are_found_in_the_folder(tmp_path):
    assert ablate_table.read_tasks(tmp_path, 40) == ({}, [])

    def write(name, results, age, **more):
        path = tmp_path / name
        path.write_text(json.dumps({"results": results, "step": 40, "limit": None} | more))
        os.utime(path, (1e9 - age, 1e9 - age))

    metrics = {"alias": "boolq", "acc_stderr": 0.01, "acc_norm": 0.7, "acc": 0.6}
    write("tasks.json", {"boolq": metrics, "wiki": {"bits_per_byte": 1.5}}, age=5)
    write("more.json", {"boolq": {"acc": 0.65}, "rte": {"acc": 0.5}}, age=4)
    write("solved.json", {"boolq": {"acc": 0.75}}, age=4, num_fewshot={"boolq": 5})
    write("early.json", {"boolq": {"acc": 0.1}}, age=3, step=20)
    write("unknown.json", {"boolq": {"acc": 0.1}}, age=2, step=None)
    write("few.json", {"boolq": {"acc": 0.1}}, age=1, limit=10)
    write("words.json", {"boolq": {"alias": "boolq"}}, age=0)  # the newest, and no number in it
    (tmp_path / "lengths.json").write_text('{"lengths": {}}')
    (tmp_path / "broken.json").write_text("{")
    found, left_out = ablate_table.read_tasks(tmp_path, 40)
    assert found == {
        Task("boolq", "acc"): 0.65, Task("boolq", "acc", 5): 0.75, Task("wiki", "bits_per_byte"): 1.5,
        Task("rte", "acc"): 0.5,
    }  # fmt: skip
    assert left_out == [
        f"{tmp_path}/early.json: of step 20, the run has 40",
        f"{tmp_path}/unknown.json: of step None, the run has 40",
        f"{tmp_path}/few.json: of the first 10 documents alone",
    ]


def cells_of(columns, rows):
    lines = ablate_table.markdown(columns, rows).splitlines()
    return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}  # fmt: skip


def test_the_mean_over_tasks_is_tested_and_has_published_numbers_beside_it():
    def run(overlay, seed, boolq, rte):
        tasks = {
            Task("boolq", "acc"): boolq,
            Task("rte", "acc"): rte,
            Task("wiki", "perplexity"): 9.0,
        }
        return result(
            overlay, seed, 4.0, tasks=tasks, left_out=["x.json: of step 1, the run has 5"]
        )

    groups = {
        "a": [run("a", 1, 0.50, 0.60), run("a", 2, 0.52, 0.60)],
        "b": [run("b", 1, 0.70, 0.80), run("b", 2, 0.72, 0.80)],
    }
    rows = ablate_table.rows(groups)
    mean = next(row for row in rows if row.label == "mean of 2 tasks")  # a perplexity is no share
    assert mean.values == {"a": [0.55, 0.56], "b": [0.75, 0.76]}
    assert ablate_table.judge(mean.groups).text() == "a < b"
    assert "Left out: x.json: of step 1, the run has 5." in ablate_table.remarks(groups, rows)

    old = results_table.Results(
        "old", {"boolq": {"acc": 0.25}, "rte": {"exact_match": 0.5}, "sst2": {"acc": 1.0}}
    )
    cells = cells_of(["a", "b", "old"], ablate_table.rows(groups, [old]))
    assert cells["boolq (acc)"] == ["0.510 ± 0.014", "0.710 ± 0.014", "0.250", "a < b"]
    assert cells["rte (acc / exact_match)"][2] == "0.500"
    assert cells["sst2 (acc)"] == ["-", "-", "1.000", "not tested"]
    assert cells["mean of 2 tasks"] == ["0.5550 ± 0.0071", "0.7550 ± 0.0071", "0.3750", "a < b"]
    assert cells["held-out loss"][2] == "-"
    solved = results_table.Results("solved", {"boolq": {"acc": 0.9}}, num_fewshot={"boolq": 5})
    cells = cells_of(["a", "b", "solved"], ablate_table.rows(groups, [solved]))
    assert (cells["boolq (acc)"][2], cells["boolq (acc, 5-shot)"][2]) == ("-", "0.900")
    # One of BigScience's files has no such task: the mean over both is not to be had, that of ours is.
    other = results_table.Results("other", {"boolq": {"acc": 0.25}})
    assert (
        cells_of(["a", "b", "other"], ablate_table.rows(groups, [other]))["mean of 2 tasks"][2]
        == "-"
    )


def test_an_overlay_without_results_is_a_column_of_dashes(tmp_path):
    groups = {"a": [], "b": [result("b", 1, 4.0), result("b", 2, 4.2)]}
    rows = ablate_table.rows(groups)
    assert cells_of(["a", "b"], rows)["held-out loss"] == ["-", "4.1000 ± 0.1414", "not tested"]
    assert ablate_table.remarks(groups, rows)
    ablate_plots.plot(groups, str(tmp_path / "plot.png"))


def test_flops_are_those_of_the_lengths_that_were_seen():
    """4 samples of 8 tokens, then 4 of 16: two thirds of the tokens are in samples of 16."""
    records = [
        {"samples": 0, "tokens": 0},
        {"samples": 4, "tokens": 32},
        {"samples": 8, "tokens": 96},
    ]
    assert ablate_table._mean_length(records) == pytest.approx(8 / 3 + 16 * 2 / 3)
    assert ablate_table._mean_length([{"samples": 7, "tokens": 7 * 64}]) == 64


# ---- plan ----


def test_runs_differ_in_overlay_and_seed_alone(plan, tmp_path):
    runs = plan("ablations/alibi.gin,ablations/rotary.gin+ablations/swiglu.gin,base", (1, 7))
    assert [run.name for run in runs] == [
        "alibi-1", "alibi-7", "rotary+swiglu-1", "rotary+swiglu-7", "base-1", "base-7",
    ]  # fmt: skip
    ablate_plan.write(runs)

    def changed(a, b):
        return sorted(set(a.text.splitlines()[1:]) ^ set(b.text.splitlines()[1:]))

    assert [line.split(" = ")[0] for line in changed(runs[0], runs[1])] == [
        "train.model_dir", "train.model_dir", "train.seed", "train.seed",
    ]  # fmt: skip
    assert {line.split(" = ")[0] for line in changed(runs[0], runs[2])} == {
        "train.model_dir", "BloomConfig.positions", "BloomConfig.activation", "BloomConfig.mlp_dim",
    }  # fmt: skip
    for run in runs:
        assert config.build("train.seed", run.gin_file) == run.seed
        assert config.build("train.train_data", run.gin_file).seed == 3  # of the base
        assert config.build("train.model_dir", run.gin_file) == str(tmp_path / "out" / run.name)


def test_a_budget_of_tokens_takes_the_cosine_with_it(plan):
    (run,) = plan("base", tokens=20 * 8 * SEQUENCE_LENGTH)
    ablate_plan.write([run])
    assert config.build("train.train_steps", run.gin_file) == 20
    rate = config.build("train.learning_rate", run.gin_file)
    assert (rate.warmup_samples, rate.decay_samples) == (20, 200)  # 40 and 400 of 40 steps


CURRICULUM = """include 'ablations/curriculum.gin'
LengthCurriculum.start = 8
LengthCurriculum.num_steps = {}
"""
RAMP = """include 'ablations/batch_ramp.gin'
BatchSchedule.ramp_start_samples = 2
BatchSchedule.ramp_increment_samples = 2
BatchSchedule.ramp_length_samples = {}
"""


def test_a_budget_of_tokens_takes_ramp_and_curriculum_with_it(plan, tmp_path):
    (tmp_path / "length.gin").write_text(CURRICULUM.format(30))
    (tmp_path / "ramp.gin").write_text(RAMP.format(120))
    half = 20 * 8 * SEQUENCE_LENGTH
    runs = plan(f"{tmp_path}/length.gin,{tmp_path}/ramp.gin,base", tokens=half)
    ablate_plan.write(runs)
    length, ramp, base = (run.gin_file for run in runs)
    assert config.build("TrainData.curriculum", length).num_steps == 15
    for file in (length, base):
        assert config.build("train.train_steps", file) == 20
    schedule = config.build("train.batch_schedule", ramp)
    assert (schedule.ramp_start_samples, schedule.ramp_length_samples) == (2, 60)
    assert config.build("train.train_steps", ramp) is None
    assert config.build("train.train_samples", ramp) == 160  # of the base; its steps are more
    assert schedule.steps_within(160) == 31  # 10 of 2 samples, 5 of 4, 4 of 6, 12 of 8
    for file in (length, ramp, base):
        rate = config.build("train.learning_rate", file)
        assert (rate.warmup_samples, rate.decay_samples) == (20, 200)


def test_another_run_in_the_same_place_is_refused(plan):
    ablate_plan.write(plan("base"))
    ablate_plan.write(plan("base", (1, 2)))  # more of the same
    with pytest.raises(BadInput, match=r"base-1\.gin is there and differs: .* another --out"):
        ablate_plan.write(plan("base", tokens=10_000))


def test_bad_input_is_one_line(command, base, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "alibi.gin").write_text("BloomConfig.positions = @Alibi()\n")
    (tmp_path / "order.gin").write_text("TrainData.seed = 5\n")
    (tmp_path / "even.gin").write_text("TrainData.weights = @TemperatureWeights()\n"
                                       "TemperatureWeights.alpha = 0.3\n")  # fmt: skip
    (tmp_path / "batch.gin").write_text("BATCH_SIZE = 4\n")
    out = tmp_path / "out"

    def refused(*flags):
        code, shown, error = command(ablate, f"--gin_file={base}", *flags)
        assert code == 1 and not shown and error.count("\n") == 1, error
        assert not out.exists()
        return error

    to = f"--out={out}"
    unknown = refused("--overlays=ablations/alibbi.gin", to)
    assert "did you mean 'ablations/alibi.gin'" in unknown and "ablations/rotary.gin" in unknown
    twice = refused(f"--overlays=ablations/alibi.gin,{tmp_path}/more/alibi.gin", to)
    assert f"two with the name alibi: ablations/alibi.gin and {tmp_path}/more/alibi.gin" in twice
    for name in ("even", "batch"):
        error = refused(f"--overlays=base,{tmp_path}/{name}.gin", to)
        assert f"overlay {name} changes the data" in error
    assert "BatchSchedule" not in error and "batch_size_samples: 8, now 4" in error
    short = "which shortens both"
    (tmp_path / "long.gin").write_text(CURRICULUM.format(41))
    error = refused(f"--overlays={tmp_path}/long.gin", to)
    assert (
        "overlay long: its length curriculum ends at step 41, the run after 40 steps" in error
        and short in error
    )
    (tmp_path / "slow.gin").write_text(RAMP.format(320))
    error = refused(f"--overlays={tmp_path}/slow.gin", to)
    assert "overlay slow: its batch-size ramp ends at step" in error and short in error
    error = refused("--overlays=ablations/curriculum.gin", to)
    assert "start=64 is not below end=16" in error
    error = refused("--overlays=base", to, f"--beside={base}")
    assert "is no JSON" in error
    error = refused("--overlays=ablations/c4.gin", "--gin.TEXT_DIR='x'", to)
    assert "overlay c4 changes the data (train.train_data.store_dir" in error
    assert "--overlays needs gin files" in refused(to)
    assert "--out must be given" in refused("--overlays=base")
    assert "--seeds=1,1: give different" in refused("--overlays=base", "--seeds=1,1", to)
    assert "--lengths=2" in refused("--overlays=base", "--lengths=2", to)
    assert "do not fill a batch" in refused("--overlays=base", "--tokens=100", to)
    assert "nothing uses the macro BATCHSIZE" in refused("--overlays=base", "--gin.BATCHSIZE=3", to)


# ---- resuming ----


def test_finished_runs_are_not_started_again(command, base, tmp_path, undisturbed, monkeypatch):
    started = []

    def train(run):
        started.append(run.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        shutil.copytree(undisturbed, run.model_dir)
        (run.model_dir / "config.gin").write_text(run.text)

    monkeypatch.setattr(ablate, "_train", train)
    flags = [f"--gin_file={base}", "--overlays=ablations/alibi.gin,base", "--seeds=1,2"]
    flags += [f"--out={tmp_path / 'out'}", "--gin.train.prepare=None"]
    code, out, _ = command(ablate, *flags)
    assert code == 130 and "1/4 alibi-1: held-out loss" in out
    assert started == ["alibi-1", "alibi-2"]
    code, out, error = command(ablate, *flags)
    assert code == 0, error
    assert "1/4 alibi-1: done before, held-out loss" in out
    assert started == ["alibi-1", "alibi-2", "alibi-2", "base-1", "base-2"]
    last = tiny_run.records(undisturbed)[-1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["loss"] for run in results["runs"]] == [last["validation_loss"]] * 4
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A run whose last evaluation is missing is not finished.
    metrics = tmp_path / "out" / "base-2" / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    assert ablate_table.read_result("base", 2, metrics.parent) is None


def test_a_failed_run_is_a_line_and_the_others_go_on(
    command, base, tmp_path, undisturbed, monkeypatch
):
    evaluated = []

    def execute(run, command):
        if command[2] == "bloomjax.evaluate":
            evaluated.append(run.name)
            (output,) = [a.removeprefix("--output=") for a in command if a.startswith("--output=")]
            found = {"results": {"made_up": {"acc": 0.5}}, "step": tiny_run.NUM_STEPS}
            Path(output).write_text(json.dumps(found))
            assert {"--tasks=made_up", "--num_fewshot=0", f"--step={tiny_run.NUM_STEPS}"} < set(
                command
            )
        elif run.overlay == "rotary":
            raise BadInput("out of memory")
        else:
            shutil.copytree(undisturbed, run.model_dir)
            (run.model_dir / "config.gin").write_text(run.text)

    monkeypatch.setattr(ablate, "_execute", execute)
    monkeypatch.setattr(ablate.harness, "check_installed", lambda: None)
    monkeypatch.setattr(ablate.harness, "load_tasks", lambda *_: None)
    flags = [
        f"--gin_file={base}",
        "--overlays=ablations/rotary.gin,base",
        "--seeds=1,2",
        "--tasks=made_up",
    ]
    flags += [f"--out={tmp_path / 'out'}", "--gin.train.prepare=None"]
    for _ in range(2):  # the second time nothing but the failed runs is tried again
        code, out, error = command(ablate, *flags)
        assert code == 1 and error.count("\n") == 1
        assert "2 failed, the rest is in" in error and "rotary-1: out of memory" in error
        assert "2/4 rotary-2: failed: out of memory" in out and "4/4 base-2: " in out
        assert evaluated == ["base-1", "base-2"]
        table = (tmp_path / "out" / "table.md").read_text()
        assert "Failed: rotary-1: out of memory\nFailed: rotary-2: out of memory\n" in table
        row = next(line for line in table.splitlines() if "made_up (acc)" in line)
        assert [cell.strip() for cell in row.split("|")[2:4]] == ["-", "0.500 ± 0.000"]


# ---- lengths ----


@pytest.mark.slow
def test_the_loss_at_each_length_is_that_of_the_same_tokens(tiny_text, undisturbed, tmp_path, plan):
    (run,) = plan("base", (3,))
    shutil.copytree(undisturbed, run.model_dir)
    (run.model_dir / "config.gin").write_text(run.text)
    found = ablate_lengths.measure(run.model_dir, [1, 2])
    trained = open_model_dir(run.model_dir)
    params, store = trained.read_params(), TokenStore(tiny_text.store_dir)
    span = 2 * SEQUENCE_LENGTH
    for length in (SEQUENCE_LENGTH, span):
        losses = []
        for language in store.languages:
            # 2 windows of 16 are evaluated, so 1 of 32
            tokens = store.read(language, "validation", 0, span + 1).astype(np.int32)
            for first in range(0, span, length):
                part = tokens[first : first + length + 1]
                x = trained.model.apply({"params": params}, part[None, :-1])
                logits = trained.model.apply({"params": params}, x, method="logits")
                logits = np.asarray(logits, np.float64)[0]
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                losses += (-log_p[np.arange(length), part[1:]]).tolist()
        assert found["lengths"][str(length)] == pytest.approx(np.mean(losses), abs=2e-3)
    assert found["num_tokens"] == 3 * span and found["left_out"] == []
    kept = (run.model_dir / "lengths.json").stat().st_mtime_ns
    assert ablate_lengths.measure(run.model_dir, [1, 2]) == found
    assert (run.model_dir / "lengths.json").stat().st_mtime_ns == kept
    with pytest.raises(BadInput, match="no language .* has 16000 held-out tokens"):
        ablate_lengths.measure(run.model_dir, [1, 1000])


@pytest.mark.slow
def test_the_loss_at_each_length_is_that_of_the_objective(tiny_text, undisturbed, plan):
    """Each window with its own prefix; what was measured under another objective is not taken for it."""
    (run,) = plan("base", (3,))
    shutil.copytree(undisturbed, run.model_dir)
    (run.model_dir / "config.gin").write_text(run.text)
    causal = ablate_lengths.measure(run.model_dir, [1, 2])["lengths"]
    prefix = "\nTrainData.objective = @PrefixLM()\nPrefixLM.seed = 5\n"
    (run.model_dir / "config.gin").write_text(run.text + prefix)
    found = ablate_lengths.measure(run.model_dir, [1, 2])["lengths"]
    trained, store = open_model_dir(run.model_dir), TokenStore(tiny_text.store_dir)
    params, span = trained.read_params(), 2 * SEQUENCE_LENGTH
    for length in (SEQUENCE_LENGTH, span):
        total = weight = 0.0
        for language in store.languages:
            tokens = store.read(language, "validation", 0, span + 1).astype(np.int32)
            for window in range(span // length):
                part = tokens[window * length : (window + 1) * length + 1]
                row = PrefixLM(5).row(part, held_out_key(language, window))
                last_key = row["last_key"][None]
                x = trained.model.apply({"params": params}, part[None, :-1], last_key_BL=last_key)
                logits = trained.model.apply({"params": params}, x, method="logits")
                logits = np.asarray(logits, np.float64)[0]
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                total -= (log_p[np.arange(length), part[1:]] * row["token_weights"]).sum()
                weight += row["token_weights"].sum()
        assert found[str(length)] == pytest.approx(total / weight, abs=2e-3)
        assert abs(found[str(length)] - causal[str(length)]) > 5e-3
    spans = "\nTrainData.objective = @SpanCorruption()\nSpanCorruption.num_sentinels = 8\n"
    spans += f"SpanCorruption.first_sentinel_id = {tiny_run.VOCAB_SIZE - 8}\n"
    (run.model_dir / "config.gin").write_text(run.text + spans)
    found = ablate_lengths.measure(run.model_dir, [1, 2])["lengths"]
    assert isinstance(found[str(SEQUENCE_LENGTH)], float)
    assert found[str(span)] == "SpanCorruption needs sentinels there that were not trained"


# ---- from end to end ----


@pytest.mark.slow
def test_two_overlays_two_seeds(tiny_text, undisturbed, base, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, str(REPOSITORY / "tools" / "ablate.py"), f"--gin_file={base}", f"--out={out}",
        "--overlays=ablations/alibi.gin,ablations/learned.gin", "--seeds=3,4", "--lengths=1,2",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=tiny_run.environment(), stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline().startswith("1/4 alibi-3: held-out loss")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    done = tiny_run.tree(out / "alibi-3")
    again = tiny_run.execute(command)
    assert again.returncode == 0, again.stderr
    assert "1/4 alibi-3: done before" in again.stdout
    assert {name: done[name] for name in done} == {
        name: data for name, data in tiny_run.tree(out / "alibi-3").items() if name in done
    }
    results = json.loads((out / "results.json").read_text())
    assert [(r["overlay"], r["seed"]) for r in results["runs"]] == [
        ("alibi", 3), ("alibi", 4), ("learned", 3), ("learned", 4),
    ]  # fmt: skip
    # The run of the Python function with the same seed and the same data.
    assert results["runs"][0]["loss"] == tiny_run.records(undisturbed)[-1]["validation_loss"]
    losses = {r["loss"] for r in results["runs"]}
    assert len(losses) == 4
    params = [r["params"] for r in results["runs"]]
    assert params[2] - params[0] == SEQUENCE_LENGTH * 32  # a row a position
    table = (out / "table.md").read_text()
    assert "learned: no loss at 32 tokens: LearnedPositions.max_length=16 positions" in table
    assert "alibi: " in table and table in again.stdout.replace("\n\nwritten", "\nwritten")
    data = json.loads((out / "runs.json").read_text())
    assert [each["run"] for each in data] == ["alibi-3", "alibi-4", "learned-3", "learned-4"]
