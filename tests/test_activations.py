"""Activations against their formulas in float64, and gated blocks, position tables and heads on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax import flops, hf, jaxpr_flops
from bloomjax.activations import GeGlu, Gelu, LiGlu, ReGlu, SquaredRelu, SwiGlu
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.positions import LearnedPositions, Rotary
from bloomjax.train_state import abstract_state, init_state
from bloomjax.train_step import StepOptions, abstract_batch, make_train_step


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# Of x, or of (gate, value).
FORMULAS = {
    Gelu(): gelu,
    SquaredRelu(): lambda x: np.maximum(x, 0) ** 2,
    SwiGlu(): lambda a, b: a / (1 + np.exp(-a)) * b,
    GeGlu(): lambda a, b: gelu(a) * b,
    ReGlu(): lambda a, b: np.maximum(a, 0) * b,
    LiGlu(): lambda a, b: a * b,
}
OF_ALL = pytest.mark.parametrize("activation", FORMULAS, ids=lambda a: type(a).__name__)


@OF_ALL
def test_values_and_gradients_are_those_of_the_formula(activation):
    rng = np.random.default_rng(0)
    inputs = activation.num_inputs
    x = 3 * rng.standard_normal((2, 3, inputs, 8))
    g = rng.standard_normal((2, 3, 8))
    formula = FORMULAS[activation]

    def of_parts(x):
        return formula(*np.moveaxis(x, 2, 0))

    given = jnp.float32(x if inputs == 2 else x[:, :, 0])
    y, pull = jax.vjp(activation.of, given)
    np.testing.assert_allclose(y, of_parts(x), rtol=2e-6, atol=2e-6)
    got = np.asarray(pull(jnp.float32(g))[0]).reshape(x.shape)
    for part in range(inputs):
        step = np.zeros(inputs)[:, None]
        step[part] = 1e-5
        slope = (of_parts(x + step) - of_parts(x - step)) / 2e-5
        np.testing.assert_allclose(got[:, :, part], slope * g, rtol=1e-5, atol=1e-5)


@OF_ALL
def test_bfloat16_is_rounded_once(activation):
    x = np.random.default_rng(1).standard_normal((1, 1, activation.num_inputs, 4096))
    x = np.asarray(jnp.bfloat16(x), np.float64)
    given = jnp.bfloat16(x if activation.num_inputs == 2 else x[:, :, 0])
    y, pull = jax.vjp(activation.of, given)
    want = FORMULAS[activation](*np.moveaxis(x, 2, 0))
    assert y.dtype == pull(y)[0].dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - want)
    assert (error <= 2**-8 * np.abs(want) + 1e-6).all()


def test_a_gated_width_keeps_the_parameters():
    """5,456 at 2,048: BigScience's tr9c."""
    assert SwiGlu().default_mlp_dim(2048) == 5456 and Gelu().default_mlp_dim(2048) == 8192
    for emb_dim, tolerance in ((128, 0.02), (1024, 3e-3), (2048, 2e-3), (14336, 3e-4)):
        plain, gated = (
            flops.num_non_embedding_params(
                emb_dim=emb_dim, num_layers=1, mlp_dim=activation.default_mlp_dim(emb_dim),
                num_mlp_inputs=activation.num_inputs,
            )
            for activation in (Gelu(), SwiGlu())
        )  # fmt: skip
        assert abs(gated / plain - 1) < tolerance, emb_dim
        assert SwiGlu().default_mlp_dim(emb_dim) % 16 == 0
    assert SwiGlu().default_mlp_dim(4) == 16


# ---- in a model ----

SHAPE = {"vocab_size": 64, "emb_dim": 32, "num_layers": 2, "num_heads": 8}
ROWS, LENGTH = 16, 16
PARTS = {
    "rotary, SwiGLU, head": {"positions": Rotary(), "activation": SwiGlu(), "tied_head": False, "mlp_dim": 48},
    "learned, squared ReLU": {
        "positions": LearnedPositions(LENGTH), "activation": SquaredRelu(), "embedding_norm": False,
    },
    "learned, documents": {"positions": LearnedPositions(LENGTH), "document_end_id": 2, "activation": GeGlu()},
}  # fmt: skip
OPTIMIZER = adamw(epsilon=0.1)  # large: the update is a smooth function of the gradient


@functools.cache
def mesh_(shape):
    return MeshShape(*shape).build(jax.devices()[: int(np.prod(shape))])


