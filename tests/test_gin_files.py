"""The shipped configurations hold the published values."""

import functools
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_run
from reference_bloom import jit

from bloomjax import config, export, flops, generate
from bloomjax.activations import Gated, Gelu, SquaredRelu
from bloomjax.embedding import head_table
from bloomjax.positions import LearnedPositions

# BigScience train/tr11-176B-ml/tr11-176B-ml.slurm and smaller_models/*.slurm:
# layers, hidden, heads, batch, ramp increment, lr, min lr, parameters.
PUBLISHED = {
    "560m.gin": (24, 1024, 16, 256, 32, 3.0e-4, 1e-5, 559_214_592),
    "1b1.gin": (24, 1536, 16, 256, 16, 2.5e-4, 1e-5, 1_065_314_304),
    "1b7.gin": (24, 2048, 16, 512, 16, 2.0e-4, 1e-5, 1_722_408_960),
    "3b.gin": (30, 2560, 32, 512, 32, 1.6e-4, 1e-5, 3_002_557_440),
    "7b1.gin": (30, 4096, 32, 512, 32, 1.2e-4, 1e-5, 7_069_016_064),
    "176b.gin": (70, 14336, 112, 2048, 16, 6.0e-5, 6e-6, 176_247_271_424),
}


@pytest.mark.parametrize("gin_file", PUBLISHED)
def test_every_size_has_its_published_values(gin_file):
    layers, hidden, heads, batch, increment, peak, end, num_params = PUBLISHED[gin_file]
    c = config.build("Bloom.config", gin_file)
    assert (c.num_layers, c.emb_dim, c.num_heads, c.vocab_size) == (layers, hidden, heads, 250_880)
    assert (c.dtype, c.init_std, c.layer_norm_epsilon) == ("bfloat16", 0.0048, 1e-5)
    assert c.hidden_dropout_rate == c.attention_dropout_rate == 0.0
    assert not c.mask_padding_vocab
    assert c.expected_params == num_params
    assert num_params == flops.num_params(
        vocab_size=c.vocab_size, emb_dim=c.emb_dim, num_layers=c.num_layers, mlp_dim=4 * c.emb_dim
    )
    schedule = config.build("train.batch_schedule", gin_file)
    assert schedule.batch_size_samples == batch
    assert schedule.ramp_start_samples == 192
    assert schedule.ramp_increment_samples == increment
    assert schedule.ramp_length_samples == 9_765_625
    rate = config.build("train.learning_rate", gin_file)
    assert (rate.peak, rate.end) == (peak, end)
    assert (rate.warmup_samples, rate.decay_samples) == (183_105, 200_000_000)
    assert config.build("train.train_samples", gin_file) == 220_000_000
    assert config.build("TrainData.sequence_length", gin_file) == 2048


def test_176b_stops_where_megatron_stops():
    schedule = config.build("train.batch_schedule", "176b.gin")
    assert schedule.steps_within(220_000_000) == 115_311  # printed by the original run


def test_tiny_has_no_dropout_and_the_overlay_has():
    assert config.build("BloomConfig.hidden_dropout_rate", "tiny.gin") == 0.0
    overlay = "ablations/dropout.gin"
    assert config.build("BloomConfig.hidden_dropout_rate", overlay) == 0.1
    assert config.build("BloomConfig.attention_dropout_rate", overlay) == 0.1


def test_init_std_is_that_of_the_largest_size():
    """tr11 took sqrt(1 / (3 h)) of h = 14336 for every size."""
    assert math.isclose(0.0048, math.sqrt(1 / (3 * 14336)), rel_tol=5e-3)


