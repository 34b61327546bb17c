"""The step on every kind of mesh against float64 BLOOM; microbatches, filling rows, layouts, dtypes."""

import collections
import dataclasses
import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_bloom
from jax.sharding import NamedSharding, PartitionSpec
from reference_bloom import jit

from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.train_state import TrainState, abstract_state, init_state
from bloomjax.train_step import StepOptions, abstract_batch, make_eval_step, make_train_step

SHAPE = {"vocab_size": 64, "emb_dim": 32, "num_layers": 2, "num_heads": 8, "mlp_dim": 64}
F32 = BloomConfig(**SHAPE, dtype="float32")
BF16 = BloomConfig(**SHAPE, dtype="bfloat16")
ROWS, LENGTH = 16, 16
OF_EIGHT = [m for m in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(m) == 8]
MESHES = [(1, 1, 1), *OF_EIGHT]
LEARNING_RATE, EPSILON, DECAY = np.float32(0.5), 0.1, 0.1
# `trace` keeps the raw gradients in the state, where a test can read them. With a large epsilon the
# update is a smooth function of the gradient and can be compared as closely as the gradient itself.
OPTIMIZER = optax.chain(optax.trace(decay=0.0), adamw(epsilon=EPSILON, weight_decay=DECAY))


@functools.cache
def build(mesh):
    return MeshShape(*mesh).build(jax.devices()[: int(np.prod(mesh))])


@functools.cache
def params():
    return reference_bloom.random_params(**SHAPE)


def some_tokens(seed=1):
    return np.random.default_rng(seed).integers(0, 64, (ROWS, LENGTH + 1), np.int32)


@functools.cache
def abstract(mesh, config=F32):
    return abstract_state(Bloom(config), OPTIMIZER, build(mesh))


@functools.cache
def lowered_step(mesh, config=F32, microbatch_size=None):
    options = StepOptions(microbatch_size_samples=microbatch_size, loss_chunk_tokens=64)
    state = abstract(mesh, config)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    replicated = NamedSharding(build(mesh), PartitionSpec())
    step = jit(
        make_train_step(Bloom(config), OPTIMIZER, options, build(mesh)),
        donate_argnums=0,
        out_shardings=(shardings, replicated),
    )
    batch = abstract_batch(ROWS, LENGTH, build(mesh))
    with jax.set_mesh(build(mesh)):
        return step.lower(state, batch, LEARNING_RATE, jax.random.key(0))


@functools.cache
def compiled_step(mesh, config=F32, microbatch_size=None):
    return lowered_step(mesh, config, microbatch_size).compile()


def place(tree, like):
    # From numpy: moving a jax array to another layout would compile a program.
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), tree, like)


def initial_state(mesh, config=F32):
    state = TrainState(np.int32(0), params(), OPTIMIZER.init(params()))
    return place(state, abstract(mesh, config))


def batch_of(mesh, tokens, weights=None):
    weights = np.ones(ROWS, np.float32) if weights is None else weights
    return place({"tokens": tokens, "weights": weights}, abstract_batch(ROWS, LENGTH, build(mesh)))


def take_step(mesh, tokens, weights=None, *, config=F32, microbatch_size=None):
    step = compiled_step(mesh, config, microbatch_size)
    batch = batch_of(mesh, tokens, weights)
    return step(initial_state(mesh, config), batch, LEARNING_RATE, jax.random.key(0))


@functools.cache
def expected(filled=()):
    """Loss, gradients and parameters after one AdamW step, in float64."""
    weights = np.ones(ROWS)
    weights[list(filled)] = 0
    loss, grads = reference_bloom.loss_and_grads(params(), some_tokens(), weights)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))

    def update(path, p, g):
        g = g / max(1.0, norm)
        decay = DECAY if path[-1].key in ("kernel", "embedding") else 0.0
        return p - LEARNING_RATE * (g / (np.abs(g) + EPSILON) + decay * p)

    old = reference_bloom.to_float64(params())
    return loss, norm, grads, jax.tree_util.tree_map_with_path(update, old, grads)


