"""The TPU's flash attention: interpreted, against float64; what it skips and refuses; compiled for absent TPUs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bloomjax import targets
from bloomjax.attention import alibi_slopes
from bloomjax.block_skipping import Blocks, needed_blocks
from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs, flash_attention
from bloomjax.flash_attention_tpu import TPU_KERNEL, TpuKernel

INTERPRETED = TpuKernel(interpret=True)
BF16_ROUNDING = 2.0**-8  # half of the last bit
# Blocks of 128, several stretches in both directions, the last one shorter: 8 blocks of keys are 4 + 4, 8 of queries
# 3 + 3 + 2 with 512 bytes a row.
SMALL = TpuKernel(block_tokens=128, stretch_bytes=6 * 128 * 512, interpret=True)
NAMES = "context", "dq", "dk", "dv"


def reference(q, k, v, g, slopes, last_key=None, documents=None):
    """context, dq, dk, dv in float64, and for each what rounding p, ds and the result to bfloat16 may change."""
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    L, scale = q.shape[1], q.shape[3] ** -0.5
    r, s = np.arange(L)[:, None], np.arange(L)[None]
    scores = np.einsum("blhk,bshk->bhls", q, k) * scale + slopes[:, None, None] * (s - r)
    visible = (s <= r)[None] if last_key is None else s[None] <= last_key[:, :, None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    scores = np.where(visible[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("blhk,bshk->bhls", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def grads(p, ds, q, k, v, g):
        return (
            np.einsum("bhls,bshk->blhk", p, v), np.einsum("bhls,bshk->blhk", ds, k),
            np.einsum("bhls,blhk->bshk", ds, q), np.einsum("bhls,blhk->bshk", p, g),
        )  # fmt: skip

    found = grads(p, ds, q, k, v, g)
    context_slack = np.einsum("bhls,bshk->blhk", p, abs(v)) + abs(found[0])
    delta_slack = np.einsum("blhk,blhk->bhl", abs(g), context_slack)[..., None]
    slack = grads(p, abs(ds) + scale * p * delta_slack, *map(abs, (q, k, v, g)))
    return found, [BF16_ROUNDING * (a + abs(b)) for a, b in zip(slack, found, strict=True)]


def random_arrays(B, L, H, K, dtype, num=4):
    keys = jax.random.split(jax.random.key(L + K), num)
    return [jax.random.normal(key, (B, L, H, K), dtype) for key in keys]


def random_masks(B, L, masks):
    """A prefix of a third of the window, and documents of about 40 tokens."""
    last_key = documents = None
    if "prefix" in masks:
        last_key = np.tile(np.maximum(np.arange(L), L // 3), (B, 1)).astype(np.int32)
    if "documents" in masks:
        is_end = np.random.default_rng(L).random((B, L)) < 1 / 40
        documents = np.cumsum(is_end, axis=1).astype(np.int32)
    return {"last_key_BL": last_key, "documents_BL": documents}


def check(kernel, B, L, H, K, dtype, masks=""):
    """flash_attention and its gradients against float64."""
    arrays, masked, slopes = (
        random_arrays(B, L, H, K, dtype),
        random_masks(B, L, masks),
        alibi_slopes(H),
    )

    @jax.jit
    def run(q, k, v, g):
        context, vjp = jax.vjp(
            lambda *qkv: flash_attention(kernel, *qkv, jnp.asarray(slopes, jnp.float32), **masked),
            q, k, v,
        )  # fmt: skip
        return context, *vjp(g)

    wanted, slack = reference(
        *arrays, slopes, last_key=masked["last_key_BL"], documents=masked["documents_BL"]
    )
    for name, found, want, may in zip(NAMES, run(*arrays), wanted, slack, strict=True):
        assert found.dtype == dtype and found.shape == (B, L, H, K)
        error = abs(np.asarray(found, np.float64) - want)
        bound = 3e-6 * abs(want).max() + (1.01 * may if dtype == jnp.bfloat16 else 0)
        assert (error < bound).all(), (name, error.max(), abs(want).max())


def test_a_prefix_and_documents_in_bfloat16():
    check(SMALL, 1, 300, 2, 80, jnp.bfloat16, "prefix documents")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "B", "L", "H", "K", "dtype", "masks"),
    [
        (SMALL, 2, 640, 2, 64, jnp.float32, "prefix documents"),
        (SMALL, 1, 400, 2, 128, jnp.float32, "documents"),
        (SMALL, 1, 400, 2, 96, jnp.float32, "prefix"),
        (SMALL, 1, 400, 2, 80, jnp.float32, ""),
        (SMALL, 1, 400, 2, 96, jnp.bfloat16, ""),
        (SMALL, 1, 400, 2, 128, jnp.bfloat16, "prefix"),
        (SMALL, 2, 640, 2, 64, jnp.bfloat16, "documents"),
        (INTERPRETED, 1, 700, 2, 64, jnp.bfloat16, ""),
        (INTERPRETED, 1, 33, 16, 64, jnp.float32, ""),
        (INTERPRETED, 1, 130, 32, 80, jnp.float32, ""),
        (INTERPRETED, 1, 100, 112, 128, jnp.bfloat16, ""),
        (INTERPRETED, 1, 300, 1, 256, jnp.float32, ""),
        (TpuKernel(block_tokens=256, interpret=True), 1, 300, 2, 160, jnp.float32, ""),
    ],
)  # fmt: skip
def test_against_float64(kernel, B, L, H, K, dtype, masks):
    check(kernel, B, L, H, K, dtype, masks)


@pytest.mark.slow
def test_in_the_simulator_of_a_tpu():
    """Which also simulates copies between memories, and stops at reads of memory that nothing wrote."""
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=False)
    with pltpu.force_tpu_interpret_mode(params):
        check(TpuKernel(block_tokens=128, stretch_bytes=4 * 128 * 512), 1, 640, 1, 64, jnp.float32)


# ---- skipping ----


@pytest.fixture(scope="module")
def run():
    """run(arrays, slopes, blocks): context, dq, dk, dv of `SMALL`; one program for all blocks."""

    @jax.jit
    def program(arrays, slopes_H, blocks):
        q, k, v, g = arrays
        inputs = Inputs(q, k, v, slopes_H, None, None, blocks)
        context, lse_BHL = SMALL.forward(inputs)
        delta_BHL = jnp.einsum("blhk,blhk->bhl", g, context)
        return context, *SMALL.backward(inputs, lse_BHL, delta_BHL, g)

    def call(arrays, slopes_H, blocks):
        return [np.asarray(a) for a in program(arrays, slopes_H, blocks)]

    return call


LONG = 1024
SLOPES = np.array([0.84, 0.25], np.float32)


def long_arrays(scores):
    """Keys like those of a trained model, with a few that all queries look at; or scores of q.k beyond +-50."""
    q, k, v, g = random_arrays(1, LONG, 2, 64, jnp.float32)
    if scores == "trained":
        return q, k.at[:, :2].add(2 * q.mean(1, keepdims=True)), v, g
    q, k = 4 * q, 4 * k
    largest = jnp.abs(jnp.einsum("blhk,bshk->bhls", q, k)).max() / 8
    assert largest > 50
    return q, k, v, g


@pytest.mark.parametrize("scores", ["trained", "adversarial"])
def test_skipping_changes_nothing(run, scores):
    arrays = long_arrays(scores)
    every = needed_blocks(*arrays[:2], SLOPES, 128, 128, skip_far_blocks=False)
    needed = needed_blocks(*arrays[:2], SLOPES, 128, 128)
    first_HM = np.asarray(needed.key_first_BHM[0])
    assert (np.asarray(every.key_first_BHM) == 0).all()
    assert first_HM[0, -1] >= (5 if scores == "trained" else 1)
    whole = run(arrays, SLOPES, every)
    for name, a, b in zip(NAMES, run(arrays, SLOPES, needed), whole, strict=True):
        assert abs(a - b).max() <= 1e-6 * abs(b).max(), name
    tolerance = (
        3e-6 if scores == "trained" else 3e-5
    )  # float32's last bit of a score of 100 is 1e-5
    wanted, _ = reference(*arrays, SLOPES.astype(np.float64))
    for name, found, want in zip(NAMES, whole, wanted, strict=True):
        assert abs(found - want).max() <= tolerance * abs(want).max(), name


def test_what_is_not_needed_is_not_looked_at(run):
    """NaN in all that the last block of queries and the first block of keys do not need."""
    arrays = long_arrays("trained")
    needed = Blocks(*map(np.array, needed_blocks(*arrays[:2], SLOPES, 128, 128)))
    whole = run(arrays, SLOPES, needed)
    first = 128 * needed.key_first_BHM[0, :, -1].min()
    end = 128 * needed.query_end_BHN[0, :, 0].max()
    assert 0 < first and end < LONG
    q, k, v, g = arrays
    context, dq, _, _ = run(
        (q, k.at[:, :first].set(jnp.nan), v.at[:, :first].set(jnp.nan), g), SLOPES, needed
    )
    np.testing.assert_array_equal(context[:, -128:], whole[0][:, -128:])
    np.testing.assert_array_equal(dq[:, -128:], whole[1][:, -128:])
    assert np.isnan(context[:, :128]).all() and np.isnan(dq[:, :128]).all()
    _, _, dk, dv = run(
        (q.at[:, end:].set(jnp.nan), k, v, g.at[:, end:].set(jnp.nan)), SLOPES, needed
    )
    np.testing.assert_array_equal(dk[:, :128], whole[2][:, :128])
    np.testing.assert_array_equal(dv[:, :128], whole[3][:, :128])
    assert np.isnan(dk[:, -128:]).all() and np.isnan(dv[:, -128:]).all()


# ---- sizes, FLOPs, limits ----


def test_block_sizes():
    lengths = 32768, 2048, 2049, 640, 300, 129, 64
    assert [TPU_KERNEL.block_sizes(L, 128)[0] for L in lengths] == [
        512,
        512,
        384,
        128,
        384,
        256,
        128,
    ]
    assert TPU_KERNEL.block_sizes(2048, 64) == (512, 512)
    assert TPU_KERNEL.block_sizes(2048, 160) == (256, 256)
    assert hash(TPU_KERNEL) == hash(TpuKernel())


def abstract(B, L, H, K, dtype=jnp.bfloat16, kernel=TPU_KERNEL):
    """Inputs without arrays."""
    block_q, block_k = kernel.block_sizes(L, K)
    array, of = jax.ShapeDtypeStruct((B, L, H, K), dtype), jax.ShapeDtypeStruct
    m, n = (of((B, H, L // block), jnp.int32) for block in (block_q, block_k))
    return Inputs(array, array, array, of((H,), jnp.float32), None, None, Blocks(m, m, n, n))


def costs(jaxpr):
    """(FLOPs, exponentials) of each kernel in a jaxpr, times the loops around it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            found.append((cost.flops, cost.transcendentals))
        elif equation.primitive.name == "scan":
            times = equation.params["length"]
            inner = costs(equation.params["jaxpr"].jaxpr)
            found += [(flops * times, exps * times) for flops, exps in inner]
        elif "jaxpr" in equation.params:
            found += costs(getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"]))
    return found


@pytest.mark.parametrize("L", [2048, 16384])
def test_flops_are_those_of_the_blocks_with_a_visible_key(L):
    B, H, K, num = 2, 3, 80, L // 512
    inputs = abstract(B, L, H, K)
    num_scores = B * H * 512**2 * np.tril(np.ones((num, num))).sum()
    row = jax.ShapeDtypeStruct((B, H, L), jnp.float32)
    forward = jax.make_jaxpr(TPU_KERNEL.forward)(inputs).jaxpr
    backward = jax.make_jaxpr(TPU_KERNEL.backward)(inputs, row, row, inputs.q_BLHK).jaxpr
    assert costs(forward) == [(2 * 2 * K * num_scores, num_scores)]
    assert costs(backward) == [(5 * 2 * K * num_scores, num_scores)]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            abstract(1, 256, 2, 264),
            "takes a head_dim up to 256 in bfloat16 or float32, not 264 in bfloat16; take 'xla_blocked'",
        ),
        (abstract(1, 256, 2, 64, jnp.float16), "not 64 in float16"),
        (abstract(1024, 128, 112, 64), "1024 x 128 tokens with 112 heads on one device"),
    ],
)
def test_what_it_does_not_take_is_one_line(inputs, words):
    with pytest.raises(BadInput, match=words) as error:
        jax.eval_shape(TPU_KERNEL.forward, inputs)
    assert "\n" not in str(error.value)


