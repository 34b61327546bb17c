"""Decoding with the cache against float64 BLOOM without one, and sampling against exact frequencies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom

from bloomjax.decoding import filter_logits, generate, next_logits, pad_left, sample_token
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig

SHAPE = {"vocab_size": 40, "emb_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64}
MODEL = Bloom(BloomConfig(**SHAPE, dtype="float32"))
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2], [11, 12, 13, 14], [30, 0, 30]]
NEVER = 40  # as </s>: no token of the vocabulary, so that no row stops
NEW = 9


@functools.cache
def params():
    params = reference_bloom.random_params(**SHAPE, seed=4)
    # As they are, the tied head repeats the last token and the biases one favourite: the text must decide.
    for name in ("embedding_norm", "final_norm"):
        params[name]["bias"] *= 0.1
    params["embedding_norm"]["scale"] *= 0.3
    for name in ("qkv", "out", "mlp_in", "mlp_out"):
        params["layers"][name]["bias"] *= 0.1
    params["layers"]["out"]["kernel"] *= 2
    params["layers"]["mlp_out"]["kernel"] *= 4
    return params


@functools.cache
def greedy(prompt):
    """Argmax token by token over the whole text, and how far the runner-up was behind."""
    wide, tokens, margin = reference_bloom.to_float64(params()), list(prompt), np.inf
    for _ in range(NEW):
        logits = reference_bloom.logits(wide, np.array([tokens]))[0, -1]
        runner_up, best = np.sort(logits)[-2:]
        margin = min(margin, best - runner_up)
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :], margin


def expected(prompts):
    continuations, margins = zip(*(greedy(tuple(prompt)) for prompt in prompts), strict=True)
    assert min(margins) > 1e-4  # float32 decides the same
    return list(continuations)


def test_cached_greedy_decoding_of_ragged_prompts():
    want = expected(PROMPTS)
    assert len({tuple(row) for row in want}) == 4 and min(len(set(row)) for row in want) > 1
    got = generate(MODEL, params(), PROMPTS, max_new_tokens=NEW, eos_id=NEVER)
    assert got == want


def test_a_row_stops_at_the_end_token_and_the_others_go_on():
    want = expected(PROMPTS)
    # A token that ends some row in the middle, and not all of them.
    eos = next(token for row in want for token in row[2:-2] if not all(token in r for r in want))
    want = [row[: row.index(eos)] if eos in row else row for row in want]
    assert len({len(row) for row in want}) > 1
    assert generate(MODEL, params(), PROMPTS, max_new_tokens=NEW, eos_id=eos) == want


def test_cached_logits_with_bf16_hf_are_those_of_training():
    """A row with padding, some tokens at once and then one by one, against all of it without padding and cache."""
    models = {
        rounding: Bloom(
            dataclasses.replace(MODEL.config, dtype="bfloat16", alibi_rounding=rounding)
        )
        for rounding in ("exact", "bf16_hf")
    }
    text = np.random.default_rng(3).integers(0, 40, 140)
    prompts, new = [[7] * 240, text[:-2].tolist()], text[-2:]
    tokens, valid = pad_left(prompts)
    valid = np.pad(valid, ((0, 0), (0, len(new))), constant_values=True)
    step = reference_bloom.jit(functools.partial(next_logits, models["bf16_hf"]))
    logits, cache = step({"params": params()}, tokens, 0, valid)
    got = [logits[1]]
    for i, token in enumerate(new):
        variables = {"params": params(), "cache": cache}
        logits, cache = step(variables, np.full((2, 1), token), tokens.shape[1] + i, valid)
        got.append(logits[1])

    @functools.partial(reference_bloom.jit, static_argnums=0)
    def train(model):
        x = model.apply({"params": params()}, jnp.asarray(text)[None])
        return model.apply({"params": params()}, x[:, -3:], method="logits")[0]

    want = {rounding: train(model) for rounding, model in models.items()}
    error = {name: np.linalg.norm(np.stack(got) - other) for name, other in want.items()}
    assert error["bf16_hf"] < error["exact"] / 5 and error["exact"] > 0.01 * np.linalg.norm(got)


def test_sampling_is_reproducible():
    sample = functools.partial(
        generate, MODEL, params(), max_new_tokens=NEW, eos_id=NEVER, temperature=50.0, top_k=30
    )  # fmt: skip
    one, same, other = (sample(PROMPTS, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert [len(row) for row in one] == [NEW] * 4
    assert {token for row in one for token in row} <= set(range(40))
    assert one != expected(PROMPTS)
    # So hot, the 30 likeliest tokens are nearly even: every step draws anew.
    assert min(len(set(row)) for row in one) >= 5
    # Rows with the same prompt draw for themselves.
    assert len({tuple(row) for row in sample([PROMPTS[1]] * 4)}) == 4


# Eight tokens with probabilities that no filter meets at a boundary.
PROBABILITIES = np.array([0.02, 0.31, 0.07, 0.23, 0.005, 0.15, 0.20, 0.015])
NUM_DRAWS = 40_000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 0, 1.0, range(8)),
        (0.5, 0, 1.0, range(8)),
        (2.5, 0, 1.0, range(8)),
        (1.0, 1, 1.0, [1]),
        (1.0, 3, 1.0, [1, 3, 6]),
        (1.0, 99, 1.0, range(8)),
        (1.0, 0, 0.5, [1, 3]),  # 0.31 + 0.23
        (1.0, 0, 0.55, [1, 3, 6]),
        (1.0, 0, 0.01, [1]),
        (1.0, 0, 0.97, [1, 3, 6, 5, 2, 0]),  # 0.96 without the sixth
        (1.0, 4, 0.8, [1, 3, 6]),  # of 0.89; all tokens together would need the fourth
        (2.0, 0, 0.5, [1, 3, 6]),  # the temperature comes first
    ],
)
def test_frequencies(temperature, top_k, top_p, kept):
    p = PROBABILITIES ** (1 / temperature)
    p = np.where(np.isin(np.arange(8), list(kept)), p, 0)
    p /= p.sum()
    # The same tokens in another order, and any constant added: nothing but the distribution counts.
    order = np.random.default_rng(0).permutation(8)
    logits = np.log(PROBABILITIES)[order] + 3.0
    draw = reference_bloom.jit(
        functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    )
    tokens = draw(jnp.broadcast_to(jnp.float32(logits), (NUM_DRAWS, 8)), jax.random.key(11))
    assert tokens.dtype == jnp.int32 and tokens.shape == (NUM_DRAWS,)
    counts = np.bincount(order[np.asarray(tokens)], minlength=8)
    assert np.all(counts[p == 0] == 0)
    noise = np.sqrt(NUM_DRAWS * p * (1 - p))
    assert np.all(np.abs(counts - NUM_DRAWS * p) <= 4.5 * noise)


def test_kept_tokens_are_the_smallest_set_that_reaches_top_p():
    """Random distributions, each row its own, against a sort in numpy."""
    p = np.random.default_rng(5).dirichlet(np.full(6, 0.7), size=200)
    top_p = 0.8
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    filtered = np.asarray(filter_logits(logits, temperature=1.0, top_k=0, top_p=top_p))
    sizes = set()
    for row, got, before in zip(p, filtered, np.asarray(logits), strict=True):
        order = np.argsort(-row)
        size = int(np.argmax(np.cumsum(row[order]) >= top_p)) + 1
        kept = np.isin(np.arange(6), order[:size])
        np.testing.assert_array_equal(got, np.where(kept, before, -np.inf))
        sizes.add(size)
    assert sizes >= {1, 2, 3, 4}


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 12)), jnp.float32)
    got = sample_token(logits, jax.random.key(0), temperature=0.0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(got, np.argmax(np.asarray(logits), -1))
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "a prompt is empty: give at least one token"),
        ([[1, 2], []], {}, "a prompt is empty: give at least one token"),
        ([[1]], {"max_new_tokens": 0}, "need max_new_tokens >= 1.*got 0, 0.0, 0, 1.0"),
        ([[1]], {"temperature": -0.1}, "temperature >= 0.*got 4, -0.1, 0, 1.0"),
        ([[1]], {"top_k": -1}, "top_k >= 0"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[1]], {"top_p": 1.5}, "0 < top_p <= 1; got 4, 0.0, 0, 1.5"),
    ],
)
def test_bad_input(prompts, options, message):
    with pytest.raises(BadInput, match=message):
        generate(MODEL, params(), prompts, **{"max_new_tokens": 4, "eos_id": 2} | options)


@pytest.mark.parametrize("num_new", [3])
def test_a_prompt_that_is_seen_whole(num_new):
    """Ragged prompts: tokens of each see all of it, those after it what is before, as in float64 without a cache."""
    wide, want = reference_bloom.to_float64(params()), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(num_new):
            position = np.arange(len(tokens))
            last_key = np.maximum(position, len(prompt) - 1)
            seen = position[None] <= last_key[:, None]
            logits = reference_bloom.logits(wide, np.array([tokens]), np, seen)[0, -1]
            runner_up, best = np.sort(logits)[-2:]
            assert best - runner_up > 1e-4
            tokens.append(int(np.argmax(logits)))
        want.append(tokens[len(prompt) :])
    got = generate(
        MODEL, params(), PROMPTS, max_new_tokens=num_new, eos_id=NEVER, sees_whole_prompt=True
    )
    assert got == want
    assert got != generate(MODEL, params(), PROMPTS, max_new_tokens=num_new, eos_id=NEVER)
