"""A process, alone or one of several, whose steps stop coming; run by test_watchdog.py.

    python watchdog_worker.py '{"model_dir": ..., "how": "python", "process": 1, "limit_seconds": [1, 1]}'

Steps are sums over the devices of all processes. Leaves a file MODEL_DIR/<pid> before step 3, in which `process` hangs.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from bloomjax import job, watchdog
from bloomjax.distributed import Cluster
from bloomjax.journal import Journal


def hang_in_python() -> None:
    while True:
        time.sleep(0.01)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # PyDLL: with the interpreter's lock


def main(given: dict) -> None:
    Cluster().start()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",), (jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    add_up = jax.jit(
        lambda: jax.lax.with_sharding_constraint(jnp.arange(8.0), sharding).sum(),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    for name in ("_JOURNAL_SECONDS", "_LEAVE_SECONDS", "_FUSE_SECONDS"):
        setattr(watchdog, name, given.get(name, getattr(watchdog, name)))
    limits = given["limit_seconds"]  # by process
    dog = watchdog.Watchdog(limit_seconds=limits[jax.process_index()], setup_limit_seconds=60)
    is_meant = job.is_main() == (given.get("process", 0) == 0)
    with dog.start(Journal(Path(given["model_dir"]), job.is_main()), 0):
        with dog.setup("compile"):
            add_up().block_until_ready()
            time.sleep(given.get("compile_seconds", 0))
        for step in range(1, given.get("num_steps", 100) + 1):
            if step == 3:
                Path(given["model_dir"], str(os.getpid())).touch()
            if step == 3 and is_meant and given["how"] == "python":
                hang_in_python()
            if step == 3 and is_meant and given["how"] == "lock":
                hang_with_the_lock()
            add_up().block_until_ready()
            time.sleep(0.05)
            dog.beat(step)
    print("done", flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Exception as error:  # a connection that broke
        sys.exit(job.fail_with(error))