def assert_close(got, want, relative):
    """Every tensor within `relative` of the largest element of its counterpart."""
    got = jax.tree_util.tree_leaves_with_path(got)
    for (path, ours), theirs in zip(got, jax.tree.leaves(want), strict=True):
        error, scale = np.abs(np.asarray(ours, np.float64) - theirs).max(), np.abs(theirs).max()
        assert error <= relative * scale, (jax.tree_util.keystr(path), error, scale)


def assert_is_the_expected_step(state, metrics, filled=(), relative=1e-5):
    loss, norm, grads, new_params = expected(filled)
    assert int(state.step) == 1
    assert float(metrics["loss"]) == pytest.approx(loss, rel=relative)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=relative)
    assert_close(state.opt_state[0].trace, grads, relative)
    assert_close(state.params, new_params, relative)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_takes_the_same_step(mesh):
    assert expected()[1] > 1  # the gradient is clipped
    assert_is_the_expected_step(*take_step(mesh, some_tokens()))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)])
def test_filling_rows_change_nothing(mesh):
    """12 rows and 4 of weight 0: the step of the 12 rows."""
    filled = (12, 13, 14, 15)
    tokens, weights = some_tokens(), np.ones(ROWS, np.float32)
    loss = reference_bloom.token_losses(reference_bloom.to_float64(params()), tokens[:12]).mean()
    assert expected(filled)[0] == pytest.approx(loss, rel=1e-12)
    tokens[12:] = some_tokens(seed=2)[12:]
    weights[12:] = 0
    assert_is_the_expected_step(*take_step(mesh, tokens, weights), filled)


@pytest.mark.parametrize(
    ("mesh", "microbatch_size"), [((1, 1, 1), 4), ((2, 2, 2), 1), ((1, 4, 2), 2), ((4, 1, 2), 1)]
)
def test_microbatches_add_up_to_the_whole_batch(mesh, microbatch_size):
    step = functools.partial(take_step, mesh, microbatch_size=microbatch_size)
    assert_is_the_expected_step(*step(some_tokens()))
    # Row r belongs to microbatch r % 4: here one microbatch is all filling.
    filled = (3, 7, 11, 15)
    tokens, weights = some_tokens(), np.ones(ROWS, np.float32)
    tokens[3::4], weights[3::4] = some_tokens(seed=2)[3::4], 0
    assert_is_the_expected_step(*step(tokens, weights), filled)


def test_splitting_into_microbatches_moves_no_rows():
    text = compiled_step((2, 2, 2), F32, 1).as_text()
    moves = re.findall(r"= .*(?:all-gather|all-to-all|collective-permute|all-reduce)\(.*", text)
    assert len(moves) > 10
    assert not [line for line in moves if "s32[" in line.split("(")[0] + line.split(")")[0]]


def test_microbatches_need_less_memory():
    temp = {
        size: compiled_step((2, 2, 2), F32, size).memory_analysis().temp_size_in_bytes
        for size in (None, 1)
    }
    assert temp[1] < temp[None], temp


