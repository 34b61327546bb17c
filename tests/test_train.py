"""Whole runs: to the bit the same however they are interrupted, and refused in one line when something does not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import NUM_STEPS, FirstDevices, Text, tiny_model

from bloomjax import token_store
from bloomjax.data import OpenTrainData, TrainData
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.preflight import check_device
from bloomjax.schedules import BatchSchedule, CosineSchedule
from bloomjax.train_state import abstract_state
from bloomjax.train_step import StepOptions, jit_programs
from bloomjax.vocabulary import train_sentencepiece

TIMES = ("seconds", "tokens_per_second", "mfu")
EIGHT = FirstDevices(data=2, fsdp=4, num=8)


def timeless(model_dir):
    """The records of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in tiny_run.records(model_dir)]


def journal(model_dir):
    return [json.loads(line) for line in (model_dir / "journal.jsonl").read_text().splitlines()]


def assert_same_run(model_dir, undisturbed):
    """Each step once, every number and the final state equal to the last bit."""
    assert [r["step"] for r in tiny_run.records(model_dir)] == list(range(NUM_STEPS + 1))
    assert timeless(model_dir) == timeless(undisturbed)
    assert tiny_run.fingerprints(model_dir) == tiny_run.fingerprints(undisturbed)
    checkpoints = model_dir / "checkpoints"
    assert not list(checkpoints.glob("*tmp*")) and (checkpoints / str(NUM_STEPS)).is_dir()


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


# ---- what a run leaves behind ----


def test_records_of_a_run(tiny_text, undisturbed):
    records = tiny_run.records(undisturbed)
    assert [r["step"] for r in records] == list(range(NUM_STEPS + 1))
    schedule = CosineSchedule(3e-3, 3e-4, 40, 400)
    for record in records:
        step = record["step"]
        assert record["samples"] == 8 * step and record["tokens"] == 8 * 16 * step
        assert record["learning_rate"] == schedule(8 * step)  # as Megatron logs it: after the step
        assert ("loss_by_language" in record) == (step in (0, 20, 40))
        if step:
            assert record["batch_size"] == 8 and record["grad_norm"] > 0
            assert record["tokens_per_second"] > 0 and record["seconds"] > 0
    first, last = records[0], records[-1]
    assert set(first["loss_by_language"]) == {"aa", "bb", "cc"}
    assert first["validation_loss"] == pytest.approx(np.log(320), abs=0.1)  # nothing is known yet
    assert first["validation_loss"] == pytest.approx(records[1]["loss"], abs=0.1)
    assert last["validation_loss"] < 0.7 * first["validation_loss"]
    assert last["validation_loss"] == pytest.approx(
        np.mean(list(last["loss_by_language"].values()))
    )
    files = {path.name for path in undisturbed.iterdir()}
    assert files >= {"metrics.jsonl", "journal.jsonl", "vocabulary", "checkpoints"}
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["20", "30", "40"]
    kept = undisturbed / "vocabulary" / tiny_text.vocabulary.path.name
    assert kept.read_bytes() == tiny_text.vocabulary.path.read_bytes()
    events = journal(undisturbed)
    assert [e["event"] for e in events] == ["start", "save", "save", "save", "save", "done"]
    assert [e["step"] for e in events] == [0, 10, 20, 30, 40, 40]


def test_the_loss_is_that_of_the_samples_and_parameters(tiny_text, undisturbed):
    """Steps 1 and 2, by a float64 softmax on the logits of the initial model.

    The first update is by lr(0 samples) = 0, so step 2 still has the initial parameters.
    """
    model = tiny_model(dtype="float32")
    mesh = FirstDevices().build()
    abstract = abstract_state(model, adamw(), mesh)
    params = jit_programs(model, adamw(), StepOptions(), mesh, abstract)[0](3).params
    rows = tiny_run.arguments(tiny_text, undisturbed)["train_data"].open().rows(np.arange(24))

    @jax.jit
    def logits(params, tokens):
        hidden = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, hidden, method="logits")

    z = np.asarray(logits(params, rows[:, :-1]), np.float64)
    lse = np.log(np.exp(z).sum(-1))
    nll = lse - np.take_along_axis(z, rows[:, 1:, None], -1)[..., 0]
    of_steps = nll.reshape(3, 8, 16).mean((1, 2))
    losses = tiny_run.losses(undisturbed)
    assert losses[1] == pytest.approx(of_steps[0], rel=2e-4)  # bfloat16 there
    assert losses[2] == pytest.approx(of_steps[1], rel=2e-4)
    assert losses[3] < of_steps[2] * (1 - 1e-3)  # something was learnt


