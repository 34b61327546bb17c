import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bloomjax import loss_chunks, targets
from bloomjax.losses import linear_cross_entropy

B, L, D, V = 8, 16, 32, 96
VALID = V - 5  # with num_tokens_in_vocab
H200 = targets.parse("cuda:h200:1x1x1")
needs_h200_compiler = pytest.mark.skipif(bool(H200.missing()), reason=H200.missing() or "")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def problem(dtype=jnp.float32, shape=(B, L, D, V)):
    b, length, dim, vocab = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(b, length, dim)), dtype)
    w = jnp.asarray(rng.normal(size=(vocab, dim)) * 0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (b, length)), jnp.int32)
    weights = rng.random((b, length)) * (rng.random((b, length)) > 0.3)
    return x, w, targets, jnp.asarray(weights, jnp.float32)


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


@pytest.fixture
def way(monkeypatch):
    """way(name): what this CPU does with a chunk; "blocks" is its own, "gpu" and "tpu" those of accelerators."""

    def choose(name):
        if name == "3 blocks":
            monkeypatch.setattr(loss_chunks, "_num_blocks", lambda V: 3)
        elif name != "blocks":
            parts = {
                "gpu": (5, loss_chunks._max_and_sum_in_one_read),
                "tpu": (10**6, loss_chunks._max_and_sum_in_two_reads),
            }[name]
            monkeypatch.setattr(
                loss_chunks, "_by_blocks",
                lambda head, with_grads, limit, *arrays: loss_chunks._by_parts(
                    head, with_grads, limit, *parts, *arrays
                ),
            )  # fmt: skip

    return choose


@pytest.mark.parametrize(
    ("name", "mesh", "chunk_tokens", "valid"),
    [
        ("blocks", None, 7, VALID),
        ("3 blocks", None, 32, VALID),
        ("gpu", None, 7, VALID),
        ("tpu", None, 32, VALID),
        ("3 blocks", (2, 2, 2), 7, VALID),
        ("3 blocks", (1, 1, 8), 32, 40),  # the last four shards hold nothing but padding
        ("gpu", (2, 1, 4), 7, VALID),
        ("tpu", (2, 2, 2), 4096, VALID),
        slow("3 blocks", None, None, None),
        slow("gpu", None, None, None),
        slow("3 blocks", (1, 1, 1), 32, VALID),
        slow("blocks", (1, 8, 1), None, VALID),
        slow("gpu", (1, 1, 8), 32, 40),
        slow("gpu", (1, 8, 1), None, None),
        slow("gpu", (2, 2, 2), 4096, VALID),
        slow("tpu", (1, 1, 8), 7, 40),
    ],
)
def test_equals_dense_float64(name, mesh, chunk_tokens, valid, mesh_of, way):
    way(name)
    z_loss = 1e-2
    x, w, targets, weights = problem()
    targets = jnp.minimum(targets, (valid or V) - 1)

    def loss(x, w):
        return linear_cross_entropy(
            x, w, targets, weights, z_loss=z_loss, chunk_tokens=chunk_tokens,
            num_tokens_in_vocab=valid,
        )  # fmt: skip

    @jax.jit
    def run(x, w):
        (total, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
        return total, nll, *grads, *loss(x, w)

    if mesh is None:
        got = run(x, w)
    else:
        with jax.set_mesh(mesh_of(*mesh)):
            got = run(x, w)
    total, nll, dx, dw = reference(x, w, targets, weights, z_loss, valid)
    for what, ours, theirs in zip(
        ("total", "nll", "dx", "dw", "eval total", "eval nll"), got, (total, nll, dx, dw, total, nll),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6, err_msg=what)


@pytest.mark.parametrize("name", ["3 blocks", "gpu", "tpu"])
def test_logits_far_apart(name, way):
    """Each block has a larger maximum than the one before, or a smaller one; probabilities leave float32's range."""
    way(name)
    x, w, targets, weights = problem()
    flat = x.at[..., 0].set(1.0)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(x, w):
        return linear_cross_entropy(x, w, targets, weights, chunk_tokens=64)[0]

    for slope in (3.0, -3.0):
        steep = w.at[:, 0].set(slope * jnp.arange(V))
        got = run(flat, steep)
        total, _, dx, dw = reference(flat, steep, targets, weights)
        for ours, theirs in zip((got[0], *got[1]), (total, dx, dw), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-4)


def test_a_target_among_the_padding_is_impossible():
    x, w, targets, weights = problem()
    targets = targets.at[0, 0].set(VALID)
    _, nll = linear_cross_entropy(x, w, targets, weights, num_tokens_in_vocab=VALID)
    assert nll[0, 0] == np.inf and np.isfinite(nll).sum() == np.sum(np.asarray(targets) < VALID)


# Of relative errors in norm, by logits of standard deviation 1, and 4 with an offset of 100 that all have in common.
# bfloat16 logits give 7e-3 for the first and 4e-2 for the second.
@pytest.mark.parametrize(
    ("name", "spread", "offset", "bound"),
    [
        ("blocks", 4, 100, 6e-3),
        ("gpu", 4, 100, 6e-3),
        slow("blocks", 1, 0, 3e-3),
        slow("gpu", 1, 0, 3e-3),
        slow("tpu", 1, 0, 3e-3),
        slow("tpu", 4, 100, 6e-3),
    ],
)
def test_bf16_gradients_are_close_to_float64(name, spread, offset, bound, way):
    way(name)
    dim, vocab = 64, 2048
    x, w, targets, weights = problem(jnp.bfloat16, (2, 64, dim, vocab))
    w = w * (2 * spread / dim**0.5)
    x, w = x.at[..., 0].set(10.0), w.at[:, 0].set(offset / 10)
    w = w.astype(jnp.bfloat16).astype(
        jnp.float32
    )  # as it is computed with; the error of that is not the loss's
    # The likeliest of some tokens: as far as a trained model is from chance.
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    likely = jnp.asarray(logits.argmax(-1), jnp.int32)
    targets = jnp.where(jnp.arange(64)[None, :] % 2 == 0, targets, likely)
    total, nll, dx, dw = reference(x, w, targets, weights)
    (got_total, got_nll), (got_dx, got_dw) = jax.jit(
        jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, targets, weights, chunk_tokens=32), (0, 1), has_aux=True
        )
    )(x, w)  # fmt: skip
    assert got_dx.dtype == jnp.bfloat16 and got_dw.dtype == jnp.float32
    np.testing.assert_allclose(got_nll, nll, atol=5e-5)
    np.testing.assert_allclose(got_total, total, rtol=1e-5)
    for ours, theirs in ((got_dx, dx), (got_dw, dw)):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < bound


