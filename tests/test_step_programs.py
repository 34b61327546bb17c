"""The programs of the bfloat16 step: dtypes of their products, what is kept, added and computed again; losses of narrow
numbers beside those of wide ones."""

import collections
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.ad_checkpoint import print_saved_residuals

from bloomjax import targets
from bloomjax.checkpoints import Checkpoints
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import adamw
from bloomjax.partitioning import MeshShape
from bloomjax.schedules import CosineSchedule
from bloomjax.train_state import abstract_state, init_state
from bloomjax.train_step import StepOptions, abstract_batch, jit_programs

LAYERS, D, ROWS, LENGTH = 2, 64, 4, 128
SHAPE: dict[str, Any] = dict(
    vocab_size=512, emb_dim=D, num_layers=LAYERS, num_heads=4, attention_kernel="xla"
)


def one_device():
    return MeshShape(1, 1, 1).build(jax.devices()[:1])


# ---- what compilers are given ----


def lowered(platform, options, **changes):
    """StableHLO of the train step for `platform`."""
    mesh, model, optimizer = one_device(), Bloom(BloomConfig(**(SHAPE | changes))), adamw()
    state = abstract_state(model, optimizer, mesh)
    step = jit_programs(model, optimizer, options, mesh, state)[2]
    key = jax.eval_shape(lambda: jax.random.key(0))
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    with jax.set_mesh(mesh):
        traced = step.trace(state, abstract_batch(ROWS, LENGTH, mesh), rate, key, None)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def dtypes_of_products(text):
    """(operand, operand): how many products the text has."""
    products = re.findall(r"stablehlo\.dot_general .* : \((.*)\) ->", text)
    return collections.Counter(tuple(re.findall(r"x(b?f\d+)>", both)) for both in products)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu", "cpu"])
@pytest.mark.parametrize("changes", [{}, {"gradient_dtype": "bfloat16"}, {"scan_layers": False}],
                         ids=["", "bf16 gradients", "unrolled"])  # fmt: skip
def test_every_product_is_of_bfloat16(platform, changes):
    found = dtypes_of_products(lowered(platform, StepOptions(), **changes))
    assert found.keys() == {("bf16", "bf16")}
    # Of a layer 4 and 2 of attention forward, twice as many backward; they stand once in the text, or, where jax 0.11
    # unrolls, once a layer. The head has 3.
    assert sum(found.values()) in (18 + 3, 18 * LAYERS + 3)


def test_in_float32_the_test_would_see_it():
    assert ("f32", "f32") in dtypes_of_products(lowered("cuda", StepOptions(), dtype="float32"))


# ---- what a layer keeps ----


def kept_bytes(capsys, policy):
    """Of all layers, a token."""
    mesh = one_device()
    model = Bloom(BloomConfig(**SHAPE, remat_policy=policy, scan_layers=False))
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: init_state(model, adamw(), 0)).params
        tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
        apply: Any = lambda p, t: model.apply({"params": p}, t)  # noqa: E731
        print_saved_residuals(lambda p, t: apply(p, t).sum(), params, tokens)
    kept = re.findall(r"^(bf16|f32)\[([\d,]+)\] output of scan", capsys.readouterr().out, re.M)
    shapes = [
        (2 if dtype == "bf16" else 4, [int(n) for n in shape.split(",")]) for dtype, shape in kept
    ]
    of_layers = [size * math.prod(shape) for size, shape in shapes if shape[0] == LAYERS]
    return sum(of_layers) / (ROWS * LENGTH)


def test_what_minimal_keeps(capsys):
    """q, k, v, context, the residual stream twice and what GELU is of: 3 + 1 + 2 + 4 arrays of D bfloat16."""
    assert kept_bytes(capsys, "minimal") == LAYERS * 20 * D
    assert kept_bytes(capsys, "full") == LAYERS * 2 * D


# ---- absent accelerators ----

COMPILE = """
import json, math, sys
from bloomjax import targets
devices = targets.parse(sys.argv[1]).devices()
import jax, jax.numpy as jnp
from bloomjax import config, train_step
from bloomjax.train_state import abstract_state
model, optimizer, options, shape = (
    config.build("train." + name, "560m.gin", sys.argv[3:]) for name in ("model", "optimizer", "step", "mesh")
)
mesh = shape.build(devices)
state = abstract_state(model, optimizer, mesh)
step = train_step.jit_programs(model, optimizer, options, mesh, state)[2]
key = jax.eval_shape(lambda: jax.random.key(0))
rate, limits = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (2,)))
with jax.set_mesh(mesh):
    lowered = step.trace(state, train_step.abstract_batch(8, 2048, mesh), rate, key, limits).lower()
compiled = lowered.compile()
memory = compiled.memory_analysis()
held = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state))
open(sys.argv[2], "w").write(compiled.as_text())
print(json.dumps({"held": held, "alias": memory.alias_size_in_bytes}))
"""


