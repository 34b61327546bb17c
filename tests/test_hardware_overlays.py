"""gin/hardware/*.gin say how a step is laid out on a machine, and nothing about what it computes."""

import re

import pytest
from tiny_run import REPOSITORY

from bloomjax import config, plan_measure, targets

OVERLAYS = {
    "a100_80_384": ("384xa100", "176b.gin"),
    "h100_384": ("384xh100", "176b.gin"),
    "h100_512": ("512xh100", "176b.gin"),
    "h200_384": ("384xh200", "176b.gin"),
    "v4_1024": ("v4-1024", "176b.gin"),
    "v5p_1024": ("v5p-1024", "176b.gin"),
    "v6e_256": ("v6e-256", "176b.gin"),
    "v6e_2x256": ("2xv6e-256", "176b.gin"),
    "v5e_256": ("v5e-256", "7b1.gin"),
    "gpu_24gb": ("1xa100_sxm_40", "560m.gin"),
    "h200_1": ("1xh200", "1b1.gin"),
    "h200_1_7b": ("1xh200", "7b1.gin"),
    "h100_8": ("8xh100", "7b1.gin"),
    "laptop": ("cpu:8", "tiny.gin"),
}
MAY_BIND = {
    "MeshShape.data", "MeshShape.fsdp", "MeshShape.tensor",
    "StepOptions.microbatch_size_samples", "StepOptions.compiler_options", "StepOptions.loss_chunk_tokens",
    "BloomConfig.remat_policy", "BloomConfig.attention_kernel", "BloomConfig.scan_layers",
}  # fmt: skip


def bound(name):
    """What the overlay binds, and what it includes."""
    text = config.find(f"hardware/{name}.gin").read_text()
    statements = [line for line in text.splitlines() if line and line[0] not in "# }"]
    names = set()
    for line in statements:
        if included := re.fullmatch(r"include 'hardware/(\w+)\.gin'", line):
            names |= bound(included[1])
        else:
            names.add(re.split(r"\s*=", line)[0])
    return names


def test_all_are_here():
    found = {path.stem for path in (REPOSITORY / "gin" / "hardware").glob("*.gin")}
    assert found == set(OVERLAYS) | {"nvidia"}  # which the others include


@pytest.mark.parametrize("name", OVERLAYS)
def test_they_change_only_the_layout(name):
    needed = {"MeshShape.data", "MeshShape.fsdp", "MeshShape.tensor"}
    if OVERLAYS[name][0].endswith(("a100", "a100_sxm_40", "h100", "h200")):
        needed = needed | {"StepOptions.compiler_options"}
    assert needed <= bound(name) <= MAY_BIND


@pytest.mark.parametrize("name", OVERLAYS)
def test_train_takes_them(name):
    """Every check of mesh, model, microbatch and ramp that `train` makes before step 1."""
    target_name, size = OVERLAYS[name]
    target = targets.parse(target_name)

    def build(binding):
        return config.build(binding, size, [f"include 'hardware/{name}.gin'"])

    setup = plan_measure.Setup(
        model=build("train.model"), optimizer=build("train.optimizer"), mesh=build("train.mesh"),
        step=build("train.step"), batch_schedule=build("train.batch_schedule"), num_steps=100_000,
        sequence_length=build("TrainData.sequence_length"),
    )  # fmt: skip
    found = plan_measure.shape_figures(setup, target, plan_measure.Assumptions())
    assert found["num_devices"] == target.num_devices
    assert found["fits"] is not False
    assert found["num_rows"] / found["batch_size_samples"] <= 1.125
