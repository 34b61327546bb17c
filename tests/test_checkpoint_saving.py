"""Saving goes on behind, is whole or is not there, and a full disk ends no training."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from cluster import Cluster
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoints import flip_uniformly

from bloomjax import checkpoint_folder, checkpoint_manifest, checkpoint_saving
from bloomjax.checkpoint_folder import CheckpointFolder, superseded
from bloomjax.checkpoints import Checkpoints
from bloomjax.errors import BadInput, NoRoom, Restart
from bloomjax.train_state import TrainState


def make_state(step, num_bytes=4000):
    rng = np.random.default_rng(step)
    params = {"a": rng.normal(size=num_bytes // 4).astype(np.float32)}
    return jax.device_put(TrainState(np.int32(step), params, {}), jax.devices()[0])


def target():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), make_state(0)
    )


def opened(folder, **options):
    checkpoints = Checkpoints(**({"save_every_steps": 10, "keep_last": 3} | options))
    checkpoints.open(folder)
    return checkpoints


def save(checkpoints, *steps, num_bytes=4000):
    return [
        checkpoints.save(step, make_state(step, num_bytes), {"samples": step}) for step in steps
    ]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    found = opened(tmp_path)
    yield found
    found.close()


# ---- what is kept ----


@pytest.mark.parametrize(
    "keep_last, every, pinned, gone",
    [
        (1, None, None, [10, 20, 30, 40, 50]),
        (2, None, 20, [10, 30, 40]),
        (1, 30, None, [10, 20, 40, 50]),
        (9, None, None, []),
        (1, 30, 30, [10, 20, 40, 50]),
        (1, None, 99, [10, 20, 30, 40, 50]),
    ],
)
def test_which_are_superseded(keep_last, every, pinned, gone):
    steps = [10, 20, 30, 40, 50, 60]
    found = superseded(steps, keep_last=keep_last, keep_every_steps=every, pinned=pinned)
    assert found == gone


def test_a_pinned_one_is_kept_until_another_is(tmp_path):
    first = opened(tmp_path, keep_last=2)
    save(first, 10, 20)
    first.wait()
    first.pin(20, "spike")
    save(first, 30, 40, 50)
    first.close()
    second = opened(tmp_path, keep_last=2)  # after a restart
    save(second, 60)
    second.wait()
    assert second.steps() == [20, 50, 60] and second.last_before(60) == 50
    assert second.last_before(20) is None
    assert second.folder.pinned()["reason"] == "spike"
    second.pin(60, "another")
    second.pin(20_000, "there is none")
    save(second, 70, 80)
    second.wait()
    assert second.steps() == [60, 70, 80]
    (tmp_path / "pinned.json").write_text("{")
    save(second, 90)
    second.wait()
    assert second.steps() == [80, 90]
    second.close()


def test_what_is_rolled_back_is_put_aside(checkpoints, tmp_path):
    save(checkpoints, 10, 20)
    assert save(checkpoints, 15, 20) == [False, False]
    checkpoints.wait()
    assert checkpoints.restore(target(), lambda p: None, before_step=20)[1]["step"] == 10
    assert checkpoints.restore(target(), lambda p: None, before_step=10) is None
    save(checkpoints, 30)
    assert checkpoints.put_aside_from(20) == [20, 30]  # one of them was still being written
    assert checkpoints.steps() == [10]
    assert save(checkpoints, 15, 20) == [True, True]
    assert checkpoints.put_aside_from(20) == [20]
    assert names(tmp_path) == ["10", "15", "rolled-back-20", "rolled-back-20.1", "rolled-back-30"]


def test_what_a_save_says_of_itself(checkpoints):
    save(checkpoints, 10)
    checkpoints.wait()
    last = checkpoints.last_save
    assert last["step"] == 10 and last["num_bytes"] > 4000 and last["num_files"] > 5
    assert 0 <= last["manifest_seconds"] <= last["seconds"] < 10
    assert not checkpoints.incidents and not checkpoints.wants_retry()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"save_every_minutes": 0}, "save_every_minutes"),
        ({"save_every_minutes": float("nan")}, "save_every_minutes"),
        ({"keep_every_steps": 0}, "keep_every_steps"),
        ({"directory": " "}, "directory is empty"),
    ],
)
def test_nonsense_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        Checkpoints(save_every_steps=1, **options)


def test_another_directory_and_two_runs_that_name_it(tmp_path):
    usual, far = tmp_path / "run" / "checkpoints", tmp_path / "far"
    usual.parent.mkdir()
    first = opened(usual, directory=str(far))
    save(first, 10)
    first.wait()
    assert first.directory == far and (far / "10").is_dir()
    assert usual.is_symlink() and (usual / "10").is_dir()
    with pytest.raises(BadInput, match=f"pid {os.getpid()} .*far"):
        opened(tmp_path / "run2" / "checkpoints", directory=str(far))
    first.close()
    opened(tmp_path / "run2" / "checkpoints", directory=str(far)).close()
    again = opened(usual)  # as `generate` does
    assert again.steps() == [10]
    again.close()
    opened(usual, directory=str(far)).close()


def test_a_run_does_not_start_anew_because_its_directory_has_changed(tmp_path):
    first = opened(tmp_path / "checkpoints")
    save(first, 10)
    first.close()
    with pytest.raises(BadInput, match="has checkpoints and .* has none: move them there"):
        opened(tmp_path / "checkpoints", directory=str(tmp_path / "far"))


@pytest.mark.parametrize("url, words", [("gs://b/c", "gcsfs"), ("ftp://b/c", "in ftp://b/c: give")])
def test_a_url_that_cannot_be_opened(url, words):
    with pytest.raises(BadInput, match=words) as error:
        CheckpointFolder(url)
    assert "\n" not in str(error.value)


# ---- killed ----

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_checkpoint_saving as t
from bloomjax import checkpoint_folder, checkpoint_manifest
checkpoints = t.opened({folder!r})
t.save(checkpoints, 10)
checkpoints.wait()
kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
{when}
t.save(checkpoints, 20)
checkpoints.wait()
"""


