"""Names of hardware, and what the compilers are told of it."""

import importlib.metadata
import math
import os
import subprocess
import sys

import pytest

from bloomjax import flops, targets
from bloomjax.chips import GPUS, TPUS
from bloomjax.errors import BadInput


@pytest.mark.parametrize(
    ("text", "name", "num_devices", "num_hosts"),
    [
        ("tpu:v5p:8x8x8", "tpu:v5p:8x8x8", 512, 128),
        ("v5p-1024", "tpu:v5p:8x8x8", 512, 128),  # Cloud counts cores
        ("v4-1024", "tpu:v4:8x8x8", 512, 128),
        ("v5p-768", "tpu:v5p:4x8x12", 384, 96),
        ("v5p-4096", "tpu:v5p:8x16x16", 2048, 512),
        ("v4-8", "tpu:v4:2x2x1", 4, 1),
        ("v6e-256", "tpu:v6e:16x16", 256, 64),  # and chips
        ("v5litepod-128", "tpu:v5e:8x16", 128, 32),
        ("2xv6e-256", "tpu:v6e:2x16x16", 512, 128),
        ("tpu:v6e:2x16x16", "tpu:v6e:2x16x16", 512, 128),
        ("tpu:v4:2x4x4x8", "tpu:v4:2x4x4x8", 256, 64),
        ("tpu:v5e:1x1", "tpu:v5e:1x1", 1, 1),
        ("cuda:a100_sxm_80:1x48x8", "cuda:a100_sxm_80:1x48x8", 384, 48),
        ("384xa100", "cuda:a100_sxm_80:1x48x8", 384, 48),
        ("1xh200", "cuda:h200:1x1x1", 1, 1),
        ("4xh100_sxm", "cuda:h100_sxm:1x1x4", 4, 1),
        ("cpu:8", "cpu:8", 8, 1),
    ],
)
def test_names(text, name, num_devices, num_hosts):
    target = targets.parse(text)
    assert (target.name, target.num_devices, target.num_hosts) == (name, num_devices, num_hosts)
    assert targets.parse(target.name) == target


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5p", "no target 'v5p'; write one like tpu:v5p:8x8x8"),
        ("tpu:v5p", "no target"),
        ("gpu:h100:1x1x8", "no target"),
        ("cpu:", "no target"),
        ("cpu:2x2", "write cpu:N"),
        ("cpu:0", "at least 1"),
        ("tpu:v9:2x2", "no chip 'v9'; there are v4, v5e, v5p, v6e"),
        ("cuda:h999:1x1x8", "no chip 'h999'; there are a100_sxm_40, a100_sxm_80, h100_sxm, h200"),
        ("cuda:h100_sxm:2x8x8", "write 1xHOSTSxGPUS"),
        ("cuda:h100_sxm:8", "write 1xHOSTSxGPUS"),
        ("tpu:v5p:16x16", "3 sides up to 16x20x28"),
        ("tpu:v6e:16x32", "2 sides up to 16x16"),
        ("tpu:v5p:3x3x3", "the first two sides are even"),
        ("v5p-100", "there are v5p-8, v5p-16"),
        ("v6e-100", "there are v6e-1, v6e-4"),
        ("12xh100", "no whole number of hosts of 8"),
    ],
)
def test_what_does_not_exist(text, words):
    with pytest.raises(BadInput) as error:
        targets.parse(text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_links_close_to_rings_where_cloud_says():
    """3D slices whose sides are multiples of 4; 2D sides of 16 (cloud.google.com/tpu/docs/v5p, v5e)."""
    wraps = {
        "tpu:v5p:8x8x8": (True,) * 3, "tpu:v4:4x8x12": (True,) * 3, "tpu:v5p:8x8x6": (False,) * 3,
        "tpu:v4:2x2x4": (False,) * 3, "tpu:v6e:16x16": (True, True), "tpu:v5e:8x16": (False, True),
        "tpu:v6e:8x8": (False, False),
    }  # fmt: skip
    assert {name: targets.parse(name).wraps for name in wraps} == wraps


def test_chips_have_a_peak_and_plausible_numbers():
    assert not TPUS.keys() & GPUS.keys()
    for name, chip in (TPUS | GPUS).items():
        assert chip.name == name
        assert chip.peak_flops_per_second == flops.peak_flops_per_second(chip.device_kind)
        # FLOPs a byte of memory: a factor of 4 between the least and the most balanced of ten years.
        assert 100 < chip.peak_flops_per_second / chip.memory_bytes_per_second < 700
        assert 8 * 2**30 < chip.memory_bytes < 200 * 2**30
        assert 0.4 < chip.sustained_fraction < 0.8 and chip.sustained_source
        assert chip.network_bytes_per_second / chip.devices_per_host < chip.link_bytes_per_second
        assert chip.watts is None or 100 < chip.watts < 1000


def test_memory_that_a_program_may_use():
    limits = {name: targets.parse(name).memory_limit_bytes for name in ("1xa100", "v5p-8", "cpu:1")}
    assert limits["1xa100"] == pytest.approx(70.91 * 2**30, rel=1e-4)  # 0.92 x 79.26 - 2
    assert limits["v5p-8"] == pytest.approx(95.74 * 2**30)
    assert limits["cpu:1"] is None


def test_environment_of_a_compiling_process():
    cpu, gpu = targets.parse("cpu:384").environment(), targets.parse("8xh100").environment()
    assert cpu["XLA_FLAGS"] == "--xla_force_host_platform_device_count=384"
    assert gpu["XLA_FLAGS"] == "" and gpu["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert cpu["JAX_PLATFORMS"] == gpu["JAX_PLATFORMS"] == "cpu"
    program = "import sys, bloomjax.targets, bloomjax.plan; print('jax' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "False\n"


def test_gpu_description_is_balanced_text():
    text = targets.gpu_target_config(GPUS["h200"])
    assert text.count("{") == text.count("}") == 3
    assert "device_memory_size: 151397597184\n" in text and "ACCELERATED_FEATURES" in text
    assert "feature_extension: NONE" in targets.gpu_target_config(GPUS["a100_sxm_80"])


@pytest.fixture
def installed(monkeypatch):
    """installed(name=version, ...): the only packages that importlib.metadata knows."""

    def set_to(requires=(), **versions):
        def version(package):
            try:
                return versions[package.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(package) from None

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda package: list(requires))

    return set_to


def test_missing_compilers_say_what_to_install(installed):
    installed(jax="0.10.2", jaxlib="0.10.2")
    tpu, gpu, cpu = map(targets.parse, ("v6e-4", "8xh100", "cpu:8"))
    assert cpu.missing() is None
    for target in (tpu, gpu):
        assert (target.missing() or "").endswith("is not installed: pip install 'bloomjax[plan]'")


def test_versions_that_do_not_match(installed):
    installed(["libtpu==0.0.42.*; extra == 'tpu'"], jax="0.10.2", libtpu="0.0.51")
    missing = targets.parse("v6e-4").missing() or ""
    assert "libtpu 0.0.51 does not fit jax 0.10.2, which wants 0.0.42.*" in missing
    installed(["libtpu==0.0.42.*; extra == 'tpu'"], jax="0.10.2", libtpu="0.0.42.1")
    assert targets.parse("v6e-4").missing() is None
    installed(jaxlib="0.10.2", jax_cuda12_plugin="0.10.1", jax_cuda12_pjrt="0.10.2")
    missing = targets.parse("8xh100").missing() or ""
    assert "jaxlib 0.10.2, jax-cuda12-plugin 0.10.1 and jax-cuda12-pjrt 0.10.2" in missing
    assert "jax-cuda12-plugin==0.10.2" in missing


@pytest.mark.parametrize("text", ["tpu:v5p:4x4x4", "tpu:v4:2x2x2", "tpu:v6e:2x16x16", "v5e-4", "2xv6e-4",
                                  "cuda:h100_sxm:1x6x8", "4xa100", "1xh200"])  # fmt: skip
def test_the_compilers_know_them(text):
    target = targets.parse(text)
    if target.missing():
        pytest.skip(target.missing() or "")
    program = (
        "from bloomjax import targets\n"
        f"devices = targets.parse({text!r}).devices()\n"
        "print(len(devices), len({d.process_index for d in devices}), devices[0].device_kind)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | target.environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num, hosts, *kind = done.stdout.split(maxsplit=2)
    assert target.chip is not None
    assert (int(num), int(hosts)) == (target.num_devices, target.num_hosts)
    if target.platform == "tpu":  # absent GPUs have no name
        assert flops.peak_flops_per_second(kind[0]) == target.chip.peak_flops_per_second
    assert math.prod(target.topology) * target.num_slices == int(num)
