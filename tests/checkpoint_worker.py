"""One process of several that save and restore checkpoints; run by test_checkpoint_saving.py under cluster.Cluster.

    python checkpoint_worker.py '{"directory": ..., "saves": {"10": null, "20": 1}, "answers": ...}'

`saves`: steps, and the number of the process whose disk is then full, if any. Leaves <process>.json in `answers`.
"""

import errno
import json
import shutil
import sys
from pathlib import Path
from unittest import mock


def main(task: dict) -> None:
    from bloomjax.distributed import Cluster

    Cluster().start()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from bloomjax import checkpoint_manifest, job
    from bloomjax.checkpoints import Checkpoints, fingerprints
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import TrainState

    mesh = MeshShape(1, 4, 1).build()
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def state_of(step: int) -> TrainState:
        make = jax.jit(
            lambda: TrainState(
                jnp.int32(step),
                {"a": jax.random.normal(jax.random.key(step), (64, 32))},
                {"m": jax.random.normal(jax.random.key(step + 1), (16, 8))},
            ),
            out_shardings=TrainState(whole, {"a": sharding}, {"m": sharding}),
        )
        return make()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    out: dict = {"saved": [], "incidents": []}
    checkpoints = Checkpoints(save_every_steps=10, keep_last=2)
    checkpoints.open(task["directory"])
    for step, full_process in task["saves"].items():
        if full_process == jax.process_index():
            with mock.patch.object(checkpoint_manifest, "entries_of", full):
                saved = checkpoints.save(int(step), state_of(int(step)), {"samples": int(step)})
                while checkpoints._saving and checkpoints._saving.is_running():
                    pass
        else:
            saved = checkpoints.save(int(step), state_of(int(step)), {"samples": int(step)})
        out["saved"].append(saved)
        checkpoints._collect()
        out["incidents"] += [
            {k: i[k] for k in ("event", "step", "freed")} for i in checkpoints.incidents
        ]
        checkpoints.incidents.clear()
        out.setdefault("wants_retry", []).append(checkpoints.wants_retry())
        out.setdefault("steps", []).append(checkpoints.steps())

    # In a copy: damage to a file of process 1, the restore that follows, a save, a roll back.
    checkpoints.close()
    copy = f"{task['directory']}-worked-on"
    newest = f"{copy}/{out['steps'][-1][-1]}"
    out["damaged"] = job.on_main(lambda: damage(task["directory"], copy, newest))
    checkpoints.open(copy)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0)
    )
    found = checkpoints.restore(target, lambda position: None)
    assert found is not None
    state, position = found
    assert fingerprints(state) == fingerprints(state_of(position["step"]))
    out |= {"restored": position["step"], "problems": checkpoints.problems}
    checkpoints.save(50, state_of(50), {"samples": 50})
    out |= {"aside": checkpoints.put_aside_from(50), "left": checkpoints.steps()}
    checkpoints.close()
    with open(f"{task['answers']}/{jax.process_index()}.json", "w") as file:
        json.dump(out | {"process": jax.process_index()}, file)


def damage(folder: str, copy: str, newest: str) -> str:
    """Copies the folder and flips a bit in what process 1 wrote; the name of that file."""
    shutil.copytree(folder, copy)
    path = min(Path(newest, "state", "ocdbt.process_1", "d").iterdir())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))
    return str(path.relative_to(newest))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
