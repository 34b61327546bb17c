"""One process of several that take steps and report; run by test_stragglers.py.

    python stragglers_worker.py '{"num_steps": 12, "slow_process": 1, "slow_seconds": 0.03}'

Process 0 prints each report as a line of JSON, at last what is left in the store of the job.
"""

import json
import sys
import time

from bloomjax import job
from bloomjax.distributed import Cluster
from bloomjax.stragglers import Stragglers


def main(given: dict) -> None:
    Cluster().start()
    import jax

    from bloomjax.partitioning import MeshShape

    # The probe runs inside the loop, under a mesh of all devices.
    mesh = MeshShape().build()
    stragglers = Stragglers(every_steps=4, probe_size=64)
    number = jax.process_index()
    with jax.set_mesh(mesh):
        for step in range(1, given["num_steps"] + 1):
            start = time.monotonic()
            time.sleep(0.002 + (given["slow_seconds"] if number == given["slow_process"] else 0))
            stragglers.host_step(time.monotonic() - start)
            # As the collectives of a step do: nobody is a step ahead.
            job.agree(step)
            job.gather(step)
            report = stragglers.report(step)
            if report:
                print(json.dumps(report), flush=True)
    time.sleep(1.1)
    job.gather("all have published")
    report = stragglers.report(given["num_steps"] + 1)
    if report:
        print(json.dumps(report), flush=True)
    if job.is_main():
        assert job._job
        print(
            json.dumps(
                [name for name, _ in job._job._client.key_value_dir_get("bloomjax/stragglers/")]
            )
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
