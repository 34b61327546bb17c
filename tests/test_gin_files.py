"""The shipped configurations hold the published values."""

import math

import pytest

from bloomjax import config, flops

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
