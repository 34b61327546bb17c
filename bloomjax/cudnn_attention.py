"""cuDNN's flash attention on NVIDIA GPUs, with ALiBi as a bias of [1, H, S, S] bfloat16 numbers.

JAX's public function for it always makes the gradient of a bias, for which cuDNN writes all [B, H, S, S] scores. The
slopes need none, so this calls what is below that function, which JAX may change: hence the check of its parameters.

Dimension key: B batch, L queries, S keys, H heads, K head_dim. Arrays end in their letters.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax.errors import BadInput

MAX_LENGTH = 8192  # where the bias of 16 heads takes 2 GiB
_SEED, _DROPOUT_RATE, _WITH_BIAS_NO_DBIAS, _WINDOW = 42, 0.0, (True, False), None
_PARAMETERS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k",
    "page_table_v", "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length",
    "cudnn_version", "return_residual",
)  # fmt: skip


@functools.cache
def _cudnn() -> Any:
    """JAX's module, if it is as this file expects."""
    name = "jax._src.cudnn.fused_attention_stablehlo"
    problem = f"its {name} is another one"
    try:
        module = __import__(name, fromlist=["_dot_product_attention"])
        found = tuple(inspect.signature(module._dot_product_attention.fun).parameters)
        if found == _PARAMETERS and hasattr(module, "_dot_product_attention_bwd_rule"):
            return module
    except (ImportError, AttributeError) as error:
        problem = str(error)
    raise BadInput(
        f"attention kernel 'cudnn' was written for jax 0.10.2 to 0.11.2 and cannot use jax {jax.__version__}: "
        f"{problem}; take 'flash_gpu'"
    )


def _cudnn_version() -> int:
    try:
        return _cudnn().check_cudnn_version()
    except RuntimeError as error:
        raise BadInput(
            f"attention kernel 'cudnn': {error} (with a GPU: pip install 'jax[cuda12]'); without one take 'xla_blocked'"
        ) from None


def relative_bias(slopes_H: jax.Array, length: int) -> jax.Array:
    """slope * (key - query position), bfloat16 [1, H, L, S]. Relative, for near keys, which count, have small numbers
    then: rounded by 2^-9 of themselves."""
    position_L = jnp.arange(length, dtype=jnp.float32)
    distance_LS = position_L[None, :] - position_L[:, None]
    return (slopes_H[:, None, None] * distance_LS[None]).astype(jnp.bfloat16)[None]


@jax.custom_vjp
def cudnn_attention(
    q_BLHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, slopes_H: jax.Array
) -> jax.Array:
    """Causal attention with ALiBi rounded to bfloat16 (`relative_bias`); bfloat16, an even L = S up to MAX_LENGTH.

    BadInput for what it cannot take; a head_dim above 256 (128 before Hopper) or not a multiple of 8 is refused when
    the program is compiled.
    """
    return _forward(q_BLHK, k_BSHK, v_BSHK, slopes_H)[0]


def _arguments(q_BLHK, slopes_H):
    _, L, _, K = q_BLHK.shape
    if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
        raise BadInput(
            f"attention kernel 'cudnn' needs bfloat16, got {q_BLHK.dtype}; take 'flash_gpu'"
        )
    if L % 2 or L > MAX_LENGTH:
        raise BadInput(
            f"attention kernel 'cudnn' takes even lengths up to {MAX_LENGTH}, got {L} (its bias would be "
            f"{len(slopes_H) * L * L * 2 / 2**30:.1f} GiB); take 'flash_gpu'"
        )
    if K % 8 or K > 256:
        raise BadInput(f"attention kernel 'cudnn' takes a head_dim of 8, 16, ... 256, got {K}")
    cudnn, unused = _cudnn(), jnp.zeros(0, q_BLHK.dtype)
    arrays = relative_bias(slopes_H, L).astype(q_BLHK.dtype), *(unused,) * 6
    causal, layout = cudnn.MaskType.CAUSAL, cudnn.AttentionLayout.BTNH.value
    static = K**-0.5, _SEED, _DROPOUT_RATE, _WITH_BIAS_NO_DBIAS, causal, layout, _WINDOW
    return cudnn, arrays, static


def _forward(q_BLHK, k_BSHK, v_BSHK, slopes_H):
    cudnn, arrays, static = _arguments(q_BLHK, slopes_H)
    _, residuals = cudnn._dot_product_attention_fwd_rule(
        q_BLHK, k_BSHK, v_BSHK, *arrays, *static, _cudnn_version(), False
    )
    *_, lse_BHL, context_BLHK = residuals
    # Named, so that a policy which keeps them spares the kernel in the backward pass.
    context_BLHK = checkpoint_name(context_BLHK, "context")
    lse_BHL = checkpoint_name(lse_BHL, "context")
    return context_BLHK, (q_BLHK, k_BSHK, v_BSHK, slopes_H, lse_BHL, context_BLHK)


def _backward(residuals, g_BLHK):
    q_BLHK, k_BSHK, v_BSHK, slopes_H, lse_BHL, context_BLHK = residuals
    cudnn, arrays, static = _arguments(q_BLHK, slopes_H)
    kept = q_BLHK, k_BSHK, v_BSHK, *arrays, lse_BHL, context_BLHK
    grads = cudnn._dot_product_attention_bwd_rule(*static, _cudnn_version(), False, kept, g_BLHK)
    return *grads[:3], jnp.zeros_like(slopes_H)


cudnn_attention.defvjp(_forward, _backward)
