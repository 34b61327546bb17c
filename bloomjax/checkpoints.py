"""Checkpoints of weights, optimizer and data position: saved asynchronously, verified leaf by leaf when restored.

A checkpoint is `checkpoints/<step>/` with two Orbax items: `state` (TrainState) and `position` (JSON: what `train`
needs to go on, and a fingerprint of every leaf). Orbax itself restores a flipped bit without a word, so each leaf is
compared with its fingerprint, which does not depend on how the leaf is sharded.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from bloomjax import job
from bloomjax.errors import BadInput


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
    """The checkpoints of one run."""

    def __init__(
        self,
        *,
        save_every_steps: int,
        keep_last: int = 3,
        keep_every_steps: int | None = None,
    ):
        """Keeps the `keep_last` newest, and for ever those whose step is a multiple of `keep_every_steps`."""
        if save_every_steps < 1 or keep_last < 1:
            raise BadInput(
                f"save_every_steps and keep_last must be at least 1, got {save_every_steps} and {keep_last}"
            )
        self.save_every_steps = save_every_steps
        self._keep: list[policies.PreservationPolicy] = [policies.LatestN(keep_last)]
        if keep_every_steps is not None and keep_every_steps < 1:
            raise BadInput(f"keep_every_steps must be at least 1 or None, got {keep_every_steps}")
        if keep_every_steps:
            self._keep.append(policies.EveryNSteps(keep_every_steps))
        self._manager: ocp.CheckpointManager | None = None
        self._handlers: dict[str, Any] = {}
        self.directory: Path | None = None
        self.problems: list[str] = []

    def open(self, directory: Path | str, *, read_only: bool = False) -> None:
        """Looks at what is there; creates `directory` unless `read_only`."""
        self.directory = Path(directory).resolve()
        self._handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "position"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(self._keep),
                create=not read_only,
                cleanup_tmp_directories=False,  # see _remove_leftovers
                single_host_load_and_broadcast=True,  # what process 0 sees is what there is
                enable_async_checkpointing=True,
                # `train` decides when to save.
                should_save_fn=lambda step, latest: latest is None or step > latest,
            ),
            item_handlers=self._handlers,
        )

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise RuntimeError("Checkpoints.open was not called")
        return self._manager

    def is_due(self, step: int) -> bool:
        return step % self.save_every_steps == 0

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any]) -> bool:
        """Copies the state to the host and returns; the writing goes on behind.

        False if nothing is saved, because the step exists: it is not rewritten.
        """
        if step in self.manager.all_steps():
            return False
        position = position_of(step, position, state, fingerprints(state))
        return self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=save_arguments(state)),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(
        self,
        abstract_state: Any,
        check_position: Callable[[dict[str, Any]], None],
        from_params: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, on the mesh of `abstract_state`; None if there is none at all.

        `check_position` may refuse a checkpoint of another run by raising BadInput; one with other arrays than
        `abstract_state` is refused too. Imported parameters become a state by `from_params`. A damaged checkpoint is
        put aside as `damaged-<step>` and the one before is taken; BadInput if all are damaged. `problems` holds a line
        about each. What is no damage (no memory, no permission, a file system that does not answer) is raised as it is.
        Of several processes all take the same step: damage that one of them sees is damage for all.
        """
        steps = self.steps()[::-1]
        damaged = []
        for step in steps:
            try:
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
            for damaged_step in damaged:
                self._put_aside(damaged_step)
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
        assert self.directory is not None
        position = self._restore_position(step)
        self._check_arrays(step, abstract_params, position, prefix=".params")
        item = {"params": abstract_params}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                restored = checkpointer.restore(
                    self.directory / str(step) / "state",
                    args=ocp.args.PyTreeRestore(
                        item=item, restore_args=restore_args, partial_restore=True
                    ),
                )
                _verify(restored["params"], position, prefix=".params")
            except Exception as error:
                raise BadInput(self._damage(step, error)) from error
        return restored["params"]

    def wait(self) -> None:
        """Until what is being saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def _restore_position(self, step: int) -> dict[str, Any]:
        position = self._restore_item(step, "position", ocp.args.JsonRestore())
        if position.pop("checksum", None) != _checksum(position):
            raise ValueError("the position differs from its checksum")
        return position

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
        assert self.directory is not None
        return self._handlers[name].restore(self.directory / str(step) / name, args=args)

    def _damage(self, step: int, error: Exception) -> str:
        assert self.directory is not None
        if not (self.directory / str(step)).exists():
            return deleted_meanwhile(self.directory / str(step))
        text = re.sub(r"\s+", " ", str(error)).strip()
        return (
            f"checkpoint {self.directory}/{step} is damaged: {type(error).__name__}: {text[:200]}"
        )

    def _put_aside(self, step: int) -> None:
        """Renamed, not deleted: an on-call engineer may want to look."""
        assert self.directory is not None
        if jax.process_index() == 0:
            names = (
                f"damaged-{step}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000)))
            )
            target = next(t for name in names if not (t := self.directory / name).exists())
            with contextlib.suppress(FileNotFoundError):
                (self.directory / str(step)).rename(target)
        self.manager.reload()

    def _remove_leftovers(self) -> None:
        """Of killed saves. Only once it is clear that the folder is this run's: Orbax would do it when it opens."""
        assert self.directory is not None
        if jax.process_index() == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)


class _Damaged(Exception):
    """A checkpoint cannot be restored; the message says which and why."""


def deleted_meanwhile(checkpoint: Path) -> str:
    """What to say of a checkpoint that is gone while it is read."""
    return (
        f"checkpoint {checkpoint} was deleted while it was read: a run keeps its newest ones "
        "(Checkpoints.keep_last, keep_every_steps); take one that is kept"
    )


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
    arrays = {"step": step, "arrays": _arrays(tree, prefix), "fingerprints": leaf_fingerprints}
    position = json.loads(json.dumps({**position, **arrays}))
    position["checksum"] = _checksum(position)
    return position


def save_arguments(tree: Any) -> Any:
    """How each leaf is cut into chunks: stacked layers one by one, so that a layer can be read without the others."""

    def of(path, _):
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return ocp.SaveArgs(shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(of, tree)


def storage_spec(state_dir: Path, path: tuple[str, ...]) -> dict[str, Any]:
    """TensorStore spec of one leaf below `checkpoints/<step>/state`, as Orbax 0.12 lays it out."""
    metadata = json.loads((state_dir / "_METADATA").read_text())
    base = {"driver": "file", "path": f"{state_dir.resolve()}/"}
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