# ---- the same run, interrupted ----


def test_twenty_and_twenty_are_forty(tiny_text, undisturbed, tmp_path, capsys):
    model_dir = tmp_path / "run"
    assert tiny_run.run(tiny_text, model_dir, train_steps=20) == 0
    assert [r["step"] for r in tiny_run.records(model_dir)] == list(range(21))
    capsys.readouterr()
    # TRAIN_STEPS raised, and given in samples.
    assert tiny_run.run(tiny_text, model_dir, train_steps=None, train_samples=40 * 8 + 7) == 0
    assert "goes on after step 20, 40 steps in all" in capsys.readouterr().out
    assert_same_run(model_dir, undisturbed)
    assert not (model_dir / "metrics.superseded.jsonl").exists()


def test_when_all_is_done_it_says_so_and_how_to_go_further(tiny_text, finished, capsys):
    before = tiny_run.tree(finished)
    assert tiny_run.run(tiny_text, finished) == 0
    out = capsys.readouterr().out
    assert "all 40 steps are done; to go further raise TRAIN_STEPS" in out
    assert "--gin.TRAIN_STEPS=80" in out
    assert "held-out loss in nats a token, step 0 -> step 40" in out
    assert f"checkpoint: {finished}/checkpoints/40" in out
    after = tiny_run.tree(finished)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"journal.jsonl", "config.gin"}


def test_fewer_steps_than_are_done(tiny_text, finished, capsys):
    before = timeless(finished)
    assert tiny_run.run(tiny_text, finished, train_steps=30) == 0
    out = capsys.readouterr().out
    assert "40 steps are done" in out and "TRAIN_STEPS" in out
    assert timeless(finished) == before
    assert tiny_run.fingerprints(finished)


class SignalAt:
    """A writer that sends this process a signal when the record of a step is written."""

    def __init__(self, step, number):
        self._step, self._number = step, number

    def __call__(self, logdir, first_step):
        return self

    def write_scalars(self, step, scalars):
        if step == self._step:
            os.kill(os.getpid(), self._number)

    def write_texts(self, step, texts):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def test_sigterm_saves_and_asks_for_a_restart(tiny_text, undisturbed, tmp_path, capsys):
    model_dir = tmp_path / "run"
    writer = SignalAt(16, signal.SIGTERM)
    assert tiny_run.run(tiny_text, model_dir, writer=writer) == 75
    assert (
        "stopped by SIGTERM after step 17, saved; the same command goes on"
        in capsys.readouterr().out
    )
    assert (model_dir / "checkpoints" / "17").is_dir()
    assert [r["step"] for r in tiny_run.records(model_dir)] == list(range(18))
    stop = journal(model_dir)[-1]
    assert (stop["event"], stop["step"], stop["signal"]) == ("stop", 17, "SIGTERM")
    # Once more, at a step that is saved and evaluated anyway.
    assert tiny_run.run(tiny_text, model_dir, writer=SignalAt(19, signal.SIGUSR1)) == 75
    assert tiny_run.run(tiny_text, model_dir) == 0
    assert_same_run(model_dir, undisturbed)


class Metric:
    """A number of a step that notes when the host reads it."""

    def __init__(self, value, note):
        self.value, self.note = value, note

    def __float__(self):
        self.note()
        return float(self.value)

    def __bool__(self):
        self.note()
        return bool(self.value)