def test_rows_are_dealt_evenly():
    """2,048 samples on 48 shards are 43 rows a shard, or 44 in microbatches of at most 11."""
    mesh = types.SimpleNamespace(shape={"data": 3, "fsdp": 16, "tensor": 8})
    rows = lambda size, n: StepOptions(microbatch_size_samples=size).num_rows(n, mesh)  # noqa: E731
    assert rows(None, 2048) == rows(1, 2048) == 2064 and rows(11, 2048) == 2112
    assert rows(11, 192) == 192 and rows(11, 16) == 48  # one smaller microbatch
    for size in (None, *range(1, 30)):
        options = StepOptions(microbatch_size_samples=size)
        for num_samples in range(1, 3000, 37):
            filled = options.num_rows(num_samples, mesh)
            assert filled >= num_samples and filled % 48 == 0
            assert options.num_rows(filled, mesh) == filled  # the step finds the same microbatches
            num_microbatches = options.num_microbatches(filled // 48)
            assert filled // 48 % num_microbatches == 0
            assert filled // 48 // num_microbatches <= (size or filled)
            assert num_microbatches == options.num_microbatches(-(-num_samples // 48))


@pytest.mark.slow
def test_five_steps_in_bf16_on_eight_devices():
    mesh = (2, 2, 2)
    state, batch = initial_state(mesh, BF16), batch_of(mesh, some_tokens())
    losses, norms = [], []
    for number in range(6):
        state, metrics = compiled_step(mesh, BF16)(state, batch, LEARNING_RATE, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        if number == 0:
            for ours, theirs in zip(
                jax.tree.leaves(state.opt_state[0].trace),
                jax.tree.leaves(expected()[2]),
                strict=True,
            ):
                assert ours.dtype == jnp.float32
                norms.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert losses[0] == pytest.approx(expected()[0], rel=3e-3)
    assert max(norms) < 0.03, norms
    assert int(state.step) == 6
    assert losses[5] < 0.9 * losses[0] and np.all(np.diff(losses) < 0), losses


def test_the_old_state_is_donated():
    mesh = (2, 2, 2)
    state = initial_state(mesh)
    new, _ = compiled_step(mesh)(
        state, batch_of(mesh, some_tokens()), LEARNING_RATE, jax.random.key(0)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(new))
    assert compiled_step(mesh).memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        ("adamw", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("adamw", "bfloat16"), ("another optimizer", "float32"), ("another optimizer", "bfloat16")]
        ),
    ],
)  # fmt: skip
def test_a_step_beyond_its_limits_is_not_taken(kind, moments):
    """Parameters and optimizer to the bit those before; within the limits those of a step without."""
    optimizer = adamw(epsilon=EPSILON, first_moment_dtype=moments)
    if kind != "adamw":
        optimizer = optax.chain(optax.trace(decay=0.9), optimizer)
    mesh = build((1, 1, 1))
    step = jit(make_train_step(Bloom(F32), optimizer, StepOptions(), mesh))
    state = TrainState(np.int32(3), params(), optimizer.init(params()))
    batch = {"tokens": some_tokens(), "weights": np.ones(ROWS, np.float32)}
    arguments = batch, LEARNING_RATE, jax.random.key(0)
    with jax.set_mesh(mesh):
        state = jax.tree.map(jnp.asarray, step(state, *arguments)[0])  # with moments
        free, metrics = step(state, *arguments)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        for limits, is_taken in (
            ((loss + 1, norm + 1), True), ((loss - 1e-3, norm + 1), False), ((loss + 1, norm - 1e-3), False),
        ):  # fmt: skip
            new, metrics = step(state, *arguments, np.array(limits, np.float32))
            assert bool(metrics["is_taken"]) == is_taken
            assert float(metrics["loss"]) == loss and int(new.step) == 5
            if is_taken:
                for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(free), strict=True):
                    np.testing.assert_allclose(
                        a.astype(np.float32), b.astype(np.float32), 1e-5, 1e-7
                    )
            else:
                new = new.replace(step=state.step)
                jax.tree.map(np.testing.assert_array_equal, new, state)
        broken = batch | {"weights": np.full(ROWS, np.nan, np.float32)}
        most = np.full(2, np.finfo(np.float32).max)
        new, metrics = step(state, broken, LEARNING_RATE, jax.random.key(0), most)
        assert not metrics["is_taken"] and not np.isfinite(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, new.replace(step=state.step), state)


