"""Checkpoints of weights, optimizer and data position: saved asynchronously, verified when restored.

A checkpoint is `checkpoints/<step>/` with two Orbax items: `state` (TrainState) and `position` (JSON: what `train`
needs to go on, and a fingerprint of every leaf). Orbax itself restores a flipped bit without a word, so each file is
compared with the manifest, and each leaf with its fingerprint, which does not depend on how the leaf is sharded.
"""

import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from bloomjax import checkpoint_manifest, job, kvstores
from bloomjax.checkpoint_folder import (
    DAMAGED,
    ROLLED_BACK,
    TEMPORARY,
    CheckpointFolder,
    superseded,
)
from bloomjax.checkpoint_saving import ITEMS, Save, is_disk_full
from bloomjax.errors import BadInput, NoRoom, Restart
from bloomjax.files import one_line_errors
from bloomjax.metrics import lock_model_dir

_RETRY_SECONDS = 10.0  # between looks at the free space after a save that failed
_FINAL_TRIES = 3  # of the last save of a run
_MAX_FAILURES = 3  # of saves in a row, by other reasons than a full disk


def _leaf_fingerprint(x: jax.Array, start: Any = 0) -> jax.Array:
    """uint32 sum over elements of mix(bits, index): any order of summing, so any sharding, gives the same value.

    `start` is the index of the first element of `x`, modulo 2^32: the sums of the blocks of an array add up to its own.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index, stride = jnp.full(x.shape, start, jnp.uint32), 1
    for d in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * jnp.uint32(stride % 2**32)
        stride *= x.shape[d]
    h = (bits ^ (index * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 13), dtype=jnp.uint32)


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_leaf_fingerprint(x) for x in leaves]


_block_fingerprint = jax.jit(_leaf_fingerprint)


def block_fingerprint(block: np.ndarray, start: int) -> int:
    """The part of an array's fingerprint that consecutive elements from index `start` contribute; add modulo 2^32."""
    return int(_block_fingerprint(block, np.uint32(start % 2**32)))


