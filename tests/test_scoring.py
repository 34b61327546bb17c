"""Log-likelihoods with shared prefixes, padding and few shapes against float64 BLOOM, one text at a time."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import reference_bloom
from test_decoding import MODEL, NEVER, params

from bloomjax import prefix_cache, scoring
from bloomjax.activations import SwiGlu
from bloomjax.decoding_until import generate_until
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.optimizer import adamw
from bloomjax.positions import LearnedPositions, Rotary
from bloomjax.scoring import Request, Scorer, batch_groups, cut, group_texts
from bloomjax.train_state import abstract_params, init_state

MAX_LENGTH = 40


@pytest.fixture(autouse=True)
def quickly():
    """Nearly all the time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def seen_by(length, num_context):
    """Which keys each query sees, where the first `num_context` tokens see each other."""
    return np.tri(length, dtype=bool) | (np.arange(length) < num_context)


@functools.cache
def likeliest(prompt, num, is_whole=False):
    """The next tokens, each the likeliest after those before, the prompt seen backwards or as a whole; float64."""
    wide, tokens = reference_bloom.to_float64(params()), list(prompt)
    for _ in range(num):
        seen = seen_by(len(tokens), len(prompt) * is_whole)
        logits = reference_bloom.logits(wide, np.array([tokens]), seen=seen)[0, -1]
        runner_up, best = np.sort(logits)[-2:]
        assert best - runner_up > 1e-4  # float32 decides the same
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :]


