"""BloomConfig.document_end_id: a document in a window is what it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom
import tiny_run
from reference_bloom import jit

from bloomjax.attention import document_numbers
from bloomjax.model import Bloom, BloomConfig
from bloomjax.train_step import StepOptions, make_eval_step, row_losses

SHAPE = dict(vocab_size=48, emb_dim=24, num_layers=2, num_heads=6)
END = 2


def model_of(**changes):
    return Bloom(BloomConfig(**(SHAPE | dict(dtype="float32", document_end_id=END) | changes)))


@pytest.fixture(scope="module")
def params():
    return reference_bloom.random_params(**SHAPE, mlp_dim=96, seed=3)


def packed(seed=0, num_rows=2):
    """Rows of 16 tokens: documents of several lengths, one that began before the row and one that goes on after it."""
    tokens = np.random.default_rng(seed).integers(3, 48, (num_rows, 16)).astype(np.int32)
    for row, ends in zip(tokens, ([0, 5, 6, 12], [3, 15]), strict=False):
        row[ends] = END
    return tokens


def documents(row):
    """Pieces of a row, each up to and with its end."""
    ends = np.flatnonzero(row == END) + 1
    return [piece for piece in np.split(row, ends) if len(piece)]


def test_numbers_of_documents():
    tokens = jnp.array([[5, END, 7, 8, END, END, 9], [END, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(document_numbers(tokens, END), expected)


def logits(model, params, tokens):
    @jit
    def run(params, tokens):
        x = model.apply({"params": params}, tokens)
        return model.apply({"params": params}, x, method="logits")

    return np.asarray(run(params, tokens))


@pytest.mark.parametrize("changes", [{}, {"scan_layers": False}, {"remat_policy": "full"}])
def test_each_document_is_what_it_would_be_alone(params, changes):
    tokens = packed()
    found = logits(model_of(**changes), params, tokens)
    plain = logits(model_of(document_end_id=None), params, tokens)
    reference = reference_bloom.to_float64(params)
    for row, row_logits, plain_row in zip(tokens, found, plain, strict=True):
        alone = [reference_bloom.logits(reference, piece[None])[0] for piece in documents(row)]
        expected = np.concatenate(alone)
        np.testing.assert_allclose(row_logits, expected, atol=2e-6 * np.abs(expected).max())
        first = len(alone[0])
        np.testing.assert_allclose(plain_row[:first], expected[:first], atol=1e-4)
        assert np.abs(plain_row[first:] - expected[first:]).max() > 0.1


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_loss_and_gradient_are_those_of_the_documents(params, mesh_of, shape):
    """The first token of a document is predicted from the end of the one before: by that token alone."""
    tokens = np.concatenate([packed(), packed(1)])
    batch = {"tokens": np.pad(tokens, ((0, 0), (0, 1)), constant_values=7)}
    model, mesh = model_of(), mesh_of(*shape)

    @jax.jit
    def loss_and_grads(params):
        weights = jnp.ones((len(tokens), 16), jnp.float32)
        loss = lambda params: row_losses(model, StepOptions(), params, batch, weights)[0]  # noqa: E731
        return jax.value_and_grad(loss)(params)

    with jax.set_mesh(mesh):
        loss, grads = loss_and_grads(params)

    def reference_loss(params):
        total = 0.0
        for row in batch["tokens"]:
            start = 0
            for piece in documents(row[:-1]):
                z = reference_bloom.logits(params, jnp.asarray(piece)[None], jnp)[0]
                gold = jnp.asarray(row[start + 1 : start + len(piece) + 1])
                log_p = jax.nn.log_softmax(z)
                total -= log_p[jnp.arange(len(piece)), gold].sum()
                start += len(piece)
        return total

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        reference = reference_bloom.to_float64(params)
        expected, expected_grads = jit(jax.value_and_grad(reference_loss))(reference)
        expected, expected_grads = float(expected), jax.tree.map(np.asarray, expected_grads)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.slow
def test_a_run_with_it(tiny_text, tmp_path):
    """Trains; the losses are others than without it, from the first step on."""
    model = tiny_run.tiny_model(document_end_id=END)
    assert tiny_run.run(tiny_text, tmp_path / "reset", model=model, train_steps=3) == 0
    assert tiny_run.run(tiny_text, tmp_path / "plain", train_steps=3) == 0
    reset, plain = tiny_run.losses(tmp_path / "reset"), tiny_run.losses(tmp_path / "plain")
    assert all(abs(reset[step] - plain[step]) > 1e-6 for step in (1, 2, 3))


def test_evaluation(params):
    """A row of one document is what it was; others are not."""
    tokens = np.pad(packed(5), ((0, 0), (0, 1)))
    tokens[0][tokens[0] == END] = 5
    batch = {"tokens": tokens, "weights": np.ones(2, np.float32)}
    one, plain = (
        np.asarray(
            jax.jit(make_eval_step(model_of(document_end_id=end), StepOptions()))(params, batch)[0]
        )
        for end in (END, None)
    )
    assert one[0] == plain[0] and abs(one[1] - plain[1]) > 1e-3