def test_the_host_reads_a_step_while_the_next_one_runs(tiny_text, tmp_path, monkeypatch):
    """Nothing but learning rate and limits reaches the devices unasked; only before a save, an evaluation and a
    compilation are numbers read of the newest step."""
    dispatched, read_early = [], set()

    def programs(*arguments):
        init, from_params, train_step, eval_step = jit_programs(*arguments)

        def step(state, batch, rate, key, limits):
            number = len(dispatched) + 1
            dispatched.append(number)
            rate, limits = jax.device_put((rate, limits))
            with jax.transfer_guard("disallow_explicit"):
                state, metrics = train_step(state, batch, rate, key, limits)
            note = lambda: dispatched[-1] == number and read_early.add(number)  # noqa: E731
            return state, {name: Metric(value, note) for name, value in metrics.items()}

        return init, from_params, step, eval_step

    monkeypatch.setattr("bloomjax.train.jit_programs", programs)
    tiny_run.run(tiny_text, tmp_path / "run")
    assert dispatched == list(range(1, NUM_STEPS + 1))
    assert read_early == {10, 20, 30, 40}  # saved after each


@pytest.mark.parametrize("died", ["before its record", "in its record", "before its evaluation"])
def test_died_between_a_save_and_its_record(tiny_text, undisturbed, finished, died):
    for step in (30, 40):
        shutil.rmtree(finished / "checkpoints" / str(step))
    path = finished / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept, record = lines[:20], json.loads(lines[20])
    assert record["step"] == 20
    if died == "in its record":
        kept.append(lines[20][:30])
    elif died == "before its evaluation":
        del record["loss_by_language"], record["validation_loss"]
        kept.append(json.dumps(record) + "\n")
    path.write_text("".join(kept))
    assert tiny_run.run(tiny_text, finished) == 0
    assert_same_run(finished, undisturbed)