def test_1b3_is_the_baseline_of_the_comparisons():
    """BigScience train/tr3-1B3-baseline/tr3d-1B3-more-warmup.slurm."""
    c = config.build("Bloom.config", "1b3.gin")
    assert (c.num_layers, c.emb_dim, c.num_heads, c.mlp_width) == (24, 2048, 16, 8192)
    assert (c.positions, c.activation) == (LearnedPositions(2048), Gelu())
    assert (c.embedding_norm, c.tied_head, c.vocab_size) == (False, True, 50_688)
    assert (c.init_std, c.hidden_dropout_rate, c.attention_dropout_rate) == (0.02, 0.1, 0.1)
    assert c.expected_params == flops.num_params(**c.shape) == 1_316_605_952
    schedule = config.build("train.batch_schedule", "1b3.gin")
    assert schedule.batch_size_samples == 512 and schedule.ramp_start_samples == 32
    assert (schedule.ramp_increment_samples, schedule.ramp_length_samples) == (32, 2_000_000)
    rate = config.build("train.learning_rate", "1b3.gin")
    assert (rate.peak, rate.end) == (2e-4, 1e-5)
    assert (rate.warmup_samples, rate.decay_samples) == (183_105, 73_242_187)
    assert config.build("train.train_samples", "1b3.gin") == 73_242_187
    assert config.build("adamw.b2", "1b3.gin") == 0.999
    assert config.build("train.seed", "1b3.gin") == 1234
    assert config.build("TrainData.seed", "1b3.gin") == 1234
    assert config.build("TrainData.sequence_length", "1b3.gin") == 2048


D, F, GATED, LENGTH = (
    64,
    256,
    176,
    2048,
)  # of `SMALL`; 176 is the multiple of 16 nearest to two thirds of 256
SMALL = [
    "NUM_LAYERS = 2", f"EMB_DIM = {D}", "NUM_HEADS = 4", "VOCAB_SIZE = 96", "prepare.vocab_size = 96",
    "BloomConfig.expected_params = None", "BloomConfig.dtype = 'float32'",
]  # fmt: skip
_GATED_MLP = 2 * (2 * (D * GATED + GATED) + GATED * D - (2 * D * F + F))
# Base, and how many parameters more the overlay has.
OVERLAYS = {
    "none": ("1b3.gin", -LENGTH * D),
    "learned": ("1b1.gin", LENGTH * D),
    "rotary": ("1b3.gin", -LENGTH * D),
    "alibi": ("1b3.gin", -LENGTH * D),
    "sinusoidal": ("1b3.gin", -LENGTH * D),
    "swiglu": ("1b3.gin", _GATED_MLP),
    "geglu": ("1b3.gin", _GATED_MLP),
    "reglu": ("1b3.gin", _GATED_MLP),
    "liglu": ("1b3.gin", _GATED_MLP),
    "squared_relu": ("1b3.gin", 0),
    "embed_norm": ("1b3.gin", 2 * D),
    "no_embed_norm": ("1b1.gin", -2 * D),
    "untied_head": ("1b3.gin", 96 * D),
    "dropout": ("1b1.gin", 0),
    "no_dropout": ("1b3.gin", 0),
}


@functools.cache
def trained_like(base, overlay=None):
    """Parameters by path, and the logits of a batch with dropout."""
    overlays = [f"include 'ablations/{overlay}.gin'"] if overlay else []
    model = config.build("train.model", base, [*SMALL, *overlays])
    tokens = np.random.default_rng(0).integers(0, 96, (2, 32), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :1])["params"]
    flat = {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(shapes))}  # fmt: skip
    # Equal where both models have them: an overlay has to change what is computed.
    flat = {k: (k.endswith("['scale']")) + 0.1 * np.random.default_rng(len(k)).standard_normal(shape, np.float32)
            for k, shape in flat.items()}  # fmt: skip
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path)], nn.unbox(shapes)
    )
    run = functools.partial(model.apply, deterministic=False)
    x = jit(lambda p, key: run({"params": p}, tokens, rngs={"dropout": key}))(
        params, jax.random.key(1)
    )
    return flat, np.asarray(x) @ np.asarray(head_table(params)).T


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ablation_overlays_change_what_they_say(overlay):
    base, more = OVERLAYS[overlay]
    before, x = trained_like(base)
    after, y = trained_like(base, overlay)
    assert sum(a.size for a in after.values()) - sum(a.size for a in before.values()) == more
    c = config.build("Bloom.config", base, [*SMALL, f"include 'ablations/{overlay}.gin'"])
    assert flops.num_params(**c.shape) == sum(a.size for a in after.values())
    assert np.isfinite(y).all() and np.abs(x - y).max() > 1e-2
    text = config.find(f"ablations/{overlay}.gin").read_text()
    assert 5 <= len(text.splitlines()) <= 10 and re.search(r"arXiv|train/tr\d|tr\d", text)


