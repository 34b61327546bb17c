"""The Hopper kernels: in jax's GPU interpreter against float64, and compiled for absent GPUs.

The interpreter has barriers, asynchronous copies and a race detector that knows of both; it has not got wgmma as these
kernels use it, nor layouts: those are only seen by the compiler.

Dimension key: B batch, L queries, S keys, H heads, K head_dim, M blocks of queries, N blocks of keys.
"""

import dataclasses
import functools
import math
import re
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, SingleDeviceSharding

from bloomjax import jaxpr_flops, targets
from bloomjax.attention import alibi_slopes, prefix_last_key
from bloomjax.attention_kernels import attend
from bloomjax.block_skipping import Blocks, needed_blocks
from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs, flash_attention
from bloomjax.flash_attention_hopper import KERNEL, HopperKernel, require_hopper
from bloomjax.hopper_blocks import BLOCK

if hasattr(plgpu, "InterpretGPUParams"):
    InterpretGPUParams = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

# Two slots: tiles take each other's place from the third on.
INTERPRETED = HopperKernel(num_stages=2, interpret=InterpretGPUParams(detect_races=True))


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """The interpreter of jax 0.10 compiles the same program for each warpgroup of each block of threads."""
    lock, programs = threading.Lock(), {}

    def run_jaxpr(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in programs:
                body = functools.partial(jax.core.eval_jaxpr, jaxpr)
                programs[id(jaxpr)] = jaxpr, jax.jit(body).lower(consts, *args).compile()
        programs[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run_jaxpr)


def problem(L, H, K, B=1, spread=1.0):
    """q, k, v, the context's gradient, slopes."""
    q, k, v, g = np.random.default_rng(0).standard_normal((4, B, L, H, K))
    arrays = (jnp.asarray(a, jnp.bfloat16) for a in (spread * q, k, v, g))
    return *arrays, jnp.asarray(alibi_slopes(H), jnp.float32)


def masks(kind, L):
    """Arguments of `flash_attention` for one row."""
    lengths = [L // 8, L // 2, L // 4, L - L // 8 - L // 2 - L // 4]
    kinds = {
        "causal": {},
        "prefix": {"last_key_BL": prefix_last_key(jnp.array([L // 3]), L)},
        "documents": {
            "documents_BL": jnp.asarray(np.repeat([0, 1, 2, 7], lengths)[None], jnp.int32)
        },
    }
    kinds["both"] = kinds["prefix"] | kinds["documents"]
    return kinds[kind]


def context_and_grads(attention, q, k, v, g):
    """Context, dq, dk, dv."""
    context, pull = jax.vjp(attention, q, k, v)
    return context, *pull(g)


def run(kernel, q, k, v, g, slopes, **options):
    attention = lambda *qkv: flash_attention(kernel, *qkv, slopes, **options)  # noqa: E731
    return jax.jit(functools.partial(context_and_grads, attention))(q, k, v, g)


def reference(q, k, v, g, slopes, documents_BL=None, last_key_BL=None, kept_HLS=True):
    """Context, logsumexp, dq, dk, dv in float64, and how far a bfloat16 kernel may be from each.

    Rounding to bfloat16 is off by up to u = 2^-8 of the number: p and ds before a product, each result at its end, and
    the context of which the frame makes delta.
    """
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    L, scale = q.shape[1], q.shape[3] ** -0.5
    r, s = np.arange(L)[:, None], np.arange(L)[None, :]
    scores = np.einsum("BLHK,BSHK->BHLS", q, k) * scale
    scores += np.asarray(slopes, np.float64)[:, None, None] * (s - r)
    seen = (s <= r)[None] if last_key_BL is None else s <= np.asarray(last_key_BL)[:, :, None]
    if documents_BL is not None:
        documents = np.asarray(documents_BL)
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    scores = np.where(seen[:, None] & kept_HLS, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p, lse = p / total, (top + np.log(total))[..., 0]
    context, dp = np.einsum("BHLS,BSHK->BLHK", p, v), np.einsum("BLHK,BSHK->BHLS", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    found = [
        context, lse, scale * np.einsum("BHLS,BSHK->BLHK", ds, k),
        scale * np.einsum("BHLS,BLHK->BSHK", ds, q), np.einsum("BHLS,BLHK->BSHK", p, g),
    ]  # fmt: skip
    u = 2.0**-8
    context_error = u * (np.einsum("BHLS,BSHK->BLHK", p, abs(v)) + abs(context))
    delta_error = np.einsum("BLHK,BLHK->BHL", abs(g), context_error)
    ds_error = u * abs(ds) + p * delta_error[..., None]
    errors = [
        context_error, 2.0**-16 * abs(lse), scale * np.einsum("BHLS,BSHK->BLHK", ds_error, abs(k)),
        scale * np.einsum("BHLS,BLHK->BSHK", ds_error, abs(q)),
        u * np.einsum("BHLS,BLHK->BSHK", p, abs(g)),
    ]  # fmt: skip
    rounded = (u, 0.0, u, u, u)
    return found, [
        error + v * abs(a) + 1e-5 for error, v, a in zip(errors, rounded, found, strict=True)
    ]


def check(found, want, bounds):
    for name, a, b, bound in zip(("context", "dq", "dk", "dv"), found, want, bounds, strict=True):
        assert a.dtype == jnp.bfloat16 and a.shape == b.shape
        off = abs(np.asarray(a, np.float64) - b)
        assert (off <= bound).all(), (name, (off / bound).max())
        assert (off / bound).max() > 0.01, f"the bound of {name} is not worth much"


def without_lse(arrays):
    return [arrays[0], *arrays[2:]]


# ---- interpreted ----


def ranges(*firsts_and_ends):
    """[B=1, H, blocks] from a list of (first, end) for each head."""
    array = np.array(firsts_and_ends, np.int32)
    return jnp.asarray(array[None, :, :, 0]), jnp.asarray(array[None, :, :, 1])


def test_what_lies_outside_of_the_blocks_is_not_read():
    """Keys and values there are NaN, and a NaN times a probability of 0 would show. A range of queries may be empty.

    With one slot, every tile but the first takes the place of another.
    """
    L, K, kernel = 3 * BLOCK, 64, dataclasses.replace(INTERPRETED, num_stages=1)
    q, k, v, g, slopes = problem(L, 2, K)
    keys = ranges([(0, 1), (0, 1), (2, 3)], [(0, 1), (0, 2), (0, 2)])
    queries = ranges([(0, 2), (0, 0), (2, 3)], [(0, 3), (1, 3), (0, 0)])
    kept = np.zeros((2, 3, BLOCK, 3, BLOCK), bool)
    for head, m, n in np.ndindex(2, 3, 3):
        kept[head, m, :, n] = keys[0][0, head, m] <= n < keys[1][0, head, m]
    want, bounds = reference(q, k, v, g, slopes, kept_HLS=kept.reshape(2, L, L))
    for head, n in ((0, 1), (1, 2)):
        at = 0, slice(n * BLOCK, (n + 1) * BLOCK), head
        k, v = k.at[at].set(jnp.nan), v.at[at].set(jnp.nan)

    def everything(q, k, v, g):
        inputs = Inputs(q, k, v, slopes, None, None, Blocks(*keys, *queries))
        context, lse = kernel.forward(inputs)
        delta = jnp.einsum("BLHK,BLHK->BHL", g.astype(jnp.float32), context.astype(jnp.float32))
        return context, lse, *kernel.backward(inputs, lse, delta, g)

    found = jax.jit(everything)(q, k, v, g)
    check(without_lse(found), without_lse(want), without_lse(bounds))
    assert (abs(found[1] - want[1]) <= bounds[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "L", "H", "K", "spread", "kind"),
    [
        (2, 200, 2, 64, 1.0, "causal"),
        (1, 300, 1, 128, 50.0, "both"),  # scores up to 200
        (1, 260, 1, 80, 1.0, "prefix"),
        (1, 390, 1, 96, 1.0, "documents"),
        (1, 1, 3, 128, 1.0, "causal"),
    ],
)
def test_against_float64(B, L, H, K, spread, kind):
    arrays = problem(L, H, K, B, spread)
    want, bounds = map(without_lse, reference(*arrays, **masks(kind, L)))
    found = run(INTERPRETED, *arrays, **masks(kind, L))
    if L > 1:
        return check(found, want, bounds)
    assert all((abs(a - b) <= bound).all() for a, b, bound in zip(found, want, bounds, strict=True))


@pytest.mark.slow
def test_without_a_bias():
    *arrays, slopes = problem(200, 1, 64)
    want, bounds = map(without_lse, reference(*arrays, 0 * slopes))
    check(run(INTERPRETED, *arrays, None, skip_far_blocks=False), want, bounds)


@pytest.mark.slow
def test_skipping_changes_nothing():
    L, slopes = 3 * BLOCK, jnp.array([0.5])
    *arrays, _ = problem(L, 1, 64, spread=0.1)
    blocks = needed_blocks(arrays[0], arrays[1], slopes, BLOCK, BLOCK)
    assert blocks.key_first_BHM[0, 0].tolist() == [0, 0, 1]
    found, want = (
        run(INTERPRETED, *arrays, slopes, skip_far_blocks=skip) for skip in (True, False)
    )
    for a, b in zip(found, want, strict=True):
        off = abs(a.astype(jnp.float32) - b.astype(jnp.float32))
        assert (off <= 2.0**-7 * abs(b.astype(jnp.float32)) + 1e-6).all()  # the next bfloat16


# ---- what it refuses ----


def test_bad_input():
    q, k, v, _, slopes = problem(64, 1, 64)
    with pytest.raises(BadInput, match="takes bfloat16, got float32"):
        flash_attention(KERNEL, *(a.astype(jnp.float32) for a in (q, k, v)), slopes)
    with pytest.raises(
        BadInput, match="no head_dim 72, there are 64, 80, 96, 128; take 'flash_gpu'"
    ):
        KERNEL.block_sizes(64, 72)
    assert require_hopper(types.SimpleNamespace(compute_capability="9.0")) is None
    with pytest.raises(BadInput, match=r"needs compute capability 9.0 \(H100, H200\), got cpu cpu"):
        require_hopper(jax.devices("cpu")[0])
    a100 = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0"
    )
    with pytest.raises(BadInput, match="got gpu NVIDIA A100 of compute capability 8.0"):
        require_hopper(a100)


# ---- lowered, which needs no compiler, and compiled, which needs no hardware ----

MISSING = targets.parse("1xh100").missing()


def traced(K, kinds=(), shape=(2, 2048, 16), sharding=None, has_bias=True):
    """Of context, dq, dk and dv."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    x, slopes = array((*shape, K), jnp.bfloat16), array(shape[2:], jnp.float32)
    seen = {name: array(shape[:2], jnp.int32) for name in kinds}

    def all_four(q, k, v, g, slopes, seen):
        bias = {} if has_bias else {"skip_far_blocks": False}
        slopes = slopes if has_bias else None
        attention = lambda *qkv: flash_attention(KERNEL, *qkv, slopes, **bias, **seen)  # noqa: E731
        return context_and_grads(attention, q, k, v, g)

    return jax.jit(all_four).trace(x, x, x, x, slopes, seen)


@pytest.mark.parametrize(("K", "kinds"), [(80, ()), (128, ("documents_BL", "last_key_BL"))])
def test_lowered(K, kinds):
    program = traced(K, kinds)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 3
    assert "2048x2048" not in text


def test_lowered_without_a_bias():
    """Nothing is multiplied by slopes of 0: the kernels do not read any."""
    slopes = re.compile(r"custom_call @mosaic_gpu.*tensor<16xf32>")
    for has_bias, num in ((True, 3), (False, 0)):
        text = traced(64, has_bias=has_bias).lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 3
        assert len(slopes.findall(text)) == num


def estimated_flops(jaxpr):
    found = 0
    for equation in jaxpr.eqns:
        if estimate := equation.params.get("cost_estimate"):
            found += estimate.flops
            continue
        found += sum(map(estimated_flops, jaxpr_flops._inner(equation.params)))
    return found


def test_estimated_flops():
    """Two products forward, three for dq, four for dk and dv: each 2 K for half of the scores."""
    assert estimated_flops(traced(64).jaxpr.jaxpr) == (2 + 3 + 4) * 2 * 64 * 2 * 16 * 2048**2 // 2


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
@pytest.mark.parametrize(
    ("chip", "K", "kinds"),
    [
        ("h100", 128, ()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("h100", 64, ()), ("h200", 64, ()), ("h200", 128, ()), ("h100", 80, ()), ("h100", 96, ()),
                ("h100", 64, ("documents_BL",)), ("h100", 128, ("documents_BL", "last_key_BL")),
            ]
        ),
    ],
)  # fmt: skip
def test_compiled(chip, K, kinds, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    (device,) = targets.parse(f"1x{chip}").devices()
    assert require_hopper(device) is None
    lowered = traced(K, kinds, sharding=SingleDeviceSharding(device)).lower()
    text = lowered.compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 3
    assert "2048,2048" not in text
    # Nothing of the size of q is copied, transposed or converted on its way into the kernels and out of them.
    made = re.findall(r"= \(?\w+\[([\d,]*)\]\S* .*?([\w-]+)\(", entry)
    large = {
        op
        for shape, op in made
        if math.prod(map(int, shape.split(",") if shape else [])) >= 2**21 * K // 32
    }
    assert large == {"parameter", "custom-call", "get-tuple-element", "tuple"}
    said = capfd.readouterr().out
    # The compiler keeps kernels it has made before: those of H100 and H200 are the same.
    assert said.count("Compiling entry function 'hopper_attention_") in (0, 3)
    # At 128, dk and dv fill the registers: a few addresses go to memory.
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill loads\n", said)]
    assert max(spilled, default=0) <= (0 if K < 128 else 64), said
    assert "serialized" not in said  # of wgmma, when its registers are touched while it runs


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
def test_a100_is_refused():
    (device,) = targets.parse("1xa100").devices()
    with pytest.raises(BadInput, match="needs compute capability 9.0 .* got gpu .*capability 8.0"):
        require_hopper(device)


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
@pytest.mark.slow
def test_compiled_on_a_mesh():
    """As the model calls it, each device with its rows and heads, inside of a rematerialised loop over layers."""
    devices = np.array(targets.parse("4xh100").devices()).reshape(1, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    slopes = jnp.asarray(alibi_slopes(16), jnp.float32)

    def loss(x):
        @jax.checkpoint
        def layer(x, _):
            return attend("flash_hopper", x, x, x, slopes), None

        return jax.lax.scan(layer, x, None, length=3)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((4, 1024, 16, 64), jnp.bfloat16)
        text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    assert (
        text.count('custom_call_target="mosaic_gpu') == 4
    )  # forward, and again in the backward loop


def test_more_slots_than_shared_memory_has():
    """Four of 64 KiB; `num_stages=None`, of the other tests, takes two."""
    program = jax.jit(functools.partial(flash_attention, HopperKernel(num_stages=4)))
    x = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="shared memory"):
        program.trace(x, x, x, jnp.ones(1)).lower(lowering_platforms=("cuda",))
