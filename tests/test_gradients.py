"""Norms of parts of the gradient against gradients row by row; the noise of languages in a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom
import tiny_run
from reference_bloom import jit

from bloomjax.errors import BadInput
from bloomjax.language_noise import LanguageNoise, make_noise_step
from bloomjax.model import Bloom, BloomConfig
from bloomjax.noise_scale import noise_and_signal
from bloomjax.optimizer import adamw
from bloomjax.train_state import TrainState
from bloomjax.train_step import StepOptions, make_train_step, row_losses

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "emb_dim": 32,
    "num_layers": 2,
    "num_heads": 8,
    "mlp_dim": 64,
}
MODEL = Bloom(BloomConfig(**SHAPE, dtype="float32"))
ROWS, LENGTH, REAL = 16, 16, 14
WEIGHTS = np.array([1.0] * REAL + [0.0] * (ROWS - REAL), np.float32)


@functools.cache
def params():
    return reference_bloom.random_params(**SHAPE)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH + 1), np.int32)


@functools.cache
def row_gradients():
    """Of each real row's own mean loss, one after the other, [REAL, parameters]."""

    @jit
    def one(p, row):
        def loss(p):
            mean = jnp.full((1, LENGTH), 1 / LENGTH)
            return row_losses(MODEL, StepOptions(), p, {"tokens": row[None]}, mean)[0]

        return jax.grad(loss)(p)

    rows = [jax.tree.leaves(one(params(), row)) for row in tokens()[:REAL]]
    return np.array([np.concatenate([np.ravel(a) for a in row]) for row in rows], np.float64)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mesh", "microbatch", "num_parts"),
    [((1, 1, 1), 4, 4), ((2, 2, 2), 2, 2), ((1, 1, 1), None, 1), slow((1, 4, 2), 1, 4)],
)
@pytest.mark.parametrize("gradient_dtype", ["float32", slow("bfloat16")])
def test_norm_of_the_first_part(mesh_of, mesh, microbatch, num_parts, gradient_dtype):
    model = Bloom(BloomConfig(**SHAPE, dtype="float32", gradient_dtype=gradient_dtype))
    options, mesh = StepOptions(microbatch_size_samples=microbatch), mesh_of(*mesh)
    step = jit(make_train_step(model, adamw(), options, mesh))
    state = TrainState(np.int32(0), params(), adamw().init(params()))
    batch = {"tokens": tokens(), "weights": WEIGHTS}
    with jax.set_mesh(mesh):
        _, metrics = step(state, batch, np.float32(0.1), jax.random.key(0))
    close = functools.partial(pytest.approx, rel=1e-6 if gradient_dtype == "float32" else 1e-3)
    assert float(metrics["grad_norm"]) == close(np.linalg.norm(row_gradients().mean(0)))
    if num_parts == 1:
        assert "part_norm" not in metrics
        return
    rows = [row for row in range(0, ROWS, num_parts) if row < REAL]
    assert metrics["part_samples"] == len(rows)
    assert float(metrics["part_norm"]) == close(np.linalg.norm(row_gradients()[rows].mean(0)))


def test_the_mean_over_parts_is_the_covariance_of_rows(mesh_of):
    """Each row once alone in the first part: the mean of the noise terms is the trace of the rows' covariance."""
    program = jit(make_noise_step(MODEL, StepOptions(), REAL))
    terms = []
    with jax.set_mesh(mesh_of(1, 1, 1)):
        for first in range(REAL):
            order = np.roll(np.arange(REAL), -first)
            batch = {"tokens": tokens()[order], "weights": np.ones(REAL, np.float32)}
            found = {name: float(value) for name, value in program(params(), batch).items()}
            assert found["language_part_samples"] == 1
            norms = found["language_part_norm"] ** 2, found["language_norm"] ** 2
            terms.append(noise_and_signal(*norms, 1, REAL))
    exact = np.sum(row_gradients().var(axis=0, ddof=1))
    noise, signal = np.mean(terms, axis=0)
    assert noise == pytest.approx(exact, rel=1e-5)
    whole = np.sum(row_gradients().mean(0) ** 2)
    assert signal == pytest.approx(whole - exact / REAL, rel=1e-5)


# ---- in a run ----


def timeless(model_dir):
    clocks = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clocks} for r in tiny_run.records(model_dir)]


@pytest.mark.slow
def test_noise_in_a_run_that_is_stopped_and_goes_on(tiny_text, undisturbed, tmp_path):
    def run(name, **changes):
        assert 0 == tiny_run.run(
            tiny_text, tmp_path / name, step=StepOptions(microbatch_size_samples=2),
            language_noise=LanguageNoise(every_steps=4, num_samples=8), **changes,
        )  # fmt: skip

    run("whole")
    run("parts", train_steps=20)
    run("parts")
    records = timeless(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == records
    assert all(r["gradient_noise"] > 0 for r in records if r["step"])
    measured = {r["step"]: r["noise_by_language"] for r in records if "noise_by_language" in r}
    assert list(measured) == list(range(4, 41, 4))
    names = [name for entry in measured.values() for name in entry]
    assert names[:4] == ["bb", "cc", "aa", "bb"]
    # Neither is seen by the parameters; microbatches sum in another order.
    losses, without = tiny_run.losses(tmp_path / "whole"), tiny_run.losses(undisturbed)
    assert losses == pytest.approx(without, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every_steps": 0}, "LanguageNoise.every_steps must be at least 1, got 0"),
        ({"num_samples": 1}, "LanguageNoise.num_samples must be at least 2, got 1"),
        ({"num_parts": 1}, "LanguageNoise.num_parts must be at least 2, got 1"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(BadInput, match=words):
        LanguageNoise(**changes)
