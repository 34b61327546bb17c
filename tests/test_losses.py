import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bloomjax.losses import linear_cross_entropy

B, L, D, V = 8, 16, 32, 96


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    w = jnp.asarray(rng.normal(size=(V, D)) * 0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.random((B, L)) * (rng.random((B, L)) > 0.3), jnp.float32)
    return x, w, targets, weights


def reference(x, w, targets, weights, z_loss=0.0, num_tokens_in_vocab=None):
    """Dense float64 loss and its gradients, by hand in numpy."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
    logits = x @ w.T
    if num_tokens_in_vocab is not None:
        logits[..., num_tokens_in_vocab:] = -np.inf
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    onehot = np.eye(w.shape[0])[np.asarray(targets)]
    nll = lse - np.sum(np.where(onehot > 0, logits, 0.0), -1)
    p = np.exp(logits - lse[..., None])
    d = weights[..., None] * (p * (1 + 2 * z_loss * lse[..., None]) - onehot)
    total = np.sum(weights * (nll + z_loss * lse**2))
    return total, nll, d @ w, np.einsum("blv,bld->vd", d, x)


@pytest.mark.parametrize("mesh", [None, (1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8), (2, 1, 4)])
@pytest.mark.parametrize("chunk_tokens", [7, 32, 4096])
def test_equals_dense_float64(mesh, chunk_tokens, mesh_of):
    args = problem()
    z_loss, valid = 1e-2, V - 5
    x, w, targets, weights = args
    targets = jnp.minimum(targets, valid - 1)

    def loss(x, w):
        return linear_cross_entropy(
            x, w, targets, weights, z_loss=z_loss, chunk_tokens=chunk_tokens,
            num_tokens_in_vocab=valid,
        )  # fmt: skip

    def run():
        (total, nll), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
        eval_total, eval_nll = jax.jit(loss)(x, w)
        return total, nll, *grads, eval_total, eval_nll

    if mesh is None:
        got = run()
    else:
        with jax.set_mesh(mesh_of(*mesh)):
            got = run()
    total, nll, dx, dw = reference(x, w, targets, weights, z_loss, valid)
    for name, ours, theirs in zip(
        ("total", "nll", "dx", "dw", "eval total", "eval nll"), got, (total, nll, dx, dw, total, nll),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6, err_msg=name)


def test_bf16_gradients_are_close_to_float64():
    x, w, targets, weights = problem(jnp.bfloat16)
    _, _, dx, dw = reference(x, w, targets, weights)
    got_dx, got_dw = jax.grad(
        lambda x, w: linear_cross_entropy(x, w, targets, weights, chunk_tokens=32)[0], (0, 1)
    )(x, w)
    assert got_dx.dtype == jnp.bfloat16 and got_dw.dtype == jnp.float32
    for ours, theirs in ((got_dx, dx), (got_dw, dw)):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < 8e-3


def test_a_token_of_weight_zero_has_no_gradient():
    x, w, targets, weights = problem()
    dx = jax.grad(lambda x: linear_cross_entropy(x, w, targets, weights)[0])(x)
    assert np.all(np.asarray(dx)[np.asarray(weights) == 0] == 0)
    assert np.all(np.abs(np.asarray(dx)[np.asarray(weights) > 0]).max(-1) > 0)


def _shapes(text, dtype):
    return set(re.findall(rf"\b{dtype}\[([0-9,]+)\]", text))


def test_no_array_of_tokens_by_vocabulary_in_the_compiled_program():
    tokens, vocab, dim = (2, 512), 4096, 64
    x = jnp.zeros((*tokens, dim), jnp.bfloat16)
    w = jnp.zeros((vocab, dim), jnp.float32)
    targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, jnp.float32)

    def loss(x, w):
        return linear_cross_entropy(x, w, targets, weights, chunk_tokens=128)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    found = [
        shape for dtype in ("f32", "bf16", "s32", "pred") for shape in _shapes(compiled, dtype)
    ]
    sizes = {tuple(map(int, shape.split(","))) for shape in found}
    assert any(np.prod(s) == 128 * vocab for s in sizes), "the chunk's logits should be there"
    assert max(np.prod(s) for s in sizes) < 2 * 512 * vocab
    assert "scatter" not in re.sub(r"metadata=\{[^}]*\}", "", compiled)


def test_evaluation_computes_no_gradients():
    x, w, targets, weights = problem()
    text = jax.jit(lambda x, w: linear_cross_entropy(x, w, targets, weights)).lower(x, w).as_text()
    assert text.count("dot_general") == 1
    grads = jax.jit(jax.grad(lambda x, w: linear_cross_entropy(x, w, targets, weights)[0], (0, 1)))
    assert grads.lower(x, w).as_text().count("dot_general") == 3
