"""How long a save holds up training, what goes on behind, and how long a restore takes to verify.

    python benchmarks/bench_checkpoints.py [--num_gigabytes 1.2] [--num_saves 4] [--folder DIR] [--json FILE]

A state of parameters and two moments (float32, random, 24 stacked layers of 8 arrays) on one CPU device is saved, and
each save awaited. Parts of the stall: `fingerprints` alone is timed, too. `copy` writes the same bytes to one file with
fsync, for comparison. Rates are in GB (1e9 bytes) of the files.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
INTERVAL_SECONDS = 1800.0


def make_state(num_bytes: int) -> Any:
    """TrainState of this size."""
    import jax
    import jax.numpy as jnp

    from bloomjax.train_state import TrainState

    num_layers, num_arrays, width = 24, 8, 512
    rows = max(1, num_bytes // (3 * 4 * num_layers * num_arrays * width))

    @jax.jit
    def make():
        keys = jax.random.split(jax.random.key(0), num_arrays * 3)
        parts = [jax.random.normal(key, (num_layers, rows, width)) for key in keys]
        names = [f"a{n}" for n in range(num_arrays)]
        trees = [
            {"layers": dict(zip(names, parts[i::3], strict=True))} for i in range(3)
        ]  # as parameters and moments
        return TrainState(jnp.int32(1), trees[0], {"mu": trees[1], "nu": trees[2]})

    return jax.block_until_ready(make())


def timed_copy(folder: Path, num_bytes: int) -> float:
    """Seconds to write so many bytes to one file, on the disk."""
    block = os.urandom(1 << 24)
    started = time.monotonic()
    with (folder / "copy").open("wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    (folder / "copy").unlink()
    return seconds


def measure(folder: Path, num_bytes: int, num_saves: int) -> dict[str, Any]:
    import jax

    from bloomjax.checkpoints import Checkpoints, fingerprints

    state = make_state(num_bytes)
    fingerprints(state)  # compiles
    started = time.monotonic()
    fingerprints(state)
    fingerprint_seconds = time.monotonic() - started
    checkpoints = Checkpoints(save_every_steps=1, keep_last=1)
    checkpoints.open(folder / "checkpoints")
    saves = []
    for step in range(1, num_saves + 1):
        started = time.monotonic()
        checkpoints.save(step, state, {"samples": step})
        stall_seconds = time.monotonic() - started
        checkpoints.wait()
        assert checkpoints.last_save is not None
        saves.append({"stall_seconds": round(stall_seconds, 3)} | checkpoints.last_save)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    started = time.monotonic()
    checkpoints._check_files(num_saves)
    verify_seconds = time.monotonic() - started
    started = time.monotonic()
    assert checkpoints.restore(target, lambda position: None) is not None
    restore_seconds = time.monotonic() - started
    checkpoints.close()
    size = saves[-1]["num_bytes"]
    middle = {
        key: statistics.median(each[key] for each in saves)
        for key in ("stall_seconds", "seconds", "manifest_seconds")
    }
    return {
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "stored_bytes": size,
        "median": middle,
        "stall_share_of_30_minutes": round(middle["stall_seconds"] / INTERVAL_SECONDS, 6),
        "manifest_seconds_per_gb": round(middle["manifest_seconds"] / size * 1e9, 3),
        "fingerprints_seconds": round(fingerprint_seconds, 3),
        "verify_files_seconds": round(verify_seconds, 3),
        "verify_files_seconds_per_gb": round(verify_seconds / size * 1e9, 3),
        "restore_seconds": round(restore_seconds, 3),
        "copy_seconds": round(timed_copy(folder, size), 3),
        "saves": saves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_gigabytes", type=float, default=1.2)
    parser.add_argument("--num_saves", type=int, default=4)
    parser.add_argument("--folder", help="where to write; a temporary folder")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = measure(Path(name), int(arguments.num_gigabytes * 1e9), arguments.num_saves)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": [round(load_before[0], 1), round(os.getloadavg()[0], 1)],
        "versions": {name: metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
        | {"python": platform.python_version()},
        "figures": figures,
    }  # fmt: skip
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
