"""tools/replay.py: steps of a finished run come out bit-equal, what does not is named, the culprit is found."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from bloomjax import config
from bloomjax.journal import read_lines

sys.path.insert(0, str(tiny_run.REPOSITORY / "tools"))
import replay  # noqa: E402

GUARD = (
    "--gin.SpikeGuard.min_steps=4", "--gin.SpikeGuard.window_steps=8", "--gin.SpikeGuard.loss_deviations=3.0",
)  # fmt: skip
# Several devices, microbatches and dropout: all that a step depends on.
MANY = (
    "--gin.FirstDevices.num=4", "--gin.FirstDevices.tensor=2", "--gin.NUM_LAYERS=1",
    "--gin.StepOptions.microbatch_size_samples=2",
    "--gin.BloomConfig.hidden_dropout_rate=0.1", "--gin.TRAIN_STEPS=13",
)  # fmt: skip
RUNS = {
    "plain": (),
    "many": MANY,
    "skip": (*GUARD, "--gin.fault.nan_samples=(178, 179)"),
    # In its second phase the limits of the guard begin anew.
    "rollback": (
        *GUARD, "--gin.SpikeGuard.policy='rollback'", "--gin.fault.noise_samples=(176, 180)",
        "--gin.Checkpoints.keep_last=9", "--gin.TrainData.phases=(@Phase(),)", "--gin.Phase.first_sample=128",
    ),
    "flip": ("--gin.fault.flip_bit_at_step=22",),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_text, tmp_path_factory):
    """runs(name): MODEL_DIR of a run of 40 steps, with checkpoints 20, 30 and 40."""
    folder, done = tmp_path_factory.mktemp("replayed"), {}

    def run(name):
        if name not in done:
            done[name] = folder / name
            flags = tiny_run.command(tiny_text, done[name], *RUNS[name])[3:]
            with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(None):
                config.run("train", ["train", *flags])
            assert end.value.code == 0
            config._parse([], [], config.CONFIGURABLES)  # nothing of it for other tests
        return done[name]

    return run


@pytest.fixture
def call(capsys):
    """call(model_dir, *flags): exit code, stdout and stderr; the folder is as it was."""

    def run(given: Path, *flags):
        folder = given.parent.parent if given.parent.name == "checkpoints" else given
        capsys.readouterr()
        before = _content(folder)
        with pytest.raises(SystemExit) as end:
            replay.main(["replay", f"--checkpoint={given}", *flags])
        assert _content(folder) == before
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def _content(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def rows(result, code=0):
    assert result[0] == code and result[2] == "", result
    found = json.loads(result[1])
    return found, {row["step"]: row for row in found["steps"]}


def rewrite(path: Path, step: int, change) -> dict:
    """Changes the record of a step; what it was."""
    records, unreadable = read_lines(path)
    assert not unreadable
    (record,) = [each for each in records if each["step"] == step]
    old = dict(record)
    change(record)
    path.write_text("".join(json.dumps(each) + "\n" for each in records if each))
    return old


@pytest.mark.parametrize(
    "name, first, last", [("plain", 20, 33), pytest.param("many", 10, 13, marks=pytest.mark.slow)]
)
def test_every_step_comes_out_bit_equal(runs, call, tiny_text, name, first, last):
    model_dir = runs(name)
    programs = set((tiny_text.folder / "xla").glob("jit_train_step-*-cache"))
    result = call(model_dir / "checkpoints" / str(first), f"--step={last}", "--json")
    found, steps = rows(result)
    assert list(steps) == list(range(first + 1, last + 1))
    assert found["equal"] is True and not found["notes"]
    # The program of the run itself, which nothing had to be compiled for.
    assert programs and set((tiny_text.folder / "xla").glob("jit_train_step-*-cache")) == programs
    recorded = {record["step"]: record for record in tiny_run.records(model_dir)}
    for step, row in steps.items():  # against the file itself
        assert row["loss"] == recorded[step]["loss"]
        assert row["grad_norm"] == recorded[step]["grad_norm"]
        assert row["is_taken"] and row["samples"] == [[8 * step - 8, 8 * step]]
        assert [each["source"] for each in row["recorded"]] == ["metrics.jsonl"]
    assert found["num_devices"] == (4 if name == "many" else 1)


def test_from_the_command_line(runs, tmp_path):
    """As a person types it, while a save seems to go on; the newest checkpoint before the step."""
    model_dir = tmp_path / "copy"
    shutil.copytree(runs("plain"), model_dir)
    leftover = model_dir / "checkpoints" / "50.orbax-checkpoint-tmp"
    leftover.mkdir()
    before = _content(model_dir)
    tool = str(tiny_run.REPOSITORY / "tools" / "replay.py")
    command = [sys.executable, tool, f"--checkpoint={model_dir}", "--step=32"]
    result = tiny_run.execute(command)
    assert result.returncode == 0 and result.stderr == "", result
    lines = result.stdout.splitlines()
    assert lines[0] == f"{model_dir}: from checkpoint 30 to step 32"
    assert [line.split()[0] for line in lines[2:4]] == ["31", "32"]
    assert all(line.endswith("bit-equal in metrics.jsonl") for line in lines[2:4])
    assert lines[4] == "2 of 2 steps are bit-equal to their record" and len(lines) == 5
    assert _content(model_dir) == before and leftover.is_dir()


def test_from_the_weights_before_the_first_step(runs, call):
    _, steps = rows(call(runs("plain") / "checkpoints" / "0", "--step=3", "--json"))
    assert list(steps) == [1, 2, 3] and all(row["equal"] for row in steps.values())


def test_one_bit_of_a_record_is_seen(runs, call, tmp_path):
    model_dir = tmp_path / "copy"
    shutil.copytree(runs("plain"), model_dir)
    metrics, superseded = model_dir / "metrics.jsonl", model_dir / "metrics.superseded.jsonl"

    def next_float(record):
        record["grad_norm"] = float(np.nextafter(np.float32(record["grad_norm"]), np.float32(9)))

    old = rewrite(metrics, 22, next_float)
    superseded.write_text(json.dumps(old) + "\n")  # as if the step had been done twice
    code, out, _ = call(model_dir / "checkpoints" / "20", "--step=23")
    assert code == 3
    line = out.splitlines()[3]
    assert "DIFFERENT in metrics.jsonl" in line
    assert line.endswith("; bit-equal in metrics.superseded.jsonl")
    assert "1 of 3 steps differ from their record, the first is 22" in out
    # Without a record in metrics.jsonl, the superseded one is what there is.
    rewrite(metrics, 22, dict.clear)
    code, out, _ = call(model_dir / "checkpoints" / "20", "--step=22")
    assert code == 0 and out.splitlines()[3].endswith("bit-equal in metrics.superseded.jsonl")
    superseded.write_text("{\n")
    code, out, _ = call(model_dir / "checkpoints" / "20", "--step=22")
    assert code == 0 and "no record" in out and "1 have none" in out
    assert f"{superseded}: cannot read 1 lines, the first: 1" in out
    metrics.unlink()
    code, out, _ = call(model_dir / "checkpoints" / "20", "--step=22")
    assert code == 3 and "there is no record to compare with" in out


def test_a_step_computed_wrong_is_found(runs, call):
    """One bit of a parameter was another after step 22: the first step that used it is the first that differs."""
    found, steps = rows(call(runs("flip") / "checkpoints" / "20", "--step=30", "--json"), code=3)
    assert [step for step, row in steps.items() if not row["equal"]][0] == 23
    assert steps[21]["equal"] and steps[22]["equal"]
    assert "journal.jsonl: fault flip_bit at step 22" in found["notes"]


@pytest.mark.slow
def test_the_culprit_of_a_nan(runs, call):
    """Sample 178 of step 23; the record of the step has null, the journal nan."""
    model_dir = runs("skip")
    result = call(
        model_dir / "checkpoints" / "20", "--step=23", "--json", "--worst=8", "--without_samples=178"
    )  # fmt: skip
    found, steps = rows(result)
    assert steps[23]["loss"] == "nan" and not steps[23]["is_taken"] and steps[23]["equal"]
    assert steps[23]["recorded"][0]["source"] == "metrics.jsonl and journal.jsonl"
    worst = found["worst"]
    assert worst[0]["sample"] == 178 and worst[0]["loss"] == "nan"
    assert {each["sample"] for each in worst} == set(range(176, 184))
    own = [each["loss"] for each in worst[1:]]
    assert own == sorted(own, reverse=True)
    # The loss of a step is the mean over its samples: here of those that remain.
    assert found["without"]["loss"] == pytest.approx(np.mean(own), rel=1e-5)
    assert found["without"]["is_taken"] and found["without"]["samples"] == [178]
    # The steps after it come out, too: nothing of it was taken.
    _, steps = rows(call(model_dir / "checkpoints" / "20", "--step=27", "--json"))
    assert [step for step, row in steps.items() if not row["is_taken"]] == [23]
    assert all(row["equal"] for row in steps.values())


def test_the_halves_of_a_step(runs, call):
    """The loss without the first half of its samples, and that without the second, have its loss as their mean."""
    checkpoint = runs("plain") / "checkpoints" / "30"
    halves = []
    for half in ("240-243", "244-247"):
        found, steps = rows(call(checkpoint, f"--without_samples={half}", "--json"))
        assert steps[31]["equal"]
        halves.append(found["without"])
    assert np.mean([half["loss"] for half in halves]) == pytest.approx(steps[31]["loss"], rel=1e-5)
    # Half a batch has a noisier gradient: |g|^2 of the whole cannot exceed the mean of the halves'.
    assert steps[31]["grad_norm"] ** 2 < np.mean([half["grad_norm"] ** 2 for half in halves])
    code, out, _ = call(checkpoint, "--without_samples=240-242, 247", "--worst=2")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[3:5]] == ["with", "without"]
    assert "with the highest loss" in lines[5] and "  sample " in lines[6]


@pytest.mark.slow
def test_a_rolled_back_step_is_taken_with_and_without_its_samples(runs, call):
    model_dir = runs("rollback")
    assert json.loads((model_dir / "skipped_samples.json").read_text()) == {"ranges": [[176, 184]]}
    checkpoint = model_dir / "checkpoints" / "20"
    found, steps = rows(call(checkpoint, "--step=25", "--json"))
    assert steps[23]["samples"] == [[184, 192]] and found["equal"] is True
    assert [each["source"] for each in steps[22]["recorded"]] == [
        "metrics.jsonl", "metrics.superseded.jsonl"
    ]  # fmt: skip
    (note,) = [each for each in found["notes"] if "--before_rollback" in each]
    assert "steps 23 to 23 once had the samples 176-183" in note
    # As it was taken the first time.
    found, steps = rows(call(checkpoint, "--step=23", "--before_rollback", "--worst=4", "--json"))
    assert steps[23]["samples"] == [[176, 184]] and not steps[23]["is_taken"]
    assert steps[23]["recorded"][0]["source"] == "journal.jsonl" and steps[23]["equal"]
    assert all(row["equal"] for row in steps.values())
    journal = map(json.loads, (model_dir / "journal.jsonl").read_text().splitlines())
    (incident,) = [event for event in journal if event["event"] == "spike"]
    assert steps[23]["limits"] == incident["limits"]
    assert {each["sample"] for each in found["worst"]} == {176, 177, 178, 179}
    # A checkpoint after the roll back knows what was deleted, even if the file is gone.
    _, steps = rows(call(model_dir / "checkpoints" / "30", "--before_rollback", "--json"))
    assert steps[31]["samples"] == [[248, 256]] and steps[31]["equal"]


def test_a_record_of_other_devices(runs, call, tmp_path):
    model_dir = tmp_path / "copy"
    shutil.copytree(runs("plain"), model_dir)
    journal = model_dir / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"num_devices": 1,', '"num_devices": 384,'))
    code, out, _ = call(model_dir / "checkpoints" / "20")
    assert code == 0 and "step 21 was recorded on 384 x cpu in 1 process with jax" in out
    assert "this is 1 x cpu in 1 process" in out and "equal bits cannot be expected" in out


def test_a_damaged_checkpoint_is_named_and_stays(runs, call, tmp_path):
    model_dir = tmp_path / "copy"
    shutil.copytree(runs("plain"), model_dir)
    files = [path for path in (model_dir / "checkpoints" / "30" / "state").rglob("*")]
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, out, err = call(model_dir / "checkpoints" / "30")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "checkpoints/30 is damaged" in err and largest.name in err
    assert call(model_dir / "checkpoints" / "20")[0] == 0


@pytest.mark.parametrize(
    "where, flags, message",
    [
        ("checkpoints/20", ["--step=20"], "the first step after checkpoint 20 is 21"),
        ("", ["--step=0"], "steps are numbered from 1"),
        ("", ["--step=15"], "no checkpoint before step 15 in .*; there are: 20, 30, 40 .*/0 means"),
        ("checkpoints/25", [], "no checkpoint of step 25 in .*; there are: 20, 30, 40"),
        ("checkpoints/damaged-20", [], "damaged-20 is not the number of a step"),
        ("nothing", [], "there is no folder .*nothing"),
        ("checkpoints/20/state", [], "has no config.gin"),
        ("checkpoints/20", ["--without_samples=8-5"], "write numbers and ranges, such as"),
        ("checkpoints/20", ["--without_samples=3,x"], "write numbers and ranges, such as"),
        ("checkpoints/20", ["--without_samples=0-99999999999"], "write numbers and ranges"),
        ("checkpoints/20", ["--without_samples=160,7"], "7 is not in step 21; .* 160-167"),
        ("checkpoints/20", ["--without_samples=160-167"], "nothing would be left; step 21"),
        ("checkpoints/20", ["--worst=-1"], "worst"),
        ("checkpoints/20", ["--gin.SEED=4"], "seed"),
        ("checkpoints/20", ["--gin.NUM_LAYERS=3"], "num_layers"),
        ("checkpoints/20", ["--gin.STORE_DIR='none'"], "none"),
        ("checkpoints/20", ["--gin_file=none.gin"], "no gin file 'none.gin'"),
        ("checkpoints/20", ["runs/tiny"], "unexpected argument"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed(runs, call, where, flags, message):
    code, out, err = call(runs("plain") / where, *flags)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert re.search(message, err), err


def test_the_checkpoint_must_be_given(capsys):
    with pytest.raises(SystemExit) as end:
        replay.main(["replay"])
    assert end.value.code == 1 and "--checkpoint=MODEL_DIR or" in capsys.readouterr().err
