"""The same BLOOM in transformers and here: logits, greedy and sampled text, and its bfloat16 rounding of ALiBi."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom

from bloomjax import decoding
from bloomjax.attention import (
    ALIBI_ROUNDINGS,
    alibi_scores,
    alibi_slopes,
    xla_attention,
)
from bloomjax.cached_attention import cached_attention
from bloomjax.hf_verify import relative_difference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hf_reference  # noqa: E402
from hf_reference import attention as their_attention  # noqa: E402
from hf_reference import logits as their_logits  # noqa: E402
from hf_reference import root_mean_square  # noqa: E402
from transformers.models.bloom import modeling_bloom  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers
# Its threads wait by spinning, which costs more than it brings where others work, too.
torch.set_num_threads(1)

VOCAB_SIZE = 512
NEVER = VOCAB_SIZE  # as </s>: no token of the vocabulary
PAD = 3  # transformers fills ended rows with it
NEW = 64


@functools.cache
def bloom(num_heads, head_dim, num_layers, dtype="float32"):
    """A BloomForCausalLM; in bfloat16 the float32 one of the same shape, rounded."""
    theirs = hf_reference.random_bloom(
        num_heads=num_heads, head_dim=head_dim, num_layers=num_layers, vocab_size=VOCAB_SIZE
    )
    return theirs.to(getattr(torch, dtype))


@functools.cache
def ours_of(theirs, **options):
    return hf_reference.ours(theirs, **options)


def some_tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape, np.int32)


@functools.partial(reference_bloom.jit, static_argnums=0)
def plain_logits(model, params, tokens):
    """Of the forward pass of training."""
    x = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, x, method="logits")


@functools.partial(reference_bloom.jit, static_argnums=0)
def cached_logits(model, params, tokens, valid):
    """Of the prefill of a generation, at every position."""
    x, _ = model.apply(
        {"params": params}, tokens, start=0, k_valid_BS=valid, mutable=["cache"]
    )  # fmt: skip
    return model.apply({"params": params}, x, method="logits")


# ---- logits ----

# Heads, head_dim, layers: powers of two and others.
SHAPES = [(6, 64, 5), (12, 64, 2), (4, 128, 3), (16, 64, 1), (12, 128, 1)]


def assert_logits_equal(shape):
    theirs = bloom(*shape)
    model, params = ours_of(theirs, dtype="float32")
    lengths = np.array([70, 45, 2, 1])
    tokens = some_tokens(4, 70)
    right = np.arange(70)[None] < lengths[:, None]  # True where a token is
    left = right[:, ::-1]
    for got, valid in (
        (plain_logits(model, params, tokens), right),
        (cached_logits(model, params, tokens, left), left),
    ):
        want = their_logits(theirs, tokens, valid)
        difference, num_other = relative_difference(np.asarray(got)[valid], want[valid])
        assert difference <= 1e-5 and num_other == 0
        # Not that of one token over and over, nor sure of everything.
        assert len(set(want[valid].argmax(-1))) > 20 and 1 < want.std() < 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_transformers(shape):
    assert_logits_equal(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 128, 5), (16, 128, 4), (14, 64, 24)], ids=str)
def test_logits_of_larger_models_are_those_of_transformers(shape):
    assert_logits_equal(shape)


def test_what_relative_difference_sees():
    theirs = np.random.default_rng(0).standard_normal((8, 7)).astype(np.float32)
    assert relative_difference(theirs, theirs) == (0.0, 0)
    ours = theirs.copy()
    ours[4, theirs[4].argmin()] += 20
    largest = pytest.approx(20 / np.abs(theirs).max(), rel=1e-6)
    assert relative_difference(ours, theirs) == (largest, 1)
    ours[0, 0] = np.nan
    assert np.isnan(relative_difference(ours, theirs)[0])


# ---- text ----

PROMPTS = [some_tokens(length, seed=20 + length).tolist() for length in (1, 17, 4, 9)]


def their_text(theirs, prompts, eos_id=NEVER, **options):
    """What generate() returns, and the new tokens [B, NEW]."""
    tokens, valid = decoding.pad_left(prompts)
    found = theirs.generate(
        torch.tensor(np.where(valid, tokens, PAD).astype(np.int64)),
        attention_mask=torch.tensor(valid.astype(np.int64)), max_new_tokens=NEW, eos_token_id=eos_id,
        pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, output_logits=True, **options,
    )  # fmt: skip
    return found, found.sequences[:, tokens.shape[1] :].numpy()


GREEDY_SHAPES = [(6, 64, 3), (16, 64, 1)]


@functools.cache
def their_greedy_text(shape):
    found, tokens = their_text(bloom(*shape), PROMPTS, do_sample=False)
    runner_up, best = torch.stack(found.logits, 1).topk(2).values.unbind(-1)[::-1]
    assert (best - runner_up).min() > 3e-4  # float32 decides the same, here and there
    assert min(len(set(row)) for row in tokens.tolist()) > 10  # no row repeats itself
    return tokens.tolist()


@pytest.mark.parametrize("shape", GREEDY_SHAPES, ids=str)
def test_greedy_text_is_that_of_transformers(shape):
    model, params = ours_of(bloom(*shape), dtype="float32")
    got = decoding.generate(model, params, PROMPTS, max_new_tokens=NEW, eos_id=NEVER)
    assert got == their_greedy_text(shape)


def test_rows_that_end_early_are_those_of_transformers():
    shape = GREEDY_SHAPES[0]
    whole = their_greedy_text(shape)
    # A token that ends some rows, in the middle, and not all of them.
    ends = {
        token: [row.index(token) if token in row else NEW for row in whole]
        for token in sum(whole, [])
    }
    eos = max(ends, key=lambda token: (NEW in ends[token], len(set(ends[token])), min(ends[token])))
    assert len(set(ends[eos])) > 2 and NEW in ends[eos] and min(ends[eos]) > 2
    want = [row[:length] for row, length in zip(whole, ends[eos], strict=True)]
    theirs = their_text(bloom(*shape), PROMPTS, eos_id=eos, do_sample=False)[1].tolist()
    assert [row[:length] for row, length in zip(theirs, ends[eos], strict=True)] == want
    model, params = ours_of(bloom(*shape), dtype="float32")
    assert decoding.generate(model, params, PROMPTS, max_new_tokens=NEW, eos_id=eos) == want


@functools.partial(
    jax.jit, static_argnums=0
)  # four times faster than reference_bloom.jit, 64 steps
def our_logits(model, params, prompts, valid, tokens):
    """Logits [N, B, V] of each of `tokens` [B, N], which are forced, as `generate` computes them."""
    k_valid = jnp.pad(valid, ((0, 0), (0, tokens.shape[1])), constant_values=True)

    def step(carry, token):
        logits, cache, start = carry
        variables = {"params": params, "cache": cache}
        after, cache = decoding.next_logits(model, variables, token[:, None], start, k_valid)
        return (after, cache, start + 1), logits

    first, cache = decoding.next_logits(model, {"params": params}, prompts, 0, k_valid)
    return jax.lax.scan(step, (first, cache, prompts.shape[1]), tokens.T)[1]


def our_probabilities(logits, **filters):
    filtered = reference_bloom.jit(functools.partial(decoding.filter_logits, **filters))(logits)
    return np.asarray(jax.nn.softmax(filtered, axis=-1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (0.7, 20, 0.8), (1.6, 300, 0.95)],
)
def test_sampled_text_has_the_probabilities_of_transformers(temperature, top_k, top_p):
    theirs = bloom(6, 64, 3)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(0)
    found, tokens = their_text(theirs, PROMPTS, do_sample=True, **filters)
    want = torch.stack(found.scores).softmax(-1).numpy()
    model, params = ours_of(theirs, dtype="float32")
    logits = our_logits(model, params, *decoding.pad_left(PROMPTS), tokens)
    np.testing.assert_allclose(logits, torch.stack(found.logits), rtol=0, atol=1e-4)
    got = our_probabilities(logits.reshape(-1, VOCAB_SIZE), **filters).reshape(want.shape)
    assert got.shape == (NEW, len(PROMPTS), VOCAB_SIZE)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    num_kept = (want > 0).sum(-1)
    assert np.median(want.max(-1)) < 0.9  # something was left to decide
    assert (num_kept.max() < VOCAB_SIZE) == (top_k > 0 or top_p < 1)


def test_top_p_at_a_boundary_is_that_of_transformers():
    """Probabilities 1/2, 1/4, 1/8, 1/8 to the last bit: a set that just reaches top_p is enough.

    Of the last two, which are equal, transformers would take one alone.
    """
    logits = np.log(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32))
    assert np.all(jax.nn.softmax(logits) == np.exp2([[-3, -1, -3, -2]]))
    for top_p, num_kept in ((0.5, 1), (0.50001, 2), (0.75, 2), (0.9, 4)):
        got = our_probabilities(logits, temperature=1.0, top_k=0, top_p=top_p)
        want = transformers.TopPLogitsWarper(top_p)(None, torch.tensor(logits)).softmax(-1)
        np.testing.assert_array_equal(got > 0, want > 0)
        assert (got > 0).sum() == num_kept


# ---- ALiBi in bfloat16 ----


def attention_problem(B, L, H, K=64):
    """q, k, v and a cotangent in bfloat16 [B, L, H, K]."""
    draw = np.random.default_rng(0).standard_normal
    return [np.asarray(jnp.asarray(draw((B, L, H, K)), jnp.bfloat16)) for _ in range(4)]


def our_attention(q, k, v, g, rounding):
    slopes = jnp.asarray(alibi_slopes(q.shape[2], rounding), jnp.float32)

    def run(q, k, v, g):
        attend = functools.partial(xla_attention, slopes_H=slopes, rounding=rounding)
        context, pull = jax.vjp(attend, q, k, v)
        return context, *pull(g)

    return reference_bloom.jit(run)(q, k, v, g)


@pytest.mark.parametrize("num_heads", [6, 16, 24, 32, 112])
def test_bias_is_that_of_transformers_to_the_last_bit(num_heads):
    """Every head and position. Its float32 powers decide ties: with float64 ones 5% of 16 heads' bias are others."""
    valid = np.ones((2, 2048), bool)
    valid[1, :5] = False
    mask = torch.tensor(valid.astype(np.int64))
    want = modeling_bloom.build_alibi_tensor(mask, num_heads, torch.bfloat16)
    want = want.float().numpy().reshape(2, num_heads, 2048)
    q, k = np.zeros((2, 1, num_heads, 1)), np.zeros((2, 2048, num_heads, 1))
    scores = functools.partial(alibi_scores, q, k, q_position_L=jnp.array([2047]), k_valid_BS=valid)
    got = {name: scores(jnp.float32(alibi_slopes(num_heads, name)), rounding="bf16_hf")[:, :, 0]
           for name in ALIBI_ROUNDINGS}  # fmt: skip
    np.testing.assert_array_equal(got["bf16_hf"][0], want[0])
    np.testing.assert_array_equal(got["bf16_hf"][1, :, 5:], want[1, :, 5:])
    assert np.mean(got["exact"][0] != want[0]) == pytest.approx(
        {6: 0, 16: 0.047, 24: 0.031, 32: 0.02, 112: 0.006}[num_heads], abs=1e-3
    )


