"""One process of several that compare copies; run by test_drift.py: python drift_worker.py '[[4, 1, 1], [1, 4, 1]]'.

The last process flips a bit of its last device's copy. Each writes a line "FOUND {...}" a mesh to stderr.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(mesh_shapes: list[list[int]]) -> None:
    from bloomjax.distributed import Cluster

    Cluster().start()
    import jax
    import numpy as np

    from bloomjax import job
    from bloomjax.drift import ReplicaCheck
    from bloomjax.fault import fault
    from bloomjax.journal import Journal
    from bloomjax.model import Bloom, BloomConfig
    from bloomjax.optimizer import adamw
    from bloomjax.partitioning import MeshShape
    from bloomjax.train_state import abstract_state

    model = Bloom(BloomConfig(vocab_size=64, emb_dim=32, num_layers=2, num_heads=8))
    optimizer = adamw()
    for mesh_shape in mesh_shapes:
        mesh = MeshShape(*mesh_shape).build()
        abstract = abstract_state(model, optimizer, mesh)
        state = jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, x.sharding, lambda index, x=x: np.ones(x.shape, x.dtype)[index]
            ),
            abstract,
        )
        check = ReplicaCheck()
        check.prepare(abstract)
        found: dict = {"mesh": mesh_shape, "before": check.differences(state)}
        for name, leaf in (("norm", "['final_norm']['scale']"), ("embedding", "['embedding']")):
            with tempfile.TemporaryDirectory() as folder:
                on_purpose = fault(flip_bit_at_step=3, flip_leaf=leaf)
                assert on_purpose is not None
                on_purpose.open(Journal(Path(folder)))
                found[name] = check.differences(on_purpose.on_state(3, state))
        with tempfile.TemporaryDirectory() as folder:
            found["nan_rows"] = job.gather(spoiled_rows(mesh, Path(folder)))
        found["last"] = mesh.devices.flat[-1].id
        print("FOUND " + json.dumps(found), file=sys.stderr, flush=True)


def spoiled_rows(mesh: Any, folder: Path) -> list[int]:
    """Rows of weight NaN on the devices of this process, of a batch of the samples 100 .. 107; 102 .. 104 are bad."""
    import numpy as np

    from bloomjax.data import put_batch
    from bloomjax.fault import fault
    from bloomjax.journal import Journal

    on_purpose = fault(nan_samples=(102, 105))
    assert on_purpose is not None
    on_purpose.open(Journal(folder))
    batch = put_batch({row: np.zeros(3, np.int32) for row in range(8)}, 8, 3, mesh)
    weights = on_purpose.on_batch(batch, np.arange(100, 108))["weights"]
    parts = [(s.index[0].indices(8)[0], np.asarray(s.data)) for s in weights.addressable_shards]
    return sorted({n + int(row) for n, x in parts for row in np.flatnonzero(np.isnan(x))})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
