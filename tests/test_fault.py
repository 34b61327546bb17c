"""Faults on purpose: each at its moment, once in a MODEL_DIR, in one process, and none by default."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tiny_run
from jax.sharding import NamedSharding, PartitionSpec

from bloomjax import config
from bloomjax.checkpoints import Checkpoints
from bloomjax.data import put_batch
from bloomjax.errors import BadInput
from bloomjax.fault import Fault, fault
from bloomjax.journal import Journal, read_lines
from bloomjax.partitioning import BATCH_AXES


def opened(folder, **arguments) -> Fault:
    found = fault(**arguments)
    assert found is not None
    found.open(Journal(folder))
    return found


def events(folder):
    return [{k: v for k, v in e.items() if k not in ("time", "host", "pid", "event")}
            for e in Journal(folder).events("fault")]  # fmt: skip


def test_nothing_by_default():
    assert fault() is None
    assert fault(process=1, flip_leaf="x", slow_host_from_step=5) is None  # says where, not what
    assert all(
        isinstance(fault(**{name: value}), Fault)
        for name, value in [
            ("crash_at_step", 1), ("crash_in_save_of_step", 1), ("hang_at_step", 1), ("nan_samples", (0, 1)),
            ("noise_samples", (3, 9)), ("flip_bit_at_step", 1), ("slow_host_seconds", 0.1), ("full_disk_at_step", 1),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crash_at_step": 0}, "the first step is 1, got 0 for crash"),
        ({"nan_samples": (5, 5)}, r"nan_samples must be \(first, end\) .* got \(5, 5\)"),
        ({"noise_samples": (-1, 5)}, r"noise_samples must be"),
        ({"noise_samples": (1, 2, 3)}, r"noise_samples must be"),
        ({"slow_host_seconds": -1.0}, "must not be negative"),
        ({"slow_host_seconds": float("nan")}, "must not be negative"),
        ({"process": -1, "hang_at_step": 3}, "number of a process"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(BadInput, match=message):
        fault(**arguments)


def test_a_process_that_does_not_exist(tmp_path):
    with pytest.raises(BadInput, match="process=1, but this job has 1 processes"):
        opened(tmp_path, process=1, hang_at_step=3)


def test_from_gin(tmp_path):
    """As `--gin.fault.nan_samples=(3,5)`; a list, or a number, is refused before anything is built."""
    (tmp_path / "x.gin").write_text("Health.fault = @fault()\n")
    known = (("bloomjax.fault", ("fault",)), ("bloomjax.health", ("Health",)))

    def build(*bindings):
        return config.build("Health.fault", tmp_path / "x.gin", bindings, known)

    assert build() is None
    found = build("fault.nan_samples = (3, 5)", "fault.crash_at_step = 7", "fault.process = 0")
    assert found.bad_samples == {"nan_samples": (3, 5)} and found.moments == {"crash": 7}
    for value in ("[3, 5]", "3", "(3, 5, 7)"):
        with pytest.raises(BadInput, match="fault.nan_samples must be"):
            build(f"fault.nan_samples = {value}")


# ---- moments ----


def in_a_process(folder, lines, **popen):
    """The lines in a process of their own, which has `on_purpose(**arguments)` and prints."""
    program = f"""
        from pathlib import Path
        from bloomjax.fault import fault
        from bloomjax.journal import Journal
        def on_purpose(**arguments):
            found = fault(**arguments)
            found.open(Journal(Path({str(folder)!r})))
            return found
    """
    program = textwrap.dedent(program) + textwrap.dedent(lines)
    return subprocess.Popen(
        [sys.executable, "-c", program], env=tiny_run.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_crashes_and_a_hang_happen_once(tmp_path):
    """Three starts of one run: killed, killed in a save, hanging; the fourth goes through."""
    run = """
        f = on_purpose(crash_at_step=2, crash_in_save_of_step=4, hang_at_step=5)
        for step in range(1, 7):
            f.before_step(step)
            print(step, flush=True)
            f.in_save(step)
    """
    seen = []
    for _ in range(2):
        process = in_a_process(tmp_path, run)
        out, _ = process.communicate(timeout=60)
        seen.append((process.returncode, out.split()))
    assert seen == [(-signal.SIGKILL, ["1"]), (-signal.SIGKILL, ["1", "2", "3", "4"])]
    process = in_a_process(tmp_path, run)
    assert process.stdout is not None
    with contextlib.closing(process.stdout) as out:
        assert [out.readline().strip() for _ in range(4)] == ["1", "2", "3", "4"]
        deadline = time.monotonic() + 60
        while len(events(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None  # it lives, and does nothing
        process.kill()
        process.wait()
    process = in_a_process(tmp_path, run)
    assert process.communicate(timeout=60)[0].split() == list("123456") and process.returncode == 0
    assert events(tmp_path) == [
        {"kind": "crash", "step": 2}, {"kind": "crash_in_save", "step": 4}, {"kind": "hang", "step": 5},
    ]  # fmt: skip
    record = read_lines(tmp_path / "journal.jsonl")[0][0]
    assert record["host"] == os.uname().nodename and record["pid"] != os.getpid()


def test_another_step_is_another_fault(tmp_path):
    state = {"x": jax.device_put(np.ones(4, np.float32))}
    for step, is_flipped in ((3, True), (3, False), (5, True)):
        on_purpose = opened(tmp_path, flip_bit_at_step=step, flip_leaf="x")
        flipped = on_purpose.on_state(step, state)
        assert (np.asarray(flipped["x"]) != 1).any() == is_flipped


def test_a_slow_host_stays_slow(tmp_path):
    for _ in range(2):  # starts of the run
        on_purpose = opened(tmp_path, slow_host_seconds=0.2, slow_host_from_step=3)
        seconds = []
        for step in range(1, 5):
            started = time.monotonic()
            on_purpose.before_step(step)
            seconds.append(time.monotonic() - started)
        assert max(seconds[:2]) < 0.15 < 0.2 <= min(seconds[2:])
    assert events(tmp_path) == [{"kind": "slow_host", "step": 3, "seconds": 0.2}]


# ---- samples ----

ROWS, LENGTH, REAL = 16, 6, 13


def a_batch(mesh, first=100):
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 50, (ROWS, LENGTH + 1), np.int32)
    batch = put_batch(dict(enumerate(tokens[:REAL])), ROWS, LENGTH + 1, mesh)
    return batch, np.arange(first, first + REAL, dtype=np.int64)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 1, 1)])
def test_bad_samples_are_spoiled_and_no_others(mesh, mesh_of, tmp_path):
    mesh = mesh_of(*mesh)
    batch, samples = a_batch(mesh)
    samples[4:] += 50  # a window was deleted: 100 .. 103, 154 .. 162
    tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["weights"])
    on_purpose = opened(tmp_path, nan_samples=(103, 155), noise_samples=(161, 300))
    spoiled = on_purpose.on_batch(batch, samples)
    for name in batch:
        assert spoiled[name].sharding == batch[name].sharding
        assert spoiled[name].sharding == NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    assert np.flatnonzero(np.isnan(np.asarray(spoiled["weights"]))).tolist() == [3, 4]
    changed = (np.asarray(spoiled["tokens"]) != tokens).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [11, 12]
    clean = ~np.isnan(np.asarray(spoiled["weights"]))
    np.testing.assert_array_equal(np.asarray(spoiled["weights"])[clean], weights[clean])
    assert np.asarray(spoiled["tokens"]).min() >= 0 and np.asarray(spoiled["tokens"]).max() < 50
    # The batch that was given is as it was, and one without bad samples is passed on.
    np.testing.assert_array_equal(np.asarray(batch["tokens"]), tokens)
    untouched = on_purpose.on_batch(batch, np.arange(REAL))
    assert untouched["tokens"] is batch["tokens"] and untouched["weights"] is batch["weights"]


def test_noise_is_a_property_of_the_sample(mesh_of, tmp_path):
    """Whatever the mesh, the batch and the restart; and each copy of a row is the same."""
    on_purpose = opened(tmp_path, noise_samples=(100, 200))
    of_meshes = []
    for mesh in ((8, 1, 1), (2, 1, 4)):
        batch, samples = a_batch(mesh_of(*mesh))
        spoiled = on_purpose.on_batch(batch, samples)["tokens"]
        of_meshes.append(np.asarray(spoiled))
        for shard in spoiled.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(spoiled)[shard.index])
    np.testing.assert_array_equal(*of_meshes)
    noise = of_meshes[0][:REAL]
    assert len({row.tobytes() for row in noise}) == REAL and len(np.unique(noise)) > 25
    again = opened(tmp_path, noise_samples=(100, 200))
    batch, samples = a_batch(mesh_of(1, 1, 1))
    np.testing.assert_array_equal(
        np.asarray(again.on_batch(batch, samples)["tokens"]), of_meshes[0]
    )
    assert events(tmp_path) == [{"kind": "noise_samples", "samples": [100, 200]}]  # told once


# ---- state ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_one_bit_of_one_copy(dtype, mesh_of, tmp_path):
    mesh = mesh_of(4, 2, 1)
    dtype = jax.numpy.dtype(dtype)
    copied = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {name: jax.device_put(np.ones(6, dtype), copied) for name in ("a", "b", "c")}
    on_purpose = opened(tmp_path, flip_bit_at_step=7, flip_leaf="'b'")
    assert on_purpose.on_state(6, state) is state
    flipped = on_purpose.on_state(7, state)
    assert flipped["a"] is state["a"] and flipped["c"] is state["c"]
    assert flipped["b"].sharding == copied
    num_bits = {}
    for was, now in zip(
        state["b"].addressable_shards, flipped["b"].addressable_shards, strict=True
    ):
        bits = [np.asarray(x.data).view(f"u{dtype.itemsize}") for x in (was, now)]
        num_bits[now.device.id] = sum(int(x).bit_count() for x in bits[0] ^ bits[1])
    assert sorted(num_bits.values()) == [0] * 7 + [1]
    values = [np.asarray(s.data, np.float64) for s in flipped["b"].addressable_shards]
    assert np.isfinite(values).all()
    assert on_purpose.on_state(7, state) is state  # once
    assert events(tmp_path) == [{"kind": "flip_bit", "step": 7, "leaf": "'b'"}]


def test_a_leaf_that_does_not_exist(tmp_path):
    state = {"a": jax.device_put(np.ones(2, np.float32))}
    with pytest.raises(BadInput, match=r"flip_leaf='embedding' is in no path .* \['a'\]"):
        opened(tmp_path, flip_bit_at_step=1, flip_leaf="embedding").on_state(1, state)


# ---- disk ----


def test_a_full_disk_fails_one_save(tmp_path):
    """Behind, after save has returned; the checkpoint before stays whole, and the next save succeeds."""
    state = {"x": jax.device_put(np.arange(4, dtype=np.float32))}
    for start, expected in (
        ((1, 2, 4), {1: True, 2: True, 4: False}),
        ((5, 6), {5: True, 6: True}),
    ):
        on_purpose = opened(tmp_path, full_disk_at_step=3)
        checkpoints = Checkpoints(save_every_steps=1, keep_last=9)
        checkpoints.open(tmp_path / "checkpoints")
        is_saved = {}
        for step in start:
            on_purpose.full_disk(step)
            assert checkpoints.save(step, state, {"samples": step})
            with contextlib.suppress(OSError):
                checkpoints.wait()
            is_saved[step] = step in checkpoints.steps()
        assert is_saved == expected
        incidents = [(e["event"], e["step"]) for e in checkpoints.incidents]
        assert incidents == ([("disk_full", 4)] if 4 in start else [])
        assert checkpoints.steps() == ([1, 2] if 4 in start else [1, 2, 5, 6])
        assert checkpoints.restore(state, lambda position: None) is not None
        checkpoints.close()
    assert events(tmp_path) == [{"kind": "full_disk", "step": 3, "save_of_step": 4}]
