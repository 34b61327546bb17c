"""Parameters of a BLOOM model, its FLOPs in every convention in use, and peak rates of chips.

A FLOP is one multiplication or one addition: a matrix product of m x k by k x n counts 2mkn. Only
matrix products count. "TFLOP/s" or "MFU" means nothing without its convention: the same step of
BLOOM-176B is 149.0, 111.8 or 109.8 TFLOP/s per GPU.
"""

from typing import NamedTuple


def num_params(
    *,
    vocab_size: int,
    emb_dim: int,
    num_layers: int,
    mlp_dim: int,
    num_mlp_inputs: int = 1,
    num_positions: int = 0,
    num_embedding_norms: int = 1,
    num_vocab_tables: int = 1,
) -> int:
    """Exact parameter count: biases and LayerNorms included. BLOOM's ALiBi has none, its tied head counts once.

    With mlp_dim = 4 emb_dim it is L(12h^2 + 13h) + Vh + 4h: 176,247,271,424 for BLOOM-176B. What else there may be
    (`BloomConfig.shape`): matrices before an activation (2 for a gated one), learned positions, no LayerNorm after the
    embedding, a second table for the head.
    """
    return (num_vocab_tables * vocab_size + num_positions) * emb_dim + num_non_embedding_params(
        emb_dim=emb_dim,
        num_layers=num_layers,
        mlp_dim=mlp_dim,
        num_mlp_inputs=num_mlp_inputs,
        num_embedding_norms=num_embedding_norms,
    )


def num_non_embedding_params(
    *,
    emb_dim: int,
    num_layers: int,
    mlp_dim: int,
    num_mlp_inputs: int = 1,
    num_embedding_norms: int = 1,
) -> int:
    """`num_params` without the tables of words and positions; the LayerNorm after the embedding counts."""
    attention = 4 * emb_dim * emb_dim + 4 * emb_dim  # query, key, value, output; with biases
    mlp = num_mlp_inputs * (emb_dim * mlp_dim + mlp_dim) + mlp_dim * emb_dim + emb_dim
    norms = 4 * emb_dim  # two LayerNorms, scale and bias
    # Outside the blocks: the LayerNorm of the embedding and the last one.
    return num_layers * (attention + mlp + norms) + 2 * (1 + num_embedding_norms) * emb_dim


class FlopCount(NamedTuple):
    """FLOPs of training (forward and backward) in each convention.

    causal: what bloomjax calls `mfu`. Every matrix product once forward and twice backward, the
        tied head included, the embedding lookup not; half of the attention square, since the other
        half is masked.
    full_attention: the same with the whole attention square.
    megatron_model: Megatron-DeepSpeed's formula with factor 3 (no recomputation). Lower than
        full_attention: its V / (16 L h) term is right at factor 4, where the head runs forward
        once, so factor 3 counts 4.5 V h for a head that costs 6 V h.
    megatron_hardware: the same formula with factor 4, for every block computed forward twice. The
        TFLOPs in the logs of BLOOM.
    six_n: 6 x all parameters, the rule of thumb of the scaling laws.
    """

    causal: float
    full_attention: float
    megatron_model: float
    megatron_hardware: float
    six_n: float


def flops_per_token(
    *,
    vocab_size: int,
    emb_dim: int,
    num_layers: int,
    mlp_dim: int,
    sequence_length_tokens: float,
    num_mlp_inputs: int = 1,
    **other_params: int,
) -> FlopCount:
    """FLOPs to train on one token of a sequence of `sequence_length_tokens`, or of that many in the mean.

    `other_params` are those of `num_params` that are in no matrix product: six_n counts them.

    Megatron's formula (megatron/training.py of Megatron-DeepSpeed), per sequence and with factor f,
    is 24 f s L h^2 (1 + s / (6h) + V / (16 L h)), written for mlp_dim = 4h; here its 24 h^2 is
    8 h^2 + 4 h mlp_dim, the same at 4h (8 h^2 + 6 h mlp_dim for a gated MLP).
    """
    block_weights = num_layers * (4 * emb_dim * emb_dim + (num_mlp_inputs + 1) * emb_dim * mlp_dim)
    head_weights = vocab_size * emb_dim
    # Scores and weighted sum: two products of sequence_length x emb_dim a token and layer.
    attention = 4 * num_layers * sequence_length_tokens * emb_dim
    matmuls = 2 * (block_weights + head_weights)
    megatron = 2 * block_weights + attention + 1.5 * head_weights
    params = num_params(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_layers=num_layers,
        mlp_dim=mlp_dim,
        num_mlp_inputs=num_mlp_inputs,
        **other_params,
    )
    return FlopCount(
        causal=3.0 * (matmuls + attention / 2),
        full_attention=3.0 * (matmuls + attention),
        megatron_model=3.0 * megatron,
        megatron_hardware=4.0 * megatron,
        six_n=6.0 * params,
    )


def flops_per_step(
    *, sequence_length_tokens: int, batch_size_samples: int, **shape: int
) -> FlopCount:
    """FLOPs of one training step over `batch_size_samples` full sequences; `shape` as in `flops_per_token`."""
    per_token = flops_per_token(**shape, sequence_length_tokens=sequence_length_tokens)
    num_tokens = batch_size_samples * sequence_length_tokens
    return FlopCount(*(flops * num_tokens for flops in per_token))


# Dense bf16 FLOP/s of one jax device, by a part of its device_kind; the first match counts, so a
# name stands before any name that is a part of it. NVIDIA prints Hopper's rates with 2:4 sparsity,
# which is twice the dense rate.
PEAK_FLOPS_PER_SECOND: dict[str, float] = {
    "A100": 312e12,  # NVIDIA A100 datasheet: 312 dense, PCIe and SXM
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet: 1,513 sparse
    "H100 NVL": 835e12,  # NVIDIA H100 datasheet: 1,671 sparse
    "H100": 989e12,  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    "H200 NVL": 835e12,  # NVIDIA H200 datasheet: 1,671 sparse
    "H200": 989e12,  # NVIDIA H200 datasheet, SXM: 1,979 sparse; the Hopper of a GH200 is the same
    "TPU v4 lite": 137e12,  # jax's own table, jax/_src/pallas/mosaic/tpu_info.py
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4, a chip of two cores is one device
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e, the name jax reports
    "TPU v5e": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p; jax reports "TPU v5" or "TPU v5p"
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e, the name jax reports
    "TPU v6e": 918e12,  # cloud.google.com/tpu/docs/v6e
}


def peak_flops_per_second(device_kind: str) -> float | None:
    """Dense bf16 peak of one device of this `jax.Device.device_kind`; None if it is not known."""
    kind = device_kind.casefold()
    if " mig " in kind:  # a slice of a GPU, whose share of the peak the name does not say
        return None
    for name, flops_per_second in PEAK_FLOPS_PER_SECOND.items():
        if name.casefold() in kind:
            return flops_per_second
    return None


def mfu(
    flops: float, seconds: float, num_devices: int, device_peak_flops_per_second: float | None
) -> float | None:
    """Share (0 to 1) of the peak of all devices that `flops` in `seconds` reached.

    Model FLOPs utilisation for `FlopCount.causal`, hardware utilisation for `megatron_hardware`.
    None if the peak is None.
    """
    if device_peak_flops_per_second is None:
        return None
    return flops / (seconds * num_devices * device_peak_flops_per_second)