def fingerprints(tree: Any) -> dict[str, int]:
    """A 32-bit fingerprint of every leaf by its path; equal bits give equal numbers on any mesh."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    values = jax.device_get(_fingerprints(list(leaves)))
    return {jax.tree_util.keystr(path): int(v) for path, v in zip(paths, values, strict=True)}


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      save_every_steps, save_every_minutes: when the run means to save.
      directory: where they lie, once `open` was called.
      problems: a line about each checkpoint that the last `restore` has found damaged.
      incidents: what else went wrong, {"event": "disk_full", ...}; for the caller to take and write down.
      last_save: of the newest that is whole: step, num_bytes, num_files, seconds, manifest_seconds (both behind).
    """

    def __init__(
        self,
        *,
        save_every_steps: int,
        save_every_minutes: float | None = None,
        keep_last: int = 3,
        keep_every_steps: int | None = None,
        directory: str | None = None,
    ):
        """Keeps the `keep_last` newest, the pinned one, and for ever those whose step is a multiple of
        `keep_every_steps`; in `directory` (a folder or a gs:// URL) if it is given.
        """
        if save_every_steps < 1 or keep_last < 1:
            raise BadInput(
                f"save_every_steps and keep_last must be at least 1, got {save_every_steps} and {keep_last}"
            )
        if keep_every_steps is not None and keep_every_steps < 1:
            raise BadInput(f"keep_every_steps must be at least 1 or None, got {keep_every_steps}")
        if save_every_minutes is not None and not 0 < save_every_minutes < math.inf:
            raise BadInput(f"save_every_minutes must be positive or None, got {save_every_minutes}")
        if directory is not None and not directory.strip():
            raise BadInput("Checkpoints.directory is empty; None means MODEL_DIR/checkpoints")
        self.save_every_steps = save_every_steps
        self.save_every_minutes = save_every_minutes
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._elsewhere = directory
        self._folder: CheckpointFolder | None = None
        self._lock: TextIO | None = None
        self._handlers: dict[str, Any] = {}
        self._steps: list[int] = []
        self._saving: Save | None = None
        self._changes = threading.Lock()  # pinning must not meet a deletion
        self._stored_bytes: int | None = (
            None  # of the last checkpoint that this process saw written
        )
        self._failed_step: int | None = None  # whose save found the disk full
        self._num_failures, self._next_try, self._needed_bytes = 0, 0.0, 0
        self._is_read_only = False
        self._num_broken = 0  # saves that have failed in a row, by other reasons than a full disk
        # Of a save that failed for another reason: its line, the process, the error here, the step.
        self._broken: tuple[str, int | None, BaseException | None, int] | None = None
        self.directory: epath.Path | None = None
        self.problems: list[str] = []
        self.incidents: list[dict[str, Any]] = []
        self.last_save: dict[str, Any] | None = None

    def open(self, directory: Path | str, *, read_only: bool = False) -> None:
        """Looks at what is in `directory`, or in that of the constructor; creates it unless `read_only`."""
        self._folder = CheckpointFolder(self._elsewhere or directory)
        self.directory = self._folder.path
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._is_read_only = read_only
        if job.is_main() and not read_only:
            with one_line_errors(f"cannot write {self.directory}"):
                self.directory.mkdir(parents=True, exist_ok=True)
            if self._elsewhere:
                self._claim_elsewhere(CheckpointFolder(directory))
        self._reload()

    def _claim_elsewhere(self, usual: CheckpointFolder) -> None:
        """BadInput if the run's checkpoints are still where they usually lie, or another run writes here.

        A link to a local folder stands in the usual place, for those who look there.
        """
        if usual.path == self.folder.path:
            return
        if usual.steps() and not self.folder.steps():
            raise BadInput(
                f"{usual.path} has checkpoints and Checkpoints.directory {self.directory} has none: "
                "move them there, or leave Checkpoints.directory out"
            )
        if self.folder.is_remote:
            return
        self._lock = lock_model_dir(Path(self.folder.path))
        if usual.path.parent.is_dir() and not os.path.lexists(usual.path):
            os.symlink(self.folder.path, usual.path)

    @property
    def folder(self) -> CheckpointFolder:
        if self._folder is None:
            raise RuntimeError("Checkpoints.open was not called")
        return self._folder

    def _reload(self) -> None:
        """What process 0 sees is what there is."""
        self._steps = job.on_main(self.folder.steps)

    def is_due(self, step: int) -> bool:
        return step % self.save_every_steps == 0

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first; one that is being saved is not among them."""
        self._collect_if_done()
        return list(self._steps)

    def last_before(self, step: int) -> int | None:
        """The newest whole checkpoint of an earlier step."""
        return max((each for each in self.steps() if each < step), default=None)

    def pin(self, step: int, reason: str) -> None:
        """Keeps the checkpoint of `step` besides the newest, until another is pinned; written by the main process."""
        if not job.is_main():
            return
        with self._changes:
            if step in self.folder.steps():
                try:
                    self.folder.pin(step, reason)
                except OSError as error:
                    logging.error("checkpoint %d is not pinned: %s", step, error)
            else:  # deleted this very moment; an incident must not end the run
                logging.error("no checkpoint of step %d in %s to be pinned", step, self.directory)

    def settle(self) -> None:
        """Waits for a save in the background, however it ends; all processes call it."""
        self._collect()

    def put_aside_from(self, step: int) -> list[int]:
        """Whole checkpoints of `step` and later become `rolled-back-<step>`; all processes call it. Their steps.

        Waits for a save in the background, which may be one of them.
        """
        self._collect()
        aside = [each for each in self._steps if each >= step]
        for each in aside:
            self._put_aside(each, ROLLED_BACK)
        if self._failed_step is not None and self._failed_step >= step:
            self._failed_step = None  # what was to be saved then is no longer wanted
        return aside

    # Saving.

    def save(self, step: int, state: Any, position: dict[str, Any]) -> bool:
        """Copies the state to the host and returns; the writing goes on behind. All processes call it.

        False if nothing is saved, because the step or a later one exists, or because the disk has no room and none
        can be made (`incidents` says so, `wants_retry` when to call again). What went wrong with the last three saves,
        other than that, is raised here.
        """
        self._collect(raises=True)
        if self._steps and step <= self._steps[-1]:
            return False
        num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        self._needed_bytes = num_bytes
        if self._stored_bytes is not None:
            self._needed_bytes = min(num_bytes, int(1.02 * self._stored_bytes))
        begun = job.on_main(lambda: self._begin(step))
        self._take_incident(begun)
        if begun["temporary"] is None:
            return False
        position = position_of(step, position, state, fingerprints(state))
        self._saving = Save(
            step,
            epath.Path(begun["temporary"]),
            self._handlers,
            {
                "state": ocp.args.StandardSave(state, save_args=save_arguments(state)),
                "position": ocp.args.JsonSave(position),
            },
            self._finish_save,
        )
        return True

    def _begin(self, step: int) -> dict[str, Any]:
        """On the main process: the folder to write in; None, and an incident, where there is no room for it."""
        freed: list[str] = []
        path = None
        try:
            free = self.folder.free_bytes()
            if free is not None and free < self._needed_bytes:
                freed = self._make_room(at_least=0)
                free = self.folder.free_bytes()
            if free is None or free >= self._needed_bytes:
                path = self.folder.begin(step)
                for name in ITEMS:
                    (path / name).mkdir()
        except OSError as error:
            if not is_disk_full(error):
                raise
            path = None
        incident = None
        if freed or path is None:
            incident = self._incident(step, freed, "too little room for a checkpoint")
        return {"temporary": None if path is None else os.fspath(path), "incident": incident}

    def _make_room(self, at_least: int) -> list[str]:
        with self._changes:
            return self.folder.make_room(
                self._needed_bytes, keep_every_steps=self._keep_every_steps, at_least=at_least
            )

    def _incident(self, step: int, freed: list[str], problem: str) -> dict[str, Any]:
        """Of a full disk; said once for each episode, and whenever something was deleted."""
        free = self.folder.free_bytes()
        if freed or self._failed_step is None:
            gone = f"; deleted {', '.join(freed)}" if freed else "; nothing could be deleted"
            line = (
                f"bloomjax: DISK FULL at the save of step {step}: {problem} in {self.directory}, needed "
                f"{_gigabytes(self._needed_bytes)}, free {_gigabytes(free)}{gone}; training goes on"
            )
            print(line, file=sys.stderr, flush=True)
        return {
            "event": "disk_full",
            "step": step,
            "directory": os.fspath(self.folder.path),
            "freed": freed,
            "free_bytes": free,
            "needed_bytes": self._needed_bytes,
            "problem": problem,
        }

    def _finish_save(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """On the main process, behind: commits and deletes what is no longer kept; or makes room for another try."""
        step, folder = outcome["step"], self.folder
        if outcome["error"] is None:
            temporary = f"{step}" if folder.is_remote else f"{step}{TEMPORARY}"
            folder.commit(step, folder.path / temporary)
            with self._changes:
                self._delete_superseded()
            return {"steps": folder.steps(), "incident": None}
        if not outcome["full"]:
            return {"steps": folder.steps(), "incident": None}
        # The numbers of free bytes know nothing of quotas: what has failed twice needs more room than they say.
        freed = self._make_room(at_least=min(self._num_failures, 1))
        return {
            "steps": folder.steps(),
            "incident": self._incident(step, freed, outcome["error"]),
        }

    def _delete_superseded(self) -> None:
        gone = superseded(
            self.folder.steps(),
            keep_last=self._keep_last,
            keep_every_steps=self._keep_every_steps,
            pinned=self.folder.pinned_step(),
        )
        for step in gone:
            try:
                self.folder.delete(self.folder.path / str(step))
            except (
                OSError
            ) as error:  # the checkpoint is whole all the same; the next save tries again
                logging.warning("cannot delete checkpoint %s/%d: %s", self.directory, step, error)

    def _collect_if_done(self) -> None:
        if self._saving is not None and not self._saving.is_running():
            self._collect()

    def _collect(self, raises: bool = False) -> None:
        """Waits for the save in the background and learns how it ended: the same on all processes."""
        if self._saving is not None:
            save, self._saving = self._saving, None
            outcome = save.join()
            self._steps = outcome.get("steps", self._steps)
            self._take_incident(outcome)
            if outcome["error"] is None:
                self._failed_step, self._num_failures, self._num_broken = None, 0, 0
                self._stored_bytes = outcome["num_bytes"]
                names = ("step", "num_bytes", "num_files", "seconds", "manifest_seconds")
                self.last_save = {name: outcome[name] for name in names}
            elif not outcome["full"] and not self._may_try_again(outcome):
                self._broken = outcome["error"], outcome.get("process"), save.error, save.step
        if raises and self._broken is not None:
            line, process, error, step = self._broken
            self._broken = None
            if error is not None:
                raise error
            where = f" of process {process}" if process is not None else ""
            raise RuntimeError(f"the save of step {step}{where} failed: {line}")

    def _may_try_again(self, outcome: dict[str, Any]) -> bool:
        """After a save that failed: file systems stumble, and the last checkpoint is whole."""
        self._num_broken += 1
        step, problem = outcome["step"], outcome["error"]
        if not outcome.get("is_agreed") or self._num_broken >= _MAX_FAILURES:
            return False
        incident = {"event": "save_failed", "step": step, "problem": problem}
        if job.is_main():
            line = f"bloomjax: THE SAVE OF STEP {step} FAILED: {problem}; training goes on"
            print(line, file=sys.stderr, flush=True)
        self.incidents.append(incident | {"process": outcome.get("process")})
        self._failed_step = step
        self._next_try = time.monotonic() + _RETRY_SECONDS
        return True

    def _take_incident(self, found: dict[str, Any]) -> None:
        incident = found.get("incident")
        if incident is None:
            return
        self.incidents.append(incident)
        if "temporary" in found and found["temporary"] is not None:
            return  # room was made before anything failed
        self._failed_step = incident["step"]
        pause = 0.0 if self._num_failures == 0 else min(60.0 * 2**self._num_failures, 1800.0)
        self._next_try = time.monotonic() + pause
        self._num_failures += 1

    def wants_retry(self) -> bool:
        """Whether a save failed and it makes sense to try again now. Local and cheap."""
        self._collect_if_done()
        if self._failed_step is None or self._saving is not None:
            return False
        now = time.monotonic()
        if now < self._next_try:
            return False
        self._next_try = now + _RETRY_SECONDS
        return self._has_room()

    def wait(self, save_again: Callable[[], Any] | None = None) -> None:
        """Until what is being saved is on disk.

        If the last save found the disk full and there is room by now, `save_again()` is called (on all processes),
        which should call `save`. NoRoom if the last save is not on the disk in the end.
        """
        self._collect(raises=True)
        for _ in range(_FINAL_TRIES):
            if self._failed_step is None or save_again is None:
                break
            if not job.on_main(self._has_room):
                break
            save_again()
            self._collect(raises=True)
        if self._failed_step is not None:
            step, self._failed_step = self._failed_step, None
            if self._num_broken:
                raise Restart(
                    f"the checkpoint of step {step} is not saved, see journal.jsonl (save_failed)"
                )
            raise NoRoom(
                f"the checkpoint of step {step} is not saved: {self.directory} is full, needed "
                f"{_gigabytes(self._needed_bytes)}, free {_gigabytes(self.folder.free_bytes())}; the newest is "
                f"{max(self._steps, default='none')}; make room and start the same command again"
            )

    def _has_room(self) -> bool:
        free = self.folder.free_bytes()
        return free is None or free >= self._needed_bytes

    def close(self) -> None:
        """Waits for a save, too, and says on stderr if it failed: this is called when a run ends by an error."""
        if self._folder is None:
            return
        self._collect()
        if self._broken is not None and job.is_main():
            line, _, _, step = self._broken
            print(f"bloomjax: the save of step {step} failed: {line}", file=sys.stderr)
        self._broken, self._failed_step = None, None
        for handler in self._handlers.values():
            handler.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._folder = None

    def restore(
        self,
        abstract_state: Any,
        check_position: Callable[[dict[str, Any]], None],
        from_params: Callable[[Any], Any] | None = None,
        before_step: int | None = None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, on the mesh of `abstract_state`; None if there is none at all.

        `check_position` may refuse a checkpoint of another run by raising BadInput; one with other arrays than
        `abstract_state` is refused too. Imported parameters become a state by `from_params`. A damaged checkpoint is
        put aside as `damaged-<step>` and the one before is taken; BadInput if all are damaged. `problems` holds a line
        about each. What is no damage (no memory, no permission, a file system that does not answer) is raised as it is.
        Of several processes all take the same step: damage that one of them sees is damage for all.
        With `before_step` only checkpoints of earlier steps are looked at.
        """
        self._collect()
        self._reload()
        steps = [x for x in reversed(self._steps) if before_step is None or x < before_step]
        self.problems = []
        damaged = []
        for step in steps:
            try:
                self._check_files(step)
                position = self._together(step, self._restore_position, step)
                check_position(position)
                if is_imported(position) and from_params:
                    state = from_params(self.restore_params(step, abstract_state.params))
                else:
                    self._check_arrays(step, abstract_state, position)
                    state = self._restore_state(step, abstract_state, position)
            except _Damaged as error:
                if job.is_main():
                    logging.error("%s", error)
                self.problems.append(str(error))
                damaged.append(step)
                continue
            for damaged_step in [] if self._is_read_only else damaged:
                self._put_aside(damaged_step, DAMAGED)
            self._remove_leftovers()
            return state, position
        if damaged:
            raise BadInput(
                f"{self.problems[0]} (and no other of the steps {steps} can be restored)"
            )
        self._remove_leftovers()
        return None

    def read_position(self, step: int | None = None) -> dict[str, Any]:
        """The position saved with `step` (the newest by default).

        BadInput names the steps that exist, or the damage.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            there = ", ".join(map(str, steps)) or "none"
            raise BadInput(f"{wanted} in {self.directory}; there are: {there}")
        step = steps[-1] if step is None else step
        try:
            return self._restore_position(step)
        except Exception as error:
            raise BadInput(self._damage(step, error)) from error

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Only the parameters of `step`, verified; for inference. BadInput if they are damaged or of another model."""
        position = self._restore_position(step)
        self._check_arrays(step, abstract_params, position, prefix=".params")
        item = {"params": abstract_params}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                restored = checkpointer.restore(
                    self._path(step, "state"),
                    args=ocp.args.PyTreeRestore(
                        item=item, restore_args=restore_args, partial_restore=True
                    ),
                )
                _verify(restored["params"], position, prefix=".params")
            except Exception as error:
                raise BadInput(self._damage(step, error)) from error
        return restored["params"]

    def _check_files(self, step: int) -> None:
        """Every file of a checkpoint against its manifest, shared between the processes."""
        folder = self.folder.path / str(step)
        entries = self._together(step, checkpoint_manifest.read, folder)
        if not any(job.gather(entries is not None)):
            # `_restore_position` knows whether there was one.
            if job.is_main():
                logging.info("checkpoint %s has no manifest: only its arrays are verified", folder)
            return
        self._together(step, _must_be_there, folder, entries)
        assert entries is not None
        if job.is_main():
            self._together(step, checkpoint_manifest.check_names, folder, entries)
        else:
            self._together(step, lambda: None)
        mine = checkpoint_manifest.share(entries, jax.process_index(), jax.process_count())
        self._together(step, checkpoint_manifest.check_files, folder, entries, mine)

    def _restore_position(self, step: int) -> dict[str, Any]:
        position = self._restore_item(step, "position", ocp.args.JsonRestore())
        if position.pop("checksum", None) != _checksum(position):
            raise ValueError("the position differs from its checksum")
        if position["step"] != step:
            raise ValueError(f"it holds step {position['step']}")
        if position.get("has_manifest") and not self._path(step, checkpoint_manifest.NAME).exists():
            raise checkpoint_manifest.Damage(f"{checkpoint_manifest.NAME}: is missing")
        return position

    def _path(self, step: int, name: str) -> epath.Path:
        return self.folder.path / str(step) / name

    def _check_arrays(
        self, step: int, abstract_state: Any, position: dict[str, Any], prefix: str = ""
    ) -> None:
        """BadInput unless the checkpoint has these arrays: Orbax would cast another dtype without a word."""
        wanted = _arrays(abstract_state, prefix)
        there = {name: a for name, a in position["arrays"].items() if name.startswith(prefix)}
        names = [name for name in wanted | there if wanted.get(name) != there.get(name)]
        if names:
            name = names[0]
            raise BadInput(
                f"checkpoint {self.directory}/{step} has other arrays in {len(names)} places: {name} is "
                f"{there.get(name, 'missing')} there, {wanted.get(name, 'missing')} here"
            )

    def _restore_state(self, step: int, abstract_state: Any, position: dict[str, Any]) -> Any:
        args = ocp.args.StandardRestore(abstract_state)
        state = self._together(step, self._restore_item, step, "state", args)
        # Not in one with the above: fingerprints are taken together, and a process with damage has nothing to take.
        self._together(step, _verify, state, position)
        return state

    def _together(self, step: int, read: Callable[..., Any], *args: Any) -> Any:
        """read(*args); raises _Damaged on all processes when one of them meets damage."""
        value, problem = None, None
        try:
            value = read(*args)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            if isinstance(error, BadInput) or _is_no_damage(error) or job.is_lost_peer(error):
                raise
            problem = self._damage(step, error)
        problems = [each for each in job.gather(problem) if each]
        if problems:
            raise _Damaged(problems[0])
        return value

    def _restore_item(self, step: int, name: str, args: Any) -> Any:
        """Past Orbax's manager, which lets the processes wait for one that has met damage."""
        return self._handlers[name].restore(self._path(step, name), args=args)

    def _damage(self, step: int, error: Exception) -> str:
        if not (self.folder.path / str(step)).exists():
            return deleted_meanwhile(self.folder.path / str(step))
        text = re.sub(r"\s+", " ", str(error)).strip()
        return (
            f"checkpoint {self.directory}/{step} is damaged: {type(error).__name__}: {text[:200]}"
        )

    def _put_aside(self, step: int, prefix: str) -> None:
        """Renamed, not deleted: an on-call engineer may want to look."""
        if job.is_main():
            self.folder.put_aside(step, prefix)
        self._reload()

    def _remove_leftovers(self) -> None:
        if self._is_read_only:  # they may be of a save that goes on
            return
        """Of killed saves. Only once it is clear that the folder is this run's."""
        if job.is_main():
            self.folder.remove_leftovers()


