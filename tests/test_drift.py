"""Copies of one bit too many: found on every mesh, with the leaf and the device that is to blame."""

import itertools
import json
import math
import sys
from pathlib import Path

import cluster
import jax
import numpy as np
import pytest
import reference_bloom
from jax.sharding import NamedSharding, PartitionSpec

from bloomjax import hlo
from bloomjax.drift import ReplicaCheck
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.train_state import TrainState, abstract_state

SHAPE = {"vocab_size": 64, "emb_dim": 32, "num_layers": 2, "num_heads": 8, "mlp_dim": 64}
OF_EIGHT = [m for m in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(m) == 8]
OPTIMIZER = adamw(first_moment_dtype="bfloat16")  # leaves of 2 and 4 bytes, integers and floats


def a_state(mesh):
    """A state with its abstract one, and the check made for it."""
    abstract = abstract_state(Bloom(BloomConfig(**SHAPE)), OPTIMIZER, mesh)
    params = reference_bloom.random_params(**SHAPE)
    state = TrainState(np.int32(7), params, OPTIMIZER.init(params))
    state = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), state, abstract)
    check = ReplicaCheck(every_steps=10)
    check.prepare(abstract)
    return state, check


def with_other_copies(state, name, changes):
    """The state in which each device of `changes` (by id) holds another bit at that place of its part of a leaf."""

    def change(path, array):
        if jax.tree_util.keystr(path) != name:
            return array
        parts = []
        for shard in array.addressable_shards:
            data = np.array(shard.data)
            if shard.device.id in changes:
                place, bit = changes[shard.device.id]
                unsigned = data.reshape(-1).view(f"u{data.dtype.itemsize}")
                unsigned[place] ^= np.array(1 << bit, unsigned.dtype)
            parts.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    return jax.tree_util.tree_map_with_path(change, state)


def copies(array):
    """{device: the devices that hold the same part}, from the indices that JAX says they hold."""
    places = array.sharding.devices_indices_map(array.shape)
    parts = {}
    for device, index in places.items():
        parts.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    return {device: part for part in parts.values() for device in part}


@pytest.mark.parametrize("mesh", OF_EIGHT)
def test_a_flipped_bit_is_found_on_every_mesh(mesh):
    """In each leaf that has copies, one bit of a random element on a random device."""
    assert len(OF_EIGHT) == 10
    mesh = MeshShape(*mesh).build()
    state, check = a_state(mesh)
    assert check.differences(state) == []
    rng = np.random.default_rng(0)
    num_copied = 0
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        name, found_copies = jax.tree_util.keystr(path), copies(array)
        device = jax.devices()[rng.integers(8)]
        shard = next(s.data for s in array.addressable_shards if s.device == device)
        bit = int(rng.integers(8 * array.dtype.itemsize))
        changed = with_other_copies(state, name, {device.id: (int(rng.integers(shard.size)), bit)})
        found = check.differences(changed)
        group = found_copies[device]
        num_copied += len(group) > 1
        # Of two that differ, nobody can say which is right; and a part without a copy is not compared.
        named = [] if len(group) == 1 else [device] if len(group) > 2 else group
        assert sorted(d["device"] for d in found) == sorted(d.id for d in named), name
        for difference in found:
            assert difference["leaf"] == name and difference["copies"] == len(group)
            assert difference["process"] == 0 and difference["host"] == cluster.host()
    copied = sum(len(copies(x)[jax.devices()[0]]) > 1 for x in jax.tree.leaves(state))
    assert num_copied == copied > 20  # at least LayerNorms with their moments, and the counters


def test_what_is_copied():
    """Over `data` everything; over `fsdp` alone LayerNorms and biases; the embedding is one tensor."""
    for mesh, is_embedding_copied in (((8, 1, 1), True), ((1, 8, 1), False), ((2, 4, 1), True)):
        state, check = a_state(MeshShape(*mesh).build())
        name = ".params['embedding']"
        found = check.differences(with_other_copies(state, name, {0: (5, 3)}))
        assert {d["leaf"] for d in found} == ({name} if is_embedding_copied else set())
    assert not [path for path in state.params if "head" in path or "output" in path]


