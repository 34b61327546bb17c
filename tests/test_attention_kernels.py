"""Choice of a kernel by name and platform, its place on a mesh, and the check on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from reference_bloom import jit
from test_flash_attention import PlainKernel

from bloomjax import attention_kernels, kernel_check
from bloomjax.attention import alibi_slopes, xla_attention
from bloomjax.attention_kernels import KERNELS, attend, check_kernel, flash_kernel
from bloomjax.errors import BadInput
from bloomjax.flash_attention_gpu import Tiles, TritonKernel
from bloomjax.flash_attention_tpu import TpuKernel
from bloomjax.triton_kernels import Tile


def problem(B=2, L=24, H=4, K=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, B, L, H, K)), dtype)
    return q, k, v, jnp.asarray(alibi_slopes(H), jnp.float32)


@pytest.fixture
def on(monkeypatch):
    """Sets the platform that kernels believe to be on."""
    return lambda name: monkeypatch.setattr(attention_kernels, "platform", lambda: name)


def test_an_unknown_kernel_is_named():
    with pytest.raises(BadInput, match="no attention kernel 'flash3'; there are: auto, xla, .*"):
        check_kernel("flash3")
    for name in KERNELS:
        check_kernel(name)


def test_a_kernel_of_another_platform_is_refused():
    for name, platform in attention_kernels._PLATFORM_OF.items():
        line = (
            f"attention kernel '{name}' is for {platform.upper()}s, and this is a CPU; 'auto' takes"
        )
        with pytest.raises(BadInput, match=line):
            attend(name, *problem())


def test_what_a_kernel_cannot_do_is_named(on):
    on("gpu")
    key = jax.random.key(0)
    with pytest.raises(BadInput, match="'flash_gpu' has no attention dropout; take 'xla' or"):
        attend("flash_gpu", *problem(), dropout_rate=0.1, dropout_rng=key)
    with pytest.raises(BadInput, match="'cudnn' has no alibi_rounding='bf16_hf'"):
        attend("cudnn", *problem(), rounding="bf16_hf")
    with pytest.raises(BadInput, match="'cudnn' is causal over whole windows: no documents"):
        attend("cudnn", *problem(), documents_BL=jnp.zeros((2, 24), jnp.int32))


@pytest.mark.parametrize(
    ("platform", "length", "is_plain", "expected"),
    [
        ("cpu", 1024, True, "xla"), ("cpu", 2048, True, "xla_blocked"), ("cpu", 64, False, "xla"),
        ("gpu", 64, True, "flash_gpu"), ("tpu", 64, True, "flash_tpu"), ("gpu", 64, False, "xla_blocked"),
        ("tpu", 2048, False, "xla_blocked"), ("metal", 64, True, "xla_blocked"),
    ],
)  # fmt: skip
def test_auto(platform, length, is_plain, expected):
    kernel = attention_kernels._kernel_of(platform, is_plain, length, 64, jnp.dtype("bfloat16"))
    assert kernel == expected


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "expected"),
    [
        ("gpu", 80, "float32", "flash_gpu"), ("gpu", 160, "bfloat16", "xla_blocked"),
        ("gpu", 8, "bfloat16", "xla_blocked"), ("gpu", 64, "float16", "xla_blocked"),
        ("tpu", 160, "bfloat16", "flash_tpu"), ("tpu", 264, "bfloat16", "xla_blocked"),
    ],
)  # fmt: skip
def test_auto_takes_what_the_kernel_has(platform, head_dim, dtype, expected):
    kernel = attention_kernels._kernel_of(platform, True, 64, head_dim, jnp.dtype(dtype))
    assert kernel == expected


def test_auto_is_the_plain_kernel_here():
    arrays = problem()
    np.testing.assert_array_equal(
        jit(functools.partial(attend, "auto"))(*arrays), jit(xla_attention)(*arrays)
    )


def test_the_platform_is_that_of_the_mesh(mesh_of):
    assert attention_kernels.platform() == "cpu"
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert attention_kernels.platform() == "cpu"
    device = jax.sharding.AbstractDevice("TPU v5", 2, "tpu")
    absent = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(absent):
        assert attention_kernels.platform() == "tpu"


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 4)])
def test_each_device_runs_a_kernel_on_its_rows_and_heads(mesh_of, on, monkeypatch, shape):
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: PlainKernel())
    arrays = problem(B=8)
    documents = jnp.asarray(np.repeat([[0, 1]], [10, 14], 1).repeat(8, 0), jnp.int32)

    def context_and_grads(q, k, v, slopes):
        attention = functools.partial(attend, "flash_gpu", slopes_H=slopes, documents_BL=documents)
        context, pull = jax.vjp(attention, q, k, v)
        return context, *pull(jnp.sin(context))

    on("gpu")
    alone = jit(context_and_grads)(*arrays)
    with jax.set_mesh(mesh_of(*shape)):
        split = jit(context_and_grads)(*arrays)
    for a, b in zip(alone, split, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["flash_gpu", "flash_hopper", "flash_tpu"])
def test_flash_kernels_can_be_imported_anywhere(name):
    block_q, block_k = flash_kernel(name).block_sizes(2048, 64)
    assert max(block_q, block_k) % min(block_q, block_k) == 0


# ---- the check on the device ----


def check(name="flash_gpu", **changes):
    options = dict(num_heads=16, head_dim=64, dtype="float32", has_masks=True)
    return kernel_check.check_attention_kernel(name, device=jax.devices()[0], **(options | changes))


def test_the_check_passes_a_right_kernel(on, monkeypatch):
    on("gpu")
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: PlainKernel())
    assert 0 < check() < 1e-5
    assert check("xla") is None and check("auto") is None  # nothing opaque on a CPU


@pytest.mark.parametrize("fault", ["context", "gradient", "nan", "documents"])
def test_the_check_finds_a_wrong_kernel(on, monkeypatch, fault):
    class Wrong(PlainKernel):
        def forward(self, inputs):
            if fault == "documents":
                inputs = inputs._replace(documents_BL=None)
            context, lse = super().forward(inputs)
            if fault == "context":
                context = context.at[0, 299, 3, 0].add(0.01)  # of one element
            return (context * jnp.nan if fault == "nan" else context), lse

        def backward(self, inputs, lse, delta, g):
            dq, dk, dv = super().backward(inputs, lse, delta, g)
            return dq, dk * (1.001 if fault == "gradient" else 1), dv

    on("gpu")
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: Wrong())
    with pytest.raises(
        BadInput, match="'flash_gpu' is wrong on cpu with jax .* off by .*xla_blocked"
    ):
        check()


def test_a_kernel_that_does_not_compile_is_one_line(on, monkeypatch):
    class Broken(PlainKernel):
        def forward(self, inputs):
            raise NotImplementedError("no such instruction\nand a long dump")

    on("gpu")
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: Broken())
    with pytest.raises(
        BadInput, match="does not run on cpu .*: no such instruction; take"
    ) as error:
        check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["xla", "xla_blocked", "flash_gpu", "flash_tpu"])
def test_without_slopes_there_is_no_bias(name, on, monkeypatch):
    """Context and gradients are those of JAX's own attention; the kernels are interpreted."""
    small = {
        "flash_gpu": lambda: TritonKernel(32, 32, Tiles(*[Tile(32, 32, 4, 1)] * 3), interpret=True),
        "flash_tpu": lambda: TpuKernel(block_tokens=128, interpret=True),
    }
    on({"flash_gpu": "gpu", "flash_tpu": "tpu"}.get(name, "cpu"))
    monkeypatch.setattr(attention_kernels, "flash_kernel", lambda name: small[name]())
    q, k, v, _ = problem(B=1, L=70, H=2, K=32)

    def context_and_grads(attention):
        def call(*qkv):
            context, pull = jax.vjp(attention, *qkv)
            return context, *pull(jnp.cos(context))

        return jit(call)(q, k, v)

    got = context_and_grads(lambda *qkv: attend(name, *qkv, None))
    want = context_and_grads(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
