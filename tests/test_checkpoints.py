import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import tree

from bloomjax import checkpoints as checkpoints_module
from bloomjax.checkpoints import Checkpoints, fingerprints
from bloomjax.errors import BadInput
from bloomjax.train_state import TrainState

POSITION = {"samples": 80, "model": {"num_layers": 2}, "record": {"loss": 0.1 + 0.2}}
SPECS = TrainState(
    step=PartitionSpec(),
    params={"matrix": PartitionSpec("fsdp", "tensor"), "vector": PartitionSpec("fsdp")},
    opt_state={"moment": PartitionSpec("data", "fsdp"), "count": PartitionSpec()},
)


def make_state(mesh, seed=0, rows=32):
    rng = np.random.default_rng(seed)
    state = TrainState(
        step=np.int32(seed),
        params={
            "matrix": rng.normal(size=(rows, 16)).astype(np.float32),
            "vector": rng.normal(size=rows).astype(jnp.bfloat16),
        },
        opt_state={"moment": rng.normal(size=(rows, 8)).astype(jnp.bfloat16), "count": np.int32(7)},
    )
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, SPECS)


def abstract(state, mesh):
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        state, SPECS,
    )  # fmt: skip


def accept(position):
    del position


def assert_equal(got, want):
    """To the bit, NaN payloads and signs of zero included."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def opened(folder, *, read_only=False, **options):
    checkpoints = Checkpoints(**({"save_every_steps": 10} | options))
    checkpoints.open(folder, read_only=read_only)
    return checkpoints


def saved(folder, states, **options):
    """Saves {step: state} and closes."""
    checkpoints = opened(folder, **options)
    for step, state in states.items():
        checkpoints.save(step, state, POSITION | {"samples": 8 * step})
    checkpoints.close()


def restored(folder, state, mesh, check=accept):
    checkpoints = opened(folder)
    try:
        return checkpoints.restore(abstract(state, mesh), check)
    finally:
        checkpoints.close()


@pytest.fixture
def mesh(mesh_of):
    return mesh_of(1, 1, 1)


# ---- fingerprints ----


def fingerprint(x):
    (value,) = fingerprints({"x": x}).values()
    return value


def test_fingerprints_do_not_depend_on_sharding(mesh_of):
    shapes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
    found = [fingerprints(make_state(mesh_of(*shape))) for shape in shapes]
    assert all(each == found[0] for each in found)
    assert set(found[0]) == {
        ".step", ".params['matrix']", ".params['vector']", ".opt_state['moment']", ".opt_state['count']"
    }  # fmt: skip
    assert len(set(found[0].values())) == 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7, 2)])
def test_any_flipped_bit_changes_the_fingerprint(dtype, shape):
    rng = np.random.default_rng(0)
    values = np.asarray(100 * rng.normal(size=shape)).astype(dtype)
    before = fingerprint(jnp.asarray(values))
    assert 0 <= before < 2**32
    num_bits = 8 * values.nbytes
    for bit in rng.permutation(num_bits)[:150]:
        raw = bytearray(values.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(raw), values.dtype).reshape(shape)
        assert fingerprint(jnp.asarray(flipped)) != before, bit


def test_fingerprints_see_order_and_sign_of_zero():
    def of(*values):
        return fingerprint(jnp.asarray(values, jnp.float32))

    assert len({of(1, 2, 3), of(2, 1, 3), of(3, 2, 1), of(1, 2, 3, 0)}) == 4
    assert of(0.0, 1.0) != of(-0.0, 1.0)
    assert of(0.0, 0.0) != of(0.0, 0.0, 0.0)


# ---- save and restore ----


@pytest.mark.parametrize("there", [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_restored_on_another_mesh_to_the_bit(mesh_of, tmp_path, there):
    state = make_state(mesh_of(2, 2, 2))
    state.params["matrix"] = (
        state.params["matrix"].at[0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf]))
    )
    saved(tmp_path, {10: state})
    mesh = mesh_of(*there)
    got, position = restored(tmp_path, state, mesh)
    assert_equal(got, state)
    for x, spec in zip(jax.tree.leaves(got), jax.tree.leaves(SPECS), strict=True):
        assert x.sharding == NamedSharding(mesh, spec)
    assert position["step"] == 10 and position["samples"] == 80
    assert position["record"] == POSITION["record"]  # floats to the bit
    assert position["fingerprints"] == fingerprints(state)


def test_nothing_there(mesh, tmp_path):
    assert restored(tmp_path / "new", make_state(mesh), mesh) is None
    checkpoints = opened(tmp_path / "new")
    with pytest.raises(BadInput, match="no checkpoint in .*/new; there are: none"):
        checkpoints.read_position()
    checkpoints.close()


def test_retention(mesh, tmp_path):
    state = make_state(mesh)
    saved(tmp_path, {step: state for step in range(10, 90, 10)}, keep_last=2, keep_every_steps=30)
    checkpoints = opened(tmp_path, read_only=True)
    assert checkpoints.steps() == [30, 60, 70, 80]
    with pytest.raises(BadInput, match="no checkpoint of step 50 in .*; there are: 30, 60, 70, 80"):
        checkpoints.read_position(50)
    assert checkpoints.read_position()["step"] == 80
    assert checkpoints.read_position(30)["samples"] == 240
    checkpoints.close()


@pytest.mark.parametrize(
    "options", [{"save_every_steps": 0}, {"save_every_steps": 1, "keep_last": 0}]
)
def test_bad_intervals(options):
    with pytest.raises(BadInput, match="must be at least 1"):
        Checkpoints(**options)


def test_due_steps():
    checkpoints = Checkpoints(save_every_steps=20)
    assert [step for step in range(1, 61) if checkpoints.is_due(step)] == [20, 40, 60]


def test_a_step_that_is_there_is_not_rewritten(mesh, tmp_path):
    saved(tmp_path, {10: make_state(mesh, 1)})
    before = tree(tmp_path)
    saved(tmp_path, {10: make_state(mesh, 2)})
    assert tree(tmp_path) == before


def test_the_position_is_that_of_the_save(mesh, tmp_path):
    """It is written behind; what the caller does with its dict meanwhile must not get in."""
    state = make_state(mesh)
    checkpoints = opened(tmp_path, keep_last=100)
    for step in range(1, 11):
        record = {"step": step}
        checkpoints.save(step, state, {"samples": step, "record": record})
        for number in range(1000):
            record[str(number)] = 0.5
    checkpoints.wait()
    for step in range(1, 11):
        assert checkpoints.read_position(step)["record"] == {"step": step}
    checkpoints.close()


def test_only_params_for_inference(mesh_of, tmp_path):
    state = make_state(mesh_of(2, 2, 2))
    saved(tmp_path, {10: state})
    whole = NamedSharding(mesh_of(1, 1, 1), PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state.params
    )
    checkpoints = opened(tmp_path, read_only=True)
    before = tree(tmp_path)
    assert_equal(checkpoints.restore_params(10, wanted), state.params)
    wanted["matrix"] = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=whole)
    with pytest.raises(BadInput, match="checkpoint .*/10 "):
        checkpoints.restore_params(10, wanted)
    checkpoints.close()
    assert tree(tmp_path) == before


def test_a_save_is_not_disturbed_by_the_steps_that_follow(mesh_of, tmp_path):
    """On CPU an array and its copy on the host may share memory, and a donated step overwrites it."""
    mesh = mesh_of(1, 2, 1)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    shapes = {"a": (512, 1024), "b": (64, 4096), "c": (2, 300_000)}  # 5.5 MB
    state = {name: jnp.zeros(shape) + i for i, (name, shape) in enumerate(shapes.items())}
    state = jax.device_put(
        TrainState(jnp.int32(0), state, {}), sharding_tree(state, sharding, mesh)
    )

    @jax.jit
    def unchanged(state):
        return jax.tree.map(lambda x: x * 1, state)

    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = opened(tmp_path, keep_last=100)
    copies = {}
    for number in range(1, 13):
        state = step(state)
        copies[number] = jax.tree.map(lambda x: np.array(x, copy=True), unchanged(state))
        checkpoints.save(number, state, POSITION)
        for _ in range(20):
            state = step(state)
    checkpoints.close()
    checkpoints = opened(tmp_path, read_only=True)
    for number, copy in copies.items():
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        position = checkpoints._restore_position(number)
        assert_equal(checkpoints._restore_state(number, target, position), copy)
    checkpoints.close()


def sharding_tree(params, sharding, mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(whole, jax.tree.map(lambda _: sharding, params), {})


# ---- damage ----


def flip_bit(path, rng):
    raw = bytearray(path.read_bytes())
    at = int(rng.integers(len(raw)))
    raw[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(raw))
    return at


def data_files(folder):
    """Files that hold something, the largest first."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: -path.stat().st_size)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 10 and 20, their states and mesh; tests work on copies."""
    from bloomjax.partitioning import MeshShape

    mesh = MeshShape(1, 1, 1).build(jax.devices()[:1])
    states = {step: make_state(mesh, step) for step in (10, 20)}
    folder = tmp_path_factory.mktemp("two_steps")
    saved(folder, states)
    return folder, states, mesh


