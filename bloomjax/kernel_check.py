"""Does the attention kernel compute attention on this device? Asked before a run, on a small problem.

Kernels depend on chip, driver and compiler, and a wrong one shows as nothing but a loss that is a little too high.

Dimension key: B batch, L query length, H heads, K head_dim.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bloomjax.attention import alibi_slopes, prefix_last_key, xla_attention
from bloomjax.attention_kernels import attend
from bloomjax.errors import BadInput

_LENGTH, _MAX_HEADS = 300, 8  # no multiple of any block
# Of the largest element. bfloat16 rounds by 2^-9, and cuDNN's bias, rounded too, moves scores by as much again.
_REMEDY = "take another: --gin.BloomConfig.attention_kernel=\"'xla_blocked'\""
TOLERANCES = {"bfloat16": 2.0**-5, "float32": 2.0**-12}


def check_attention_kernel(
    name: str, num_heads: int, head_dim: int, dtype: str, device: Any, has_masks: bool
) -> float | None:
    """Compares context, dq, dk and dv of a kernel with those of float32 scores, on `device`.

    Args:
      name: of the kernel, see attention_kernels. With those of XLA there is nothing to check.
      num_heads, head_dim: the model's; the first 8 heads' slopes are used.
      dtype: of q, k and v, "bfloat16" or "float32".
      has_masks: also checks documents and a prefix, which not every kernel has.

    Returns:
      The largest difference as a share of the largest element; None if nothing was checked.

    Raises:
      BadInput: the kernel fails or is off by more than TOLERANCES, with what to take instead.
    """
    if name in ("xla", "xla_blocked"):
        return None
    if name == "auto" and device.platform == "cpu":
        return None
    if name == "flash_hopper":
        from bloomjax.flash_attention_hopper import require_hopper  # Pallas takes its time

        require_hopper(device)
    slopes_H = jnp.asarray(alibi_slopes(num_heads)[:_MAX_HEADS], jnp.float32)
    where = f"{device.device_kind} with jax {jax.__version__}"
    rng = np.random.default_rng(0)
    shape = (4, 1, _LENGTH, len(slopes_H), head_dim)
    with jax.set_mesh(Mesh(np.array([device]), ("device",))):
        *qkv, g_BLHK = jnp.asarray(rng.standard_normal(shape), dtype)
        worst = 0.0
        for masks in [{}] + [_masks()] * has_masks:
            attention = functools.partial(attend, name, slopes_H=slopes_H, **masks)
            try:
                found = _run(attention, qkv, g_BLHK)
            except BadInput:
                raise
            except Exception as error:
                line = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
                raise BadInput(
                    f"attention kernel {name!r} does not run on {where}: {line}; {_REMEDY}"
                ) from None
            with jax.default_matmul_precision("highest"):
                exact = functools.partial(xla_attention, slopes_H=slopes_H, **masks)
                qkvg = [a.astype(jnp.float32) for a in (*qkv, g_BLHK)]
                expected = _run(exact, qkvg[:3], qkvg[3])
            worst = max([worst, *map(_difference, found, expected)])
    if not worst <= TOLERANCES[dtype]:  # NaN is not
        raise BadInput(
            f"attention kernel {name!r} is wrong on {where}: off by {worst:.2g} of the largest element "
            f"({dtype} allows {TOLERANCES[dtype]:.2g}); {_REMEDY}"
        )
    return worst


def _masks() -> dict[str, Any]:
    """A prefix, and documents of 100 tokens."""
    documents_BL = (jnp.arange(_LENGTH, dtype=jnp.int32) // 100)[None]
    return {"documents_BL": documents_BL, "last_key_BL": prefix_last_key(jnp.array([70]), _LENGTH)}


def _run(kernel: Callable[..., Any], qkv: Sequence[Any], g_BLHK: Any) -> tuple[Any, ...]:
    def context_and_grads(q, k, v, g):
        context, pullback = jax.vjp(kernel, q, k, v)
        return context, *pullback(g)

    return jax.jit(context_and_grads)(*qkv, g_BLHK)


def _difference(found, expected) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    return float("inf") if np.isnan(difference) else float(difference)