# ---- absent TPUs ----

COMPILE = """
import json, re, sys
from bloomjax import targets
devices = targets.parse(sys.argv[1]).devices()
import jax, jax.numpy as jnp
from bloomjax.flash_attention import flash_attention
from bloomjax.flash_attention_tpu import TPU_KERNEL
here = jax.sharding.SingleDeviceSharding(devices[0])
def of(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)
for L, H, K, dtype, masks in json.loads(sys.argv[2]):
    array, slopes = of((1, L, H, K), dtype), of((H,), jnp.float32)
    given = {name: of((1, L), jnp.int32) for name in masks}
    def step(q, k, v, g, slopes, given):
        context, vjp = jax.vjp(lambda *a: flash_attention(TPU_KERNEL, *a, slopes, **given), q, k, v)
        return context, *vjp(g)
    compiled = jax.jit(step).lower(array, array, array, array, slopes, given).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2, text.count("tpu_custom_call")
    square = re.search(rf"\\[(\\d+,)*{L},{L}\\]", text)
    assert square is None, square
    # A few arrays, lanes and float32 sums of dk and dv included; scores would be {H} x L x L.
    limit = 24 * L * H * max(K, 128)
    assert compiled.memory_analysis().temp_size_in_bytes < limit
print("compiled")
"""
MASKS = ["documents_BL", "last_key_BL"]
SHORT = [(2048, 14, 128, "bfloat16", [])]
MORE = [(2048, 14, 80, "bfloat16", MASKS), (32768, 16, 64, "bfloat16", [])]
LARGE = [(8192, 2, 96, "float32", MASKS), (8192, 1, 256, "bfloat16", [])]  # most VMEM; v4 has least


def compiled_for(name, cases, marks=()):
    missing = targets.parse(name).missing()
    return pytest.param(
        name,
        cases,
        id=name,
        marks=[pytest.mark.skipif(bool(missing), reason=missing or ""), *marks],
    )


@pytest.mark.parametrize(
    ("target", "cases"),
    [
        compiled_for("tpu:v5p:2x2x1", SHORT),
        *[compiled_for(name, MORE, marks=[pytest.mark.slow])
          for name in ("tpu:v5p:2x2x2", "tpu:v6e:2x2", "tpu:v5e:2x2")],
        compiled_for("tpu:v4:2x2x1", MORE + LARGE, marks=[pytest.mark.slow]),
    ],
)  # fmt: skip
def test_compiles_without_a_tpu(target, cases):
    """With the VMEM that each chip gives by default, and no scores of the whole window in memory."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, json.dumps(cases)], capture_output=True, text=True,
        env=os.environ | targets.parse(target).environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr[-2000:]
