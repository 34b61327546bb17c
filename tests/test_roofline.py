"""The estimate of a step's time, against numbers worked out by hand."""

import dataclasses
from typing import NamedTuple

import pytest

from bloomjax import flops, roofline
from bloomjax.chips import GPUS, TPUS
from bloomjax.roofline import Cluster, bytes_per_second


class Sent(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    wire_bytes: float


A100 = dataclasses.replace(GPUS["a100_sxm_80"], link_fraction=1.0)
V5P = dataclasses.replace(TPUS["v5p"], link_fraction=1.0)
NODES = Cluster(A100, 8, 200e9)


def cube(*sides, wraps=True, num_slices=1):
    return Cluster(V5P, 4, 25e9, num_slices=num_slices, sides=sides, wraps=(wraps,) * len(sides))


@pytest.mark.parametrize(
    ("mesh", "axes", "expected"),
    [
        ((3, 16, 8), ("tensor",), 300e9),  # a host's own NVLinks
        ((3, 16, 8), ("fsdp",), 25e9),  # 8 rings leave each host, one GPU of each in it
        ((3, 16, 8), ("data",), 25e9),
        ((3, 32, 4), ("fsdp",), 50e9),  # two GPUs of a ring in each host
        ((1, 384, 1), ("fsdp",), 200e9),
        ((1, 8, 1), ("fsdp",), 300e9),
        ((1, 24, 16), ("tensor",), 200e9),  # over two hosts
        ((3, 16, 8), ("data", "fsdp"), 25e9),
        ((3, 16, 8), ("?",), 200e9),
    ],
)
def test_rates_of_gpus(mesh, axes, expected):
    shape = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    assert bytes_per_second(NODES, shape, axes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cluster", "mesh", "links"),
    [
        # Two links a closed side: tensor one side, fsdp the other two.
        (cube(8, 8, 8), (1, 64, 8), {"tensor": 2, "fsdp": 4}),
        (cube(8, 8, 8), (1, 512, 1), {"fsdp": 6}),
        (cube(8, 8, 8), (8, 8, 8), {"data": 2, "fsdp": 2, "tensor": 2}),
        (cube(8, 8, 8, wraps=False), (1, 64, 8), {"tensor": 1, "fsdp": 2}),
        # Half of a side is a line, and what is left of it too.
        (cube(16, 16), (1, 32, 8), {"tensor": 1, "fsdp": 3}),
        (cube(4, 8, 12), (3, 16, 8), {"tensor": 2}),
        (cube(16, 16, num_slices=2), (2, 16, 16), {"tensor": 2, "fsdp": 2}),
    ],
)
def test_rates_of_tpus(cluster, mesh, links):
    shape = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    found = {axis: bytes_per_second(cluster, shape, (axis,)) / 9e10 for axis in links}
    assert found == pytest.approx(links)


def test_between_slices_hosts_share_their_network():
    cluster = cube(16, 16, num_slices=2)
    shape = {"data": 2, "fsdp": 16, "tensor": 16}
    assert bytes_per_second(cluster, shape, ("data",), leaves_slice=True) == 25e9 / 4


def test_estimate_of_gpus_shows_tensor():
    shape = {"data": 3, "fsdp": 16, "tensor": 8}
    sent = [
        Sent("all-gather", ("fsdp",), 250e9),
        Sent("reduce-scatter", ("fsdp",), 250e9),
        Sent("all-gather", ("tensor",), 600e9),
    ]
    found = roofline.estimate(
        NODES, shape, hardware_flops=312e12 * 0.711 * 30, memory_bytes=2039e9 * 5, traffic=sent
    )
    assert found.compute_seconds == pytest.approx(30)
    assert found.memory_seconds == pytest.approx(5)
    assert found.network_seconds == pytest.approx({"fsdp": 20.0, "tensor": 2.0})
    assert found.step_seconds == pytest.approx(32) and found.bound == "compute"
    assert found.no_overlap_seconds == pytest.approx(57)
    slow = dataclasses.replace(NODES, network_bytes_per_second=50e9)  # 4 x 100 Gb/s
    found = roofline.estimate(
        slow, shape, hardware_flops=312e12 * 0.711 * 30, memory_bytes=0.0, traffic=sent
    )
    assert found.step_seconds == pytest.approx(80) and found.bound == "network (fsdp)"


def test_estimate_of_tpus_hides_tensor():
    shape = {"data": 1, "fsdp": 64, "tensor": 8}
    found = roofline.estimate(
        cube(8, 8, 8), shape, hardware_flops=459e12 * V5P.sustained_fraction * 10, memory_bytes=0.0,
        traffic=[Sent("all-gather", ("tensor",), 9e10 * 2 * 4)],
    )  # fmt: skip
    assert found.network_seconds == pytest.approx({"tensor": 4.0})
    assert found.step_seconds == pytest.approx(10) and found.exposed_seconds == 0


def test_memory_traffic_is_that_of_its_parts():
    kwargs = dict(
        params=1000, gathered_params=0, num_microbatches=1, tokens=0, emb_dim=64, mlp_dim=256, num_layers=2,
        num_heads=4, vocab_size=1000, sequence_length=128, num_tensor=1, passes=3.0, scores_in_memory=False,
    )  # fmt: skip
    assert roofline.memory_bytes(**kwargs) == 28_000  # AdamW: 4 reads and 3 writes of 4 bytes
    weights = roofline.memory_bytes(**kwargs | {"gathered_params": 10, "num_microbatches": 5})
    assert weights - 28_000 == 50 * (2 * 2 + 3 * 2 + 4 * 4)
    with_tokens = kwargs | {"tokens": 128}
    scores = roofline.memory_bytes(**with_tokens | {"scores_in_memory": True})
    # 64 of 128 keys on average, 12 bytes each, of 4 heads, 2 layers, 3 passes, 128 queries.
    assert scores - roofline.memory_bytes(**with_tokens) == 64 * 12 * 4 * 2 * 3 * 128
    half = roofline.memory_bytes(**with_tokens | {"num_tensor": 2})
    assert half - 28_000 == (roofline.memory_bytes(**with_tokens) - 28_000) / 2


# The layouts that BigScience timed last before the run (tr11-176B-ml/chronicles-prequel.md): layers, width, seconds of
# a step of 2048 x 2048 tokens on 384 A100, and the TFLOP/s a GPU in its log. The last is the run itself.
TIMED = [
    (70, 14336, 121.63, 128.92), (70, 14336, 102.03, 153.68), (70, 14336, 104.50, 150.05),
    (70, 14336, 105.89, 148.08), (70, 14336, 102.27, 153.33), (82, 13312, 104.45, 151.71),
    (82, 13312, 123.71, 128.10), (82, 13312, 108.78, 145.68), (100, 12288, 120.96, 136.20),
    (106, 12288, 116.54, 149.75), (106, 12288, 118.79, 146.90), (106, 12288, 121.42, 143.73),
    (94, 13312, 124.10, 146.12), (70, 14336, 105.22, 149.02),
]  # fmt: skip


@pytest.mark.parametrize(("num_layers", "emb_dim", "seconds", "logged"), TIMED)
def test_the_meter_reads_what_the_logs_of_bloom_read(num_layers, emb_dim, seconds, logged):
    found = flops.flops_per_step(
        vocab_size=250_880, emb_dim=emb_dim, num_layers=num_layers, mlp_dim=4 * emb_dim,
        sequence_length_tokens=2048, batch_size_samples=2048,
    )  # fmt: skip
    assert found.megatron_hardware / seconds / 384 / 1e12 == pytest.approx(logged, abs=0.011)
