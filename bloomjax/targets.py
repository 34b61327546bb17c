"""Hardware by name, for compiling without it: `tpu:v5p:8x8x8`, `cuda:h100_sxm:1x48x8`, `cpu:8`, `v5p-1024`, `384xh100`.

No module here imports jax when it is loaded: a process must set `Target.environment()` before it does.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
from typing import Any

from bloomjax.chips import GPUS, TPUS, Chip
from bloomjax.errors import BadInput

# Share of a GPU's memory that jax may take (XLA_PYTHON_CLIENT_MEM_FRACTION, which `train` sets: jax's own default
# is 0.75), and what libraries take of it behind the compiler's back: cuBLAS, cuDNN, NCCL's registered buffers.
GPU_MEMORY_FRACTION = 0.92
GPU_LIBRARIES_BYTES = 2 * 2**30
# Chips of one slice, as Cloud offers them (cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}); a tuple without 1s is a torus
# from 64 chips (3D) or a side of 16 (2D) on.
_FLAT = {n: dims for dims in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
         for n in [math.prod(dims)]}  # fmt: skip
_CUBES = {n: dims for dims in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)) for n in [math.prod(dims)]}  # fmt: skip
_ALIASES = {"a100": "a100_sxm_80", "h100": "h100_sxm", "v5litepod": "v5e", "v5": "v5p"}
# libtpu's spelling, and how it should see a chip: "megacore" joins the two cores of one to one device.
_LIBTPU = {"v4": ("v4", "megacore"), "v5e": ("v5e", "default"), "v5p": ("v5", "megacore"),
           "v6e": ("v6e", "default")}  # fmt: skip
EXAMPLES = (
    "tpu:v5p:8x8x8, tpu:v6e:2x16x16 (two slices), cuda:a100_sxm_80:1x48x8 (48 hosts of 8), cpu:8, "
    "v5p-1024, 384xh100"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that need not be here.

    Attributes:
      platform: "tpu", "cuda" or "cpu".
      chip: None for "cpu".
      num_slices: of a TPU; slices see each other through the hosts' network.
      topology: chips along each side of one slice; hosts and GPUs a host; the number of virtual CPU devices.
    """

    platform: str
    chip: Chip | None
    num_slices: int
    topology: tuple[int, ...]

    @property
    def name(self) -> str:
        sizes = self.topology
        if self.platform == "cuda" or self.num_slices > 1:
            sizes = (self.num_slices, *sizes)
        chip = [self.chip.name] if self.chip else []
        return ":".join([self.platform, *chip, "x".join(map(str, sizes))])

    @property
    def num_devices(self) -> int:
        return self.num_slices * math.prod(self.topology)

    @property
    def devices_per_host(self) -> int:
        if self.platform == "cuda":
            return self.topology[1]
        return min(self.num_devices, self.chip.devices_per_host) if self.chip else self.num_devices

    @property
    def num_hosts(self) -> int:
        return self.num_devices // self.devices_per_host

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of a TPU slice close to a ring along each side."""
        if len(self.topology) == 2:
            return tuple(side == 16 for side in self.topology)
        closed = all(side % 4 == 0 for side in self.topology)
        return (closed,) * len(self.topology)

    @property
    def memory_limit_bytes(self) -> float | None:
        """What a program may use of one device; None for a CPU, whose memory is the host's."""
        if self.chip is None:
            return None
        if self.platform == "cuda":
            return self.chip.memory_bytes * GPU_MEMORY_FRACTION - GPU_LIBRARIES_BYTES
        return float(self.chip.memory_bytes)

    def environment(self) -> dict[str, str]:
        """Variables of a process that compiles for this target, to be set before jax is imported."""
        found = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
        if self.platform == "cpu":
            found["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.num_devices}"
        # libtpu looks at them wherever it is installed; several processes may hold it, its logs would fill /tmp.
        found |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
                  "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}  # fmt: skip
        return found

    def missing(self) -> str | None:
        """What the compiler for this target lacks here, in one line with its remedy; None if nothing."""
        if self.platform == "tpu":
            return _missing_libtpu()
        return _missing_cuda() if self.platform == "cuda" else None

    def devices(self) -> list[Any]:
        """The devices, as jax.experimental.topologies makes them; the compiler must not be `missing()`.

        BadInput for a topology that it does not know.
        """
        import jax
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.platform == "cpu":
            return jax.devices("cpu")[: self.num_devices]
        assert self.chip is not None
        if self.platform == "cuda":
            topology = "x".join(map(str, (1, *self.topology)))
            options = {"target_config": gpu_target_config(self.chip), "topology": topology}
            return list(topologies.get_topology_desc(platform="cuda", **options).devices)
        generation, config = _LIBTPU[self.chip.name]
        bounds = (2, 2, 1) if self.devices_per_host > 1 else (1, 1, 1)
        wraps = (*self.wraps, False)[:3]
        options = {"chip_config_name": config, "chips_per_host_bounds": bounds, "wrap": wraps,
                   "num_slices": self.num_slices}  # fmt: skip
        name = f"{generation}:{'x'.join(map(str, self.topology))}"
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"target {self.name}: libtpu does not take it: {reason}") from None
        return list(found.devices)


