"""The folder of a run's checkpoints, local or a URL: which are whole, which are kept, and what may go.

`<step>/` is a whole checkpoint: in a local folder it takes this name when all of it is written; in a store of objects,
which cannot rename, its manifest is written last and makes it whole. Nothing here loads JAX.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from bloomjax import checkpoint_manifest
from bloomjax.errors import BadInput
from bloomjax.files import write_whole

TEMPORARY = ".orbax-checkpoint-tmp"
DAMAGED, ROLLED_BACK = "damaged-", "rolled-back-"
_PINNED = "pinned.json"
# etils would load TensorFlow for a URL, wherever it is installed; it decides at the first path it sees.
os.environ.setdefault("EPATH_USE_TF", "false")


def superseded(
    steps: Sequence[int],
    *,
    keep_last: int,
    keep_every_steps: int | None = None,
    pinned: int | None = None,
) -> list[int]:
    """Which of these steps need not be kept, oldest first."""
    steps = sorted(steps)
    kept = {*steps[-keep_last:], pinned}
    return [
        step
        for step in steps
        if step not in kept and not (keep_every_steps and step % keep_every_steps == 0)
    ]


def free_bytes(path: epath.Path) -> int | None:
    """What may still be written to the file system of `path`; None for a URL."""
    if checkpoint_manifest.is_remote(path):
        return None
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class CheckpointFolder:
    """What lies in `path`; every change is complete or can be told from one that is."""

    def __init__(self, path: str | os.PathLike[str]):
        """BadInput for a URL that cannot be opened here."""
        text = os.fspath(path)
        self.is_remote = "://" in text
        if self.is_remote:
            if not text.startswith("gs://"):  # of stores of objects Orbax 0.12 writes to no other
                raise BadInput(f"checkpoints cannot lie in {text}: give a folder or a gs:// URL")
            try:
                self.path = epath.Path(text)
                self.path.exists()
            except (ImportError, ValueError) as error:
                text = " ".join(str(error).split())
                raise BadInput(f"cannot open {self.path}: {text}; pip install gcsfs") from None
        else:
            self.path = epath.Path(Path(text).resolve())

    def steps(self) -> list[int]:
        """Of the whole checkpoints, oldest first."""
        if not self.path.exists():
            return []
        found = [path for path in self.path.iterdir() if _is_step(path.name)]
        return sorted(int(path.name) for path in found if self._is_whole(path))

    def _is_whole(self, path: epath.Path) -> bool:
        return (path / checkpoint_manifest.NAME).exists() if self.is_remote else path.is_dir()

    def leftovers(self) -> list[epath.Path]:
        """Of saves and deletions that were killed, or still go on."""
        if not self.path.exists():
            return []
        return sorted(
            path
            for path in self.path.iterdir()
            if TEMPORARY in path.name
            or (self.is_remote and _is_step(path.name) and not self._is_whole(path))
        )

    def put_asides(self, prefix: str) -> list[epath.Path]:
        """Checkpoints that were put aside under this prefix, DAMAGED or ROLLED_BACK, oldest first."""
        if not self.path.exists():
            return []
        found = [path for path in self.path.iterdir() if path.name.startswith(prefix)]
        return sorted(found, key=lambda path: (_number(path.name.removeprefix(prefix)), path.name))

    # Changes.

    def begin(self, step: int) -> epath.Path:
        """An empty folder to write a checkpoint in; `commit` makes it the checkpoint of this step."""
        path = self.path / (str(step) if self.is_remote else f"{step}{TEMPORARY}")
        if path.exists():
            path.rmtree()
        path.mkdir(parents=True)
        return path

    def commit(self, step: int, temporary: epath.Path) -> None:
        """Of a folder that has its manifest."""
        if self.is_remote:
            return
        _sync_folders(temporary)
        temporary.rename(self.path / str(step))
        _sync(self.path)

    def delete(self, path: epath.Path) -> None:
        """A killed deletion must not leave what looks like a checkpoint."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_remote:
                (path / checkpoint_manifest.NAME).unlink(missing_ok=True)
            elif TEMPORARY not in path.name:
                path = path.rename(self._free_name(f"{path.name}{TEMPORARY}-deleted"))
            path.rmtree()

    def put_aside(self, step: int, prefix: str) -> epath.Path | None:
        """Renames a checkpoint, so that somebody can still look at it; None if it is gone."""
        source, target = self.path / str(step), self._free_name(f"{prefix}{step}")
        try:
            if self.is_remote:  # a copy, file by file; it must not count as a checkpoint meanwhile
                manifest = source / checkpoint_manifest.NAME
                content = manifest.read_bytes() if manifest.exists() else None
                manifest.unlink(missing_ok=True)
                source.rename(target)
                if content is not None:
                    (target / checkpoint_manifest.NAME).write_bytes(content)
            else:
                source.rename(target)
                _sync(self.path)
        except FileNotFoundError:
            return None
        return target

    def remove_leftovers(self) -> None:
        for path in self.leftovers():
            self.delete(path)

    def _free_name(self, name: str) -> epath.Path:
        names = (f"{name}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000))))
        return next(path for each in names if not (path := self.path / each).exists())

    # The pinned one.

    def pinned(self) -> dict[str, Any] | None:
        """`step`, `reason`, `time` of the checkpoint that is kept besides the newest."""
        path = self.path / _PINNED
        try:
            found = json.loads(path.read_bytes())
            int(found["step"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logging.warning("%s cannot be read: nothing is pinned", path)
            return None
        return found

    def pinned_step(self) -> int | None:
        found = self.pinned()
        return int(found["step"]) if found else None

    def pin(self, step: int, reason: str) -> None:
        """Instead of the one pinned before."""
        found = {"step": step, "reason": reason, "time": round(time.time(), 3)}
        data = (json.dumps(found) + "\n").encode()
        if self.is_remote:
            (self.path / _PINNED).write_bytes(data)
        else:
            write_whole(Path(self.path) / _PINNED, data)

    # Room.

    def free_bytes(self) -> int | None:
        """What may still be written here; None if nobody knows."""
        return free_bytes(self.path)

    def make_room(
        self, needed_bytes: int, *, keep_every_steps: int | None = None, at_least: int = 0
    ) -> list[str]:
        """Deletes until `needed_bytes` are free and at least `at_least` were deleted; returns their names.

        First leftovers (not counted), then what was rolled back, then the oldest checkpoints; those that are kept for
        ever go after the others, the pinned one after these; the newest whole one stays.
        """
        self.remove_leftovers()
        pinned, steps = self.pinned_step(), self.steps()[:-1]

        def rank(step: int) -> tuple[bool, bool, int]:
            is_for_ever = bool(keep_every_steps) and step % (keep_every_steps or 1) == 0
            return step == pinned, is_for_ever, step

        victims = self.put_asides(ROLLED_BACK)
        checkpoints = [self.path / str(step) for step in sorted(steps, key=rank)]
        free = self.free_bytes()
        if free is None or free + sum(map(_num_bytes, victims + checkpoints)) >= needed_bytes:
            victims += checkpoints  # else they would be lost for nothing
        freed = []
        for path in victims:
            free = self.free_bytes()
            if len(freed) >= at_least and (free is None or free >= needed_bytes):
                break
            self.delete(path)
            freed.append(path.name)
        return freed


def _num_bytes(folder: epath.Path) -> int:
    names = checkpoint_manifest.files_below(folder)
    return sum((folder / name).stat().length for name in names)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _number(text: str) -> int:
    digits = text.split(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _sync(folder: epath.Path) -> None:
    """The names in a local folder, too, must survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(handle)


def _sync_folders(folder: epath.Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _sync_folders(path)
    _sync(folder)