def test_dropout_masks_differ_between_steps_keys_and_microbatches():
    mesh = (1, 1, 1)
    config = dataclasses.replace(F32, hidden_dropout_rate=0.1, attention_dropout_rate=0.1)
    step = compiled_step(mesh, config, 4)
    tokens = np.repeat(some_tokens()[:4], 4, axis=0)  # the same four rows in every microbatch

    def loss(*, number=0, seed=0, weights=None):
        state = dataclasses.replace(initial_state(mesh), step=jax.device_put(np.int32(number)))
        batch = batch_of(mesh, tokens, weights)
        return float(step(state, batch, LEARNING_RATE, jax.random.key(seed))[1]["loss"])

    first_microbatch = (np.arange(ROWS) % 4 == 0).astype(np.float32)
    assert loss() == loss()
    others = loss(number=1), loss(seed=1), loss(weights=first_microbatch)
    without = reference_bloom.token_losses(reference_bloom.to_float64(params()), tokens).mean()
    assert min(abs(np.diff(sorted([loss(), *others, without])))) > 1e-4


# ---- layouts ----

SPECS = {
    "['embedding']": ("tensor", "fsdp"),
    "['embedding_norm']['bias']": (None,),
    "['embedding_norm']['scale']": (None,),
    "['final_norm']['bias']": (None,),
    "['final_norm']['scale']": (None,),
    "['layers']['attention_norm']['bias']": (None, None),
    "['layers']['attention_norm']['scale']": (None, None),
    "['layers']['mlp_in']['bias']": (None, "tensor"),
    "['layers']['mlp_in']['kernel']": (None, "fsdp", "tensor"),
    "['layers']['mlp_norm']['bias']": (None, None),
    "['layers']['mlp_norm']['scale']": (None, None),
    "['layers']['mlp_out']['bias']": (None, None),
    "['layers']['mlp_out']['kernel']": (None, "tensor", "fsdp"),
    "['layers']['out']['bias']": (None, None),
    "['layers']['out']['kernel']": (None, "tensor", None, "fsdp"),
    "['layers']['qkv']['bias']": (None, None, "tensor", None),
    "['layers']['qkv']['kernel']": (None, "fsdp", None, "tensor", None),
}


def specs(tree):
    return {jax.tree_util.keystr(path): tuple(leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def test_optimizer_state_is_split_like_the_parameters():
    state = abstract((2, 2, 2))
    adam = next(part for part in state.opt_state[1] if hasattr(part, "mu"))
    for tree in (state.params, state.opt_state[0].trace, adam.mu, adam.nu):
        assert specs(tree) == SPECS
    assert state.step.sharding.spec == adam.count.sharding.spec == PartitionSpec()
    # Not only promised: what a step returns lies like this.
    new, _ = take_step((2, 2, 2), some_tokens())
    for leaf, promised in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)
    kernel = new.opt_state[0].trace["layers"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 3, 4, 4)


def test_initial_values_do_not_depend_on_the_mesh():
    init = functools.partial(jit, init_state, static_argnums=(0, 1, 2))
    model, optimizer = Bloom(F32), optax.identity()
    state = abstract_state(model, optimizer, build((2, 2, 2)))
    ours = init(out_shardings=jax.tree.map(lambda x: x.sharding, state))(model, optimizer, 7)
    alone, other = init()(model, optimizer, 7), init()(model, optimizer, 8)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)
    one, two = (np.asarray(state.params["embedding"]) for state in (alone, other))
    assert np.mean(one == two) < 0.01


@functools.cache
def lowered_eval_step(set_mesh):
    step = jit(make_eval_step(Bloom(BF16), StepOptions()))
    mesh = build((2, 2, 2))
    arguments = abstract((2, 2, 2), BF16).params, abstract_batch(ROWS, LENGTH, mesh)
    if not set_mesh:
        return step.lower(*arguments)
    with jax.set_mesh(mesh):
        return step.lower(*arguments)


