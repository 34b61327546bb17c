"""One process of several that fetch batches; run by test_data_processes.py.

    python data_worker.py '{"address": ..., "num_processes": 2, "process": 0, "mesh": [4, 2, 1], ...}'

Prints a line "sample crc32" for each row with weight 1 that lies on a device of this process.
"""

import functools
import json
import os
import sys
import zlib


def main(job: dict) -> None:
    num_devices = 8 // job["num_processes"]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    import jax
    import numpy as np

    if job["num_processes"] > 1:
        jax.distributed.initialize(job["address"], job["num_processes"], job["process"])
    from bloomjax.data import TrainData, filled_rows
    from bloomjax.partitioning import MeshShape
    from bloomjax.schedules import BatchSchedule

    assert jax.process_count() == job["num_processes"] and jax.device_count() == 8
    data = TrainData(**job["data"]).open()
    schedule = BatchSchedule(**job["schedule"])
    mesh = MeshShape(*job["mesh"]).build()
    num_rows = functools.partial(filled_rows, multiple=job["mesh"][0] * job["mesh"][1])
    first, last = job["steps"]
    for step, batch in data.batches(first, last, schedule, mesh, num_rows):
        rows = {}
        for tokens, weights in zip(
            batch["tokens"].addressable_shards, batch["weights"].addressable_shards, strict=True
        ):
            start = tokens.index[0].start or 0
            for row, (line, weight) in enumerate(zip(tokens.data, weights.data, strict=True)):
                if weight == 1:
                    rows[start + row] = zlib.crc32(np.asarray(line, np.int32).tobytes())
        for row, crc in sorted(rows.items()):
            print(schedule.samples_after(step - 1) + row, crc)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
