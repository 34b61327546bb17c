"""muP against the exponents of the paper's table 8, and against float64 BLOOM with the multipliers written out."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_bloom
from reference_bloom import jit

from bloomjax import config
from bloomjax.data import TrainData
from bloomjax.decoding import generate
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.mup import MuP, widths_of
from bloomjax.optimizer import adamw
from bloomjax.position import Position
from bloomjax.positions import Rotary
from bloomjax.schedules import BatchSchedule
from bloomjax.train_state import TrainState, abstract_state, init_state
from bloomjax.train_step import StepOptions, abstract_batch, make_train_step

# 8 times as wide as its base in each way: D 8 -> 64, F 16 -> 128, K 2 -> 16.
BASE = MuP(base_emb_dim=8, base_num_heads=4, base_mlp_dim=16)
WIDE = BloomConfig(
    vocab_size=320, num_layers=2, emb_dim=64, num_heads=4, mlp_dim=128, dtype="float32", mup=BASE
)
SMALL = {"vocab_size": 40, "emb_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 96}
# Table 8 of arXiv 2203.03466 by its own words: exponents of the width in initial variance and Adam's learning rate.
# Input weights and biases: fan_in is no width; hidden weights: 1/fan_in and 1/fan_in.
VECTOR, HIDDEN = (0, 0), (-1, -1)
TABLE_8 = {
    "embedding": VECTOR,
    "embedding_norm/scale": VECTOR,
    "embedding_norm/bias": VECTOR,
    "layers/attention_norm/scale": VECTOR,
    "layers/attention_norm/bias": VECTOR,
    "layers/qkv/kernel": HIDDEN,
    "layers/qkv/bias": VECTOR,
    "layers/out/kernel": HIDDEN,
    "layers/out/bias": VECTOR,
    "layers/mlp_norm/scale": VECTOR,
    "layers/mlp_norm/bias": VECTOR,
    "layers/mlp_in/kernel": HIDDEN,
    "layers/mlp_in/bias": VECTOR,
    "layers/mlp_out/kernel": HIDDEN,
    "layers/mlp_out/bias": VECTOR,
    "final_norm/scale": VECTOR,
    "final_norm/bias": VECTOR,
}


def leaves(tree) -> dict[str, np.ndarray]:
    flat = jax.tree.leaves_with_path(tree)
    return {"/".join(each.key for each in path): np.asarray(leaf) for path, leaf in flat}


def tokens_of(model, rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, model.vocab_size, (rows, length), np.int32)


def test_initial_variances_are_those_of_table_8():
    wide = leaves(jit(lambda: init_state(Bloom(WIDE), adamw(), 0).params)())
    assert wide.keys() == TABLE_8.keys()
    for name, (variance, _) in TABLE_8.items():
        if name.endswith(("kernel", "embedding")):
            depth = 4 if name.split("/")[1:2] in (["out"], ["mlp_out"]) else 1  # 2 num_layers
            want = WIDE.init_std * (8.0**variance / depth) ** 0.5
            assert wide[name].std() == pytest.approx(want, rel=4 / np.sqrt(2 * wide[name].size))
        else:
            assert np.all(wide[name] == (1.0 if name.endswith("scale") else 0.0)), name


def test_learning_rates_are_those_of_table_8(mesh_of):
    """Adam's first step is the learning rate, whatever the gradient: what a weight moves by is its rate."""
    mesh, optimizer = mesh_of(1, 1, 1), adamw(weight_decay=0.0, epsilon=1e-20)
    step = jit(make_train_step(Bloom(WIDE), optimizer, StepOptions(), mesh))
    params = reference_bloom.random_params(
        vocab_size=320, emb_dim=64, num_layers=2, num_heads=4, mlp_dim=128
    )
    state = TrainState(np.int32(0), params, optimizer.init(params))
    batch = {"tokens": tokens_of(WIDE, 2, 17), "weights": np.ones(2, np.float32)}
    rate = np.float32(2.0**-7)
    with jax.set_mesh(mesh):
        new, _ = step(state, batch, rate, jax.random.key(0))
    before, after = leaves(params), leaves(new.params)
    for name, (_, exponent) in TABLE_8.items():
        if name == "layers/qkv/bias":  # that of k changes all scores of a query alike: no gradient
            before[name], after[name] = (x[name][:, [0, 2]] for x in (before, after))
        moved = np.abs(after[name] - before[name]) / rate
        np.testing.assert_allclose(np.median(moved), 8.0**exponent, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(moved.max(), 8.0**exponent, rtol=1e-2, err_msg=name)


def test_weight_decay_has_no_rates():
    params = reference_bloom.random_params(**SMALL)
    optimizer, zeros = adamw(weight_decay=0.25), jax.tree.map(np.zeros_like, params)
    rates = jax.tree.map(lambda _: 0.125, params)
    state = optimizer.init(params)
    updates = jit(lambda g: optimizer.update(g, state, params, rates=rates)[0])(zeros)
    for name, update in leaves(updates).items():
        decays = name.endswith(("kernel", "embedding"))
        np.testing.assert_array_equal(update, 0.25 * leaves(params)[name] * decays)


@pytest.mark.parametrize("is_taken", [None, True])
def test_rates_multiply_adams_part(is_taken):
    params = reference_bloom.random_params(**SMALL)
    optimizer, gradients = adamw(weight_decay=0.0), jax.tree.map(np.cos, params)
    rates = widths_of(dataclasses.replace(WIDE, mlp_dim=256)).rates(params)
    extra = {} if is_taken is None else {"is_taken": jnp.bool_(is_taken)}
    before = optimizer.init(params)
    plain, state = jit(lambda g: optimizer.update(g, before, params, **extra))(gradients)
    scaled, same = jit(lambda g: optimizer.update(g, before, params, **extra, rates=rates))(
        gradients
    )
    jax.tree.map(np.testing.assert_array_equal, state, same)  # moments are those of the gradients
    for name, update in leaves(scaled).items():
        factor = {"mlp_out/kernel": 1 / 16, "bias": 1, "scale": 1, "embedding": 1}
        factor = next((x for end, x in factor.items() if name.endswith(end)), 1 / 8)
        np.testing.assert_array_equal(update, np.float32(factor) * leaves(plain)[name])


def with_multipliers(params, query, output):
    """Float64 parameters of a plain BLOOM that has q.k and logits multiplied."""
    wide = reference_bloom.to_float64(params)
    wide["layers"]["qkv"]["kernel"][:, :, 0] *= query
    wide["layers"]["qkv"]["bias"][:, 0] *= query
    return wide, output


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("base_num_heads, query", [slow(1, 1.0), (2, 0.5**0.5), slow(4, 0.5)])
def test_logits_and_gradients_equal_float64(base_num_heads, query):
    """Base width 8, here 32 with heads of 8: K is that of the base, twice or four times as much; 1/sqrt(K K/base K)."""
    mup = MuP(8, base_num_heads, output_multiplier=3.0, attention_multiplier=1.5)
    model = Bloom(BloomConfig(**SMALL, dtype="float32", mup=mup))
    params, tokens = reference_bloom.random_params(**SMALL, seed=2), tokens_of(model.config, 3, 12)
    plain, output = with_multipliers(params, 1.5 * query, 3.0 / 4)

    def logits(params):
        x = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, x, method="logits")

    want = output * reference_bloom.logits(plain, tokens)
    got = np.asarray(jit(logits)(params))
    assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()

    # Of the sum of squares, by autodiff of the reference.
    def reference(params):
        q = jnp.asarray([1.5 * query, 1, 1]).reshape(3, 1, 1)
        qkv = {name: q * x for name, x in params["layers"]["qkv"].items()}
        params = params | {"layers": params["layers"] | {"qkv": qkv}}
        return jnp.sum(jnp.square(output * reference_bloom.logits(params, tokens, jnp)))

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        want = leaves(jit(jax.grad(reference))(reference_bloom.to_float64(params)))
    got = leaves(jit(jax.grad(lambda p: jnp.sum(jnp.square(logits(p)))))(params))
    for name, gradient in want.items():
        error = np.abs(got[name] - gradient).max() / np.abs(gradient).max()
        assert error < 2e-5, (name, error)