@pytest.mark.parametrize(
    "when, leaves",
    [
        ("checkpoint_folder.CheckpointFolder.commit = kill", ["10", "20.orbax-checkpoint-tmp"]),
        ("checkpoint_manifest.write = kill", ["10", "20.orbax-checkpoint-tmp"]),
        ("import shutil; checkpoints._keep_last = 1; shutil.rmtree = kill; "
         "from etils import epath; epath.Path('/').__class__.rmtree = kill",
         ["10.orbax-checkpoint-tmp-deleted", "20"]),
    ],
    ids=["before its name", "before the manifest", "in a deletion"],
)  # fmt: skip
def test_a_kill_leaves_no_checkpoint_in_part(tmp_path, when, leaves):
    tests = str(Path(__file__).parent)
    program = KILLED.format(tests=tests, folder=str(tmp_path), when=when)
    ended = subprocess.run(
        [sys.executable, "-c", program], env=tiny_run.environment(), capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert names(tmp_path) == leaves
    checkpoints = opened(tmp_path)
    whole = [int(name) for name in leaves if name.isdigit()]
    assert checkpoints.steps() == whole
    assert checkpoints.restore(target(), lambda p: None)[1]["step"] == whole[-1]
    assert names(tmp_path) == list(map(str, whole)) and not checkpoints.problems
    checkpoints.close()


# ---- failing ----


def test_what_else_fails_in_the_background_is_tried_again_and_raised_at_last(
    checkpoints, monkeypatch, capsys
):
    save(checkpoints, 10)
    checkpoints.wait()

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_manifest, "write", fail)
    for step in (20, 30):
        save(checkpoints, step)
        checkpoints.settle()
        incident = checkpoints.incidents.pop()
        assert (incident["event"], incident["step"]) == ("save_failed", step)
        assert f"THE SAVE OF STEP {step} FAILED" in capsys.readouterr().err
        assert not checkpoints.incidents and checkpoints.steps() == [10]
    assert not checkpoints.wants_retry()  # not at once
    checkpoints._next_try = 0.0
    assert checkpoints.wants_retry()
    save(checkpoints, 40)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.wait(lambda: save(checkpoints, 45))
    assert checkpoints.steps() == [10, 45]
    save(checkpoints, 50)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 45, 50] and not checkpoints.wants_retry()


def test_the_last_save_of_a_run_that_fails_asks_for_another_start(checkpoints, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_manifest, "write", fail)
    save(checkpoints, 20)
    with pytest.raises(Restart, match="the checkpoint of step 20 is not saved, see journal.jsonl"):
        checkpoints.wait()


@pytest.mark.parametrize(
    "error, is_full",
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), True),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes"), False),
        (OSError(errno.EIO, "x"), False),
        (None, False),
    ],
)
def test_which_errors_are_a_full_disk(error, is_full):
    assert checkpoint_saving.is_disk_full(error) == is_full
    if error:
        outer = RuntimeError("save failed")
        outer.__cause__ = error
        assert checkpoint_saving.is_disk_full(outer) == is_full


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 7 MB; checkpoints of 2 MB of noise fit in three times."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


