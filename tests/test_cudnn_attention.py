"""cuDNN's attention: what it is asked for, read from the program, since there is no GPU to run it; and its bias."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bloomjax import cudnn_attention
from bloomjax.attention import alibi_slopes
from bloomjax.errors import BadInput
from bloomjax.jaxpr_flops import matmul_flops


@pytest.fixture
def with_cudnn(monkeypatch):
    module = cudnn_attention._cudnn()
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91900)


def loss(q, k, v, slopes):
    return cudnn_attention.cudnn_attention(q, k, v, slopes).astype(jnp.float32).sum()


def shapes(B=2, L=256, H=4, K=64, dtype=jnp.bfloat16):
    qkv = jax.ShapeDtypeStruct((B, L, H, K), dtype)
    return qkv, qkv, qkv, jax.ShapeDtypeStruct((H,), jnp.float32)


def test_the_program_is_causal_with_a_bias_and_no_gradient_of_it(with_cudnn):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S*?)\(.*-> \((.*)\)", text)
    qkv, bias = "tensor<2x4x256x64xbf16>", "tensor<1x4x256x256xbf16>"
    assert [(name, out.split(", ")[:-1]) for name, out in calls] == [
        ("__cudnn$fmhaScaleBiasSoftmax", [qkv, "tensor<2x4x256xf32>"]),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", [qkv] * 3),
    ]
    assert text.count("CAUSAL") == 2 and bias in text
    assert "tensor<2x4x256x256x" not in text  # no scores
    # Two products forward, five backward, of half the scores.
    assert matmul_flops(traced.jaxpr) == (7 * 2 * 4 * 256 * 256 * 64, ())


def test_the_bias_is_alibi_and_exact_near_the_query():
    slopes = jnp.asarray(alibi_slopes(16), jnp.float32)
    bias = np.asarray(cudnn_attention.relative_bias(slopes, 512), np.float64)[0]
    distance = np.arange(512)[None] - np.arange(512)[:, None]
    exact = alibi_slopes(16)[:, None, None] * distance
    assert bias.shape == (16, 512, 512)
    assert np.all(np.abs(bias - exact) <= 2.0**-8 * np.abs(exact))
    for head in (7, 15):  # powers of two: 1/16 and 1/256
        np.testing.assert_allclose(bias[head, -1, -256:], exact[head, -1, -256:], rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(dtype=jnp.float32), "needs bfloat16, got float32; take 'flash_gpu'"),
        (dict(L=255), "takes even lengths up to 8192, got 255"),
        (dict(L=32768), r"got 32768 \(its bias would be 8.0 GiB\); take 'flash_gpu'"),
        (dict(K=68), "takes a head_dim of 8, 16, ... 256, got 68"),
    ],
)
def test_what_it_cannot_take(with_cudnn, change, line):
    with pytest.raises(BadInput, match=line):
        jax.eval_shape(loss, *shapes(**change))


def test_without_cudnn():
    with pytest.raises(BadInput, match="'cudnn': cuDNN is not detected.* take 'xla_blocked'"):
        jax.eval_shape(loss, *shapes())


def test_another_jax(monkeypatch):
    cudnn_attention._cudnn.cache_clear()
    monkeypatch.setattr(cudnn_attention, "_PARAMETERS", ("query",))
    with pytest.raises(
        BadInput, match="for jax 0.10.2 to 0.11.2 and cannot use jax .*: its jax._src"
    ):
        jax.eval_shape(loss, *shapes())
    cudnn_attention._cudnn.cache_clear()