class _Damaged(Exception):
    """A checkpoint cannot be restored; the message says which and why."""


def _must_be_there(folder: epath.Path, entries: Any) -> None:
    """Of several hosts one may not see what the others see."""
    if entries is None:
        raise checkpoint_manifest.Damage(
            f"{checkpoint_manifest.NAME}: {os.uname().nodename} does not see it"
        )


def deleted_meanwhile(checkpoint: os.PathLike[str]) -> str:
    """What to say of a checkpoint that is gone while it is read."""
    return (
        f"checkpoint {checkpoint} was deleted while it was read: a run keeps its newest ones "
        "(Checkpoints.keep_last, keep_every_steps); take one that is kept"
    )


def _gigabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.3f} GB"


def is_imported(position: dict[str, Any]) -> bool:
    """Whether a checkpoint holds imported parameters and nothing else (checkpoint_arrays.ParamsWriter)."""
    return "imported" in position


def position_of(
    step: int,
    position: dict[str, Any],
    tree: Any,
    leaf_fingerprints: dict[str, int],
    prefix: str = "",
) -> dict[str, Any]:
    """A copy of `position`, since it is written while the caller goes on, with what is needed to verify `tree`."""
    own = {
        "step": step,
        "arrays": _arrays(tree, prefix),
        "fingerprints": leaf_fingerprints,
        "has_manifest": True,
    }
    position = json.loads(json.dumps({**position, **own}))
    position["checksum"] = _checksum(position)
    return position


