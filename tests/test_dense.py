"""`dense` and what is pointwise around it, against float64; float8 against ml_dtypes; what GPUs are asked for."""

import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax import float8
from bloomjax.dense import How, dense
from bloomjax.errors import BadInput
from bloomjax.pointwise import gelu, layer_norm

QKV = ("BLD,DcHK->BLcHK", ("embed", "qkv", "heads", "kv"), (16, 3, 4, 6), 3)
OUT = ("BLHK,HKD->BLD", ("heads", "kv", "embed"), (4, 6, 16), 1)
MLP_IN = ("BLD,DF->BLF", ("embed", "mlp"), (16, 24), 1)
B, L = 4, 6


def arrays(product, seed=0):
    """x, w, b and the result's gradient, float32."""
    spec, _, shape, num_out = product
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, L, *shape[: len(shape) - num_out])).astype(np.float32)
    w = rng.standard_normal(shape).astype(np.float32) / 4
    b = rng.standard_normal(shape[len(shape) - num_out :]).astype(np.float32)
    return x, w, b, rng.standard_normal((B, L, *b.shape)).astype(np.float32)


def expected(product, x, w, b, g):
    """y, dx, dw, db in float64."""
    inputs, out = product[0].split("->")
    x_dims, w_dims = inputs.split(",")
    x, w, b, g = (np.asarray(a, np.float64) for a in (x, w, b, g))
    return (
        np.einsum(product[0], x, w) + b,
        np.einsum(f"{out},{w_dims}->{x_dims}", g, w),
        np.einsum(f"{x_dims},{out}->{w_dims}", x, g),
        g.sum((0, 1)),
    )


def run(how, x, w, b, g, slot=None):
    """y and the gradients of x, w, b and the slot."""

    def f(x, w, b, slot, g):
        y, vjp = jax.vjp(lambda *a: dense(how, *a), x, w, b, slot)
        return y, *vjp(g)

    return jit(f)(x, w, b, slot, g)


def bf16(a):
    return np.asarray(a).astype(ml_dtypes.bfloat16)


def assert_close(got, want, relative):
    want = np.asarray(want, np.float64)
    error = np.abs(np.asarray(got, np.float64) - want).max()
    assert error <= relative * np.abs(want).max(), (error, np.abs(want).max())


