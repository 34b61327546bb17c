"""What one device of each supported kind has: memory, rates, links, power; every number with its source.

A device is what jax calls one: a GPU, or a TPU chip (both cores of a v4 or v5p together). Rates are those of the data
sheets, in bytes a second and one direction; what of them a training step reaches stands beside them as a fraction.
Peaks of matrix products are in `flops.PEAK_FLOPS_PER_SECOND`, by `device_kind`.
"""

import dataclasses

from bloomjax import flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      name: as in a target of `plan`.
      device_kind: part of what jax reports for it.
      memory_bytes: all that a GPU has; of a TPU what its compiler lets a program use.
      memory_bytes_per_second: of the device's own memory.
      link_bytes_per_second: of one link of a TPU's torus; of all links of a GPU inside its host together.
      link_fraction: of links and network, what a large collective was measured to reach.
      devices_per_host: of the usual machine.
      network_bytes_per_second: what leaves a host, all its adapters together.
      sustained_fraction: FLOPs that the devices did (recomputation included) over peak, of the best published whole
        step of a large dense model; sustained_source says whose.
      watts: TDP, or the highest draw measured; None where nobody published it.
    """

    name: str
    device_kind: str
    memory_bytes: int
    memory_bytes_per_second: float
    link_bytes_per_second: float
    link_fraction: float
    devices_per_host: int
    network_bytes_per_second: float
    sustained_fraction: float
    sustained_source: str
    watts: float | None

    @property
    def peak_flops_per_second(self) -> float:
        """Dense bf16 peak of one device."""
        peak = flops.peak_flops_per_second(self.device_kind)
        assert peak is not None, self.device_kind  # a test looks at every chip
        return peak


_GIB = 2**30
_GBIT = 1e9 / 8

# Memory: the "available" of libtpu's own out-of-memory message (libtpu 0.0.42). Memory and network rates:
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (v4's network: the 25 GB/s a host of the book below). One link, one
# direction: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus); its all-gather on a v5e torus reaches 95 %
# of that (.../sharding). v5e and v6e come as machines of 4 chips, of which two share the adapters of a host. Sustained:
# MaxText's README, model FLOPs of its best dense model on that chip; with its light recomputation the hardware did
# hardly more. Power of v4: Jouppi et al. 2023, arXiv 2304.01433, table 4; of the others Google says nothing.
_TPUS = (
    Chip("v4", "TPU v4", int(30.75 * _GIB), 1228e9, 4.5e10, 0.95, 4, 200 * _GBIT,
         0.589, "MaxText, 52B on 384 v4", 192.0),
    Chip("v5e", "TPU v5 lite", int(15.75 * _GIB), 819e9, 4.5e10, 0.95, 4, 100 * _GBIT,
         0.669, "MaxText, 32B on 256 v5e", None),
    Chip("v5p", "TPU v5", int(95.74 * _GIB), 2765e9, 9e10, 0.95, 4, 200 * _GBIT,
         0.688, "MaxText, 256B on 512 v5p", None),
    Chip("v6e", "TPU v6 lite", int(31.25 * _GIB), 1640e9, 9e10, 0.95, 4, 400 * _GBIT,
         0.503, "MaxText, 70B on v6e", None),
)  # fmt: skip

# Memory in bytes as the driver reports it, memory rates and power: NVIDIA's data sheets of A100, H100 SXM and H200.
# Links: 12 (A100) or 18 (Hopper) NVLinks of 25 GB/s a direction. NCCL's ring reaches 82 % of them (8 H200, SHARP off:
# 367.6 of 450 GB/s; stas00/ml-engineering, network/README.md), taken for the network too. Network: 8 adapters of
# 200 Gb/s (DGX A100) or 400 Gb/s (DGX H100, H200). Sustained: HFU of a 70B with full recomputation on 64 GPUs,
# mosaicml/llm-foundry, scripts/train/benchmarking/README.md (A100: 1,600 Gb/s a node); H200 is not in it.
_A100, _H100 = "llm-foundry, 70B on 64 A100", "llm-foundry, 70B on 64 H100"
_GPUS = (
    Chip("a100_sxm_40", "A100", 42_331_013_120, 1555e9, 300e9, 0.82, 8, 1600 * _GBIT, 0.711, _A100, 400.0),
    Chip("a100_sxm_80", "A100", 85_100_068_864, 2039e9, 300e9, 0.82, 8, 1600 * _GBIT, 0.711, _A100, 400.0),
    Chip("h100_sxm", "H100", 84_942_979_072, 3352e9, 450e9, 0.82, 8, 3200 * _GBIT, 0.568, _H100, 700.0),
    Chip("h200", "H200", 151_397_597_184, 4800e9, 450e9, 0.82, 8, 3200 * _GBIT, 0.568, _H100, 700.0),
)  # fmt: skip

TPUS = {chip.name: chip for chip in _TPUS}
GPUS = {chip.name: chip for chip in _GPUS}