def constraints(lowered):
    """How often each layout is demanded in the StableHLO text."""
    found = re.findall(r"sdy\.sharding_constraint .*<@mesh, (\[.*\])> : tensor<(\S+)>", lowered.as_text())  # fmt: skip
    return collections.Counter((spec.replace('"', ""), shape) for spec, shape in found)


def test_no_sharding_constraint_is_lost():
    """Under `with mesh:` instead of `jax.set_mesh` all of them would vanish without a word."""
    assert constraints(lowered_eval_step(True)) == {
        # The residual stream: after the embedding and after both branches.
        ("[{data, fsdp}, {tensor}, {}]", "16x16x32xbf16"): 3,
        # Gathered along the sequence: into attention, into the MLP, into the head.
        ("[{data, fsdp}, {}, {}]", "16x16x32xbf16"): 3,
        ("[{data, fsdp}, {}, {}, {tensor}, {}]", "16x16x3x8x4xbf16"): 1,
        ("[{data, fsdp}, {}, {tensor}, {}]", "16x16x8x4xbf16"): 1,
        ("[{data, fsdp}, {}, {tensor}]", "16x16x64xbf16"): 1,
        # Weights: cast, then gathered over fsdp.
        ("[{}, {}, {tensor}, {}]", "32x3x8x4xbf16"): 1,
        ("[{tensor}, {}, {}]", "8x4x32xbf16"): 1,
        ("[{}, {tensor}]", "32x64xbf16"): 1,
        ("[{tensor}, {}]", "64x32xbf16"): 1,
    }
    assert constraints(lowered_eval_step(False)) == {}


def test_the_step_constrains_gradients_too():
    demanded = constraints(lowered_step((2, 2, 2), BF16))
    forward = constraints(lowered_eval_step(True))
    assert forward <= demanded
    # Weight gradients leave in float32, split as the weights are.
    in_float32 = {key: number for key, number in demanded.items() if key[1].endswith("f32")}
    assert in_float32 == {
        ("[{fsdp}, {}, {tensor}, {}]", "32x3x8x4xf32"): 1,
        ("[{tensor}, {}, {fsdp}]", "8x4x32xf32"): 1,
        ("[{fsdp}, {tensor}]", "32x64xf32"): 1,
        ("[{tensor}, {fsdp}]", "64x32xf32"): 1,
    }
    # Cotangents of activations, too, are split over the batch and `tensor`.
    activations = [key for key, number in (demanded - forward).items() if "data" in key[0]]
    assert {"16x16x32xbf16", "16x16x3x8x4xbf16", "16x16x64xbf16"} <= {key[1] for key in activations}


def group_size(line):
    """Devices that take part in one collective, from any of XLA's three notations."""
    groups = line.split("replica_groups=")[1]
    if found := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(found[1])
    if found := re.match(r"\{\{([\d,]*)\}", groups):
        return found[1].count(",") + 1
    sizes = dict(re.findall(r"('\w+')=(\d+)", groups.split("]")[0]))
    axes = re.findall(r"'\w+'", groups[groups.index("{") : groups.index("}")])
    return int(np.prod([int(sizes[axis]) for axis in axes]))