@pytest.mark.parametrize("num_heads", [12, 16])  # slopes of 16 heads meet ties of the rounding
def test_attention_rounds_as_transformers_does(num_heads):
    """Forward and backward: with bf16_hf equal but for their order of sums, with exact as far off as they are."""
    L = 768
    problem = attention_problem(1, L, num_heads)
    theirs = their_attention(*problem, np.ones((1, L), bool), torch.bfloat16)
    precise = their_attention(*problem, np.ones((1, L), bool), torch.float32)
    rounded, exact = (our_attention(*problem, name) for name in ("bf16_hf", "exact"))
    for got, other, want, truth in zip(rounded, exact, theirs, precise, strict=True):
        error = root_mean_square(want, truth)
        assert error > 0.2  # measured 0.22 to 0.27
        assert root_mean_square(got, want) < 0.01  # 0.00001 for context and dv, 0.004 for dq and dk
        assert root_mean_square(other, truth) < 0.01  # 0.002 to 0.003
        assert root_mean_square(other, want) == pytest.approx(error, rel=0.1)
    # Nothing of the context is rounded otherwise, but for few scores midway between two numbers.
    assert root_mean_square(rounded[0], theirs[0]) < 2e-4


def test_cached_attention_rounds_as_transformers_does():
    """A row with padding on the left: positions count its tokens."""
    L, H, padding = 700, 16, 300
    problem = attention_problem(2, L, H)
    valid = np.ones((2, L), bool)
    valid[1, :padding] = False
    theirs = their_attention(*problem, valid, torch.bfloat16)[0]
    slots = np.pad(valid, ((0, 0), (0, 9)), constant_values=True)
    q, *cache = problem[:3]
    k, v = (np.pad(a, ((0, 0), (0, 9), (0, 0), (0, 0)), constant_values=50) for a in cache)
    errors = {}
    for name in ALIBI_ROUNDINGS:
        attend = functools.partial(cached_attention, k_valid_BS=slots, rounding=name)
        slopes = jnp.asarray(alibi_slopes(H, name), jnp.float32)
        for start in (0, L - 1):  # the prefill, a later step
            got = reference_bloom.jit(attend)(q[:, start:], k, v, slopes, start=start)
            first = start or padding
            errors[name, start] = root_mean_square(got[:, first - start :], theirs[:, first:])
    assert errors["bf16_hf", 0] < 2e-4 and errors["bf16_hf", L - 1] < 2e-4
    assert errors["exact", 0] > 0.1


@pytest.mark.parametrize(("shape", "factor"), [((16, 64, 1), 10), ((12, 64, 2), 5)], ids=str)
def test_bf16_logits_are_nearer_to_transformers_with_its_rounding(shape, factor):
    """Measured 1/47 and 1/10 of the distance of `exact`; what is left are the roundings of GELU and the like."""
    L = 1024
    tokens = some_tokens(1, L)
    theirs = bloom(*shape, "bfloat16")
    want = their_logits(theirs, tokens)
    distance = {}
    for name in ALIBI_ROUNDINGS:
        model, params = ours_of(theirs, alibi_rounding=name)
        distance[name] = root_mean_square(plain_logits(model, params, tokens), want)
    assert distance["exact"] > 0.1 and distance["bf16_hf"] < distance["exact"] / factor