@pytest.mark.parametrize("mesh", [None, (1, 1, 1), (1, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("product", [QKV, OUT, MLP_IN], ids=["qkv", "out", "mlp_in"])
def test_value_and_gradients(mesh_of, product, mesh):
    """bfloat16 operands, float32 sums; the float32 gradient of the weight is not rounded."""
    x, w, b, g = arrays(product)
    how = How(product[0], product[1], "float32")
    call = lambda: run(how, bf16(x), w, b, bf16(g))  # noqa: E731
    if mesh is None:
        y, dx, dw, db, _ = call()
    else:
        with jax.set_mesh(mesh_of(*mesh)):
            y, dx, dw, db, _ = call()
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == ("bfloat16", "bfloat16", "float32", "float32")
    want = expected(product, bf16(x), bf16(w), b, bf16(g))
    for got, exact, relative in zip((y, dx, dw, db), want, (4e-3, 4e-3, 1e-6, 1e-6), strict=True):
        assert got.shape == exact.shape
        assert_close(got, exact, 2 * relative if mesh == (2, 2, 2) else relative)


def test_in_float32():
    x, w, b, g = arrays(QKV)
    got = run(How(*QKV[:2], "float32"), x, w, b, g)
    for ours, exact in zip(got, expected(QKV, x, w, b, g), strict=False):
        assert ours.dtype == jnp.float32
        assert_close(ours, exact, 1e-6)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_a_slot_takes_the_gradient_of_the_weight(mesh_of, mesh):
    x, w, b, g = arrays(QKV)
    slot = jnp.full(w.shape, jnp.nan, jnp.bfloat16)  # nobody reads it
    with jax.set_mesh(mesh_of(*mesh)):
        y, dx, dw, db, dslot = run(How(*QKV[:2], "bfloat16"), bf16(x), w, b, bf16(g), slot)
    want = expected(QKV, bf16(x), bf16(w), b, bf16(g))
    assert not np.any(dw) and dslot.dtype == jnp.bfloat16
    for got, exact in zip((y, dx, dslot, db), want, strict=True):
        assert_close(got, exact, 8e-3)


# ---- float8 ----


@pytest.mark.parametrize("dtype", [float8.FORWARD, float8.BACKWARD])
@pytest.mark.parametrize("largest", [1e-6, 0.3, 448.0, 449.0, 57344.0, 1e5, 2.0**20 * 448])
def test_the_largest_fits_just(dtype, largest):
    x = np.linspace(-1, 1, 41, dtype=np.float32) * np.float32(largest)
    values, scale = float8.quantize(jnp.asarray(x), dtype)
    scale, top = float(scale), float(jnp.finfo(dtype).max)
    assert np.frexp(scale)[0] == 0.5  # a power of two
    assert top / 2 < largest / scale <= top * (1 + 1e-6)
    exact = (x / np.float32(scale)).astype(dtype)  # by ml_dtypes
    np.testing.assert_array_equal(np.asarray(values, np.float32), exact.astype(np.float32))


@pytest.mark.parametrize("dtype", [float8.FORWARD, float8.BACKWARD])
def test_of_zeros_and_of_what_is_not_finite(dtype):
    values, scale = float8.quantize(jnp.zeros(3), dtype)
    assert not np.any(values.astype(np.float32)) and np.isfinite(scale) and scale > 0
    for bad in (np.nan, np.inf):
        values, scale = float8.quantize(jnp.array([1.0, bad, 2.0]), dtype)
        assert not np.all(np.isfinite(values.astype(np.float32) * scale))


@pytest.mark.parametrize("product", [QKV, OUT], ids=["qkv", "out"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_products_of_float8(mesh_of, product, mesh):
    """x and w in e4m3, g in e5m2, one scale each; between them nothing is rounded before the end."""

    def rounded(a, dtype):
        a = np.asarray(a, np.float32)
        scale = 2.0 ** np.ceil(np.log2(np.abs(a).max() / float(ml_dtypes.finfo(dtype).max)))
        return (a / np.float32(scale)).astype(dtype).astype(np.float64) * scale

    x, w, b, g = arrays(product)
    with jax.set_mesh(mesh_of(*mesh)):
        y, dx, dw, db, _ = run(How(*product[:2], "float32", True), bf16(x), w, b, bf16(g))
    x8, w8 = (rounded(bf16(a), ml_dtypes.float8_e4m3fn) for a in (x, w))
    want = expected(product, x8, w8, b, rounded(bf16(g), ml_dtypes.float8_e5m2))
    for got, exact, relative in zip((y, dx, dw), want, (8e-3, 8e-3, 1e-6), strict=False):
        assert_close(got, exact, relative)
    assert_close(db, bf16(g).astype(np.float64).sum((0, 1)), 1e-6)
    in_bf16 = expected(product, bf16(x), bf16(w), b, bf16(g))
    assert 0.01 < np.abs(want[0] - in_bf16[0]).max() / np.abs(in_bf16[0]).max() < 0.1


OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def device(platform, kind="", **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (device("gpu", "NVIDIA A100", compute_capability="8.0"), OPTIONS, "this is a NVIDIA A100: leave it None"),
        (device("gpu", compute_capability="8.0"), OPTIONS, "this is a GPU of compute capability 8.0"),
        (device("gpu", "AMD MI300", compute_capability="gfx942"), OPTIONS, "this is a AMD MI300"),
        (device("tpu", "TPU v5"), None, "needs an NVIDIA GPU of compute capability 8.9 or more"),
        (device("gpu", "NVIDIA H100", compute_capability="9.0"), None, "'xla_gpu_enable_triton_gemm': False"),
        (device("gpu", compute_capability="9.0"), {"xla_gpu_enable_triton_gemm": True}, "needs StepOptions"),
    ],
)  # fmt: skip
def test_devices_without_float8(devices, options, words):
    with pytest.raises(BadInput) as error:
        float8.check_devices([devices], options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_devices_with_float8(capsys):
    for capability in ("8.9", "9.0", "10.0"):
        float8.check_devices([device("gpu", compute_capability=capability)], OPTIONS)
    assert capsys.readouterr() == ("", "")
    float8.check_devices(jax.devices()[:2], None)
    assert capsys.readouterr().err.count("\n") == 1


# ---- what is pointwise ----


def by_differences(f, x, g, step=1e-6):
    """Gradient of sum(g * f(x)) in float64."""
    x = np.asarray(x, np.float64)
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        found[index] = np.sum(g * (f(up) - f(down))) / (2 * step)
    return found


def reference_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_gelu():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-12, 12, 97), [0.0, 60.0, -60.0]]).astype(np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    y, vjp = jax.vjp(gelu, x)
    np.testing.assert_allclose(y, reference_gelu(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vjp(g)[0], by_differences(reference_gelu, x, g), rtol=1e-4, atol=2e-6)  # fmt: skip
    y, vjp = jax.vjp(gelu, bf16(x))
    assert y.dtype == vjp(bf16(g))[0].dtype == jnp.bfloat16


def reference_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_layer_norm():
    rng = np.random.default_rng(0)
    x = (5.0 + 3.0 * rng.standard_normal((2, 3, 8))).astype(np.float32)
    scale, bias = rng.standard_normal((2, 8)).astype(np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    y, vjp = jax.vjp(lambda *a: layer_norm(*a, 1e-5), x, scale, bias)
    x64, scale64, bias64 = (a.astype(np.float64) for a in (x, scale, bias))
    np.testing.assert_allclose(y, reference_norm(x64, scale64, bias64), rtol=1e-5, atol=1e-5)
    want = (
        by_differences(lambda x: reference_norm(x, scale64, bias64), x, g),
        by_differences(lambda s: reference_norm(x64, s, bias64), scale, g),
        by_differences(lambda b: reference_norm(x64, scale64, b), bias, g),
    )
    for ours, exact in zip(vjp(g), want, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)
    y, vjp = jax.vjp(lambda *a: layer_norm(*a, 1e-5), bf16(x), scale, bias)
    assert y.dtype == jnp.bfloat16
    assert [a.dtype for a in vjp(bf16(g))] == ["bfloat16", "float32", "float32"]


# ---- what compilers are given ----


def dots(platform, how, product):
    """Dtypes of operands and result, and what is added, of each product in the StableHLO for `platform`."""
    x, w, b, g = arrays(product)
    step = jax.jit(lambda x, w, b, g: jax.vjp(lambda *a: dense(how, *a), x, w, b)[1](g))
    lowered = step.trace(bf16(x), w, b, bf16(g)).lower(lowering_platforms=(platform,))
    shapes = re.findall(r"stablehlo\.dot_general .* : (\(.*)", lowered.as_text())
    return [tuple(re.findall(r"x(b?f\d+)>", each)) for each in shapes]


@pytest.mark.parametrize(
    ("platform", "of_activations"), [("cuda", "bf16"), ("rocm", "bf16"), ("tpu", "f32"), ("cpu", "f32")]
)  # fmt: skip
def test_gpus_are_asked_for_rounded_results(platform, of_activations):
    """Of them a bias becomes part of the matmul; elsewhere (XLA:CPU above all) float32 sums are the faster ones."""
    how = How(*QKV[:2], "float32")
    found = sorted(dots(platform, how, QKV))
    assert found == sorted([("bf16", "bf16", of_activations), ("bf16", "bf16", "f32")])


def test_it_is_a_matrix_where_tensor_splits_nothing(mesh_of):
    x, w, b, _ = arrays(QKV)
    lower = jax.jit(lambda x, w, b: dense(How(*QKV[:2], "float32"), x, w, b)).lower
    with jax.set_mesh(mesh_of(1, 8, 1)):
        assert "(tensor<4x6x16xbf16>, tensor<16x72xbf16>)" in lower(bf16(x), w, b).as_text()
    with jax.set_mesh(mesh_of(1, 2, 4)):
        assert "(tensor<4x6x16xbf16>, tensor<16x3x4x6xbf16>)" in lower(bf16(x), w, b).as_text()
