"""An allocation that fails is one line."""

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from bloomjax import job, out_of_memory


def error(message):
    return jax.errors.JaxRuntimeError(message)


@pytest.fixture
def device(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_in_use": 100 * 2**30, "bytes_limit": 127 * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])


@pytest.mark.parametrize(
    "asked", ["34359738368 bytes.", "32.00GiB.", "32.0GiB. [tf-allocator-allocation-error='']"]
)
def test_on_a_gpu(device, asked):
    message = f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {asked}"
    found = out_of_memory.line(error(message))
    assert found is not None and "\n" not in found
    assert found.startswith(
        "out of memory on NVIDIA H200: 100.0 GiB are in use, and 32.0 GiB more were needed, of 127.0 GiB; "
    )
    assert "StepOptions.microbatch_size_samples" in found


def test_on_a_tpu(device):
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40.50G of "
        "15.48G hbm. Exceeded hbm capacity by 25.02G.\n\nTotal hbm usage >= 41.02G"
    )
    found = out_of_memory.line(error(message))
    assert found is not None and "40.5 GiB are needed and 15.5 GiB are there" in found


def test_what_this_cpu_says():
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jnp.zeros(1 << 50).block_until_ready()
    found = out_of_memory.line(raised.value)
    assert found is not None and "4,194,304.0 GiB more were needed" in found


def test_other_errors_are_none_of_its_business():
    assert out_of_memory.line(error("INTERNAL: a kernel failed")) is None
    assert out_of_memory.line(error("RESOURCE_EXHAUSTED: too many files")) is None
    assert (
        out_of_memory.line(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."))
        is None
    )


def test_a_process_of_several_ends_with_it(capsys):
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."
    assert job.fail_with(error(message)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "4.0 GiB more were needed" in err


def test_a_run_ends_in_one_line(tiny_text, tmp_path):
    """2^55 bytes, which no allocator promises."""
    done = tiny_run.execute(
        tiny_run.command(tiny_text, tmp_path / "run", f"--gin.BloomConfig.mlp_dim={2**44}")
    )
    assert done.returncode == 1, done.stderr
    (line,) = [each for each in done.stderr.splitlines() if "out of memory" in each]
    assert line.startswith("bloomjax: out of memory on cpu: ")
    assert "Traceback" not in done.stderr