def test_the_minority_is_named():
    state, check = a_state(MeshShape(8, 1, 1).build())
    norm, moment = (
        ".params['final_norm']['scale']",
        ".opt_state[1].mu['layers']['mlp_norm']['bias']",
    )

    def devices(name, changes):
        return [d["device"] for d in check.differences(with_other_copies(state, name, changes))]

    assert devices(norm, {5: (0, 0)}) == [5]
    assert devices(norm, {2: (0, 0), 5: (0, 0), 7: (1, 4)}) == [2, 5, 7]
    assert devices(norm, {0: (3, 1), 1: (3, 1), 2: (3, 1)}) == [0, 1, 2]  # nor is 0 always right
    assert devices(norm, {d: (3, 1) for d in range(4)}) == list(range(8))  # four against four
    assert (
        devices(norm, {d: (3, 1) for d in range(8)}) == []
    )  # the same everywhere: a replay would find it
    both = with_other_copies(
        with_other_copies(state, norm, {1: (0, 9)}), moment, {6: (2, 15), 4: (2, 15)}
    )
    found = {(d["leaf"], d["device"]) for d in check.differences(both)}
    assert found == {(norm, 1), (moment, 4), (moment, 6)}


def test_when_it_is_due():
    state, check = a_state(MeshShape(4, 2, 1).build())
    assert [step for step in range(31) if check.is_due(step)] == [0, 10, 20, 30]
    never = ReplicaCheck(every_steps=None)
    assert not never.is_due(0)  # nor before it is prepared
    never.prepare(state)
    assert not any(map(never.is_due, range(300)))
    alone = MeshShape(1, 1, 1).build(jax.devices()[:1])
    state, check = a_state(alone)
    assert not check.is_due(10) and check.differences(state) == []
    for every_steps in (0, -1):
        with pytest.raises(BadInput, match="every_steps must be at least 1 or None"):
            ReplicaCheck(every_steps=every_steps)


def test_the_check_leaves_the_state_and_moves_little():
    """Not donated; the only collective has one number of 4 bytes a leaf and device."""
    mesh = MeshShape(2, 2, 2).build()
    state, check = a_state(mesh)
    before = jax.tree.map(np.asarray, state)
    check.differences(state)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    found = hlo.collectives(check._program.as_text(), dict(mesh.shape)).collectives
    assert {each.kind for each in found} <= {"all-gather", "all-reduce"}
    num_leaves = len(jax.tree.leaves(state))
    assert 0 < sum(each.wire_bytes for each in found) <= 3 * 4 * 8 * num_leaves


def test_axes_in_one_dimension():
    """A leaf that is split over two axes at once has copies along the third."""
    mesh = MeshShape(2, 2, 2).build()
    sharding = NamedSharding(mesh, PartitionSpec(("data", "tensor"), None))
    abstract = {"x": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=sharding)}
    check = ReplicaCheck()
    check.prepare(abstract)
    state = {"x": jax.device_put(np.ones((8, 2), np.float32), sharding)}
    pair = sorted(d.id for d in copies(state["x"])[jax.devices()[3]])
    found = check.differences(with_other_copies(state, "['x']", {3: (1, 1)}))
    assert len(pair) == 2 and sorted(d["device"] for d in found) == pair


def test_two_processes_find_the_same():
    worker, meshes = Path(__file__).with_name("drift_worker.py"), [(4, 1, 1), (2, 1, 2), (1, 4, 1)]
    results = cluster.Cluster([sys.executable, str(worker), json.dumps(meshes)], 2).end()
    assert [code for code, _, _ in results] == [0, 0], results
    found, of_the_other = (
        [json.loads(line[6:]) for line in err.splitlines() if line.startswith("FOUND ")]
        for _, _, err in results
    )
    assert found == of_the_other and [tuple(each["mesh"]) for each in found] == meshes
    name, here = ".params['final_norm']['scale']", {"process": 1, "host": cluster.host()}
    for each in found:
        assert each["before"] == []
        assert each["norm"] == [{"leaf": name, "device": each["last"], "copies": 4, **here}]
        assert sorted({row for rows in each["nan_rows"] for row in rows}) == [2, 3, 4]
    assert found[0]["nan_rows"] == [[2, 3], [4]]  # each process spoils the rows that it holds
    of_embedding = [each["embedding"] for each in found]
    assert [len(each) for each in of_embedding] == [1, 2, 0]
    assert [d["process"] for d in of_embedding[1]] == [0, 1]  # of two copies, in two processes


def test_nothing_heals_by_itself():
    """Each device goes on from its own copy, so that the next check finds what an earlier one could not."""
    state, check = a_state(MeshShape(8, 1, 1).build())
    changed = with_other_copies(state, ".params['final_norm']['scale']", {3: (0, 21)})
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(lambda s: jax.tree.map(lambda p: p * 2, s), out_shardings=shardings)
    assert [d["device"] for d in check.differences(update(changed))] == [3]
