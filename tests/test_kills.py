"""Killed runs against an undisturbed one (benchmarks/drill_kills.py), and one checkpoint on other meshes and processes.

Run as a program it is one process of several: python test_kills.py TASK, see `work`.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from cluster import Cluster

SAVED_STEP = 8
MESHES = ((2, 2, 2), (8, 1, 1), (1, 2, 4))


@pytest.fixture(scope="module")
def drill():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tiny_run.REPOSITORY / "benchmarks")
        import drill_kills
    return drill_kills


@pytest.fixture(scope="module")
def bench(drill, tiny_text, tmp_path_factory):
    """With the undisturbed run of one process."""
    found = drill.Bench(tiny_text, tmp_path_factory.mktemp("kills"))
    found.prepare(1, twice=False)
    found.seconds[1, False] = found.seconds[1, True] / 4  # about
    return found


def test_a_killed_run_ends_as_an_undisturbed_one(drill, bench):
    row = bench.drill(drill.Plan(number=0, num_processes=1, in_save=False))
    assert not row["problems"] and len(row["kills"]) == 1 and row["num_starts"] == 2
    assert "equal" in drill.line_of(row)
    assert drill.totals([row])["runs_equal"] == 1


@pytest.mark.slow
def test_four_killed_runs(drill, bench):
    bench.prepare(2)
    rows = [bench.drill(plan) for plan in drill.plans(4, seed=1)]
    assert not [row["problems"] for row in rows if row["problems"]]
    found = drill.totals(rows)
    assert found["runs_by_processes"] == {"1": 2, "2": 2}
    assert found["runs_with_first_kill_in_save"] >= 1 and found["kills"] >= 4


def test_plans_are_those_of_the_drill(drill):
    found = drill.plans(100, seed=0)
    assert found == drill.plans(100, seed=0)
    for num_processes in (1, 2):
        half = [plan for plan in found if plan.num_processes == num_processes]
        assert len(half) == 50 and 16 <= sum(plan.in_save for plan in half) <= 18
        assert sum(plan.is_cold for plan in half) >= 3
        assert sum(plan.num_kills == 2 for plan in half) == 10


# ---- the comparison can fail ----


def _lines(model_dir, change):
    path = model_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in change(lines)))


def _next_float(model_dir):
    def change(lines):
        record = json.loads(lines[7])
        record["loss"] = float(np.nextafter(record["loss"], 9.0))
        return [*lines[:7], json.dumps(record), *lines[8:]]

    _lines(model_dir, change)


def _flip(model_dir):
    folder = model_dir / "checkpoints" / "24" / "state"
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _chain(model_dir):
    path = model_dir / "checkpoints" / "24" / "position" / "metadata"
    position = json.loads(path.read_text())
    position["chain"][1][1] ^= 1
    path.write_text(json.dumps(position))


def _again(model_dir):
    record = json.loads((model_dir / "metrics.jsonl").read_text().splitlines()[5])
    record["grad_norm"] *= 1.0000001
    (model_dir / "metrics.superseded.jsonl").write_text(json.dumps(record) + "\n")


def _cut(model_dir):
    path = model_dir / "journal.jsonl"
    path.write_text(path.read_text()[:-9])


MUTATIONS = {
    "step twice": (lambda d: _lines(d, lambda x: [*x[:9], x[8], *x[9:]]), "has the steps [0, "),
    "step missing": (lambda d: _lines(d, lambda x: [*x[:9], *x[10:]]), "has the steps [0, "),
    "last bit of a loss": (_next_float, "metrics.jsonl: {'step': 7"),
    "first time other": (_again, "grad_norm of step 5 was"),
    "chain": (_chain, "checkpoint 24: chain is"),
    "bit": (_flip, "is damaged|checksum|elements are equal"),
    "leftover": (
        lambda d: (d / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(),
        "checkpoints has ['20.orbax-checkpoint-tmp']",
    ),
    "temporary file": (lambda d: (d / "config.ginx1").touch(), ". has ['config.ginx1']"),
    "checkpoint gone": (
        lambda d: shutil.rmtree(d / "checkpoints" / "16"),
        "checkpoints has [] and lacks ['16']",
    ),
    "line cut off": (_cut, "journal.jsonl: lines ["),
}


@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_what_differs_is_named(drill, bench, tmp_path, name):
    expected, copy = bench.undisturbed[1], tmp_path / "copy"
    shutil.copytree(expected, copy)
    if name is None:
        assert drill.differences(copy, expected) == []
        return
    mutate, words = MUTATIONS[name]
    mutate(copy)
    found = "\n".join(drill.differences(copy, expected))
    assert any(each in found for each in words.split("|")), found


# ---- one checkpoint on other meshes and processes ----


def work(task: dict) -> None:
    """Trains in each `model_dir` of the task on its mesh up to `num_steps`, and leaves in `answers` by process 0:
    the hash of the bytes of each array that was restored before and its fingerprint; loss and gradient norm of the
    last step, and the fingerprints of the state `after` it.
    """
    from bloomjax.distributed import Cluster as Here

    Here().start()
    import jax
    from jax.experimental import multihost_utils

    from bloomjax.checkpoints import Checkpoints, fingerprints
    from bloomjax.optimizer import adamw
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import abstract_state

    folder = Path(task["folder"])
    text: Any = types.SimpleNamespace(
        folder=folder,
        store_dir=folder / "tokens",
        vocabulary=types.SimpleNamespace(path=folder / "v.model"),
    )
    model, answers = tiny_run.tiny_model(dtype="float32"), []
    for each in task["runs"]:
        mesh, model_dir = MeshShape(*each["mesh"]), Path(each["model_dir"])
        answer: dict = {}
        if (model_dir / "checkpoints").exists():
            checkpoints = Checkpoints(save_every_steps=SAVED_STEP)
            checkpoints.open(model_dir / "checkpoints")
            abstract = abstract_state(model, adamw(), mesh.build())
            found = checkpoints.restore(abstract, lambda position: None)
            assert found is not None
            answer["fingerprints"] = fingerprints(found[0])
            answer["saved"] = found[1]["fingerprints"]
            whole = {
                jax.tree_util.keystr(path): np.asarray(
                    multihost_utils.process_allgather(x, tiled=True)
                )
                for path, x in jax.tree_util.tree_leaves_with_path(found[0])
            }
            answer["hashes"] = {
                name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in whole.items()
            }
            checkpoints.close()
        with contextlib.redirect_stdout(io.StringIO()):
            code = tiny_run.run(
                text, model_dir, model=model, mesh=mesh, train_steps=each["num_steps"],
                checkpoints=Checkpoints(save_every_steps=SAVED_STEP), eval_every_steps=100,
            )  # fmt: skip
        assert code == 0
        last = tiny_run.records(model_dir)[-1]
        assert last["step"] == each["num_steps"]
        answer |= {name: last[name] for name in ("loss", "grad_norm")}
        answers.append(answer | {"after": tiny_run.fingerprints(model_dir, each["num_steps"])})
    if jax.process_index() == 0:
        Path(task["answers"]).write_text(json.dumps(answers))


def answers_of(text, folder, num_processes, runs):
    """Of so many processes with 8 devices together."""
    task = {"folder": str(text.folder), "answers": str(folder / "answers.json"), "runs": runs}
    line = [sys.executable, __file__, json.dumps(task)]
    ended = Cluster(line, num_processes, num_devices=8).end()
    assert [code for code, _, _ in ended] == [0] * num_processes, ended
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
def test_two_processes_of_four_devices_to_other_meshes_and_processes(tiny_text, tmp_path):
    saved = tmp_path / "saved"
    first = {"model_dir": str(saved), "mesh": MESHES[0], "num_steps": SAVED_STEP}
    answers_of(tiny_text, tmp_path, 2, [first])
    parts = {path.name for path in (saved / "checkpoints" / str(SAVED_STEP) / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts

    found = {}
    for num_processes in (1, 2, 4):
        runs = []
        for mesh in MESHES:
            model_dir = tmp_path / f"{num_processes}-{'x'.join(map(str, mesh))}"
            shutil.copytree(saved, model_dir)
            runs.append({"model_dir": str(model_dir), "mesh": mesh, "num_steps": SAVED_STEP + 1})
        answers = answers_of(tiny_text, tmp_path, num_processes, runs)
        found |= {(num_processes, mesh): x for mesh, x in zip(MESHES, answers, strict=True)}

    usual = found[2, MESHES[0]]
    for (num_processes, mesh), answer in found.items():
        # What is restored: to the bit, everywhere.
        assert answer["hashes"] == usual["hashes"]
        assert answer["fingerprints"] == answer["saved"] == usual["saved"]
        # The next loss: to the bit, too. Its gradient is added up in another order on another mesh, and within one
        # process in another one than by Gloo between several.
        assert answer["loss"] == usual["loss"]
        assert answer["grad_norm"] == pytest.approx(usual["grad_norm"], rel=1e-6)
        # How devices are spread over several processes changes no bit of the state after that step.
        if num_processes > 1:
            assert answer["grad_norm"] == found[2, mesh]["grad_norm"]
            assert answer["after"] == found[2, mesh]["after"]
    assert len({str(answer["after"]) for answer in found.values()}) > 1  # so it can be seen


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