def test_a_damaged_checkpoint_costs_only_time(tiny_text, undisturbed, finished):
    for step in (30, 40):
        files = [
            p for p in (finished / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()
        ]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert tiny_run.run(tiny_text, finished) == 0
    assert_same_run(finished, undisturbed)
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert names == {"20", "30", "40", "damaged-30", "damaged-40"}
    cut = (finished / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in cut] == list(range(21, 41))


def test_an_error_in_the_middle_does_not_lose_the_save_before_it(
    tiny_text, undisturbed, tmp_path, monkeypatch
):
    model_dir = tmp_path / "run"
    batch = OpenTrainData.batch

    def broken(self, step, *args):
        if step == 11:
            raise BadInput("a chunk is damaged")
        return batch(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OpenTrainData, "batch", broken)
        with pytest.raises(BadInput, match="a chunk is damaged"):
            tiny_run.run(tiny_text, model_dir)
    assert [path.name for path in (model_dir / "checkpoints").iterdir()] == ["10"]
    assert tiny_run.run(tiny_text, model_dir) == 0
    assert_same_run(model_dir, undisturbed)


def test_all_checkpoints_damaged(tiny_text, finished):
    for path in (finished / "checkpoints").rglob("ocdbt.process_0"):
        shutil.rmtree(path)
    before = tiny_run.tree(finished)
    with pytest.raises(BadInput, match="/checkpoints/40 is damaged: .* no other of the steps"):
        tiny_run.run(tiny_text, finished)
    assert tiny_run.tree(finished) == before


@pytest.fixture(scope="module")
def float32_run(tiny_text, tmp_path_factory):
    """Losses of 40 steps of 12 samples in float32 on one device."""
    model_dir = tmp_path_factory.mktemp("float32") / "run"
    assert tiny_run.run(tiny_text, model_dir, **FLOAT32) == 0
    return tiny_run.losses(model_dir)


FLOAT32 = dict(model=tiny_model(dtype="float32"), batch_schedule=BatchSchedule(12))


@pytest.mark.slow
def test_half_on_one_device_and_half_on_eight(tiny_text, float32_run, tmp_path, capsys):
    """The batch of 12 is filled to 16 rows on 8 devices."""
    model_dir = tmp_path / "run"
    assert tiny_run.run(tiny_text, model_dir, train_steps=20, **FLOAT32) == 0
    assert "weight 0" not in capsys.readouterr().out
    assert tiny_run.run(tiny_text, model_dir, mesh=EIGHT, **FLOAT32) == 0
    out = capsys.readouterr().out
    assert "from step 1: batch 12 runs as 16 rows, 25.0% of them with weight 0" in out
    losses = tiny_run.losses(model_dir)
    assert [losses[s] for s in range(1, 21)] == [float32_run[s] for s in range(1, 21)]
    np.testing.assert_allclose([*losses.values()], [*float32_run.values()], rtol=1e-5)


@pytest.mark.slow
def test_filled_rows_change_nothing(tiny_text, float32_run, tmp_path):
    model_dir = tmp_path / "run"
    assert tiny_run.run(tiny_text, model_dir, mesh=EIGHT, train_steps=10, **FLOAT32) == 0
    losses = tiny_run.losses(model_dir)
    assert list(losses) == list(range(1, 11))
    np.testing.assert_allclose([*losses.values()], [*float32_run.values()][:10], rtol=1e-5)
    assert tiny_run.records(model_dir)[-1]["samples"] == 120


# ---- the same run as commands, killed ----


def end_when(condition, command, number) -> int:
    """Starts `command`, sends it `number` as soon as `condition()` holds; its exit code."""
    process = subprocess.Popen(
        command,
        env=tiny_run.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 600
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "nothing happened in ten minutes"
        time.sleep(0.0005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    # A run that ended on its own was not interrupted: the steps must be slower.
    assert process.returncode not in (0, 1, 97), output
    return process.returncode


def num_records(model_dir):
    path = model_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_in_a_save(command, model_dir) -> None:
    """kill -9 while a checkpoint lies under its temporary name."""
    temporary = "*.orbax-checkpoint-tmp"
    checkpoints = model_dir / "checkpoints"
    for _ in range(3):  # in case it got its final name in the last moment
        code = end_when(lambda: any(checkpoints.glob(temporary)), command, signal.SIGKILL)
        assert code == -signal.SIGKILL
        if any(checkpoints.glob(temporary)):
            return
    raise AssertionError("no save was hit")


def steps_saved(model_dir):
    return {int(p.name) for p in (model_dir / "checkpoints").iterdir() if p.name.isdigit()}


@pytest.mark.slow
def test_killed_during_a_save(tiny_text, undisturbed, tmp_path):
    """By the command line; none of the commands loads TensorFlow (see tiny_run.environment)."""
    model_dir = tmp_path / "run"
    command = tiny_run.command(tiny_text, model_dir)
    kill_in_a_save([*command, "--gin.train.writer=@SlowWriter"], model_dir)

    done = tiny_run.execute([*command, "--gin.train.sample_prompts=('ba', 'δι')"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(model_dir, undisturbed)
    assert (model_dir / "metrics.superseded.jsonl").exists()
    assert list(model_dir.glob("events.out.tfevents.*"))
    assert "samples (temperature 0.8, top-p 0.9):\n  ba|" in done.stdout
    assert f"checkpoint: {model_dir}/checkpoints/40" in done.stdout
    assert done.stderr == ""

    generate = [*command[:2], "bloomjax.generate", f"--checkpoint={model_dir}"]
    generated = tiny_run.execute([*generate, "--prompt=ba ke", "--prompt=δι"])
    assert generated.returncode == 0 and generated.stderr == "", generated.stderr
    first, second = generated.stdout.splitlines()
    assert first.startswith("ba ke") and len(first) > 6 and second.startswith("δι")


@pytest.mark.slow
def test_killed_three_times_and_stopped_once(tiny_text, undisturbed, tmp_path):
    model_dir = tmp_path / "run"
    command = tiny_run.command(tiny_text, model_dir)
    slow = [*command, "--gin.train.writer=@SlowWriter"]
    # kill -9 before the first save: everything is done again.
    assert end_when(lambda: num_records(model_dir) >= 4, slow, signal.SIGKILL) == -signal.SIGKILL
    assert not steps_saved(model_dir)
    # SIGTERM in the middle.
    assert end_when(lambda: num_records(model_dir) >= 6, slow, signal.SIGTERM) == 75
    assert num_records(model_dir) - 1 in steps_saved(model_dir)
    # kill -9 during a save, and some steps after one.
    kill_in_a_save(slow, model_dir)
    step = max(*steps_saved(model_dir), 20) + 4
    assert end_when(lambda: num_records(model_dir) > step, slow, signal.SIGKILL) == -signal.SIGKILL
    assert num_records(model_dir) <= NUM_STEPS
    done = tiny_run.execute(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(model_dir, undisturbed)
    # What was run is in MODEL_DIR, and can be run from there.
    again = tiny_run.execute([*command[:3], f"--gin_file={model_dir}/config.gin"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert "all 40 steps are done" in again.stdout


# ---- refused ----


def other_text(tmp_path) -> Text:
    (tmp_path / "other").mkdir()
    return Text(tmp_path / "other", seed=1)


def data_with(text, **changes):
    found = dict(store_dir=str(text.store_dir), sequence_length=16, seed=3)
    return TrainData(**(found | changes))


OTHER_RUNS = {
    "layers": (
        dict(model=tiny_model(num_layers=3)),
        "other model: there num_layers=2, here num_layers=3",
    ),
    "width": (dict(model=tiny_model(emb_dim=64)), "other model: there emb_dim=32"),
    "vocabulary rows": (
        dict(model=tiny_model(vocab_size=384)),
        "other model: there vocab_size=320",
    ),
    "seed of the data": (dict(seed=4), "other data: there seed=3, here seed=4"),
    "sequence": (
        dict(sequence_length=8),
        "other data: there sequence_length=16, here sequence_length=8",
    ),
    "shares": (
        dict(weights={"aa": 1.0, "bb": 1.0, "cc": 2.0}),
        "other data: there shares={'aa': 0.",
    ),
    "languages": (dict(weights={"aa": 1.0, "cc": 1.0}), "other data: there shares={'aa': 0."),
    "temperature": (dict(temperature=3.0), "other data: there shares={'aa': 0."),
    "batch": (
        dict(batch_schedule=BatchSchedule(16)),
        "had consumed 320 samples after step 40; this batch ",
    ),
    "ramp": (
        dict(batch_schedule=BatchSchedule(8, 4, 4, 40)),
        "had consumed 320 samples after step 40",
    ),
    "optimizer": (
        dict(optimizer=adamw(first_moment_dtype="bfloat16")),
        "has other arrays in 17 places",
    ),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_model_dir_of_another_run_is_refused(tiny_text, finished, name):
    changes, message = OTHER_RUNS[name]
    data = {
        k: changes[k] for k in ("seed", "sequence_length", "weights", "temperature") if k in changes
    }
    if data:
        changes = dict(train_data=data_with(tiny_text, **data))
    # Perhaps another process is saving here right now.
    (finished / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    before = tiny_run.tree(finished)
    with pytest.raises(BadInput) as error:
        tiny_run.run(tiny_text, finished, **({"train_steps": 80} | changes))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(finished) in str(error.value)
    assert tiny_run.tree(finished) == before


def test_another_text_is_refused(finished, tmp_path):
    text = other_text(tmp_path)
    before = tiny_run.tree(finished)
    with pytest.raises(
        BadInput, match="holds a run with other data: there store=.*take another MODEL_DIR"
    ):
        tiny_run.run(text, finished)
    assert tiny_run.tree(finished) == before


BAD = {
    "both lengths": (
        dict(train_samples=80), "exactly one of TRAIN_STEPS and TRAIN_SAMPLES must be set, both are"
    ),
    "no length": (
        dict(train_steps=None), "exactly one of TRAIN_STEPS and TRAIN_SAMPLES must be set, neither is"
    ),
    "no step": (dict(train_steps=0), "TRAIN_STEPS must be a whole number of at least 1"),
    "too few samples": (
        dict(train_steps=None, train_samples=7), "TRAIN_SAMPLES=7 does not fill the first batch of 8"
    ),
    "mesh": (
        dict(mesh=MeshShape(data=3, fsdp=1)), "mesh data=3 x fsdp=1 x tensor=1 does not fit the 8 devices"
    ),
    "mesh that leaves devices": (dict(mesh=MeshShape(2, 2, 1)), "does not fit the 8 devices"),
    "heads": (dict(mesh=MeshShape(1, 1, 8)), "num_heads=4 cannot be split over mesh axis tensor=8"),
    "filling": (
        dict(mesh=MeshShape(8, 1, 1), batch_schedule=BatchSchedule(1)), "fills only 12% of the 8 rows"
    ),
    "parameters": (
        dict(model=tiny_model(expected_params=36_000)), "has 35,776 parameters, expected_params says 36,000"
    ),
    "embedding": (dict(model=tiny_model(vocab_size=256)), "has 320 tokens, the embedding only 256 rows"),
    "vocabulary": (dict(vocabulary_path="/nowhere/v.model"), "there is no vocabulary /nowhere/v.model"),
    "held out": (
        dict(train_data=dict(sequence_length=300)), "no held-out window of 300 tokens in: aa, bb, cc"
    ),
    "train": (dict(train_data=dict(sequence_length=10_000)), "no training window in: aa, bb, cc"),
    "language": (dict(train_data=dict(weights={"aa": 1.0, "zz": 1.0})), "the mixture names zz, which"),
    "store": (dict(train_data=dict(store_dir="/nowhere/tokens")), "there is no token store /nowhere/tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_text, tmp_path, name):
    changes, message = BAD[name]
    if "train_data" in changes:
        changes = changes | {"train_data": data_with(tiny_text, **changes["train_data"])}
    with pytest.raises(BadInput) as error:
        tiny_run.run(tiny_text, tmp_path / "run", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_did_not_make_the_store(tiny_text, tmp_path):
    path = tmp_path / "another.model"
    train_sentencepiece(tiny_text.documents["aa"] + tiny_text.documents["bb"], path, 300)
    with pytest.raises(
        BadInput, match=r"another\.model \(sha256 .*\) did not make the store .*/tokens"
    ) as error:
        tiny_run.run(tiny_text, tmp_path / "run", vocabulary_path=str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_bit_in_the_store_is_named(tiny_text, tmp_path, split):
    store_dir = shutil.copytree(tiny_text.store_dir, tmp_path / "tokens")
    (path,) = (p for p in (store_dir / "bb" / split / "tokens" / "c").rglob("*") if p.is_file())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(bytes(raw))
    with pytest.raises(
        BadInput, match=f"{store_dir}: bb {split} tokens .* cannot be read"
    ) as error:
        tiny_run.run(
            tiny_text, tmp_path / "run", train_data=data_with(tiny_text, store_dir=str(store_dir))
        )
    assert "\n" not in str(error.value)


def test_a_missing_store_is_prepared_once(tiny_text, tmp_path, monkeypatch):
    """By the subprocess that `prepare` names; its exit code is ours."""
    from bloomjax import preflight

    store_dir = tmp_path / "tokens"
    calls = []

    def fake():
        calls.append(1)
        if len(calls) == 1:
            return 1
        token_store.write_store(store_dir, tiny_text.documents, tiny_text.vocabulary)
        return 0

    monkeypatch.setattr(preflight, "prepare_in_subprocess", fake)
    data = data_with(tiny_text, store_dir=str(store_dir))
    changes = dict(train_data=data, prepare=lambda: None, train_steps=2)
    assert tiny_run.run(tiny_text, tmp_path / "run", **changes) == 1
    assert not (tmp_path / "run").exists()
    assert tiny_run.run(tiny_text, tmp_path / "run", **changes) == 0
    assert tiny_run.run(tiny_text, tmp_path / "run", **changes) == 0
    assert len(calls) == 2


def test_model_dir_is_a_file(tiny_text, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(BadInput, match="MODEL_DIR .*/run cannot be written"):
        tiny_run.run(tiny_text, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


# ---- one run at a time, and none into NaN ----


def test_a_second_process_on_the_model_dir_is_refused(tiny_text, undisturbed, tmp_path):
    model_dir = tmp_path / "run"
    before = {}

    def second(logdir, first_step):
        return Second()

    class Second:
        def write_scalars(self, step, scalars):
            if step == 15:
                before["files"] = sorted(model_dir.rglob("*"))
                with pytest.raises(BadInput, match=rf"pid {os.getpid()} on .* trains in MODEL_DIR"):
                    tiny_run.run(tiny_text, model_dir)

        def write_texts(self, step, texts):
            pass

        def flush(self):
            pass

        def close(self):
            pass

    assert tiny_run.run(tiny_text, model_dir, writer=second) == 0
    assert before["files"]
    assert_same_run(model_dir, undisturbed)


def test_a_loss_that_is_not_finite_is_never_saved(tiny_text, tmp_path):
    model_dir = tmp_path / "run"
    wild = CosineSchedule(1e30, 1e30, 0, 400)
    with pytest.raises(BadInput, match=r"step \d+ \(samples \d+ to \d+\) has loss .*nothing of it"):
        tiny_run.run(tiny_text, model_dir, learning_rate=wild)
    incident = journal(model_dir)[-1]
    assert incident["event"] == "not_finite"
    step = incident["step"]
    assert incident["samples"] == [[8 * (step - 1), 8 * step]]
    assert sum(incident["languages"].values()) == 8 and incident["action"] == "stop"
    steps = [int(p.name) for p in (model_dir / "checkpoints").iterdir() if p.name.isdecimal()]
    assert all(step < incident["step"] for step in steps)
    assert [r["step"] for r in tiny_run.records(model_dir)] == list(range(incident["step"]))


def test_evaluation_interval_must_be_positive(tiny_text, tmp_path):
    with pytest.raises(BadInput, match="eval_every_steps must be at least 1, got 0"):
        tiny_run.run(tiny_text, tmp_path / "run", eval_every_steps=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_of_tiny_gin_without_tensorflow(tmp_path):
    """The shipped configuration as a user runs it, once prepared: TensorFlow would end it with code 97."""
    pytest.importorskip("seqio", reason="prepare needs the extra `data`")
    command = [sys.executable, "-m", "bloomjax.train", "--gin_file=tiny.gin"]
    refused = subprocess.run(
        command, cwd=tmp_path, env=tiny_run.environment(), capture_output=True, check=False
    )
    assert refused.returncode == 97  # the guard works: without a store, train starts prepare
    prepare = [sys.executable, "-m", "bloomjax.prepare", "--gin_file=tiny.gin"]
    plain = os.environ | {"PYTHONPATH": str(tiny_run.REPOSITORY)}
    subprocess.run(prepare, cwd=tmp_path, env=plain, capture_output=True, check=True)
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = tiny_run.records(tmp_path / "runs" / "tiny")
    assert [r["step"] for r in records] == list(range(301))
    assert records[-1]["validation_loss"] <= 0.7 * records[0]["validation_loss"]
    assert len(records[-1]["loss_by_language"]) == 59
    assert "checkpoint: runs/tiny/checkpoints/300" in done.stdout


def test_what_the_device_cannot_do(mesh_of):
    def check(options=None, **changes):
        shape = dict(vocab_size=8, num_layers=1, emb_dim=8, num_heads=2)
        check_device(Bloom(BloomConfig(**shape, **changes)), mesh_of(1, 1, 1), options)

    check()
    check({"xla_cpu_enable_fast_math": False})
    with pytest.raises(BadInput, match="'flash_tpu' is for TPUs, and this is a CPU; 'auto' takes"):
        check(attention_kernel="flash_tpu")
    with pytest.raises(
        BadInput, match="StepOptions.compiler_options on cpu: .*xla_nonsense"
    ) as caught:
        check({"xla_nonsense": 1})
    assert "\n" not in str(caught.value)
