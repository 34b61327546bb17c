"""Attention of new queries over the keys and values of a cache, for decoding.

Dimension key: B batch, L query length, S key length, H heads, K head_dim. Arrays end in their letters.
"""

import jax
import jax.numpy as jnp

from bloomjax.attention import alibi_scores


def cached_attention(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    slopes_H: jax.Array,
    *,
    start: jax.Array,
    k_valid_BS: jax.Array,
    last_key_BL: jax.Array | None = None,
    rounding: str = "exact",
) -> jax.Array:
    """Attention of L new queries at positions start.. over a key/value cache of S slots; not differentiated.

    `k_valid_BS` is False for slots that hold padding (or nothing yet); `last_key_BL` is the last slot each query sees,
    None for its own. Returns [B, L, H, K].
    """
    position_L = start + jnp.arange(q_BLHK.shape[1])
    scores_BHLS = alibi_scores(
        q_BLHK, k_BSHK, slopes_H, position_L, k_valid_BS, rounding, last_key_BL=last_key_BL
    )
    p_BHLS = jax.nn.softmax(scores_BHLS, axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("BHLS,BSHK->BLHK", p_BHLS, v_BSHK, preferred_element_type=jnp.float32).astype(
        q_BLHK.dtype
    )
