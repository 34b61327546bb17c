"""Parameter and FLOP counts against published numbers and an independent count by tensor."""

import pytest

from bloomjax.flops import (
    FlopCount,
    flops_per_step,
    flops_per_token,
    mfu,
    num_non_embedding_params,
    num_params,
    peak_flops_per_second,
)

VOCAB_SIZE = 250_880
# Layers, width; parameters and those without the embedding (bigscience-workshop/model_card and the
# checkpoints on the hub); GFLOP a token at 2048 tokens: causal, full attention, 6N.
SIZES = {
    "560m": (24, 1024, 559_214_592, 302_313_472, "3.66", "3.96", "3.36"),
    "1b1": (24, 1536, 1_065_314_304, 679_962_624, "6.84", "7.29", "6.39"),
    "1b7": (24, 2048, 1_722_408_960, 1_208_606_720, "10.93", "11.54", "10.33"),
    "3b": (30, 2560, 3_002_557_440, 2_360_304_640, "18.95", "19.90", "18.02"),
    "7b1": (30, 4096, 7_069_016_064, 6_041_411_584, "43.9", "45.4", "42.4"),
    "176b": (70, 14_336, 176_247_271_424, 172_650_655_744, "1070", "1082", "1057"),
}


def shape(name):
    num_layers, emb_dim = SIZES[name][:2]
    return {
        "vocab_size": VOCAB_SIZE,
        "emb_dim": emb_dim,
        "num_layers": num_layers,
        "mlp_dim": 4 * emb_dim,
    }


def bloom_tensors(vocab_size, emb_dim, num_layers, mlp_dim):
    """Shape of every tensor of a transformers BloomForCausalLM checkpoint."""
    h = emb_dim
    block = [(h,)] * 4 + [(3 * h, h), (3 * h,), (h, h), (h,)]
    block += [(mlp_dim, h), (mlp_dim,), (h, mlp_dim), (h,)]
    return [(vocab_size, h)] + [(h,)] * 4 + block * num_layers


def size_of(tensor_shape):
    return tensor_shape[0] * (tensor_shape[1] if len(tensor_shape) == 2 else 1)


def megatron_flops(factor, batch, s, num_layers, h, vocab_size):
    """The formula as written in megatron/training.py of Megatron-DeepSpeed."""
    tail = 1.0 + s / (6.0 * h) + vocab_size / (16.0 * num_layers * h)
    return 24 * factor * batch * s * num_layers * h**2 * tail


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    dims = shape(name)
    assert num_params(**dims) == SIZES[name][2]
    del dims["vocab_size"]
    assert num_non_embedding_params(**dims) == SIZES[name][3]


@pytest.mark.parametrize("dims", [(1000, 64, 3, 256), (1000, 64, 3, 100), (512, 48, 1, 200)])
def test_parameters_of_any_shape_by_tensor(dims):
    keys = ("vocab_size", "emb_dim", "num_layers", "mlp_dim")
    kwargs = dict(zip(keys, dims, strict=True))
    assert num_params(**kwargs) == sum(size_of(t) for t in bloom_tensors(**kwargs))


@pytest.mark.parametrize("name", SIZES)
def test_gigaflops_per_token(name):
    flops = flops_per_token(**shape(name), sequence_length_tokens=2048)
    for value, text in zip(
        (flops.causal, flops.full_attention, flops.six_n), SIZES[name][4:], strict=True
    ):
        digits = len(text.partition(".")[2])
        assert f"{value / 1e9:.{digits}f}" == text


@pytest.mark.parametrize("dims", [(VOCAB_SIZE, 1024, 24, 4096), (512, 48, 3, 200)])
def test_causal_and_full_are_a_sum_over_products(dims):
    keys = ("vocab_size", "emb_dim", "num_layers", "mlp_dim")
    kwargs = dict(zip(keys, dims, strict=True))
    vocab_size, emb_dim, num_layers, _ = dims
    length = 2048
    # The word embedding is the only matrix outside the blocks: it counts as the tied head.
    matrices = [t for t in bloom_tensors(**kwargs) if len(t) == 2]
    products = sum(2 * size_of(t) for t in matrices) * length
    square = sum(2 * 2 * length * length * emb_dim for _ in range(num_layers))
    flops = flops_per_token(**kwargs, sequence_length_tokens=length)
    assert flops.full_attention * length == 3 * (products + square)
    assert flops.causal * length == 3 * (products + square // 2)


@pytest.mark.parametrize("name", SIZES)
def test_megatrons_formula(name):
    dims = shape(name)
    flops = flops_per_step(**dims, sequence_length_tokens=2048, batch_size_samples=512)
    for factor, value in ((3, flops.megatron_model), (4, flops.megatron_hardware)):
        expected = megatron_flops(
            factor, 512, 2048, dims["num_layers"], dims["emb_dim"], VOCAB_SIZE
        )
        assert value == pytest.approx(expected, rel=1e-14)


def test_the_teraflops_of_bloom_176b():
    """149.02 in BLOOM's log at iteration 12695: 105.22 s a step on 384 A100 (tr11 chronicles)."""
    flops = flops_per_step(**shape("176b"), sequence_length_tokens=2048, batch_size_samples=2048)
    gpu_teraflop_seconds = 105.22 * 384 * 1e12
    assert round(flops.megatron_hardware / gpu_teraflop_seconds, 2) == 149.02
    assert flops.megatron_hardware / gpu_teraflop_seconds == pytest.approx(
        149.0228201548948, rel=1e-13
    )
    assert flops.megatron_model / gpu_teraflop_seconds == pytest.approx(
        111.76711511617108, rel=1e-13
    )
    assert flops.six_n / gpu_teraflop_seconds == pytest.approx(109.77514902150985, rel=1e-13)


def test_mfu_of_bloom_176b():
    flops = flops_per_step(**shape("176b"), sequence_length_tokens=2048, batch_size_samples=2048)
    peak = peak_flops_per_second("NVIDIA A100-SXM4-80GB")
    share = mfu(flops.megatron_model, 105.22, 384, peak)
    assert share is not None and round(100 * share, 1) == 35.8
    assert mfu(flops.causal, 105.22, 384, peak_flops_per_second("cpu")) is None


def test_a_step_is_its_tokens():
    dims = shape("3b")
    token = flops_per_token(**dims, sequence_length_tokens=1024)
    step = flops_per_step(**dims, sequence_length_tokens=1024, batch_size_samples=7)
    assert step == FlopCount(*(7 * 1024 * value for value in token))


@pytest.mark.parametrize(
    "device_kind,teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("TPU v4", 275),
        ("TPU v4 lite", 137),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
    ],
)
def test_peaks(device_kind, teraflops):
    assert peak_flops_per_second(device_kind) == teraflops * 1e12


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "TPU v3",
        "TPU7x",
        "NVIDIA B200",
    ],
)
def test_unknown_chips_have_no_peak(device_kind):
    assert peak_flops_per_second(device_kind) is None
