"""What lies in a folder of checkpoints, whether it is whole, how two differ, and which may go.

    python tools/checkpoint.py ls --checkpoints=runs/tiny
    python tools/checkpoint.py verify --checkpoints=runs/tiny [--step=300] [--deep]
    python tools/checkpoint.py diff --checkpoints=runs/tiny --step=200 --other=300 [--all]
    python tools/checkpoint.py diff --checkpoints=runs/a --step=200 --other=runs/b/checkpoints/200
    python tools/checkpoint.py rollback --checkpoints=runs/tiny --step=200
    python tools/checkpoint.py prune --checkpoints=runs/tiny --keep_last=3 --keep_every_steps=1000 [--damaged]

--checkpoints is MODEL_DIR, its folder `checkpoints`, or the folder or URL of Checkpoints.directory. verify reads every
file and compares it with the manifest; with --deep also every array with its fingerprint. diff needs no model.
rollback puts aside (`rolled-back-N`) what is newer than --step, so that the next start goes on from there. prune keeps
the newest checkpoint that is whole (it reads it) and the pinned one. Both refuse while a run works in the folder;
--dry_run only says what would be done. --json prints one object. Exit code: 0; 3 if something is damaged, or if two
checkpoints differ; 1 for input that cannot be used.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath

from bloomjax import checkpoint_manifest, config
from bloomjax.checkpoint_folder import DAMAGED, ROLLED_BACK, CheckpointFolder, superseded
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors
from bloomjax.metrics import lock_model_dir

_FLAGS = flags.FlagValues()


def _define(define: Any, name: str, default: Any, text: str, **more: Any) -> Any:
    return define(name, default, text, flag_values=_FLAGS, **more)


_CHECKPOINTS = _define(
    flags.DEFINE_string, "checkpoints", None, "MODEL_DIR or its checkpoints; a URL"
)
_STEP = _define(flags.DEFINE_integer, "step", None, "This checkpoint; verify: all if not given.")
_OTHER = _define(
    flags.DEFINE_string,
    "other",
    None,
    "diff: a step, or the folder of a checkpoint of another run.",
)
_DEEP = _define(flags.DEFINE_bool, "deep", False, "verify: arrays, too.")
_ALL = _define(flags.DEFINE_bool, "all", False, "diff: also arrays that are equal.")
_KEEP_LAST = _define(flags.DEFINE_integer, "keep_last", None, "prune: keep so many.", lower_bound=1)
_KEEP_EVERY = _define(
    flags.DEFINE_integer,
    "keep_every_steps",
    None,
    "prune: and those whose step is a multiple.",
    lower_bound=1,
)
_DAMAGED = _define(
    flags.DEFINE_bool, "damaged", False, "prune: also what was put aside or is left over."
)
_DRY_RUN = _define(flags.DEFINE_bool, "dry_run", False, "prune, rollback: only say what would go.")
_UNLOCKED = _define(
    flags.DEFINE_bool, "unlocked", False, "prune, rollback: of a URL, where nothing tells of a run."
)
_JSON = _define(flags.DEFINE_bool, "json", False, "One JSON object.")

EXIT_DIFFERENT = 3


def find_folder(given: str | None) -> CheckpointFolder:
    """BadInput if there is none."""
    if not given:
        raise BadInput("--checkpoints=DIR is needed: MODEL_DIR or its folder of checkpoints")
    folder = CheckpointFolder(given)
    if (folder.path / "checkpoints").is_dir():
        folder = CheckpointFolder(os.fspath(folder.path / "checkpoints"))
    if not folder.path.is_dir():
        raise BadInput(f"--checkpoints={given}: there is no folder {folder.path}")
    return folder


def _position(path: epath.Path) -> dict[str, Any]:
    """What the checkpoint says of itself; empty if that cannot be read."""
    try:
        found = json.loads((path / "position" / "metadata").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe(path: epath.Path, state: str) -> dict[str, Any]:
    """A row of `ls`."""
    names = checkpoint_manifest.files_below(path)
    try:
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
        written = metadata["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        written = path.stat().mtime
    position = _position(path)
    return {
        "name": path.name,
        "step": position.get("step"),
        "samples": position.get("samples"),
        "time": round(written, 3),
        "num_bytes": sum((path / name).stat().length for name in names),
        "num_files": len(names),
        "manifest": checkpoint_manifest.NAME in names,
        "state": state,
    }


def rows(folder: CheckpointFolder) -> list[dict[str, Any]]:
    """All that lies there: whole checkpoints by step, then what is none."""
    pinned = folder.pinned_step()
    found = [
        describe(folder.path / str(step), "pinned" if step == pinned else "whole")
        for step in folder.steps()
    ]
    aside = ((ROLLED_BACK, "rolled back"), (DAMAGED, "damaged"))
    for prefix, state in aside:
        found += [describe(path, state) for path in folder.put_asides(prefix)]
    return found + [describe(path, "leftover") for path in folder.leftovers()]


def list_checkpoints() -> None:
    folder = find_folder(_CHECKPOINTS.value)
    found, pinned = rows(folder), folder.pinned()
    if _JSON.value:
        content = {"directory": os.fspath(folder.path), "pinned": pinned, "checkpoints": found}
        print(json.dumps(content, ensure_ascii=False))
        return
    head = ("name", "samples", "written", "GB", "files", "")
    table = [head, *(_cells(row) for row in found)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = (cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells, row[5])).rstrip())
    if not found:
        print(f"no checkpoints in {folder.path}")
    if pinned:
        print(f"pinned: step {pinned['step']}: {pinned.get('reason')}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    note = row["state"] + ("" if row["manifest"] else ", no manifest")
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
    samples = "?" if row["samples"] is None else f"{row['samples']:,}"
    size = f"{row['num_bytes'] / 1e9:.3f}"
    return row["name"], samples, written, size, str(row["num_files"]), note


def _checkpoint_of(folder: CheckpointFolder, step: int) -> epath.Path:
    steps = folder.steps()
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise BadInput(f"no checkpoint of step {step} in {folder.path}; there are: {there}")
    return folder.path / str(step)


def problems_of(path: epath.Path, deep: bool) -> Iterator[str]:
    """One line for each damage found in a checkpoint; all files are read."""
    try:
        entries = checkpoint_manifest.read(path)
        if entries is None:
            if _position(path).get("has_manifest"):
                yield f"{checkpoint_manifest.NAME}: is missing"
        else:
            yield from checkpoint_manifest.problems(path, entries)
    except checkpoint_manifest.Damage as error:
        yield str(error)
    if not deep:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bloomjax import checkpoint_arrays

    position = _position(path)
    if not {"arrays", "fingerprints"} <= position.keys():
        yield "position/metadata: cannot be read, so no array can be verified"
        return
    for name, problem in checkpoint_arrays.damaged_arrays(path, position):
        yield f"array {name}: {problem}"


def verify() -> int:
    folder = find_folder(_CHECKPOINTS.value)
    steps = [_STEP.value] if _STEP.value is not None else folder.steps()
    paths = [_checkpoint_of(folder, step) for step in steps]
    if not paths:
        raise BadInput(f"no checkpoints in {folder.path}")
    found = {}
    for step, path in zip(steps, paths, strict=True):
        started = time.monotonic()
        problems = list(problems_of(path, _DEEP.value))
        found[step] = problems
        if _JSON.value:
            continue
        row = describe(path, "")
        seconds = time.monotonic() - started
        what = "damaged" if problems else "whole"
        if not row["manifest"] and not problems:
            what = "not known to be damaged: it has no manifest" + (
                "" if _DEEP.value else "; --deep"
            )
        print(f"step {step}: {what}; {row['num_bytes'] / 1e9:.3f} GB, {seconds:.1f} seconds")
        for problem in problems:
            print(f"  {path}/{problem}")
    if _JSON.value:
        print(json.dumps({"directory": os.fspath(folder.path), "problems": found}))
    return EXIT_DIFFERENT if any(found.values()) else 0


def _two_checkpoints() -> tuple[epath.Path, epath.Path]:
    folder, other = find_folder(_CHECKPOINTS.value), _OTHER.value
    if _STEP.value is None or other is None:
        raise BadInput("diff needs --step=A and --other=B: a step, or a folder of a checkpoint")
    mine = _checkpoint_of(folder, _STEP.value)
    if other.isdecimal():
        return mine, _checkpoint_of(folder, int(other))
    there = CheckpointFolder(other).path
    if not (there / "position" / "metadata").exists():
        raise BadInput(f"--other={other}: there is no checkpoint in {there}")
    return mine, there


def diff() -> int:
    paths = _two_checkpoints()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bloomjax import checkpoint_arrays

    positions = [_position(path) for path in paths]
    for path, position in zip(paths, positions, strict=True):
        if "arrays" not in position:
            raise BadInput(f"checkpoint {path} is damaged: position/metadata cannot be read")
    kinds = positions[0]["arrays"], positions[1]["arrays"]
    try:
        found = list(checkpoint_arrays.differences(paths, kinds))
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise BadInput(f"{paths[0]} or {paths[1]} is damaged: {text}") from error
    different = [each for each in found if not each.is_equal]
    if _JSON.value:
        listed = [vars(each) | {"is_equal": each.is_equal} for each in found]
        print(json.dumps({"checkpoints": list(map(os.fspath, paths)), "arrays": listed}))
    else:
        for each in found if _ALL.value else different:
            print(_difference(each))
        print(f"{len(found) - len(different)} of {len(found)} arrays are equal to the bit")
    return EXIT_DIFFERENT if different else 0


def _difference(each: Any) -> str:
    mine, other = (kind or "missing" for kind in each.kinds)
    if each.kinds[0] != each.kinds[1]:
        return f"{each.name}  {mine} and {other}"
    share = each.num_equal / max(1, each.num_elements)
    return f"{each.name}  {mine}  max |a-b| {each.max_difference:.6g}  equal {share:.4%}"


def _newest_whole(folder: CheckpointFolder) -> int | None:
    steps = reversed(folder.steps())
    return next((s for s in steps if not any(problems_of(folder.path / str(s), False))), None)


def _victims(folder: CheckpointFolder) -> Sequence[epath.Path]:
    found = []
    if _KEEP_LAST.value is not None:
        gone = superseded(
            folder.steps(),
            keep_last=_KEEP_LAST.value,
            keep_every_steps=_KEEP_EVERY.value,
            pinned=folder.pinned_step(),
        )
        whole = _newest_whole(folder) if gone else None
        found += [folder.path / str(step) for step in gone if step != whole]
    elif _KEEP_EVERY.value is not None:
        raise BadInput("--keep_every_steps keeps more than the newest: give --keep_last=N, too")
    if _DAMAGED.value:
        found += folder.put_asides(DAMAGED) + folder.put_asides(ROLLED_BACK) + folder.leftovers()
    if _KEEP_LAST.value is None and not _DAMAGED.value:
        raise BadInput("say what may go: --keep_last=N (with --keep_every_steps=K), --damaged")
    return found


@contextlib.contextmanager
def _no_run(folder: CheckpointFolder) -> Iterator[None]:
    """BadInput while a run holds the folder, or the MODEL_DIR around it."""
    if folder.is_remote:
        if not _UNLOCKED.value:
            raise BadInput(
                f"nothing tells whether a run writes to {folder.path}; if none does, say --unlocked"
            )
        yield
        return
    with contextlib.ExitStack() as locks:
        for place in (Path(folder.path), Path(folder.path).parent):
            if (place / ".lock").exists():
                locks.enter_context(lock_model_dir(place))
        yield


def prune() -> None:
    folder = find_folder(_CHECKPOINTS.value)
    with _no_run(folder) if not _DRY_RUN.value else contextlib.nullcontext():
        gone = []
        for path in _victims(folder):
            gone.append(describe(path, ""))
            if not _DRY_RUN.value:
                with one_line_errors(f"cannot delete {path}"):
                    folder.delete(path)
        kept = folder.steps() if not _DRY_RUN.value else None
    num_bytes = sum(row["num_bytes"] for row in gone)
    names = [row["name"] for row in gone]
    if _JSON.value:
        print(json.dumps({"deleted": names, "num_bytes": num_bytes, "dry_run": _DRY_RUN.value}))
        return
    verb = "would delete" if _DRY_RUN.value else "deleted"
    print(f"{verb} {len(names)} ({num_bytes / 1e9:.3f} GB): {', '.join(names) or 'nothing'}")
    if kept is not None:
        print(f"kept: {', '.join(map(str, kept)) or 'none'}")


def rollback() -> None:
    folder = find_folder(_CHECKPOINTS.value)
    if _STEP.value is None:
        raise BadInput("rollback needs --step=N: the checkpoint to go on from")
    with _no_run(folder) if not _DRY_RUN.value else contextlib.nullcontext():
        target = _checkpoint_of(folder, _STEP.value)
        damage = next(problems_of(target, False), None)
        if damage:
            raise BadInput(f"checkpoint {target} is damaged, nothing is rolled back: {damage}")
        newer = [step for step in folder.steps() if step > _STEP.value]
        if not _DRY_RUN.value:
            for step in newer:
                with one_line_errors(f"cannot rename {folder.path / str(step)}"):
                    folder.put_aside(step, ROLLED_BACK)
    if _JSON.value:
        print(json.dumps({"step": _STEP.value, "put_aside": newer, "dry_run": _DRY_RUN.value}))
        return
    verb = "would put aside" if _DRY_RUN.value else "put aside"
    print(f"{verb}: {', '.join(map(str, newer)) or 'nothing'}; the newest is {_STEP.value}")


VERBS = {
    "ls": list_checkpoints, "verify": verify, "diff": diff, "rollback": rollback, "prune": prune,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    argv = list(sys.argv if argv is None else argv)
    words = [word for word in argv[1:] if not word.startswith("-")]
    verb = next((word for word in words if word in VERBS), words[0] if words else None)
    if verb is not None:
        argv.remove(verb)

    def call() -> int | None:
        if verb not in VERBS:
            said = "" if verb is None else f"; {verb!r} is none of them"
            raise BadInput(f"say what to do: {', '.join(VERBS)}{said}")
        return VERBS[verb]()

    config.call(call, argv, _FLAGS)


if __name__ == "__main__":
    main()
