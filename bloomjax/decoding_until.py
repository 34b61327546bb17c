"""Generation that ends at strings: a prefill, then blocks of tokens on the cache until the text of each row is done.

Dimension key: B prompts, P prompt slots, S cache slots, N new tokens, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.decoding import next_logits, sample_token
from bloomjax.model import Bloom
from bloomjax.prefix_cache import next_size, padded_length, prefill

_BLOCK_TOKENS = 16  # between two looks at the text


def generate_until(
    model: Bloom,
    params: Any,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    is_done: Callable[[list[int]], bool],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sees_whole_prompt: bool = False,
) -> list[list[int]]:
    """Continues each prompt (token ids, at least one) by up to `max_new_tokens`; a row ends before its </s>.

    It stops when `is_done` says so of the new tokens of every row; a row may be longer than where that began.
    Temperature 0 takes the likeliest token. `sees_whole_prompt` is as in `decoding.generate`.
    """
    num_blocks = math.ceil(max_new_tokens / _BLOCK_TOKENS)
    num_rows = next_size(len(prompts))
    shards = partitioning.num_batch_shards(mesh)
    num_rows = math.ceil(num_rows / shards) * shards
    P = padded_length(max(map(len, prompts)))
    tokens_BP, valid_BP = np.zeros((num_rows, P), np.int32), np.zeros((num_rows, P), bool)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, P - len(prompt) :] = prompt
        valid_BP[row, P - len(prompt) :] = True
    k_valid_BS = np.pad(valid_BP, ((0, 0), (0, num_blocks * _BLOCK_TOKENS)), constant_values=True)
    out: list[list[int]] = [[] for _ in prompts]
    done = np.arange(num_rows) >= len(prompts)
    # Not under jax.set_mesh: one token cannot be split over `tensor`. The parameters say where things are computed.
    rows = NamedSharding(mesh, PartitionSpec(partitioning.BATCH_AXES))
    k_valid_BS = jax.device_put(k_valid_BS, rows)
    tokens_BP = jax.device_put(tokens_BP, rows)
    logits_BV, cache = _start(model, params, tokens_BP, k_valid_BS, sees_whole_prompt)
    for number in range(num_blocks):
        key = jax.random.fold_in(jax.random.key(seed), number)
        start = jnp.int32(P + number * _BLOCK_TOKENS)
        tokens_BN, logits_BV, cache = _block(
            model, params, cache, logits_BV, k_valid_BS, start, key, jax.device_put(done, rows),
            eos_id=eos_id, temperature=float(temperature), top_k=top_k, top_p=top_p,
        )  # fmt: skip
        for row, new in enumerate(np.asarray(tokens_BN).tolist()[: len(prompts)]):
            if not done[row]:
                out[row] += new[: new.index(eos_id)] if eos_id in new else new
                done[row] = eos_id in new or is_done(out[row])
        if done.all():
            break
    return [row[:max_new_tokens] for row in out]


@functools.partial(jax.jit, static_argnames=("model", "sees_whole_prompt"))
def _start(model, params, tokens_BP, k_valid_BS, sees_whole_prompt):
    """float32 logits [B, V] after the prompts, and their cache."""
    x_B1D, cache = prefill(model, params, tokens_BP, k_valid_BS, sees_whole_prompt)
    return model.apply({"params": params}, x_B1D, method="logits")[:, 0], cache


@functools.partial(
    jax.jit,
    static_argnames=("model", "eos_id", "temperature", "top_k", "top_p"),
    donate_argnames=("cache",),
)
def _block(
    model, params, cache, logits_BV, k_valid_BS, start, key, done_B, *,
    eos_id, temperature, top_k, top_p,
):  # fmt: skip
    """The next tokens [B, N], </s> in rows that are done, and logits and cache after them."""
    sample = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)

    def step(carry, number):
        logits_BV, cache, done_B = carry
        token_B = sample(logits_BV, jax.random.fold_in(key, number))
        token_B = jnp.where(done_B, eos_id, token_B)
        variables = {"params": params, "cache": cache}
        logits_BV, cache = next_logits(
            model, variables, token_B[:, None], start + number, k_valid_BS
        )
        return (logits_BV, cache, done_B | (token_B == eos_id)), token_B

    (logits_BV, cache, _), token_NB = jax.lax.scan(
        step, (logits_BV, cache, done_B), jnp.arange(_BLOCK_TOKENS)
    )
    return token_NB.T, logits_BV, cache