def parse(text: str) -> Target:
    """The target of this name. BadInput, with what there is, for one that does not exist."""
    cloud = re.fullmatch(r"(?:(\d+)x)?(v\w+)-(\d+)", text)
    gpus = re.fullmatch(r"(\d+)x([a-z]\w+)", text)
    if cloud and int(cloud[1] or 1) > 0:
        return _cloud_slice(text, int(cloud[1] or 1), cloud[2], int(cloud[3]))
    if gpus:
        num, chip = int(gpus[1]), _chip(text, GPUS, gpus[2])
        per_host = min(num, chip.devices_per_host)
        if num < 1 or num % per_host:
            raise BadInput(f"target {text}: {num} GPUs are no whole number of hosts of {per_host}")
        return Target("cuda", chip, 1, (num // per_host, per_host))
    platform, _, rest = text.partition(":")
    chip_name, _, sizes_text = rest.rpartition(":")
    if platform not in ("tpu", "cuda", "cpu") or not re.fullmatch(r"\d+(x\d+)*", sizes_text):
        raise BadInput(f"no target {text!r}; write one like {EXAMPLES}")
    sizes = tuple(map(int, sizes_text.split("x")))
    if min(sizes) < 1:
        raise BadInput(f"target {text}: sizes are at least 1")
    if platform == "cpu":
        if chip_name or len(sizes) > 1:
            raise BadInput(f"target {text}: write cpu:N")
        return Target("cpu", None, 1, sizes)
    if platform == "tpu":
        return _slices(text, _chip(text, TPUS, chip_name), sizes)
    if len(sizes) != 3 or sizes[0] != 1:
        raise BadInput(f"target {text}: write 1xHOSTSxGPUS, as in cuda:a100_sxm_80:1x48x8")
    return Target("cuda", _chip(text, GPUS, chip_name), 1, sizes[1:])


def _chip(text: str, there: dict[str, Chip], name: str) -> Chip:
    chip = there.get(_ALIASES.get(name, name))
    if chip is None:
        raise BadInput(f"target {text}: no chip {name!r}; there are {', '.join(there)}")
    return chip


def _slices(text: str, chip: Chip, sizes: tuple[int, ...]) -> Target:
    num_sides = 3 if chip.name in ("v4", "v5p") else 2
    num_slices, sides = (sizes[0], sizes[1:]) if len(sizes) == num_sides + 1 else (1, sizes)
    limits = {2: (16, 16), 3: (16, 20, 28)}[num_sides]
    if len(sides) != num_sides or any(a > b for a, b in zip(sorted(sides), limits, strict=True)):
        example = "8x8x8" if num_sides == 3 else "16x16"
        raise BadInput(
            f"target {text}: a slice of {chip.name} has {num_sides} sides up to {'x'.join(map(str, limits))}, as in "
            f"tpu:{chip.name}:{example}, or tpu:{chip.name}:2x{example} for two slices"
        )
    if math.prod(sides) > 1 and (sides[0] % 2 or sides[1] % 2):
        raise BadInput(f"target {text}: a host has 2x2 chips, so the first two sides are even")
    return Target("tpu", chip, num_slices, sides)


def _cloud_slice(text: str, num_slices: int, generation: str, size: int) -> Target:
    """Cloud counts cores for v4 and v5p (two a chip), and chips for v5e and v6e."""
    chip = _chip(text, TPUS, generation)
    if chip.name in ("v5e", "v6e"):
        sides, there = _FLAT.get(size), _FLAT
    else:
        there = {2 * n: dims for n, dims in _CUBES.items()} | {
            2 * 64 * n: () for n in (1, 2, 4, 6, 8, 12, 16)
        }
        sides = None if size % 2 else _cube(size // 2)
    if sides is None:
        sizes = ", ".join(f"{generation}-{n}" for n in there)
        raise BadInput(
            f"target {text}: no such slice; there are {sizes} and, by its sides, tpu:{chip.name}:..."
        )
    return Target("tpu", chip, num_slices, sides)


def _cube(num_chips: int) -> tuple[int, ...] | None:
    """Sides of the slice with so many chips: from 64 on multiples of 4, as near to a cube as they get."""
    if num_chips in _CUBES:
        return _CUBES[num_chips]
    best = None
    for a in range(4, 17, 4):
        for b in range(a, 21, 4):
            c = num_chips // (a * b)
            if a * b * c == num_chips and b <= c <= 28 and c % 4 == 0:
                best = min(best or (a, b, c), (a, b, c), key=lambda sides: sides[2] - sides[0])
    return best


# Compute capability; shared memory of a multiprocessor and of a block that asks for it; multiprocessors, FP32 units of
# each, L2 bytes, GHz: CUDA C++ programming guide, "compute capabilities", and NVIDIA's white papers on A100 and H100.
_GPU_LIMITS = {
    "A100": ((8, 0), 167_936, 166_912, 108, 64, 41_943_040, 1.41),
    "H100": ((9, 0), 233_472, 232_448, 132, 128, 52_428_800, 1.98),
    "H200": ((9, 0), 233_472, 232_448, 132, 128, 52_428_800, 1.98),
}


def gpu_target_config(chip: Chip) -> str:
    """XLA's description of a GPU (stream_executor.GpuTargetConfigProto as text): what its compiler asks a real one."""
    (major, minor), core_smem, block_smem, cores, fpus, l2, clock = _GPU_LIMITS[chip.device_kind]
    # Instructions of sm_90a, such as wgmma, are an extension in XLA's terms.
    extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    fields = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49152, "shared_memory_per_core": core_smem,
        "shared_memory_per_block_optin": block_smem, "core_count": cores, "fpus_per_core": fpus,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.memory_bytes_per_second), "l2_cache_size": l2,
        "clock_rate_ghz": clock, "device_memory_size": chip.memory_bytes,
    }  # fmt: skip
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    capability = f"major: {major} minor: {minor} feature_extension: {extension}"
    return "\n".join(
        ["gpu_device_info {", *lines, f"  cuda_compute_capability {{ {capability} }}",
         # Of CUDA: without it there are no float8 matmuls.
         f'  name: "NVIDIA {chip.device_kind}"', '  runtime_version: "12.8.0"',
         '  device_vendor: "NVIDIA Corporation"', "}",
         'platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 10 patch: 0 }", ""]
    )  # fmt: skip


# ---- compilers ----

_INSTALL = "pip install 'bloomjax[plan]'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_libtpu() -> str | None:
    found, jax_version = _version("libtpu"), _version("jax")
    if found is None:
        return f"libtpu, the compiler for TPUs, is not installed: {_INSTALL}"
    wanted = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    for requirement in wanted:  # such as: libtpu==0.0.42.*; extra == "tpu"
        prefix = re.search(r"==\s*([\d.]+?)\.?\*", requirement)
        if prefix and not (found + ".").startswith(prefix[1] + "."):
            return f"libtpu {found} does not fit jax {jax_version}, which wants {prefix[1]}.*: {_INSTALL}"
    return None


def _missing_cuda() -> str | None:
    jax_version = _version("jaxlib")
    for cuda, compiler in (("12", "nvidia.cuda_nvcc"), ("13", "nvidia.cu13")):
        plugin, pjrt = _version(f"jax-cuda{cuda}-plugin"), _version(f"jax-cuda{cuda}-pjrt")
        if plugin is None or pjrt is None:
            continue
        if not plugin == pjrt == jax_version:
            return (
                f"jaxlib {jax_version}, jax-cuda{cuda}-plugin {plugin} and jax-cuda{cuda}-pjrt {pjrt} must have one "
                f"version: pip install jax-cuda{cuda}-plugin=={jax_version} jax-cuda{cuda}-pjrt=={jax_version}"
            )
        try:
            has_compiler = importlib.util.find_spec(compiler) is not None
        except ModuleNotFoundError:
            has_compiler = False
        if not has_compiler:
            return f"ptxas and libdevice, parts of the compiler for NVIDIA GPUs, are not installed: {_INSTALL}"
        return None
    return f"jax's CUDA plugin, the compiler for NVIDIA GPUs, is not installed: {_INSTALL}"