def flip_uniformly(folder, number, rng):
    """A bit of a file below `folder`: by turns of any file alike, and of any byte alike. Its name."""
    files = data_files(folder)
    sizes = np.array([path.stat().st_size for path in files], float)
    chosen = rng.choice(len(files), p=None if number % 2 else sizes / sizes.sum())
    flip_bit(files[chosen], rng)
    return str(files[chosen].relative_to(folder))


def check_flips(original, states, mesh, tmp_path, num_flips, seed=0):
    """Each is found, the file named, the checkpoint before restored, and nothing of the damaged one is lost."""
    rng = np.random.default_rng(seed)
    named = set()
    for number in range(num_flips):
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        name = flip_uniformly(folder / "20", number, rng)
        before = tree(folder / "20")
        checkpoints = opened(folder)
        got, position = checkpoints.restore(abstract(states[20], mesh), accept)
        checkpoints.close()
        (problem,) = checkpoints.problems
        assert f"{folder}/20 is damaged: " in problem and name in problem, (name, problem)
        assert position["step"] == 10 and position["samples"] == 80
        assert_equal(got, states[10])
        assert not (folder / "20").exists() and tree(folder / "damaged-20") == before
        if number == 0:  # the run goes on: the step can be saved again, and a restore finds it
            saved(folder, {20: states[20]})
            assert restored(folder, states[20], mesh)[1]["step"] == 20
        named.add(name)
        shutil.rmtree(folder)
    return named


