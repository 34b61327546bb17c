"""Generation with a key/value cache: prefill, then one token at a time inside one compiled loop.

Prompts of different lengths are padded on the left. ALiBi sees only distances, so padding moves nothing; padded slots
are masked. Dimension key: B prompts, P prompt slots, S cache slots, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bloomjax.errors import BadInput
from bloomjax.model import Bloom


def filter_logits(
    logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """Logits [B, V] of the distribution that a token is drawn from: -inf for what cannot be drawn.

    Divided by the temperature (> 0) first. Then top_k > 0 keeps the k likeliest; then top_p < 1 keeps the smallest set
    of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020, arXiv 1904.09751), always at least one.
    Tokens as likely as the last one kept are kept, too. The order is that of transformers.
    """
    logits_BV = logits_BV / temperature
    if top_k > 0:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # probability of the likelier ones
        last_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
    return logits_BV


def sample_token(
    logits_BV: jax.Array, key: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """The next token of each row, int32 [B]: drawn from `filter_logits`, or the likeliest at temperature 0."""
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def pad_left(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens [B, P], the shorter prompts with zeros on the left, and where they are tokens, bool [B, P]."""
    longest = max(map(len, prompts))
    tokens_BP = np.zeros((len(prompts), longest), np.int32)
    valid_BP = np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, longest - len(prompt) :] = prompt
        valid_BP[row, longest - len(prompt) :] = True
    return tokens_BP, valid_BP


def next_logits(
    model: Bloom, variables, tokens_BL, start, k_valid_BS, last_key_BL=None
) -> tuple[jax.Array, Any]:
    """float32 logits [B, V] after the last of `tokens_BL`, and the cache with them in slots `start`.. of S.

    `variables` holds "params" and, from the second call on, the "cache" of the call before. `k_valid_BS` is False for
    slots of padding; those that are not written yet may be True. `last_key_BL` is the last slot that each token sees;
    None for its own.
    """
    x_BLD, updated = model.apply(
        variables, tokens_BL, start=start, k_valid_BS=k_valid_BS, last_key_BL=last_key_BL,
        mutable=["cache"],
    )  # fmt: skip
    logits_B1V: Any = model.apply(variables, x_BLD[:, -1:], method="logits")
    return logits_B1V[:, 0], updated["cache"]


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "eos_id",
        "temperature",
        "top_k",
        "top_p",
        "sees_whole_prompt",
    ),
)
def _generate(
    model, params, tokens_BP, valid_BP, key, *, max_new_tokens, eos_id, temperature, top_k, top_p,
    sees_whole_prompt,
):  # fmt: skip
    """Tokens [B, max_new_tokens]; after </s> a row repeats it."""
    B, P = tokens_BP.shape
    k_valid_BS = jnp.pad(valid_BP, ((0, 0), (0, max_new_tokens)), constant_values=True)
    sample = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    last_key_BP = jnp.full((B, P), P - 1) if sees_whole_prompt else None
    variables = {"params": params}
    logits_BV, cache = next_logits(model, variables, tokens_BP, 0, k_valid_BS, last_key_BP)
    out_BN = jnp.full((B, max_new_tokens), eos_id, jnp.int32)

    def more(carry):
        number, _, _, _, done_B = carry
        return (number < max_new_tokens) & ~jnp.all(done_B)

    def step(carry):
        number, logits_BV, cache, out_BN, done_B = carry
        token_B = sample(logits_BV, jax.random.fold_in(key, number))
        token_B = jnp.where(done_B, eos_id, token_B)
        out_BN = jax.lax.dynamic_update_slice(out_BN, token_B[:, None], (0, number))
        variables = {"params": params, "cache": cache}
        logits_BV, cache = next_logits(model, variables, token_B[:, None], P + number, k_valid_BS)
        return number + 1, logits_BV, cache, out_BN, done_B | (token_B == eos_id)

    carry = (jnp.zeros((), jnp.int32), logits_BV, cache, out_BN, jnp.zeros((B,), bool))
    return jax.lax.while_loop(more, step, carry)[3]


def generate(
    model: Bloom,
    params,
    prompts: list[list[int]],
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

    With `sees_whole_prompt` tokens of a prompt see those after them, too: of objectives with a prefix.

    Raises BadInput for an empty prompt, an id that is no row of the embedding, sampling options outside their range, or
    if there are no positions for the shortest prompt and all of its continuation; of a longer one, what is beyond them
    is of no use.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise BadInput("a prompt is empty: give at least one token")
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise BadInput(
            f"need max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got "
            f"{max_new_tokens}, {temperature}, {top_k}, {top_p}"
        )
    vocab_size = model.config.vocab_size
    if not all(0 <= token < vocab_size for prompt in prompts for token in prompt):
        raise BadInput(f"a prompt has token ids outside [0, {vocab_size})")
    model.config.positions.check_length(min(map(len, prompts)) + max_new_tokens)
    tokens_BP, valid_BP = pad_left(prompts)
    out_BN = _generate(
        model, params, tokens_BP, valid_BP, jax.random.key(seed), max_new_tokens=max_new_tokens,
        eos_id=eos_id, temperature=float(temperature), top_k=int(top_k), top_p=float(top_p),
        sees_whole_prompt=sees_whole_prompt,
    )  # fmt: skip
    rows = np.asarray(out_BN).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
