"""Eight virtual CPU devices and strict numerics for every test."""

import os
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # now: `plan` sets other flags for its target, and the first use of a device fixes their number


@pytest.fixture
def mesh_of():
    """mesh_of(data, fsdp, tensor): a mesh over the first data*fsdp*tensor virtual devices."""
    from bloomjax.partitioning import MeshShape

    def build(data: int, fsdp: int, tensor: int):
        devices = jax.devices()[: data * fsdp * tensor]
        return MeshShape(data, fsdp, tensor).build(devices)

    return build


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """Documents, vocabulary and store of `tiny_run`; its folder also keeps compiled programs."""
    from tiny_run import Text

    return Text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def undisturbed(tiny_text, tmp_path_factory):
    """MODEL_DIR of the 40 steps of `tiny_run` without a break, bfloat16 compute on one device."""
    import tiny_run

    model_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert tiny_run.run(tiny_text, model_dir) == 0
    return model_dir


@pytest.fixture
def command(capsys):
    """command(verb, *flags): exit code, stdout and stderr of a verb in this process."""

    def call(verb, *flags):
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
            verb.main([verb.__name__, *map(str, flags)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    call.capsys = capsys
    return call