def test_a_flipped_bit_anywhere_is_found(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    assert len(check_flips(original, states, mesh, tmp_path, 20)) > 8


@pytest.mark.slow
def test_200_flipped_bits_are_found(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    named = check_flips(original, states, mesh, tmp_path, 200, seed=1)
    assert len(named) == len(data_files(original / "20")) > 10


def test_every_file_counts(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    rng = np.random.default_rng(0)
    for path in data_files(original / "20"):
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        flip_bit(folder / path.relative_to(original), rng)
        checkpoints = opened(folder)
        assert checkpoints.restore(abstract(states[20], mesh), accept)[1]["step"] == 10
        checkpoints.close()
        assert str(path.relative_to(original / "20")) in checkpoints.problems[0]
        shutil.rmtree(folder)


def without_manifest(folder, step):
    """As versions before the manifest have written it."""
    (folder / str(step) / "manifest.json").unlink()
    path = folder / str(step) / "position" / "metadata"
    position = json.loads(path.read_text())
    del position["checksum"], position["has_manifest"]
    position["checksum"] = checkpoints_module._checksum(position)
    path.write_text(json.dumps(position))


def test_without_a_manifest_the_arrays_are_still_verified(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    rng = np.random.default_rng(0)
    files = [path.relative_to(original) for path in data_files(original / "20")]
    files = [path for path in files if len(path.parts) > 2]
    num_found = {"state": 0, "position": 0}
    for number in range(3 * len(files)):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        without_manifest(folder, 20)
        if number == 0:
            assert restored(folder, states[20], mesh)[1]["step"] == 20
        path = files[number % len(files)]
        at = flip_bit(folder / path, rng)
        got, position = restored(folder, states[20], mesh)
        step = position["step"]
        assert_equal(got, states[step]), (path, at)
        assert position["samples"] == 8 * step and position["record"] == POSITION["record"]
        if step == 20:
            assert not (folder / "damaged-20").exists()
        else:
            assert step == 10 and (folder / "damaged-20").is_dir(), (path, at)
            num_found[path.parts[1]] += 1
        shutil.rmtree(folder)
    assert num_found["state"] > 4 and num_found["position"] > 0, num_found


def test_a_manifest_is_missed(two_steps, tmp_path):
    original, states, mesh = two_steps
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    (folder / "20" / "manifest.json").unlink()
    checkpoints = opened(folder)
    assert checkpoints.restore(abstract(states[20], mesh), accept)[1]["step"] == 10
    checkpoints.close()
    assert "manifest.json: is missing" in checkpoints.problems[0]


def test_an_unknown_file_and_a_renamed_checkpoint(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    (folder / "20" / "state" / "d" / "stray").write_bytes(b"?")
    (folder / "10").rename(folder / "15")
    checkpoints = opened(folder)
    with pytest.raises(BadInput, match="state/d/stray: is not of this checkpoint"):
        checkpoints.restore(abstract(states[20], mesh), accept)
    checkpoints.close()
    assert "/15 is damaged: ValueError: it holds step 10" in checkpoints.problems[1]


def test_orbax_can_read_it(two_steps):
    """The files are those of its own manager, which another program may use."""
    original, states, mesh = two_steps
    with ocp.CheckpointManager(
        original,
        item_names=("state", "position"),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(create=False, read_only=True),
    ) as manager:
        assert sorted(manager.all_steps()) == [10, 20]
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract(states[20], mesh)),
            position=ocp.args.JsonRestore(),
        )
        found = manager.restore(20, args=args)
        assert_equal(found["state"], states[20])
        assert found["position"]["samples"] == 160
        assert manager.metadata(20).commit_timestamp_nsecs > 1.7e18


def test_orbax_lets_flipped_bits_pass_and_we_do_not(mesh, tmp_path, caplog):
    """Chunks above a kilobyte carry no checksum: only the fingerprint tells."""
    caplog.set_level(logging.CRITICAL)
    states = {step: make_state(mesh, step, rows=1024) for step in (10, 20)}
    original = tmp_path / "original"
    saved(original, states)
    largest = data_files(original / "20")[0].relative_to(original)
    assert (original / largest).stat().st_size > 50_000
    rng = np.random.default_rng(0)
    num_silent = 0
    for number in range(8):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        flip_bit(folder / largest, rng)
        with ocp.StandardCheckpointer() as orbax:
            try:
                alone = orbax.restore(folder / "20" / "state", abstract(states[20], mesh))
            except Exception:
                alone = None
        if alone is not None:
            num_silent += fingerprints(alone) != fingerprints(states[20])
        got, position = restored(folder, states[20], mesh)
        assert_equal(got, states[position["step"]])
    assert num_silent > 4  # else this test proves nothing about the fingerprints


def test_every_bit_of_the_position_counts(two_steps, tmp_path):
    """A wrong digit in JSON is still JSON: only a checksum can tell."""
    original, states, mesh = two_steps
    (path,) = (p for p in data_files(original / "20" / "position") if b"samples" in p.read_bytes())
    text = path.read_bytes()
    for number, (old, new) in enumerate(
        ((b"160", b"161"), (b"0.30000000000000004", b"0.30000000000000014"))
    ):
        assert text.count(old) == 1
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        (folder / path.relative_to(original)).write_bytes(text.replace(old, new))
        assert restored(folder, states[20], mesh)[1]["step"] == 10
        assert (folder / "damaged-20").is_dir()


def test_all_damaged_is_refused_and_nothing_is_touched(two_steps, tmp_path, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    for step in (10, 20):
        largest = data_files(folder / str(step) / "state")[0]
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (folder / "30.orbax-checkpoint-tmp").mkdir()
    before = tree(folder)
    with pytest.raises(
        BadInput, match=r"/20 is damaged: .* \(and no other of the steps \[20, 10\]"
    ) as error:
        restored(folder, states[20], mesh)
    assert "\n" not in str(error.value)
    assert tree(folder) == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "no position", "no state"])
def test_a_checkpoint_that_is_not_whole(two_steps, tmp_path, damage, caplog):
    original, states, mesh = two_steps
    caplog.set_level(logging.CRITICAL)
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    largest = data_files(folder / "20" / "state")[0]
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "missing":
        largest.unlink()
    elif damage == "empty":
        largest.write_bytes(b"")
    else:
        shutil.rmtree(folder / "20" / damage.split()[1])
    got, position = restored(folder, states[20], mesh)
    assert position["step"] == 10
    assert_equal(got, states[10])
    assert (folder / "damaged-20").is_dir() and not (folder / "20").exists()


def test_leftovers_of_a_killed_save_are_ignored(two_steps, tmp_path):
    original, states, mesh = two_steps
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    leftover = folder / "30.orbax-checkpoint-tmp"
    shutil.copytree(original / "20", leftover)
    looking = opened(folder, read_only=True)
    assert looking.steps() == [10, 20]
    looking.close()
    assert leftover.is_dir()  # generate, say, may look while train is saving
    got, position = restored(folder, states[20], mesh)
    assert position["step"] == 20
    assert_equal(got, states[20])
    assert not leftover.exists()


def test_a_refused_checkpoint_is_not_taken_for_damaged(two_steps, tmp_path):
    original, states, mesh = two_steps
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    shutil.copytree(
        original / "20", folder / "30.orbax-checkpoint-tmp"
    )  # perhaps being saved right now
    before = tree(folder)

    def refuse(position):
        assert position["model"] == {"num_layers": 2}
        raise BadInput("of another run")

    with pytest.raises(BadInput, match="of another run"):
        restored(folder, states[20], mesh, refuse)
    assert tree(folder) == before


@pytest.mark.parametrize(
    "name, shape, dtype",
    [("matrix", (32, 16), jnp.bfloat16), ("vector", (32,), jnp.float32), ("matrix", (16, 16), jnp.float32),
     ("matrix", (64, 16), jnp.float32), ("matrix", (512,), jnp.float32)],
)  # fmt: skip
def test_another_dtype_or_shape_is_refused_not_cast(two_steps, tmp_path, name, shape, dtype):
    original, states, mesh = two_steps
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    before = tree(folder)
    wanted = abstract(states[20], mesh)
    wanted.params[name] = jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    checkpoints = opened(folder)
    with pytest.raises(BadInput) as error:
        checkpoints.restore(wanted, accept)
    checkpoints.close()
    assert f".params['{name}']" in str(error.value) and "\n" not in str(error.value)
    assert str(jnp.dtype(dtype)) in str(error.value) and "damaged" not in str(error.value)
    assert tree(folder) == before


def test_other_arrays_are_refused(two_steps, tmp_path):
    """Such as those of another optimizer."""
    original, states, mesh = two_steps
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    before = tree(folder)
    more, fewer = abstract(states[20], mesh), abstract(states[20], mesh)
    more.opt_state["second"] = more.opt_state["moment"]
    del fewer.opt_state["moment"]
    for wanted, name in ((more, "second"), (fewer, "moment")):
        checkpoints = opened(folder)
        with pytest.raises(BadInput, match=rf"\.opt_state\['{name}'\]"):
            checkpoints.restore(wanted, accept)
        checkpoints.close()
    assert tree(folder) == before


def test_position_is_plain_json(two_steps):
    original, _, _ = two_steps
    (path,) = (p for p in data_files(original / "20" / "position") if b"samples" in p.read_bytes())
    assert json.loads(path.read_text())["step"] == 20


@pytest.mark.parametrize("error", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: 3 GiB")])
def test_what_is_no_damage_costs_no_checkpoint(two_steps, tmp_path, monkeypatch, error):
    """Out of memory once, and the newest checkpoint would be put aside and its steps done again."""
    original, states, mesh = two_steps
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)

    def fail(*_):
        raise error

    monkeypatch.setattr("bloomjax.checkpoints._verify", fail)
    with pytest.raises(type(error)):
        restored(folder, states[20], mesh)
    monkeypatch.undo()
    assert restored(folder, states[20], mesh)[1]["step"] == 20


def test_an_earlier_damaged_checkpoint_is_kept(two_steps, tmp_path):
    original, states, mesh = two_steps
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    (folder / "damaged-20").mkdir()
    (folder / "damaged-20" / "note").write_text("of last week")
    for path in data_files(folder / "20" / "state"):
        path.write_bytes(path.read_bytes()[:-3])
    assert restored(folder, states[20], mesh)[1]["step"] == 10
    assert (folder / "damaged-20" / "note").exists() and (folder / "damaged-20.1").is_dir()