SIZE = 2_000_000


def big(checkpoints, *steps):
    return save(checkpoints, *steps, num_bytes=SIZE)


def fill(folder, leave_bytes):
    free = checkpoint_folder.free_bytes(CheckpointFolder(folder).path)
    (folder / "ballast").write_bytes(bytes(max(0, free - leave_bytes)))


def big_target():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), make_state(0, SIZE)
    )


def drained(checkpoints):
    found = [(i["event"], i["step"], i["freed"]) for i in checkpoints.incidents]
    checkpoints.incidents.clear()
    return found


def test_a_full_disk_frees_the_oldest(small_disk, capfd):
    checkpoints = opened(small_disk / "c", keep_last=10)
    big(checkpoints, 10, 20, 30)
    checkpoints.wait()
    checkpoints.pin(10, "incident")
    assert big(checkpoints, 40) == [True]
    checkpoints.wait()
    assert drained(checkpoints) == [("disk_full", 40, ["20"])]
    assert checkpoints.steps() == [10, 30, 40] and not checkpoints.wants_retry()
    err = capfd.readouterr().err
    assert "DISK FULL at the save of step 40" in err and "deleted 20" in err
    assert err.count("\n") == 1
    assert checkpoints.restore(big_target(), lambda p: None)[1]["step"] == 40
    checkpoints.close()