@pytest.mark.parametrize(
    "shape", [(1, 31, 33, 97), slow((1, 3, 1, 512)), slow((1, 130, 48, 2 * 512))]
)
def test_odd_sizes_run_in_bf16(shape):
    """XLA:CPU compiles some bfloat16 matmuls that it cannot run; these it can."""
    x, w, targets, weights = problem(jnp.bfloat16, shape)
    total, _, dx, dw = reference(x, w.astype(jnp.bfloat16), targets, weights)
    got = jax.jit(
        jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, targets, weights, chunk_tokens=16)[0], (0, 1)
        )
    )(x, w)
    for ours, theirs in zip((got[0], *got[1]), (total, dx, dw), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=2e-2, atol=2e-2 * np.abs(theirs).max()
        )


@pytest.mark.parametrize("name", ["blocks", slow("gpu")])
def test_a_token_of_weight_zero_has_no_gradient(name, way):
    way(name)
    x, w, targets, weights = problem()
    dx = jax.grad(lambda x: linear_cross_entropy(x, w, targets, weights)[0])(x)
    assert np.all(np.asarray(dx)[np.asarray(weights) == 0] == 0)
    assert np.all(np.abs(np.asarray(dx)[np.asarray(weights) > 0]).max(-1) > 0)


# ---- how large a chunk is ----


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "emb_dim", "platform", "expected"),
    [
        (16_384, 250_880, 1024, "cuda", 4096),
        (16_384, 250_880, 2048, "cuda", 4096),
        (16_384, 250_880, 4096, "cuda", 2048),  # not 2560, of which 16,384 is no multiple
        (16_384, 250_880, 14_336, "cuda", 1024),  # the weights alone are 7 GB
        (16_384, 250_880 // 8, 14_336, "cuda", 4096),
        (10_240, 250_880, 1024, "cuda", 2560),
        (6_100, 250_880, 1024, "cuda", 3072),
        (300, 250_880, 1024, "cuda", 300),
        (16_384, 250_880, 1024, "tpu", 2048),
        (16_384, 250_880, 4096, "tpu", 1024),
        (16_384, 250_880, 1024, "cpu", 1024),
    ],
)
def test_chunk_by_tokens_and_memory(num_tokens, vocab_size, emb_dim, platform, expected):
    got = loss_chunks.chunk_tokens_for(num_tokens, vocab_size, emb_dim, platform=platform)
    assert got == expected
    if got > 1024:
        logits = 4 * got if platform == "tpu" else 2 * got + 4 * loss_chunks.PART_TOKENS
        assert vocab_size * (logits + 2 * emb_dim) <= loss_chunks.TEMPORARY_BYTES == 4e9


# ---- the programs ----


