"""tools/checkpoint.py: what is there, whether it is whole, how two differ, what may go."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
from test_checkpoint_saving import make_state, names, opened, save
from test_checkpoints import data_files, flip_bit

from bloomjax import checkpoint_manifest
from bloomjax.checkpoint_arrays import ParamsWriter, storage_path
from bloomjax.checkpoint_folder import CheckpointFolder
from bloomjax.metrics import lock_model_dir

_PATH = tiny_run.REPOSITORY / "tools" / "checkpoint.py"
_SPEC = importlib.util.spec_from_file_location("checkpoint_tool", _PATH)
assert _SPEC and _SPEC.loader
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """MODEL_DIR with steps 10 to 40, one pinned, and all kinds of what is no checkpoint."""
    model_dir = tmp_path_factory.mktemp("tool") / "run"
    checkpoints = opened(model_dir / "checkpoints", keep_last=9)
    save(checkpoints, 10, 20, 30, 40, 50)
    checkpoints.wait()
    checkpoints.put_aside_from(50)
    checkpoints.pin(20, "spike at 23")
    checkpoints.close()
    shutil.copytree(model_dir / "checkpoints" / "10", model_dir / "checkpoints" / "damaged-15")
    (model_dir / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    return model_dir


@pytest.fixture
def run_dir(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def call(command):
    def call(verb, folder, *flags):
        with pytest.raises(SystemExit) as end:
            tool.main(["checkpoint", verb, f"--checkpoints={folder}", *flags])
        out, err = command.capsys.readouterr()
        return end.value.code, out, err

    return call


def test_ls(call, original):
    code, out, err = call("ls", original)
    lines = out.splitlines()
    assert code == 0 and not err
    first = [line.split()[0] for line in lines[1:]]
    assert first[:-1] == [
        "10", "20", "30", "40", "rolled-back-50", "damaged-15", "60.orbax-checkpoint-tmp"
    ]  # fmt: skip
    assert lines[2].endswith("pinned") and lines[-1] == "pinned: step 20: spike at 23"
    found = json.loads(call("ls", original / "checkpoints", "--json")[1])
    row = found["checkpoints"][1]
    folder = original / "checkpoints" / "20"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert row["num_files"] == len(files) and row["samples"] == row["step"] == 20
    assert row["num_bytes"] == sum(path.stat().st_size for path in files)
    assert abs(row["time"] - folder.stat().st_mtime) < 60 and row["state"] == "pinned"


def test_nothing_heavy_is_loaded(original):
    program = (
        f"import sys; sys.argv = ['checkpoint', 'ls', '--checkpoints={original}']\n"
        f"import runpy\ntry:\n runpy.run_path({str(_PATH)!r}, run_name='__main__')\n"
        "except SystemExit: print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(result.stdout.split())
    assert "etils" in loaded and not loaded & {"jax", "orbax", "tensorstore", "tensorflow"}


def test_verify(call, run_dir):
    code, out, _ = call("verify", run_dir, "--deep")
    assert code == 0 and out.count(": whole;") == 4
    path = data_files(run_dir / "checkpoints" / "30" / "state")[0]
    flip_bit(path, np.random.default_rng(0))
    code, out, _ = call("verify", run_dir)
    assert code == 3 and out.count(": whole;") == 3 and f"  {path}: CRC-32C is " in out
    assert call("verify", run_dir, "--step=10")[0] == 0
    found = json.loads(call("verify", run_dir, "--step=30", "--json", "--deep")[1])
    assert len(found["problems"]["30"]) >= 2 and "array " in found["problems"]["30"][-1]


def test_verify_finds_wrong_arrays_below_a_right_manifest(call, run_dir):
    """As of a device that copied wrong bits to the host: only the fingerprint can tell."""
    path = run_dir / "checkpoints" / "10" / "position" / "metadata"
    position = json.loads(path.read_text())
    position["fingerprints"][".params['a']"] ^= 1
    path.write_text(json.dumps(position))
    checkpoint_manifest.write(CheckpointFolder(path.parent.parent).path)
    assert call("verify", run_dir, "--step=10")[0] == 0
    code, out, _ = call("verify", run_dir, "--step=10", "--deep")
    assert code == 3 and "array .params['a']: content differs from its fingerprint" in out


def test_verify_without_a_manifest(call, run_dir):
    folder = run_dir / "checkpoints" / "10"
    (folder / "manifest.json").unlink()
    code, out, _ = call("verify", run_dir, "--step=10")
    assert code == 3 and "manifest.json: is missing" in out
    position = folder / "position" / "metadata"
    position.write_text(position.read_text().replace('"has_manifest": true, ', ""))
    code, out, _ = call("verify", run_dir, "--step=10")
    assert code == 0 and "not known to be damaged: it has no manifest; --deep" in out


def test_diff(call, run_dir, tmp_path):
    code, out, _ = call("diff", run_dir, "--step=10", "--other=20")
    a, b = (np.asarray(make_state(step).params["a"]) for step in (10, 20))
    gap = np.abs(a.astype(np.float64) - b).max()
    assert code == 3 and f".params['a']  float32[1000]  max |a-b| {gap:.6g}  equal 0.0000%" in out
    assert ".step  int32[]  max |a-b| 10" in out and out.endswith(
        "0 of 2 arrays are equal to the bit\n"
    )
    code, out, _ = call("diff", run_dir, "--step=10", f"--other={run_dir}/checkpoints/damaged-15")
    assert code == 0 and out == "2 of 2 arrays are equal to the bit\n"
    other = opened(tmp_path / "other")
    save(other, 10, num_bytes=8000)
    other.close()
    code, out, _ = call("diff", run_dir, "--step=10", f"--other={tmp_path}/other/10", "--all")
    assert code == 3 and ".params['a']  float32[1000] and float32[2000]" in out
    arrays = json.loads(call("diff", run_dir, "--step=10", "--other=20", "--json")[1])["arrays"]
    assert [each["num_equal"] for each in arrays] == [0, 0]


@pytest.mark.parametrize(
    "name, parts",
    [
        (".step", ("step",)),
        (".params['layers']['qkv']['kernel']", ("params", "layers", "qkv", "kernel")),
        (".opt_state[0].mu['a']", ("opt_state", "0", "mu", "a")),
    ],
)
def test_where_an_array_lies(name, parts):
    assert storage_path(name) == parts


def test_prune(call, run_dir):
    folder = run_dir / "checkpoints"
    before = names(folder)
    code, out, _ = call("prune", run_dir, "--keep_last=1", "--damaged", "--dry_run")
    assert code == 0 and out.startswith("would delete 5 (") and names(folder) == before
    code, out, _ = call("prune", run_dir, "--keep_last=1", "--keep_every_steps=30")
    assert code == 0 and "kept: 20, 30, 40" in out  # 20 is pinned
    assert call("prune", run_dir, "--damaged")[0] == 0
    assert names(folder) == ["20", "30", "40", "pinned.json"]


def test_prune_keeps_the_newest_whole_one(call, run_dir):
    (path, *_) = data_files(run_dir / "checkpoints" / "40" / "state")
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = call("prune", run_dir, "--keep_last=1")
    assert code == 0 and "kept: 20, 30, 40" in out


def test_prune_refuses_while_a_run_works(call, run_dir):
    (run_dir / ".lock").touch()
    with lock_model_dir(run_dir):
        code, _, err = call("prune", run_dir, "--keep_last=1")
        assert code == 1 and "trains in MODEL_DIR" in err and err.count("\n") == 1
        assert call("ls", run_dir)[0] == 0
    assert call("prune", run_dir, "--keep_last=1")[0] == 0


@pytest.mark.parametrize(
    "verb, flags, words",
    [
        ("list", [], "say what to do: ls, verify, diff, rollback, prune; 'list' is none of them"),
        ("verify", ["--step=11"], "no checkpoint of step 11 in .*; there are: 10, 20, 30, 40"),
        ("diff", ["--step=10"], "diff needs --step=A and --other=B"),
        ("diff", ["--step=10", "--other=/no"], "--other=/no: there is no checkpoint in /no"),
        ("prune", [], "say what may go"),
        ("prune", ["--keep_every_steps=10"], "give --keep_last=N, too"),
        ("prune", ["--keep_last=0"], "keep_last"),
        ("ls", ["--checkpoints=/no/such"], "there is no folder /no/such"),
    ],
)
def test_mistakes(call, original, verb, flags, words):
    import re

    code, out, err = call(verb, original, *flags)
    assert code == 1 and not out and err.count("\n") == 1 and re.search(words, err), err


def test_an_import_has_a_manifest(tmp_path):
    writer = ParamsWriter(tmp_path / "scratch", {("a", "b"): (3, 2)})
    writer.write(("a", "b"), 0, np.arange(6, dtype=np.float32).reshape(3, 2))
    writer.save(tmp_path / "c", {"samples": 0})
    folder = CheckpointFolder(tmp_path / "c")
    entries = checkpoint_manifest.read(folder.path / "0")
    assert entries and not list(checkpoint_manifest.problems(folder.path / "0", entries))
    position = json.loads((tmp_path / "c" / "0" / "position" / "metadata").read_text())
    assert position["has_manifest"] and jax.device_count() == 8


def test_rollback(call, run_dir):
    folder = run_dir / "checkpoints"
    before = tiny_run.tree(folder)
    code, out, _ = call("rollback", run_dir, "--step=20", "--dry_run")
    assert (code, out) == (0, "would put aside: 30, 40; the newest is 20\n")
    assert tiny_run.tree(folder) == before
    code, out, _ = call("rollback", run_dir, "--step=20", "--json")
    assert (code, json.loads(out)["put_aside"]) == (0, [30, 40])
    assert CheckpointFolder(folder).steps() == [10, 20]
    assert {"rolled-back-30", "rolled-back-40"} <= {path.name for path in folder.iterdir()}
    assert call("rollback", run_dir, "--step=20")[1] == "put aside: nothing; the newest is 20\n"


def test_rollback_refuses(call, run_dir):
    before = tiny_run.tree(run_dir)
    assert "needs --step=N" in call("rollback", run_dir)[2]
    assert "no checkpoint of step 25 in" in call("rollback", run_dir, "--step=25")[2]
    flip_bit(data_files(run_dir / "checkpoints" / "20")[0], np.random.default_rng(5))
    code, _, err = call("rollback", run_dir, "--step=20")
    assert code == 1 and "is damaged, nothing is rolled back" in err
    with lock_model_dir(run_dir):
        code, _, err = call("rollback", run_dir, "--step=10")
    assert code == 1 and "trains in MODEL_DIR" in err
    assert set(tiny_run.tree(run_dir)) - set(before) <= {".lock"}