def test_bf16_rounds_q_once():
    """The factor is not rounded: 0.5^0.5 in bfloat16 is 0.2 % off, in every score."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 2, 64)), jnp.bfloat16)
    got = np.asarray(widths_of(WIDE)._replace(head=2.0).scaled_query(q), np.float64)
    want = np.asarray(q, np.float64) * 0.5**0.5
    assert abs((got * want).sum() / (want * want).sum() - 1) < 1e-4
    assert np.abs(got / want - 1).max() < 2.0**-8


def lowered(mup, mesh):
    shape = dict(vocab_size=320, num_layers=2, emb_dim=32, num_heads=4, dtype="float32")
    model, optimizer = Bloom(BloomConfig(**shape, mup=mup)), adamw()
    step = jax.jit(make_train_step(model, optimizer, StepOptions(), mesh))
    limits = jax.ShapeDtypeStruct((2,), jnp.float32)
    with jax.set_mesh(mesh):
        text = step.lower(
            abstract_state(model, optimizer, mesh), abstract_batch(4, 16, mesh), np.float32(0.1),
            jax.random.key(0), limits,
        ).as_text()  # fmt: skip
    return text, leaves(
        jit(lambda: nn.unbox(model.init(jax.random.key(3), jnp.zeros((1, 1), int))))()
    )


def test_at_the_base_it_is_the_standard_parametrization_to_the_bit(mesh_of):
    """The same program of a step, from the same initial values."""
    mesh = mesh_of(1, 1, 1)
    plain, values = lowered(None, mesh)
    at_base, same = lowered(MuP(32, 4), mesh)
    assert at_base == plain
    for name, value in values.items():
        np.testing.assert_array_equal(same[name], value)
    wider, other = lowered(MuP(16, 4), mesh)
    assert (
        wider != plain
        and (other["params/layers/qkv/kernel"] != values["params/layers/qkv/kernel"]).any()
    )


@pytest.mark.slow
def test_decoding_with_a_cache_has_the_multipliers():
    """Continuations are those of a plain model with the multipliers in its weights; without them they are others."""
    model = Bloom(BloomConfig(**SMALL, dtype="float32", mup=MuP(2, 1, attention_multiplier=40.0)))
    params = reference_bloom.random_params(**SMALL, seed=4)
    for name in ("embedding_norm", "final_norm"):  # or the head repeats the last token
        params[name]["bias"] *= 0.1
    params["embedding_norm"]["scale"] *= 0.3
    params["layers"]["mlp_out"]["kernel"] *= 4
    prompts, new = [[7], [3, 1, 4, 1, 5], [30, 0, 30]], 6
    wide, _ = with_multipliers(params, 40.0 * (2 / 8) ** 0.5, 1 / 16)
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(np.argmax(reference_bloom.logits(wide, np.array([tokens]))[0, -1])))
        expected.append(tokens[len(prompt) :])
    assert generate(model, params, prompts, max_new_tokens=new, eos_id=40) == expected
    plain = Bloom(dataclasses.replace(model.config, mup=None))
    assert generate(plain, params, prompts, max_new_tokens=new, eos_id=40) != expected


def test_a_run_does_not_go_on_with_another_base(tiny_text, tmp_path):
    shape = dict(vocab_size=320, num_layers=2, emb_dim=32, num_heads=4)

    def position(mup):
        data = TrainData(store_dir=str(tiny_text.store_dir), sequence_length=16, seed=3).open()
        return Position(tmp_path, Bloom(BloomConfig(**shape, mup=mup)), data, BatchSchedule(8))

    def saved(mup):
        return json.loads(json.dumps(position(mup).fields())) | {"step": 0}

    with_mup = saved(MuP(16, 4))
    position(MuP(16, 4)).check(with_mup)
    older = saved(None)
    assert "mup" not in older["model"]  # as before there was one
    position(None).check(older)
    for mup, there in ((None, with_mup), (MuP(8, 4), with_mup), (MuP(16, 4), older)):
        with pytest.raises(BadInput, match="a run with other model: there mup="):
            position(mup).check(there)
    imported = older | {"imported": {"source": "x", "sequence_length": 16}, "data": {}}
    position(None).check(imported)
    with pytest.raises(BadInput, match="a run with other model: there mup=BLOOM's, here mup="):
        position(MuP(16, 4)).check(imported)
    rotary = Bloom(BloomConfig(**shape, positions=Rotary()))
    of_rotary = Position(tmp_path, rotary, position(None)._data, BatchSchedule(8))
    with pytest.raises(BadInput, match="there positions=BLOOM's, here positions=Rotary"):
        of_rotary.check(imported)


def test_the_overlay_has_the_shape_of_its_base():
    mup = config.build("BloomConfig.mup", "ablations/mup.gin")
    base = config.build("Bloom.config", "560m.gin")
    assert (mup.base_emb_dim, mup.base_num_heads) == (base.emb_dim, base.num_heads)
    assert set(widths_of(dataclasses.replace(base, mup=mup))) == {1.0}
    peak = config.build("train.learning_rate", "560m.gin").peak
    assert config.build("CosineSchedule.peak", "ablations/mup.gin") == peak


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_emb_dim": 0}, "MuP.base_emb_dim must be at least 1, got 0"),
        ({"base_num_heads": 3}, "MuP.base_num_heads=3 does not divide base_emb_dim=8"),
        ({"base_mlp_dim": -1}, "MuP.base_mlp_dim must be at least 1, got -1"),
        ({"output_multiplier": 0.0}, "MuP.output_multiplier must be positive, got 0.0"),
        ({"attention_multiplier": float("nan")}, "MuP.attention_multiplier must be positive"),
    ],
)
def test_bases_that_are_none(change, message):
    with pytest.raises(BadInput) as error:
        dataclasses.replace(BASE, **change)
    assert str(error.value).startswith(message)


def test_an_optimizer_that_knows_no_rates_is_refused(mesh_of):
    with pytest.raises(BadInput, match="BloomConfig.mup needs adamw"):
        make_train_step(Bloom(WIDE), optax.sgd(1.0), StepOptions(), mesh_of(1, 1, 1))
