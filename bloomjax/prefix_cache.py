"""The keys and values of prompts, in pieces: what stands before the tokens that are scored or generated.

Dimension key: B prompts, P prompt slots, S cache slots, D emb_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bloomjax import partitioning
from bloomjax.model import Bloom

# Queries whose scores with all keys exist at a time: those of 2,048 queries at once are 0.27 GB a prompt of 16 heads.
PIECE_TOKENS = 256


def padded_length(num_tokens: int) -> int:
    """Slots for prompts of this many tokens: few different numbers, and whole pieces."""
    if num_tokens > PIECE_TOKENS:
        num_tokens = -(-num_tokens // PIECE_TOKENS) * PIECE_TOKENS
    return next_size(num_tokens)


def next_size(num: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half is added, and programs are few."""
    size = 1
    while size < num:
        size *= 2
    return size * 3 // 4 if size >= 4 and size * 3 // 4 >= num else size


def prefill(
    model: Bloom, params: Any, tokens_BP, k_valid_BS, sees_whole_prompt: bool = False
) -> tuple[jax.Array, Any]:
    """The last hidden states [B, 1, D] of prompts padded on the left, and their cache of S >= P slots.

    `k_valid_BS` is as in `decoding.next_logits`. P is at most PIECE_TOKENS or a multiple of it (`padded_length`). With
    `sees_whole_prompt` each token sees all of its prompt, which then is one piece: a layer needs all keys of it.
    """
    P = tokens_BP.shape[1]
    piece = P if sees_whole_prompt else min(P, PIECE_TOKENS)
    assert P % piece == 0, P
    last_key_BL = jnp.full(tokens_BP.shape, P - 1) if sees_whole_prompt else None

    def step(variables, tokens_BL, start):
        x_BLD, updated = model.apply(
            variables, tokens_BL, start=start, k_valid_BS=k_valid_BS, last_key_BL=last_key_BL,
            mutable=["cache"],
        )  # fmt: skip
        return x_BLD[:, -1:], jax.tree.map(_constrain, updated["cache"])

    if P == piece:
        return step({"params": params}, tokens_BP, 0)
    shapes = jax.eval_shape(lambda: step({"params": params}, tokens_BP[:, :piece], 0))

    def next_piece(carry, number):
        start = number * piece
        tokens_BL = jax.lax.dynamic_slice_in_dim(tokens_BP, start, piece, axis=1)
        return step({"params": params, "cache": carry[1]}, tokens_BL, start), None

    empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(next_piece, empty, jnp.arange(P // piece))[0]


def _constrain(x: jax.Array) -> jax.Array:
    """Keys and values [layers, B, S, H, K] lie where the layers make them."""
    if x.ndim != 5:
        return x
    names = ("batch", "length", "heads", "kv")
    return partitioning.constrain(x, PartitionSpec(None, *partitioning.activation_spec(names)))
