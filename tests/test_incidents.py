"""Runs in which something goes wrong on purpose: refused steps, roll backs, kill switch, the end of the time."""

import json
import time

import jax.numpy as jnp
import pytest
import tiny_run

from bloomjax.checkpoints import Checkpoints, fingerprints
from bloomjax.data import Phase, TrainData
from bloomjax.errors import EXIT_RESTART, BadInput
from bloomjax.fault import fault
from bloomjax.guard import SpikeGuard
from bloomjax.health import Health
from bloomjax.schedules import BatchSchedule
from bloomjax.stops import StopConditions


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
    model_dir = tmp_path / "run"
    bad = {kind: (8 * 24, 8 * 24 + (1 if kind == "nan_samples" else 8))}
    options = dict(policy="skip", **bad)
    changes = dict(checkpoints=Checkpoints(save_every_steps=1, keep_last=99))
    assert tiny_run.run(tiny_text, model_dir, health=guarded(**options), **changes) == 0
    (incident,) = journal(model_dir, "spike", "not_finite")
    assert incident["step"] == 25 and incident["samples"] == [[192, 200]]
    assert incident["action"] == "skip" and sum(incident["languages"].values()) == 8
    # While a step is refused nothing is saved; after it the optimizer has counted one step less.
    assert not (model_dir / "checkpoints" / "25").exists()
    expected = fingerprints({"step": jnp.int32(26), "count": jnp.int32(25)})
    saved = tiny_run.fingerprints(model_dir, 26)
    assert saved[".step"] == expected["['step']"]
    assert saved[".opt_state[1].count"] == expected["['count']"]
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


@pytest.mark.parametrize("batch", ["constant", pytest.param("ramp", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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

    switch.parent.mkdir(exist_ok=True)
    original = stops.is_stop_due

    asked = []

    def is_stop_due():
        asked.append(None)
        if len(asked) == 8:  # after step 7
            switch.touch()
            stops._next_look = 0.0
        return original()

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


def broken_after(step):
    """A fault.on_state that makes a weight huge for good, as a device might that nothing is compared with."""
    found = fault(nan_samples=(10**6, 10**6 + 1))

    def on_state(at, state):
        if at != step:
            return state
        params = state.params | {"embedding": state.params["embedding"] * 1e30}
        return state.replace(params=params)

    found.on_state = on_state
    return found


def test_what_is_no_good_pushes_out_no_checkpoint(tiny_text, tmp_path):
    """Saves every second step: none is made while steps are refused, and the pinned one stays."""
    model_dir = tmp_path / "run"
    guard = SpikeGuard(min_steps=4, window_steps=8, loss_deviations=3.0, max_in_a_row=6)
    changes = dict(checkpoints=Checkpoints(save_every_steps=2, keep_last=2))
    with pytest.raises(BadInput, match="7 refused in a row; stopped"):
        tiny_run.run(
            tiny_text, model_dir, health=Health(guard=guard, fault=broken_after(17)), **changes
        )
    assert [e["step"] for e in journal(model_dir, "save")] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert json.loads((model_dir / "checkpoints" / "pinned.json").read_text())["step"] in (14, 16)
    assert tiny_run.run(tiny_text, model_dir) == 0


def test_a_checkpoint_that_is_to_blame_is_put_aside(tiny_text, tmp_path):
    """Broken after 16, which is saved: other samples do not help, the checkpoint before does."""
    model_dir = tmp_path / "run"
    guard = SpikeGuard(min_steps=4, window_steps=8, loss_deviations=3.0, policy="rollback")
    once = broken_after(16)
    on_state, times = once.on_state, []

    def the_first_time(at, state):
        times.append(at)
        return on_state(at, state) if times.count(16) == 1 else state

    once.on_state = the_first_time
    changes = dict(checkpoints=Checkpoints(save_every_steps=8))
    assert (
        tiny_run.run(tiny_text, model_dir, health=Health(guard=guard, fault=once), **changes) == 0
    )
    assert (model_dir / "checkpoints" / "rolled-back-16").is_dir()
    assert [e["first_step"] for e in journal(model_dir, "rollback")] == [17, 17, 16]


def test_no_checkpoint_before_the_window_is_said(tiny_text, tmp_path):
    model_dir = tmp_path / "run"
    health = guarded(policy="rollback", rollback_steps=14, nan_samples=(8 * 22, 8 * 23))
    changes = dict(checkpoints=Checkpoints(save_every_steps=10, keep_last=1))
    with pytest.raises(
        BadInput, match="before step 10, but the checkpoints of .* are of steps (10, )?20; nothing"
    ):
        tiny_run.run(tiny_text, model_dir, health=health, **changes)
    assert (model_dir / "checkpoints" / "20").is_dir()


def test_another_phase_is_no_spike(tiny_text, tmp_path):
    """From sample 160 on, texts in a language that was never seen."""
    phases = [Phase(160, weights={"bb": 1.0})]
    data = TrainData(
        store_dir=str(tiny_text.store_dir),
        sequence_length=16,
        seed=3,
        weights={"aa": 1.0},
        phases=phases,
    )
    model_dir = tmp_path / "run"
    health = guarded(policy="stop", loss_deviations=2.0)
    assert tiny_run.run(tiny_text, model_dir, health=health, train_data=data) == 0
    losses = tiny_run.losses(model_dir)
    assert losses[21] > losses[20] + 0.5  # what would have been one


def test_a_full_disk_ends_no_bookkeeping(tiny_text, tmp_path, monkeypatch, capsys, undisturbed):
    """Records that the disk refuses come later, whole and in order."""
    import errno
    import os

    write, model_dir = os.write, tmp_path / "run"
    calls = []

    def full_for_a_while(file, data):
        if not data.startswith(b'{"'):
            return write(file, data)
        calls.append(len(data))
        if 20 <= len(calls) < 24:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:7] if len(calls) == 24 else data)

    monkeypatch.setattr(os, "write", full_for_a_while)
    assert tiny_run.run(tiny_text, model_dir) == 0
    assert tiny_run.losses(model_dir) == tiny_run.losses(undisturbed)
    assert capsys.readouterr().err.count("cannot be written: No space left") >= 1