def abstract(num_tokens, dim, vocab, sharding=None):
    shapes = (((1, num_tokens, dim), jnp.bfloat16), ((vocab, dim), jnp.float32),
              ((1, num_tokens), jnp.int32), ((1, num_tokens), jnp.float32))  # fmt: skip
    return [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in shapes]


def value_and_grad(chunk_tokens=None):
    def loss(x, w, targets, weights):
        return linear_cross_entropy(x, w, targets, weights, chunk_tokens=chunk_tokens)[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_lowered_program(platform):
    """bfloat16 matmuls only, no scatter, and no array of [all tokens, V]."""
    num_tokens, dim, vocab = 1536, 64, 8192
    traced = value_and_grad(512).trace(*abstract(num_tokens, dim, vocab))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo\.dot_general.*: \((.*)\) -> (.*)", text)
    assert len(products) == 3
    for operands, result in products:
        types = re.findall(r"x([a-z]+\d+)>", operands)
        assert types == ["bf16", "bf16"] and "xf32>" in result
    assert "scatter" not in text
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    sizes = {math.prod(map(int, shape[:-1].split("x"))) for shape in shapes}
    assert 512 * vocab in sizes, "of one chunk there should be one"
    assert max(sizes) < num_tokens * vocab


def arrays(text):
    """(dtype, dimensions) of all arrays of a compiled program."""
    found = re.findall(r"\b(f32|bf16|f16|s32|u16|pred)\[([0-9,]+)\]", text)
    return {(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found}


def test_the_compiled_program_of_this_cpu():
    num_tokens, dim, vocab = 1024, 64, 4096
    text = value_and_grad(128).lower(*abstract(num_tokens, dim, vocab)).compile().as_text()
    sizes = {math.prod(shape): dtype for dtype, shape in arrays(text)}
    assert max(sizes) == 128 * vocab and sizes[128 * vocab] == "u16"  # exponentials of the chunk
    assert "scatter" not in re.sub(r"metadata=\{[^}]*\}", "", text)


@needs_h200_compiler
@pytest.mark.parametrize("dim", [1024, 2048, 4096])
def test_the_compiled_program_of_an_h200(dim):
    """16k tokens of 560m, 1b7 and 7b1: at most 4 GB beside the results; each pass over the logits is accounted for."""
    num_tokens, vocab = 16_384, 250_880
    sharding = jax.sharding.SingleDeviceSharding(H200.devices()[0])
    compiled = value_and_grad().lower(*abstract(num_tokens, dim, vocab, sharding)).compile()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes >= 4 * vocab * dim
    assert memory.temp_size_in_bytes <= 4e9
    text = re.sub(r"metadata=\{[^}]*\}", "", compiled.as_text())
    assert "scatter" not in text
    products = re.findall(r" = f32\[[0-9,]+\]\S* dot\(%(\S+), %(\S+)\)", text)
    assert len(products) == 3
    for operand in (name for pair in products for name in pair):
        assert re.search(rf"%{re.escape(operand)} = bf16\[", text), operand
    # Outside of fusions; a tuple, a bitcast or a parameter moves nothing.
    program = "\n".join(re.findall(r"^(?:ENTRY|%region)[^\n]*\{\n.*?^\}", text, re.M | re.S))
    wide = rf"\[(?:\d+,)*{vocab}\]"
    written = re.findall(rf"^ *(?:ROOT )?%(\S+) = (f32|bf16){wide}\S* (fusion|custom-call|copy|transpose)\(([^)]*)",
                         program, re.M)  # fmt: skip
    logits = [name for name, dtype, *_ in written if dtype == "f32"]
    dlogits = [(name, operands) for name, dtype, _, operands in written if dtype == "bf16"]
    assert len(logits) == 1 and len(dlogits) == 2  # of which one is the zeros they start from
    assert sum(f"%{logits[0]}" in operands for _, operands in dlogits) == 1
    # Read for maximum and sum together, for the targets' logits (T of them), and for dlogits.
    readers = re.findall(rf"= (\S.*) fusion\([^)]*%{re.escape(logits[0])}[,)]", program)
    assert len(readers) == 3 and sum(vocab_sized(reader, vocab) for reader in readers) == 1
    assert ("f32", (512, vocab)) in arrays(text)


def vocab_sized(shape, vocab):
    return f"{vocab}]" in shape


def test_evaluation_computes_no_gradients():
    x, w, targets, weights = problem()
    text = jax.jit(lambda x, w: linear_cross_entropy(x, w, targets, weights)).lower(x, w).as_text()
    assert text.count("dot_general") == 1
    grads = jax.jit(jax.grad(lambda x, w: linear_cross_entropy(x, w, targets, weights)[0], (0, 1)))
    assert grads.lower(x, w).as_text().count("dot_general") == 3
