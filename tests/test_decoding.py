"""Decoding with the cache against float64 BLOOM without one, and sampling against exact frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom

from bloomjax.decoding import generate, sample_token
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
    """Random distributions, each row its own: support found by many draws against a sort in numpy."""
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.full(6, 0.7), size=8)
    top_p = 0.8
    draw = reference_bloom.jit(
        functools.partial(sample_token, temperature=1.0, top_k=0, top_p=top_p)
    )
    logits = jnp.log(jnp.asarray(np.repeat(p, 2000, axis=0), jnp.float32))
    tokens = np.asarray(draw(logits, jax.random.key(0))).reshape(8, 2000)
    for row, drawn in zip(p, tokens, strict=True):
        order = np.argsort(-row)
        size = int(np.argmax(np.cumsum(row[order]) >= top_p)) + 1
        likely = {int(token) for token in order[:size] if row[token] > 0.01}
        assert likely <= set(drawn.tolist()) <= set(order[:size].tolist())


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