def ragged(num_questions=14, seed=0):
    """Questions with one to five endings of 1 to 9 tokens, some too long; the likeliest endings; single tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_questions):
        context = rng.integers(0, 40, rng.integers(1, MAX_LENGTH + 12)).tolist()
        for _ in range(1 + number % 5):
            ending = rng.integers(0, 40, 1 if number % 3 == 0 else rng.integers(1, 10)).tolist()
            found.append(Request(context, ending))
    found += [Request([1], [5]), Request([1], [5, 6]), Request([2], list(range(MAX_LENGTH)))]
    # The likeliest continuations, one of them spoilt at the end.
    text = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
    found += [Request(text, likeliest(text, num)) for num in (1, 3)]
    found.append(Request(text, [*found[-1].continuation[:-1], NEVER - 1]))
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def exact(request, is_whole=False):
    """The score of a request in float64, after a context that is seen backwards or as a whole."""
    context, continuation = request
    tokens = np.array([*context, *continuation])[-(MAX_LENGTH + 1) :]
    num = len(continuation)
    seen = seen_by(len(tokens) - 1, (len(tokens) - num) * is_whole)
    wide = reference_bloom.to_float64(params())
    logits = reference_bloom.logits(wide, tokens[None, :-1], seen=seen)[0, -num:]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    is_greedy = bool((logits.argmax(-1) == continuation).all())
    return logp[np.arange(num), continuation].sum(), is_greedy


@functools.cache
def expected():
    """Of `ragged`: the score of each."""
    return [exact(request) for request in ragged()]


def assert_expected(scores, wanted=None):
    """Of the first requests of `ragged`, or `wanted`."""
    wanted = wanted or expected()[: len(scores)]
    for score, (total, is_greedy) in zip(scores, wanted, strict=True):
        assert score.log_probability == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == is_greedy


def scorer(mesh, batch_tokens=128, model=MODEL, **changes):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    placed = jax.device_put(params(), shardings)
    sizes = {"max_length": MAX_LENGTH, "batch_tokens": batch_tokens}
    return Scorer(model, placed, mesh, **sizes, **changes)


def test_scores_are_those_of_each_text_alone(mesh_of):
    assert sum(is_greedy for _, is_greedy in expected()) >= 2
    assert any(not is_greedy for _, is_greedy in expected())
    done = []
    ours = scorer(mesh_of(1, 1, 1))
    assert_expected(ours.score(ragged(), done.append))
    assert sum(done) == len(ragged()) and len(done) > 1
    assert any(shape.P for shape, _ in ours.shapes) and any(not shape.P for shape, _ in ours.shapes)
    assert len(ours.shapes) <= 6


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_contexts_that_are_seen_as_a_whole(mesh_of, shape):
    """Alone, and shared by endings; and not where they are no prompt."""
    question, other = list(range(20)), [*range(19), 39]
    endings = [[7], [9, 8], list(range(35, 20, -1))]
    requests = [Request(context, ending) for context in (question, other) for ending in endings]
    requests += [Request([5, 6, 7], [8, 9]), Request([1], [5])]
    groups = group_texts(cut(requests, MAX_LENGTH), sees_whole_context=True)
    # What differs in its last token shares nothing; what shares nothing stands in a batch with the others.
    assert sorted((group.prefix, len(group.texts)) for group in groups) == [
        (0, 1),
        (0, 1),
        (20, 3),
        (20, 3),
    ]
    ours = scorer(mesh_of(*shape), 2048, sees_whole_context=True)
    wanted = [exact(request, is_whole=True) for request in requests]
    assert_expected(ours.score(requests), wanted)
    assert {shape.P for shape, _ in ours.shapes} == {24}
    alone = [Request(list(range(38)), [3, 4]), Request([*question, *other, *question], [1, 2, 3])]
    assert_expected(ours.score(alone), [exact(request, is_whole=True) for request in alone])
    assert_expected(ours.score(alone, is_causal=True), [exact(request) for request in alone])
    assert all(
        abs(exact(r)[0] - exact(r, is_whole=True)[0]) > 1e-3 for r in [*requests[:6], *alone]
    )


@pytest.mark.slow
def test_on_a_mesh(mesh_of):
    assert_expected(scorer(mesh_of(2, 2, 2), 512).score(ragged()[:24]))


@pytest.mark.slow
def test_with_few_logits_at_a_time_and_long_prefixes_in_pieces(mesh_of, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * 40 * 16)  # of 16 positions
    monkeypatch.setattr(prefix_cache, "PIECE_TOKENS", 16)
    jax.clear_caches()
    assert_expected(scorer(mesh_of(1, 1, 1), 512).score(ragged()[:24]))
    jax.clear_caches()


def test_few_logits_exist_at_a_time(mesh_of, monkeypatch):
    """Of 9 texts of 31 scored positions and of 256 of one: as many on each device as it may have."""

    def most_positions(limit, B, N, mesh):
        monkeypatch.setattr(scoring, "_LOGITS_BYTES", limit * 4 * 40 // mesh.shape["tensor"])
        placed = scorer(mesh)
        arrays = placed._put(np.zeros((B, N, 32), np.float32)), placed._put(np.zeros((B, N), int))
        with jax.set_mesh(mesh):
            score = jax.jit(functools.partial(scoring._score_tokens, placed.model))
            text = score.lower(placed.params, *arrays).compile().as_text()
        sizes = [list(map(int, size.split(","))) for size in re.findall(r"f32\[([\d,]+)\]", text)]
        # With some vocabulary, and no emb_dim: neither the embedding nor hidden states.
        logits = [size for size in sizes if set(size) & {20, 40} and not set(size) & {16, 32}]
        return max(np.prod(size) for size in logits) / (40 // mesh.shape["tensor"])

    one = mesh_of(1, 1, 1)
    assert most_positions(1000, 9, 31, one) == 9 * 31
    assert most_positions(6, 9, 31, one) == 6
    assert most_positions(6, 256, 1, one) == 6
    assert most_positions(6, 256, 1, mesh_of(2, 2, 2)) == 6


def test_a_document_end_in_a_context_hides_nothing(mesh_of):
    model = type(MODEL)(dataclasses.replace(MODEL.config, document_end_id=5))
    plain = Request([9, 5, 7], [3, 4])
    (with_end,) = scorer(mesh_of(1, 1, 1), model=model).score([plain])
    (without,) = scorer(mesh_of(1, 1, 1)).score([plain])
    assert with_end == without


def test_groups():
    """Each text once; a common prefix is common, holds nothing scored, and saves tokens."""
    texts = cut(ragged(60, seed=3), MAX_LENGTH)
    groups = group_texts(texts)
    assert sorted(t.number for g in groups for t in g.texts) == list(range(len(texts)))
    shared = [g for g in groups if len(g.texts) > 1]
    assert len(shared) > 10 and all(g.prefix == 0 for g in groups if g not in shared)
    for group in shared:
        assert all(group.prefix <= len(text.context) for text in group.texts)
        assert len({tuple(text.inputs[: group.prefix].tolist()) for text in group.texts}) == 1
    computed = sum(g.prefix + sum(len(t.inputs) - g.prefix for t in g.texts) for g in groups)
    assert computed < 0.6 * sum(len(text.inputs) for text in texts)


def test_a_common_preamble_does_not_swallow_the_questions():
    preamble = list(range(30))
    requests = [
        Request([*preamble, *[q] * 20], [ending]) for q in range(6) for ending in (1, 2, 3, 4)
    ]
    groups = group_texts(cut(requests, 100))
    assert [(len(g.texts), g.prefix) for g in groups] == [(4, 50)] * 6


def test_batches():
    """Every group once, in a shape that holds it; long ones first; as few shapes as batches allow."""
    rng = np.random.default_rng(1)
    requests = [Request(rng.integers(0, 9, n).tolist(), [1, 2]) for n in rng.integers(2, 500, 400)]
    groups = group_texts(cut(requests, 512))
    batches = list(batch_groups(groups, batch_tokens=2048, row_multiple=4))
    assert sum(len(members) for _, _, members in batches) == len(groups)
    for shape, num_rows, members in batches:
        assert len(members) <= num_rows and num_rows % 4 == 0
        assert all(shape.covers(group.shape) for group in members)
        assert num_rows * shape.num_tokens <= 1.6 * max(2048, 4 * shape.num_tokens)
    sizes = [shape.num_tokens for shape, _, _ in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert len({batch[:2] for batch in batches}) <= 8
    padded = sum(num_rows * shape.num_tokens for shape, num_rows, _ in batches)
    assert padded < 1.6 * sum(len(text.inputs) for g in groups for text in g.texts)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], [1]), "empty context"),
        (Request([1], []), "empty context or continuation"),
        (Request([1], [1] * 41), "a continuation of 41 tokens, the model reads 40"),
    ],
)
def test_what_cannot_be_scored(request_, message):
    with pytest.raises(BadInput, match=message):
        cut([request_], MAX_LENGTH)


def test_sizes():
    sizes = [prefix_cache.padded_length(n) for n in range(1, 3000)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 24
    assert all(n <= size <= max(512, 1.5 * n + 1) for n, size in enumerate(sizes, 1))
    assert all(size % 256 == 0 for size in sizes if size > 256)


def test_generation_after_prompts_that_are_seen_as_a_whole(mesh_of):
    prompts = [(3, 1, 4, 1, 5, 9, 2), (30, 0, 30)]
    theirs = [likeliest(prompt, 6, is_whole=True) for prompt in prompts]
    assert theirs != [likeliest(prompt, 6) for prompt in prompts]
    ours = scorer(mesh_of(1, 1, 1))
    found = generate_until(
        ours.model, ours.params, ours.mesh, prompts, lambda ids: False, max_new_tokens=6, eos_id=NEVER,
        sees_whole_prompt=True,
    )  # fmt: skip
    assert found == theirs


@pytest.mark.slow
def test_generation_until_a_token_and_after_many_blocks(mesh_of):
    """Greedy text over more than one block, left to itself and stopped."""
    prompts = [(7,), (3, 1, 4, 1, 5, 9, 2), (30, 0, 30)]
    theirs = {prompt: likeliest(prompt, 20) for prompt in prompts}
    for mesh in (mesh_of(1, 1, 1), mesh_of(2, 2, 2)):
        ours = scorer(mesh)
        arguments = (ours.model, ours.params, mesh, prompts)
        found = generate_until(*arguments, lambda ids: False, max_new_tokens=20, eos_id=NEVER)
        assert found == list(theirs.values())
        stopped = generate_until(*arguments, lambda ids: True, max_new_tokens=20, eos_id=NEVER)
        assert stopped == [row[:16] for row in found]  # one block
        eos_id = found[1][3]
        ended = generate_until(*arguments, lambda ids: False, max_new_tokens=20, eos_id=eos_id)
        assert ended[1] == found[1][: found[1].index(eos_id)]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(Rotary(), marks=pytest.mark.slow), LearnedPositions(MAX_LENGTH)],
    ids=["rotary", "learned"],
)
def test_other_positions_and_heads(mesh_of, kind):
    """Prefixes stand at the end of their slots: positions count tokens, not slots."""
    config = dataclasses.replace(
        MODEL.config, positions=kind, tied_head=False, activation=SwiGlu(), expected_params=None
    )
    model, requests = Bloom(config), ragged(5)[:12]
    tree = init_state(model, adamw(), 0).params
    scorer = Scorer(model, tree, mesh_of(1, 1, 1), max_length=MAX_LENGTH, batch_tokens=200)
    scores = scorer.score(requests)
    assert any(shape.P for shape, _ in scorer.shapes)  # some share a prefix

    @jax.jit
    def whole(tokens):
        hidden = model.apply({"params": tree}, tokens)
        return model.apply({"params": tree}, hidden, method="logits")

    for (context, continuation), score in zip(requests, scores, strict=True):
        tokens = np.array([*context, *continuation])[-(MAX_LENGTH + 1) :]
        padded = np.pad(tokens[:-1], (0, MAX_LENGTH - len(tokens) + 1))  # after it: not seen
        logits = np.asarray(whole(padded[None]), np.float64)[0, : len(tokens) - 1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        num = len(continuation)
        exact = logp[np.arange(len(tokens) - 1), tokens[1:]][-num:].sum()
        assert score.log_probability == pytest.approx(exact, abs=1e-4)