def compiled(target, folder, *bindings):
    """Text of the compiled step of two layers of 560m with 8 windows; bytes of the state, and of those given back."""
    path = folder / "program.txt"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, target, str(path), f"NUM_LAYERS = {LAYERS}", *bindings],
        capture_output=True, text=True, check=False, env=os.environ | targets.parse(target).environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return path.read_text(), json.loads(done.stdout)


def operands(text, operation):
    """Dtypes of the first two operands of each such operation of a compiled program, and its own text."""
    found = []
    for names, line in re.findall(rf" {operation}\(([^)]*)\)(.*)", text):
        dtypes = []
        for name in names.split(", ")[:2]:
            defined = re.search(rf"^ *(?:ROOT )?{re.escape(name)} = (\w+)\[", text, re.M)
            assert defined, name
            dtypes.append(defined[1])
        found.append((*dtypes, line))
    return found


def needs(name):
    missing = targets.parse(name).missing()
    return pytest.mark.skipif(bool(missing), reason=missing or "")


@needs("cuda:h200:1x1x1")
def test_the_compiled_step_of_an_h200(tmp_path):
    """With gin/hardware/h200_1.gin, whose compiler options are half of it."""
    text, sizes = compiled("cuda:h200:1x1x1", tmp_path, "include 'hardware/h200_1.gin'")
    assert " dot(" not in text and " convolution(" not in text
    matmuls = [m for m in operands(text, "custom-call") if "__cublas$lt$matmul" in m[2]]
    assert {m[:2] for m in matmuls} == {("bf16", "bf16")}
    # 4 forward and 8 backward a layer: `minimal` computes none again. 3 of the head.
    assert len(matmuls) == 12 * LAYERS + 3
    assert sum('"epilogue":"BIAS"' in m[2] for m in matmuls) == 4 * LAYERS
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3 * LAYERS  # attention
    assert not re.search(r"\[(?:\d+,)*2048,2048\]", text)
    assert sizes["alias"] >= sizes["held"]


@needs("cuda:h100_sxm:1x1x1")
def test_the_compiled_step_of_float8(tmp_path):
    """The blocks' products, forward and backward, are float8 matmuls; head and attention are not."""
    text, _ = compiled("cuda:h100_sxm:1x1x1", tmp_path, "include 'hardware/h200_1.gin'",
                       "BloomConfig.matmul_dtype = 'float8'")  # fmt: skip
    found = collections.Counter()
    for first, second, line in operands(text, "custom-call"):
        if "__cublas$lt$matmul" in line:
            found[" ".join(sorted({first, second}))] += 1
    assert found == {
        "f8e4m3fn": 4 * LAYERS, "f8e4m3fn f8e5m2": 8 * LAYERS, "bf16": 3
    }  # fmt: skip


@needs("tpu:v5p:2x2x1")
def test_the_compiled_step_of_a_v5p(tmp_path):
    text, sizes = compiled("tpu:v5p:2x2x1", tmp_path, "MeshShape.fsdp = 4")
    products = operands(text, "convolution")
    assert len(products) >= 12 + 3 and {p[:2] for p in products} == {("bf16", "bf16")}
    assert " dot(" not in text
    assert sizes["alias"] >= sizes["held"]


# ---- what narrow numbers do to the loss ----


@pytest.mark.slow
def test_losses_with_narrow_numbers(tmp_path):
    """300 steps: mean of the last 50, and held out. Each way has to be within half a percent."""
    text = tiny_run.Text(tmp_path)

    def losses(name, moment="float32", **model):
        tiny_run.run(
            text, tmp_path / name, model=tiny_run.tiny_model(**model), train_steps=300,
            optimizer=adamw(first_moment_dtype=moment), step=StepOptions(microbatch_size_samples=4),
            learning_rate=CosineSchedule(3e-3, 3e-4, 40, 2400), eval_every_steps=300,
            checkpoints=Checkpoints(save_every_steps=300),
        )  # fmt: skip
        of_step = tiny_run.losses(tmp_path / name)
        records = tiny_run.records(tmp_path / name)
        held_out = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
        return np.array([np.mean([of_step[s] for s in range(251, 301)]), held_out])

    wide = losses("wide")
    assert wide[0] < 2
    gaps = {
        "bf16 state": losses("state", moment="bfloat16", gradient_dtype="bfloat16") / wide - 1,
        "float8": losses("float8", matmul_dtype="float8") / wide - 1,
    }
    assert all(0 < np.abs(gap).max() < 0.005 for gap in gaps.values()), gaps
