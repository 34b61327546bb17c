"""Runs in which something goes wrong on purpose: refused steps, roll backs, kill switch, the end of the time."""

import json
import time

import pytest
import tiny_run

from bloomjax.checkpoints import Checkpoints
from bloomjax.data import Phase, TrainData
from bloomjax.errors import EXIT_RESTART, BadInput
from bloomjax.fault import fault
from bloomjax.guard import SpikeGuard
from bloomjax.health import Health
from bloomjax.schedules import BatchSchedule
from bloomjax.stops import StopConditions
from bloomjax.train_step import StepOptions


def journal(model_dir, *events):
    lines = (model_dir / "journal.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not events or e["event"] in events]


def guarded(**options):
    faults = {k: options.pop(k) for k in ("nan_samples", "noise_samples") if k in options}
    options = {"min_steps": 4, "window_steps": 8, "loss_deviations": 3.0} | options
    return Health(guard=SpikeGuard(**options), fault=fault(**faults) if faults else None)


@pytest.fixture(scope="module")
def with_guard(tiny_text, tmp_path_factory):
    """The run with a guard and no incident."""
    model_dir = tmp_path_factory.mktemp("guarded") / "run"
    assert tiny_run.run(tiny_text, model_dir, health=guarded()) == 0
    assert not journal(model_dir, "spike", "not_finite")
    return model_dir


def test_the_guard_changes_nothing(with_guard, undisturbed):
    assert tiny_run.losses(with_guard) == tiny_run.losses(undisturbed)
    assert tiny_run.fingerprints(with_guard) == tiny_run.fingerprints(undisturbed)


@pytest.mark.parametrize("kind", ["nan_samples", "noise_samples"])
def test_a_refused_step_leaves_the_state_and_consumes_its_samples(tiny_text, tmp_path, kind):
    """Compared with a second run in which the update of that step is nothing because its learning rate is 0 and its
    moments do not move: the run until the step before, restored after it."""
    model_dir = tmp_path / "run"
    bad = {kind: (8 * 24, 8 * 24 + (1 if kind == "nan_samples" else 8))}
    options = dict(policy="skip", **bad)
    changes = dict(checkpoints=Checkpoints(save_every_steps=1, keep_last=99))
    assert tiny_run.run(tiny_text, model_dir, health=guarded(**options), **changes) == 0
    (incident,) = journal(model_dir, "spike", "not_finite")
    assert incident["step"] == 25 and incident["samples"] == [[192, 200]]
    assert incident["action"] == "skip" and sum(incident["languages"].values()) == 8
    before, after = (tiny_run.fingerprints(model_dir, step) for step in (24, 25))
    different = {name for name in before if before[name] != after[name]}
    assert different == {".step"}  # not even the count of the optimizer
    assert (
        tiny_run.fingerprints(model_dir, 26)[".opt_state[1].count"] != after[".opt_state[1].count"]
    )
    records = tiny_run.records(model_dir)
    assert [r["samples"] for r in records] == [8 * r["step"] for r in records]
    assert records[25]["refused_steps"] == 1 and records[-1]["refused_steps"] == 1
    if kind == "nan_samples":
        assert incident["event"] == "not_finite" and records[25]["loss"] is None
        assert "NaN" not in (model_dir / "metrics.jsonl").read_text()
    else:
        assert incident["event"] == "spike" and incident["loss"] > incident["limits"][0]
    # The last good one before it is kept besides the newest.
    assert json.loads((model_dir / "checkpoints" / "pinned.json").read_text())["step"] in (
        23,
        24,
    )  # what was whole


@pytest.mark.parametrize("batch", ["constant", "ramp"])
@pytest.mark.parametrize("kind", ["nan_samples", "noise_samples"])
def test_rolled_back_is_as_if_it_had_never_been_seen(tiny_text, tmp_path, kind, batch):
    """Parameters, optimizer and losses to the bit those of a run that was told from the start to skip these samples."""
    schedule = BatchSchedule(8) if batch == "constant" else BatchSchedule(16, 4, 4, 200)
    first = schedule.samples_after(22)
    size = schedule.batch_size(23)
    changes = dict(batch_schedule=schedule)
    model_dir = tmp_path / "run"
    bad = {kind: (first, first + size)}
    health = guarded(policy="rollback", **bad)
    assert tiny_run.run(tiny_text, model_dir, health=health, **changes) == 0
    (incident,) = journal(model_dir, "spike", "not_finite")
    (back,) = journal(model_dir, "rollback")
    assert back["step"] == 23 and back["samples"] == [[first, first + size]]
    assert json.loads((model_dir / "skipped_samples.json").read_text())["ranges"] == back["samples"]

    never = tmp_path / "never"
    data = TrainData(
        store_dir=str(tiny_text.store_dir),
        sequence_length=16,
        seed=3,
        skip_samples=[(first, first + size)],
    )
    assert tiny_run.run(tiny_text, never, health=guarded(), train_data=data, **changes) == 0
    assert not journal(never, "spike", "not_finite", "rollback")
    assert tiny_run.losses(model_dir) == tiny_run.losses(never)
    assert tiny_run.fingerprints(model_dir) == tiny_run.fingerprints(never)
    position = model_dir / "checkpoints" / "40" / "position" / "metadata"
    assert json.loads(position.read_text())["skipped_samples"] == [[first, first + size]]


def test_the_window_may_begin_before_the_step(tiny_text, tmp_path):
    """Checkpoints inside of the window are put aside."""
    model_dir = tmp_path / "run"
    health = guarded(policy="rollback", rollback_steps=5, nan_samples=(8 * 22, 8 * 22 + 1))
    assert tiny_run.run(tiny_text, model_dir, health=health) == 0  # saves at 10, 20, 30, 40
    (back,) = journal(model_dir, "rollback")
    assert back["first_step"] == 19 and back["samples"] == [[8 * 18, 8 * 23]]
    assert (model_dir / "checkpoints" / "rolled-back-20").is_dir()
    never = tmp_path / "never"
    data = TrainData(
        store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3, skip_samples=[(144, 184)]
    )
    assert tiny_run.run(tiny_text, never, health=guarded(), train_data=data) == 0
    assert tiny_run.fingerprints(model_dir) == tiny_run.fingerprints(never)


def test_before_the_first_checkpoint_it_goes_back_to_the_start(tiny_text, tmp_path):
    model_dir = tmp_path / "run"
    health = guarded(policy="rollback", nan_samples=(8 * 3, 8 * 3 + 2))
    assert tiny_run.run(tiny_text, model_dir, health=health) == 0
    records = tiny_run.records(model_dir)
    assert [r["step"] for r in records] == list(range(41))
    assert "loss_by_language" in records[0]
    assert json.loads((model_dir / "skipped_samples.json").read_text()) == {"ranges": [[24, 32]]}


def test_skipped_samples_survive_restarts(tiny_text, tmp_path):
    """Rolled back at 23, ended at 30 without a trace of the fault, and gone on: the position keeps the list."""
    model_dir = tmp_path / "run"
    health = guarded(policy="rollback", nan_samples=(8 * 22, 8 * 23))
    assert tiny_run.run(tiny_text, model_dir, health=health, train_steps=30) == 0
    (model_dir / "skipped_samples.json").unlink()  # the checkpoint has it, too
    assert tiny_run.run(tiny_text, model_dir, health=guarded()) == 0
    straight = tmp_path / "straight"
    health = guarded(policy="rollback", nan_samples=(8 * 22, 8 * 23))
    assert tiny_run.run(tiny_text, straight, health=health) == 0
    assert tiny_run.fingerprints(model_dir) == tiny_run.fingerprints(straight)
    # What was trained on cannot be skipped afterwards.
    data = TrainData(
        store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3, skip_samples=[(0, 8)]
    )
    with pytest.raises(
        BadInput, match=r"trained on samples up to 327, some of which .*: 0\.\.7; go back"
    ):
        tiny_run.run(tiny_text, model_dir, train_data=data, train_steps=50)
    (model_dir / "skipped_samples.json").write_text("{")
    with pytest.raises(BadInput, match=r"skipped_samples\.json holds no ranges"):
        tiny_run.run(tiny_text, model_dir, train_steps=50)


def test_a_phase_of_another_length_still_begins_with_a_step(tiny_text, tmp_path):
    phases = [Phase(8 * 30, sequence_length=8)]
    data = dict(store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3, phases=phases)
    model_dir = tmp_path / "run"
    schedule = BatchSchedule(
        8, 4, 4, 40
    )  # 4 in the first steps, so a step is not all of a later one
    phases[0] = Phase(schedule.samples_after(30), sequence_length=8)
    bad = schedule.samples_after(4)
    health = guarded(policy="rollback", nan_samples=(bad, bad + 1))
    changes = dict(train_data=TrainData(**data), batch_schedule=schedule)
    assert tiny_run.run(tiny_text, model_dir, health=health, **changes) == 0
    skipped = json.loads((model_dir / "skipped_samples.json").read_text())["ranges"]
    begins = phases[0].first_sample
    assert skipped[0] == [bad, bad + 4] and skipped[1][1] == begins and len(skipped) == 2
    # Where it would begin now, a step begins.
    position = begins - sum(b - a for a, b in skipped)
    assert position in {schedule.samples_after(step) for step in range(41)}


def test_stop_ends_with_nothing_saved_of_it(tiny_text, tmp_path):
    model_dir = tmp_path / "run"
    health = guarded(policy="stop", nan_samples=(8 * 22, 8 * 23))
    with pytest.raises(
        BadInput, match=r"step 23 \(samples 176 to 183\) has loss nan .*nothing of it is saved"
    ):
        tiny_run.run(tiny_text, model_dir, health=health)
    assert [r["step"] for r in tiny_run.records(model_dir)][-1] == 22


def test_what_does_not_go_away_ends(tiny_text, tmp_path):
    health = guarded(policy="rollback", max_in_a_row=3, nan_samples=(8 * 22, 8 * 99))
    with pytest.raises(BadInput, match="step 23 .*, 4 refused in a row; stopped"):
        tiny_run.run(tiny_text, tmp_path / "run", health=health)
    assert len(journal(tmp_path / "run", "rollback")) == 3


@pytest.mark.parametrize("where", ["default", "given"])
def test_kill_switch(tiny_text, tmp_path, capsys, where):
    model_dir = tmp_path / "run"
    switch = model_dir / "kill_switch" if where == "default" else tmp_path / "switch"
    stops = StopConditions(kill_switch=None if where == "default" else str(switch))
    stops._next_look = -1e9

    class Slow(StepOptions):  # only to have a place that is passed in each step
        pass

    switch.parent.mkdir(exist_ok=True)
    original = stops.is_stop_due

    def is_stop_due(step):
        if step == 7:
            switch.touch()
            stops._next_look = 0.0
        return original(step)

    stops.is_stop_due = is_stop_due
    assert tiny_run.run(tiny_text, model_dir, health=Health(stops=stops)) == 0
    assert (
        f"stopped by kill switch after step 7, saved; without {switch}" in capsys.readouterr().out
    )
    assert (model_dir / "checkpoints" / "7").is_dir()
    again = StopConditions(kill_switch=None if where == "default" else str(switch))
    before = tiny_run.tree(model_dir)
    assert tiny_run.run(tiny_text, model_dir, health=Health(stops=again)) == 0
    assert "nothing is done while the kill switch" in capsys.readouterr().out
    assert tiny_run.tree(model_dir) == before
    switch.unlink()
    assert tiny_run.run(tiny_text, model_dir) == 0


def test_a_kill_switch_that_cannot_be_looked_for(tiny_text, tmp_path):
    (tmp_path / "file").touch()
    stops = StopConditions(kill_switch=str(tmp_path / "file" / "switch"))
    with pytest.raises(
        BadInput, match="kill_switch .*/file/switch cannot be looked for: Not a dir"
    ):
        tiny_run.run(tiny_text, tmp_path / "run", health=Health(stops=stops))
    assert not (tmp_path / "run").exists()


def test_the_end_of_the_time(tiny_text, tmp_path, capsys, undisturbed):
    model_dir = tmp_path / "run"
    stops = StopConditions(exit_after_minutes=1e-9)
    assert tiny_run.run(tiny_text, model_dir, health=Health(stops=stops)) == EXIT_RESTART
    assert (
        "stopped by exit_after_minutes after step 0, nothing to save yet" in capsys.readouterr().out
    )
    assert tiny_run.run(tiny_text, model_dir) == 0
    assert tiny_run.fingerprints(model_dir) == tiny_run.fingerprints(undisturbed)
    with pytest.raises(BadInput, match="exit_after_minutes must be above 0"):
        StopConditions(exit_after_minutes=0)


def test_saves_by_the_clock(tiny_text, tmp_path, monkeypatch):
    """Every 40 ms, of steps that are made to take 10."""
    model_dir = tmp_path / "run"
    checkpoints = Checkpoints(save_every_steps=1000, save_every_minutes=0.04 / 60, keep_last=99)
    health = Health(fault=fault(slow_host_seconds=0.01))
    started = time.monotonic()
    assert tiny_run.run(tiny_text, model_dir, health=health, checkpoints=checkpoints) == 0
    most = (time.monotonic() - started) / 0.04 + 1
    saves = [e["step"] for e in journal(model_dir, "save")]
    assert 4 <= len(saves) <= most and saves[-1] == 40