def test_every_kind_of_unit_has_an_overlay():
    bound = {
        type(
            config.build("Bloom.config", "1b3.gin", [f"include 'ablations/{name}.gin'"]).activation
        )
        for name in OVERLAYS
    }
    assert bound == {Gelu, SquaredRelu, *Gated.__subclasses__()}


def test_the_batch_ramp_overlay_is_that_of_tr1():
    """train/tr1-13B-base/README.md: 79,365 samples of each size (5,000,000 / 63), so 4,960 steps of 16, 2,480 of 32."""
    schedule = config.build(
        "train.batch_schedule",
        "1b3.gin",
        ["include 'ablations/batch_ramp.gin'", "BATCH_SIZE = 1024"],
    )
    steps = [(s.batch_size_samples, s.num_steps) for s in schedule.stages()]
    assert len(steps) == 64 and steps[0] == (16, 4961) and steps[-1] == (1024, None)
    assert [size for size, _ in steps] == list(range(16, 1025, 16)) and abs(steps[1][1] - 2480) <= 1
    for base in ("1b3.gin", "560m.gin", "176b.gin", "tiny.gin"):
        before = config.build("train.batch_schedule", base)
        after = config.build("train.batch_schedule", base, ["include 'ablations/batch_ramp.gin'"])
        assert after.batch_size(1) == 16 < before.batch_size(1)
        assert (
            after.batch_size_samples
            == before.batch_size_samples
            == after.stages()[-1].batch_size_samples
        )


def test_every_size_takes_every_overlay():
    """The count that a size expects is no longer asked for where the overlay changes it."""
    for base in ("1b3.gin", "560m.gin", "176b.gin", "tiny.gin"):
        for overlay in OVERLAYS:
            c = config.build("Bloom.config", base, [f"include 'ablations/{overlay}.gin'"])
            assert c.expected_params in (None, flops.num_params(**c.shape)), (base, overlay)


@pytest.mark.slow
def test_a_run_with_overlays_through_the_commands(tiny_text, tmp_path, command):
    """Trains, goes on with the same parts alone, generates, and is no model of transformers."""
    run = tmp_path / "run"

    def train(*overlays):
        flags = ["--gin.TRAIN_STEPS=20", *[f"--gin_file=ablations/{name}.gin" for name in overlays]]
        return tiny_run.execute(tiny_run.command(tiny_text, run, *flags))

    result = train("learned", "swiglu", "no_embed_norm")
    assert result.returncode == 0, result.stderr
    losses = tiny_run.losses(run)
    assert losses[20] < losses[1] - 0.1
    result = train("learned", "no_embed_norm")
    assert result.returncode == 1
    assert (
        "holds a run with other model: there activation=SwiGlu(), here activation=BLOOM's"
        in result.stderr
    )
    code, out, err = command(generate, f"--checkpoint={run}", "--prompt=ba", "--max_length=12")
    assert code == 0 and out.strip().startswith("ba"), err
    code, _, err = command(generate, f"--checkpoint={run}", "--prompt=ba", "--max_length=17")
    assert code == 1 and "max_length=16 positions are learned, 17 tokens need more" in err
    code, _, err = command(export, f"--checkpoint={run}")
    assert code == 1 and err.count("\n") == 1
    assert (
        "cannot be a model with positions=LearnedPositions(max_length=16), activation=SwiGlu()"
        in err
    )
    assert not (run / "hf").exists()