@functools.cache
def step_of(parts, mesh_shape, **changes):
    """Parameters after a step, its loss, and the traced program."""
    mesh = mesh_(mesh_shape)
    microbatch = changes.pop("microbatch", None)
    config = BloomConfig(**SHAPE, **{"dtype": "float32"} | PARTS[parts] | changes)
    model, options = Bloom(config), StepOptions(microbatch_size_samples=microbatch)
    abstract = abstract_state(model, OPTIMIZER, mesh)
    state = jit(init_state, static_argnums=(0, 1, 2))(model, OPTIMIZER, 5)
    rng = np.random.default_rng(0)  # biases, too, and not all alike
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape, np.float32), state.params
    )
    state = jax.tree.map(
        lambda a, s: jax.device_put(np.asarray(a), s.sharding),
        state.replace(params=params),
        abstract,
    )
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1), np.int32)
    batch = {"tokens": tokens, "weights": np.ones(ROWS, np.float32)}
    batch = jax.tree.map(
        lambda a, s: jax.device_put(a, s.sharding), batch, abstract_batch(ROWS, LENGTH, mesh)
    )
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    step = jit(make_train_step(model, OPTIMIZER, options, mesh), out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch, np.float32(0.5), jax.random.key(0))
        new, metrics = traced.lower().compile()(state, batch, np.float32(0.5), jax.random.key(0))
    return jax.tree.map(np.asarray, new.params), float(metrics["loss"]), traced, new, params


@pytest.mark.parametrize(
    ("parts", "mesh", "microbatch"),
    [
        ("rotary, SwiGLU, head", (2, 2, 2), None),
        *(
            pytest.param(parts, (2, 2, 2), None, marks=pytest.mark.slow)
            for parts in list(PARTS)[1:]
        ),
        *(pytest.param(parts, (1, 2, 4), 4, marks=pytest.mark.slow) for parts in PARTS),
    ],
)
def test_every_mesh_takes_the_same_step(parts, mesh, microbatch):
    want, loss, _, _, start = step_of(parts, (1, 1, 1))
    got, sharded_loss, *_ = step_of(parts, mesh, microbatch=microbatch)
    assert sharded_loss == pytest.approx(loss, rel=1e-5)
    for (path, a), b, before in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), jax.tree.leaves(start), strict=True
    ):  # fmt: skip
        assert np.abs(b - before).max() > 1e-4, path  # it learns
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max(), jax.tree_util.keystr(path)


def test_where_the_new_parameters_lie():
    params = step_of("rotary, SwiGLU, head", (2, 2, 2), microbatch=None)[3].params
    assert params["layers"]["mlp_in"]["kernel"].shape == (2, 32, 2, 48)
    assert params["layers"]["mlp_in"]["kernel"].addressable_shards[0].data.shape == (2, 16, 2, 24)
    assert params["layers"]["mlp_in"]["bias"].addressable_shards[0].data.shape == (2, 2, 24)
    assert params["head"]["embedding"].addressable_shards[0].data.shape == (32, 16)
    learned = step_of("learned, squared ReLU", (2, 2, 2), microbatch=None)[3].params
    assert learned["positions"]["embedding"].addressable_shards[0].data.shape == (16, 16)


@pytest.mark.slow
def test_gradients_of_layers_in_bfloat16_leave_the_others_alone():
    """Kernels leave through slots, tables as they are."""
    name = "rotary, SwiGLU, head"
    want, loss, *_ = step_of(name, (1, 1, 1))
    got, other_loss, *_ = step_of(name, (1, 1, 1), gradient_dtype="bfloat16")
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max(), path


@pytest.mark.parametrize("parts", ["rotary, SwiGLU, head", "learned, squared ReLU"])
def test_parameters_and_flops_are_counted(parts):
    config = BloomConfig(**SHAPE, **{"dtype": "float32"} | PARTS[parts])
    params, _, traced, *_ = step_of(parts, (1, 1, 1))
    assert flops.num_params(**config.shape) == sum(a.size for a in jax.tree.leaves(params))
    found = jaxpr_flops.matmul_flops(traced.jaxpr)
    formula = flops.flops_per_step(
        **config.shape, sequence_length_tokens=LENGTH, batch_size_samples=ROWS
    )
    # XLA attention keeps the probabilities; a recomputed product would be a sixth of the whole.
    assert found.flops == pytest.approx(formula.full_attention, rel=1e-9)
    assert formula.six_n == 6.0 * ROWS * LENGTH * flops.num_params(**config.shape)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"positions": Rotary()}, "positions=Rotary(base=10000.0, fraction=1.0)"),
        ({"activation": SwiGlu()}, "activation=SwiGlu()"),
        ({"embedding_norm": False, "tied_head": False}, "embedding_norm=False, tied_head=False"),
    ],
)  # fmt: skip
def test_what_is_no_bloom_is_not_exported(change, named):
    config = BloomConfig(**SHAPE)
    assert hf.to_hf_config(config, 2048, "float32")["tie_word_embeddings"] is True
    with pytest.raises(BadInput) as caught:
        hf.to_hf_config(dataclasses.replace(config, **change), 2048, "float32")
    assert str(caught.value) == (
        "BloomForCausalLM has ALiBi, GELU, an embedding LayerNorm and a tied head; it cannot be a model with "
        + named
    )
