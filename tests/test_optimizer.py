"""AdamW against float64 numpy, and who decays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw, decay_mask

LEARNING_RATES = (0.0, 1e-3, 3e-2, 1e-2, 1e-2, 1e-3)


def some_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "embedding": normal(12, 4),
        "norm": {"scale": normal(4), "bias": normal(4)},
        "layers": {"out": {"kernel": normal(2, 3, 4), "bias": normal(2, 4)}},
    }


def some_gradients():
    """For six steps, with norms far above, just above and far below 1; one of them all zeros."""
    rng = np.random.default_rng(1)
    for size in (10.0, 0.3, 0.01, 0.0, 1e-5, 2.0):
        yield jax.tree.map(
            lambda p, size=size: (size * rng.standard_normal(p.shape)).astype(np.float32),
            some_params(),
        )


def reference(options):
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) after clipping; parameters after each step."""
    flat = {path: np.asarray(p, np.float64) for path, p in jax.tree.leaves_with_path(some_params())}
    m = {path: np.zeros(p.shape) for path, p in flat.items()}
    v = {path: np.zeros(p.shape) for path, p in flat.items()}
    b1, b2 = options["b1"], options["b2"]
    for step, (gradients, rate) in enumerate(zip(some_gradients(), LEARNING_RATES, strict=True), 1):
        gradients = dict(jax.tree.leaves_with_path(gradients))
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values()))
        for path, p in flat.items():
            g = gradients[path] * min(1.0, options["clip_norm"] / max(norm, 1e-300))
            m[path] = b1 * m[path] + (1 - b1) * g
            v[path] = b2 * v[path] + (1 - b2) * g**2
            update = (m[path] / (1 - b1**step)) / (np.sqrt(v[path] / (1 - b2**step)) + options["epsilon"])  # fmt: skip
            if path[-1].key in ("embedding", "kernel"):
                update = update + options["weight_decay"] * p
            flat[path] = p - rate * update
        yield dict(flat)


def run(**options):
    optimizer = adamw(**options)
    params = some_params()
    state = optimizer.init(params)
    update = jit(optimizer.update)
    for gradients, rate in zip(some_gradients(), LEARNING_RATES, strict=True):
        updates, state = update(gradients, state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - np.float32(rate) * u, params, updates)
        yield params, state


BLOOM = {"b1": 0.9, "b2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        BLOOM,
        {"b1": 0.8, "b2": 0.99, "epsilon": 1e-3, "weight_decay": 0.5, "clip_norm": 0.25},
        BLOOM | {"weight_decay": 0.0},
    ],
)
def test_equals_float64_adamw(options):
    for number, ((params, _), want) in enumerate(zip(run(**options), reference(options), strict=True)):  # fmt: skip
        for path, p in jax.tree.leaves_with_path(params):
            assert p.dtype == np.float32
            np.testing.assert_allclose(p, want[path], rtol=1e-6, atol=1e-6, err_msg=f"{number} {path}")  # fmt: skip


def test_defaults_are_those_of_bloom():
    """--adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 1e-1 --clip-grad 1.0 (tr11-176B-ml.slurm)."""
    for (ours, _), (theirs, _) in zip(run(), run(**BLOOM), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_first_moment_in_bf16():
    (*_, (params, state)), (*_, want) = run(first_moment_dtype="bfloat16"), reference(BLOOM)
    mu, nu = state[1].mu, state[1].nu
    assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(nu)} == {jnp.dtype("float32")}
    moved = 0.0
    for path, p in jax.tree.leaves_with_path(params):
        # A step moves by about the learning rate, and each of the moments is off by 2^-8 at most.
        assert np.abs(p - want[path]).max() < 3 * 2**-8 * sum(LEARNING_RATES)
        moved = max(moved, np.abs(p - want[path]).max())
    assert moved > 1e-6


def test_exactly_kernels_and_the_embedding_decay():
    """In Megatron the groups went by class, and once a LayerNorm decayed (BigScience, tr11 chronicles)."""
    model = Bloom(BloomConfig(vocab_size=16, num_layers=2, emb_dim=8, num_heads=2))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))["params"]
    params = nn.unbox(params)
    mask = {jax.tree_util.keystr(path): decays
            for path, decays in jax.tree.leaves_with_path(decay_mask(params))}  # fmt: skip
    assert len(mask) == len(jax.tree.leaves(params)) == 17
    assert {name for name, decays in mask.items() if decays} == {
        "['embedding']",
        "['layers']['qkv']['kernel']",
        "['layers']['out']['kernel']",
        "['layers']['mlp_in']['kernel']",
        "['layers']['mlp_out']['kernel']",
    }
    # What decays is what shrinks when there is no gradient.
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), params)
    optimizer = adamw(weight_decay=0.25)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jit(optimizer.update)(zeros, optimizer.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        assert np.all(np.asarray(update) == 0.25 * mask[jax.tree_util.keystr(path)])


def test_bad_dtype_of_the_moment():
    with pytest.raises(BadInput, match="first_moment_dtype must be 'float32' or 'bfloat16'"):
        adamw(first_moment_dtype="bf16")