def test_the_last_whole_one_stays_and_the_save_succeeds_when_there_is_room(small_disk, capfd):
    checkpoints = opened(small_disk / "c")
    big(checkpoints, 10)
    checkpoints.wait()
    fill(small_disk, leave_bytes=SIZE // 2)
    for step in (20, 30):  # training goes on
        assert big(checkpoints, step) == [False]
        assert not checkpoints.wants_retry()
    assert drained(checkpoints) == [("disk_full", 20, []), ("disk_full", 30, [])]
    assert capfd.readouterr().err.count("DISK FULL") == 1
    assert checkpoints.restore(big_target(), lambda p: None)[1]["step"] == 10
    (small_disk / "ballast").unlink()
    checkpoints._next_try = 0.0  # else in ten seconds
    assert checkpoints.wants_retry()
    assert big(checkpoints, 33) == [True]
    checkpoints.wait()
    assert checkpoints.steps() == [10, 33] and not drained(checkpoints)
    assert checkpoints.restore(big_target(), lambda p: None)[1]["step"] == 33
    checkpoints.close()


def test_the_disk_fills_up_while_a_save_is_written(small_disk, monkeypatch):
    """Another program takes the room that was there: the system's own error, from TensorStore."""
    checkpoints = opened(small_disk / "c")
    big(checkpoints, 10, 20)
    checkpoints.wait()
    fill(small_disk, leave_bytes=SIZE // 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "free_bytes", lambda path: 10 * SIZE)
        assert big(checkpoints, 30) == [True]
        checkpoints._saving.join()
        assert names(small_disk / "c") == ["10", "20"]  # nothing half-written; none deleted yet
        assert checkpoints.wants_retry()
        assert drained(checkpoints) == [("disk_full", 30, [])]
        # The numbers say that there is room, and it fails again, as with a quota: the oldest goes.
        assert big(checkpoints, 31) == [True]
        checkpoints._saving.join()
        assert names(small_disk / "c") == ["20"] and not checkpoints.wants_retry()
        assert drained(checkpoints) == [("disk_full", 31, ["10"])]
    checkpoints._next_try = 0.0
    assert checkpoints.wants_retry()
    assert big(checkpoints, 32) == [True]
    checkpoints.wait()
    assert checkpoints.steps() == [20, 32]
    assert checkpoints.restore(big_target(), lambda p: None)[1]["step"] == 32
    checkpoints.close()


def test_the_last_save_of_a_run(small_disk, capfd):
    checkpoints = opened(small_disk / "c")
    big(checkpoints, 10)
    checkpoints.wait()
    fill(small_disk, leave_bytes=SIZE // 2)
    big(checkpoints, 20)
    with pytest.raises(NoRoom) as error:
        checkpoints.wait(save_again=lambda: pytest.fail("there is no room"))
    text = str(error.value)
    assert "the checkpoint of step 20 is not saved" in text and "needed 0.002 GB" in text
    assert "the newest is 10" in text and "\n" not in text and str(small_disk) in text
    big(checkpoints, 20)
    (small_disk / "ballast").unlink()
    checkpoints.wait(save_again=lambda: big(checkpoints, 20))
    assert checkpoints.steps() == [10, 20]
    fill(small_disk, leave_bytes=SIZE // 2)
    assert big(checkpoints, 30) == [True]  # by deleting 10
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30]
    big(checkpoints, 40)
    checkpoints.close()  # as after an error: it does not raise
    assert "deleted 20" in capfd.readouterr().err


def test_what_goes_first_when_room_is_made(tmp_path, monkeypatch):
    for step in (10, 20, 30, 40, 50):
        (tmp_path / str(step)).mkdir()
    for name in ("rolled-back-45", "damaged-5", "60.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"12345")
    folder = CheckpointFolder(tmp_path)
    folder.pin(20, "incident")
    monkeypatch.setattr(checkpoint_folder, "free_bytes", lambda path: 0)
    (tmp_path / "10" / "data").write_bytes(b"12345")
    # Checkpoints that would not make enough room are not given up for nothing.
    assert folder.make_room(11, keep_every_steps=30) == ["rolled-back-45"]
    shutil.copytree(tmp_path / "damaged-5", tmp_path / "rolled-back-45")
    freed = folder.make_room(10, keep_every_steps=30)
    assert freed == ["rolled-back-45", "10", "40", "30", "20"]
    assert names(tmp_path) == ["50", "damaged-5", "pinned.json"]


# ---- several processes ----


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes with two devices each have answered, stderr of the first, and the folder."""
    folder = tmp_path_factory.mktemp("two") / "c"
    worker = Path(__file__).with_name("checkpoint_worker.py")
    answers = tmp_path_factory.mktemp("answers")
    saves = {"10": None, "20": 1, "30": 0, "40": None}
    task = {"directory": str(folder), "saves": saves, "answers": str(answers)}
    results = Cluster([sys.executable, str(worker), json.dumps(task)], 2).end(timeout_seconds=120)
    assert [code for code, _, _ in results] == [0, 0], results
    found = [json.loads((answers / f"{number}.json").read_text()) for number in range(2)]
    return found, results[0][2], folder


@pytest.mark.slow
def test_the_disk_of_one_process_is_full(two_processes):
    """All learn of it, nothing hangs, and the next save succeeds."""
    found, err, _ = two_processes
    for each in found:
        assert each["saved"] == [True] * 4
        assert each["steps"] == [[10], [10], [10], [10, 40]]
        assert [i["step"] for i in each["incidents"]] == [20, 30]
        assert each["wants_retry"] == [False, True, False, False]  # the second time it pauses
    assert err.count("DISK FULL") == 1 and [each["process"] for each in found] == [0, 1]


def test_damage_and_a_roll_back_of_two_processes(two_processes):
    found, _, folder = two_processes
    entries = checkpoint_manifest.read(CheckpointFolder(folder / "40").path)
    parts = {name.split("/")[1] for name in entries if name.startswith("state/ocdbt")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    for each in found:
        assert each["restored"] == 10 and each["damaged"] in each["problems"][0]
        assert "ocdbt.process_1/d/" in each["damaged"]
        assert each["aside"] == [50] and each["left"] == [10]
    assert names(f"{folder}-worked-on") == ["10", "damaged-40", "rolled-back-50"]


def check_flips_of_two_processes(two_processes, mesh, tmp_path, num_flips):
    """Restored here, by one process on eight devices."""
    original = two_processes[2]
    rng = np.random.default_rng(num_flips)
    shard, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    wanted = TrainState(
        jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        {"a": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=shard)},
        {"m": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=shard)},
    )
    checkpoints = opened(original)
    assert checkpoints.restore(wanted, lambda p: None)[1]["step"] == 40
    checkpoints.close()
    for number in range(num_flips):
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        name = flip_uniformly(folder / "40", number, rng)
        checkpoints = opened(folder)
        _, position = checkpoints.restore(wanted, lambda p: None)
        checkpoints.close()
        assert position["step"] == 10 and name in checkpoints.problems[0]
        shutil.rmtree(folder)


def test_a_flipped_bit_in_a_checkpoint_of_two_processes(two_processes, mesh_of, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    check_flips_of_two_processes(two_processes, mesh_of(1, 8, 1), tmp_path, 20)


@pytest.mark.slow
def test_200_flipped_bits_in_a_checkpoint_of_two_processes(
    two_processes, mesh_of, tmp_path, caplog
):
    caplog.set_level(logging.CRITICAL)
    check_flips_of_two_processes(two_processes, mesh_of(1, 8, 1), tmp_path, 200)