def save_arguments(tree: Any) -> Any:
    """How each leaf is cut into chunks: stacked layers one by one, so that a layer can be read without the others."""

    def of(path, _):
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return ocp.SaveArgs(shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(of, tree)


def storage_spec(state_dir: Path | epath.Path, path: tuple[str, ...]) -> dict[str, Any]:
    """TensorStore spec of one leaf below `checkpoints/<step>/state`, as Orbax 0.12 lays it out."""
    metadata = json.loads((state_dir / "_METADATA").read_text())
    base = kvstores.kvstore(state_dir)
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(path)}/"}
    return {"driver": "zarr3" if metadata["use_zarr3"] else "zarr", "kvstore": kvstore}


def leaf_name(path: tuple[str, ...]) -> str:
    """The name of a parameter in a position, for its path."""
    return ".params" + "".join(f"['{key}']" for key in path)


def _is_no_damage(error: Exception) -> bool:
    """Whether the surroundings failed, not the files."""
    words = (
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "PERMISSION_DENIED",
        "DEADLINE_EXCEEDED",
        "out of memory",
    )
    if isinstance(error, MemoryError | PermissionError | TimeoutError):
        return True
    return any(word in str(error) for word in words)


def _arrays(tree: Any, prefix: str = "") -> dict[str, str]:
    """dtype and shape of every leaf by its path, such as "float32[2, 3]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _checksum(position: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def _verify(state: Any, position: dict[str, Any], prefix: str = "") -> None:
    saved = position["fingerprints"]
    wrong = [
        name for name, value in fingerprints(state).items() if saved.get(prefix + name) != value
    ]
    if wrong:
        names = ", ".join(wrong[:3])
        raise ValueError(f"content differs from its fingerprint in {len(wrong)} arrays: {names}")