def collectives(compiled):
    """kind -> shapes of the results, of the compiled program; those of one device move nothing."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = collections.defaultdict(set)
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (\S+|\(.*?\)) ({kinds})(-start)?\(", line)
        if match and (match[2] == "collective-permute" or group_size(line) > 1):
            # A layer's slice of the stacked weights may keep its leading 1.
            found[match[2]] |= set(re.findall(r"\[(?:1,)?([\d,]*)\]", match[1]))
    return dict(found)


def test_collectives():
    weights = {"32,3,8,4", "8,4,32", "32,64", "64,32"}  # the last is the embedding's, too
    matrices = {
        "32,96",
        "32,32",
        "32,64",
        "64,32",
    }  # what `dense` makes of them where `tensor` splits none
    assert collectives(compiled_step((1, 1, 1))) == {}
    # Replicas only add up gradients.
    data = collectives(compiled_step((8, 1, 1)))
    assert data.keys() == {"all-reduce"} and matrices <= data["all-reduce"]
    # FSDP gathers every weight whole, and nothing else.
    fsdp = collectives(compiled_step((1, 8, 1)))
    assert fsdp["all-gather"] == weights
    # Tensor parallelism moves activations and never a weight.
    tensor = collectives(compiled_step((1, 1, 8)))
    assert "16,16,32" in tensor["all-gather"]
    for shapes in tensor.values():
        assert not shapes & (weights | matrices)
    assert not any("all-to-all" in kinds for kinds in (data, fsdp, tensor))


def dot_operands(lowered):
    dots = re.findall(r"stablehlo\.dot_general .* : (\(.*)", lowered.as_text())
    return [tuple(re.findall(r"x(b?f\d+)>", dot)) for dot in dots]


@pytest.mark.parametrize("remat_policy", ["none", "full"])
def test_no_matmul_has_float32_operands(remat_policy):
    config = dataclasses.replace(BF16, remat_policy=remat_policy)
    dots = dot_operands(lowered_step((2, 2, 2), config))
    # A layer has qkv, scores, context, out and two of the MLP: each once forward, twice backward.
    assert len(dots) >= 6 * 3 + 3  # and the head
    assert {dot[:2] for dot in dots} == {("bf16", "bf16")}
    # Sums over `tensor` travel in bf16: out and mlp_out forward, qkv and mlp_in backward.
    parts = 4 + (remat_policy == "full")  # attention is computed again for what follows it
    assert collections.Counter(dot[2] for dot in dots)["bf16"] == parts
    # On one device all sums are float32.
    dots = dot_operands(lowered_step((1, 1, 1), config))
    assert set(dots) == {("bf16", "bf16", "f32")}


def test_gradients_may_be_summed_in_bf16():
    """Half the bytes of the scatter; 40 steps end with a loss within 0.2 % of float32 sums."""
    mesh, tokens = (1, 8, 1), some_tokens()
    final, scattered = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(BF16, gradient_dtype=dtype)
        step = compiled_step(mesh, config)
        state, first = initial_state(mesh, config), None
        for _ in range(40):
            state, metrics = step(
                state, batch_of(mesh, tokens), np.float32(0.05), jax.random.key(0)
            )
            first = float(metrics["loss"]) if first is None else first
        final[dtype] = float(metrics["loss"])
        assert final[dtype] < 0.9 * first
        demanded = constraints(lowered_step(mesh, config))
        scattered[dtype] = {shape for spec, shape in demanded if spec == "[{fsdp}, {tensor}]"}
    assert scattered == {"float32": {"32x64xf32"}, "bfloat16": {"32x64xbf16"}}
    assert 0 < abs(final["bfloat16"] / final["float32"] - 1) < 2e-3


# ---- evaluation ----


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_row_losses_equal_float64(mesh):
    tokens = some_tokens()
    batch = {"tokens": tokens, "weights": np.zeros(ROWS, np.float32)}  # weights are the trainer's
    step = jit(make_eval_step(Bloom(F32), StepOptions(loss_chunk_tokens=64, z_loss=1.0)))
    if mesh is None:
        got = step(params(), batch)
    else:
        with jax.set_mesh(build(mesh)):
            got = step(place(params(), abstract(mesh).params), batch_of(mesh, tokens))
    want = reference_bloom.token_losses(reference_bloom.to_float64(params()), tokens)
    assert got.shape == (2, ROWS) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, [want.sum(1), [want.shape[1]] * ROWS], rtol=1e-5)


@pytest.mark.parametrize("bad", [{"microbatch_size_samples": 0}, {"loss_chunk_tokens": 0}])
def test_options_that_make_no_sense(bad):
    with pytest.raises(BadInput, match="must be at least 1"):
        StepOptions(**bad)
