"""Keys and values kept for decoding, and attention of new queries over them.

Dimension key: B batch, L query length, S key length, H heads, K head_dim. Arrays end in their letters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bloomjax.attention import alibi_scores


def cached(
    module: nn.Module, k_BLHK: jax.Array, v_BLHK: jax.Array, start: Any, num_slots: int
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S, H, K] in the module's collection "cache", after those given took the slots `start`.."""
    arrays = []
    for name, new_BLHK in (("keys", k_BLHK), ("values", v_BLHK)):
        B, _, H, K = new_BLHK.shape
        kept = module.variable("cache", name, jnp.zeros, (B, num_slots, H, K), new_BLHK.dtype)
        kept.value = jax.lax.dynamic_update_slice(kept.value, new_BLHK, (0, start, 0, 0))
        arrays.append(kept.value)
    return arrays[0], arrays[1]


def cached_attention(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    slopes_H: jax.Array | None,
    *,
    start: jax.Array,
    k_valid_BS: jax.Array,
    last_key_BL: jax.Array | None = None,
    rounding: str = "exact",
) -> jax.Array:
    """Attention of L new queries at positions start.. over a key/value cache of S slots; not differentiated.

    `k_valid_BS` is False for slots that hold padding (or nothing yet); `last_key_BL` is the last slot each query sees,
    None for its own. Without slopes there is no bias. Returns [B, L, H, K].
    """
    if slopes_H is None:
        slopes_H = jnp.zeros(q_BLHK.shape[2])
    position_L = start + jnp.arange(q_BLHK.shape[1])
    scores_BHLS = alibi_scores(
        q_BLHK, k_BSHK, slopes_H, position_L, k_valid_BS, rounding, last_key_BL=last_key_BL
    )
    p_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("BHLS,BSHK->BLHK", p_BHLS, v_BSHK, preferred_element_type=jnp.float32).astype(
        q_BLHK.dtype
    )
