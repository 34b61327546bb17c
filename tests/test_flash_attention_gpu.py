"""The Triton kernel: in interpret mode against float64, and compiled for absent GPUs.

Dimension key: B batch, L queries, S keys, H heads, K head_dim.
"""

import functools
import importlib.util
import math
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference_bloom import jit

from bloomjax import jaxpr_flops, targets
from bloomjax.attention import alibi_slopes, prefix_last_key
from bloomjax.block_skipping import needed_blocks
from bloomjax.chips import GPUS
from bloomjax.errors import BadInput
from bloomjax.flash_attention import Inputs, flash_attention
from bloomjax.flash_attention_gpu import KERNEL, Tiles, TritonKernel, default_tiles
from bloomjax.triton_kernels import Tile

# Small enough that every walk has steps with a mask and without one; each kernel with other tiles than the others.
SMALL = TritonKernel(
    block_q=32, block_k=64, interpret=True,
    tiles=Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
)  # fmt: skip


def problem(L, H, K, dtype, B=1, seed=0):
    """q, k, v, the context's gradient, slopes."""
    rng = np.random.default_rng(seed)
    arrays = (jnp.asarray(rng.standard_normal((B, L, H, K)), dtype) for _ in range(4))
    return *arrays, jnp.asarray(alibi_slopes(H), jnp.float32)


def seen_by(kind, L):
    """Arguments of `flash_attention` for one row."""
    documents = np.repeat([0, 1, 2, 7], [L // 8, L // 2, L // 4, L - L // 8 - L // 2 - L // 4])
    kinds = {
        "causal": {},
        "prefix": {"last_key_BL": prefix_last_key(jnp.array([L // 3]), L)},
        "documents": {"documents_BL": jnp.asarray(documents[None], jnp.int32)},
    }
    kinds["both"] = kinds["prefix"] | kinds["documents"]
    return kinds[kind]


def run(kernel, q, k, v, g, slopes, **seen):
    """Context, dq, dk, dv."""

    def all_four(q, k, v, g):
        attention = lambda *qkv: flash_attention(kernel, *qkv, slopes, **seen)  # noqa: E731
        context, pull = jax.vjp(attention, q, k, v)
        return context, *pull(g)

    return jit(all_four)(q, k, v, g)


def reference(q, k, v, g, slopes, documents_BL=None, last_key_BL=None):
    """Context, dq, dk, dv in float64; and how far a bfloat16 kernel may be from each.

    Numbers of bfloat16 are rounded by up to u = 2^-8 of themselves: p and ds before a product, each result at its end,
    and the context that the frame takes delta from.
    """
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    L, scale = q.shape[1], q.shape[3] ** -0.5
    r, s = np.arange(L)[:, None], np.arange(L)[None, :]
    scores = np.einsum("BLHK,BSHK->BHLS", q, k) * scale
    scores += np.asarray(slopes, np.float64)[:, None, None] * (s - r)
    is_seen = (s <= r)[None] if last_key_BL is None else s <= np.asarray(last_key_BL)[:, :, None]
    if documents_BL is not None:
        documents = np.asarray(documents_BL)
        is_seen = is_seen & (documents[:, :, None] == documents[:, None, :])
    scores = np.where(is_seen[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    context = np.einsum("BHLS,BSHK->BLHK", p, v)
    dp = np.einsum("BLHK,BSHK->BHLS", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    found = [
        context, scale * np.einsum("BHLS,BSHK->BLHK", ds, k),
        scale * np.einsum("BHLS,BLHK->BSHK", ds, q), np.einsum("BHLS,BLHK->BSHK", p, g),
    ]  # fmt: skip
    u = 2.0**-8
    context_error = u * (np.einsum("BHLS,BSHK->BLHK", p, abs(v)) + abs(context))
    delta_error = np.einsum("BLHK,BLHK->BHL", abs(g), context_error)
    ds_error = u * abs(ds) + p * delta_error[..., None]
    errors = [
        context_error, scale * np.einsum("BHLS,BSHK->BLHK", ds_error, abs(k)),
        scale * np.einsum("BHLS,BLHK->BSHK", ds_error, abs(q)),
        u * np.einsum("BHLS,BLHK->BSHK", p, abs(g)),
    ]  # fmt: skip
    return found, [error + u * abs(a) + 1e-5 for error, a in zip(errors, found, strict=True)]


def check(found, want, bounds, dtype, float32_tolerance=1e-5):
    for name, a, b, bound in zip(("context", "dq", "dk", "dv"), found, want, bounds, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        off = abs(np.asarray(a, np.float64) - b)
        if dtype == jnp.float32:
            assert off.max() <= float32_tolerance * abs(b).max(), name
        else:
            assert (off <= bound).all(), name
            assert off.max() > 1e-4, "it was not computed in bfloat16"


CASES = [  # L, H, K, dtype, what is seen
    (100, 2, 80, jnp.float32, "causal"),
    (120, 2, 64, jnp.bfloat16, "documents"),
    (60, 1, 32, jnp.float32, "both"),
]
SLOW_CASES = [
    (100, 16, 64, jnp.float32, "documents"),
    (90, 2, 64, jnp.bfloat16, "both"),
    (70, 32, 80, jnp.bfloat16, "causal"),
    (100, 16, 96, jnp.bfloat16, "documents"),
    (150, 2, 96, jnp.float32, "prefix"),
    (33, 112, 128, jnp.bfloat16, "prefix"),
    (45, 32, 128, jnp.float32, "both"),
    (129, 3, 64, jnp.bfloat16, "causal"),
]


@pytest.mark.parametrize(
    ("L", "H", "K", "dtype", "kind"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES],
)
def test_against_float64(L, H, K, dtype, kind):
    arrays = problem(L, H, K, dtype)
    seen = seen_by(kind, L)
    want, bounds = reference(*arrays, **seen)
    check(run(SMALL, *arrays, **seen), want, bounds, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "documents", "both"])
def test_default_tiles(kind):
    """Two rows of unlike documents; the tiles of the GPU, in blocks of 128 tokens."""
    arrays = problem(300, 2, 80, jnp.bfloat16, B=2)
    rows = {name: jnp.concatenate([a, a], 0) for name, a in seen_by(kind, 300).items()}
    if "documents_BL" in rows:
        rows["documents_BL"] = rows["documents_BL"].at[1].set(jnp.arange(300) // 110)
    want, bounds = reference(*arrays, **rows)
    check(run(TritonKernel(interpret=True), *arrays, **rows), want, bounds, jnp.bfloat16)


# ---- skipped blocks ----


BLOCKS_OF_32 = TritonKernel(32, 32, Tiles(*[Tile(32, 32, 4, 1)] * 3), interpret=True)
STEEP = jnp.array([0.9, 0.02], jnp.float32)


def shifted(q, k, kind):
    """Queries and keys as they are found in trained models, which agree in a direction; or with scores over +-50."""
    if kind == "trained":
        return q + 0.5, k + 0.5
    q, k = 3.3 * q, 3.3 * k
    scores = np.einsum("BLHK,BSHK->BHLS", q, k) * q.shape[3] ** -0.5
    assert scores.max() > 50 and scores.min() < -50
    return q, k


@pytest.mark.parametrize("kind", ["trained", "adversarial"])
def test_skipping_changes_nothing(kind):
    q, k, v, g, _ = problem(310, 2, 16, jnp.float32)
    q, k = shifted(q, k, kind)
    runs = [run(BLOCKS_OF_32, q, k, v, g, STEEP, skip_far_blocks=skip) for skip in (True, False)]
    for a, b in zip(*runs, strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
    want, bounds = reference(q, k, v, g, STEEP)
    if kind == "trained":
        # Biases that are added to a row as a whole and taken off again would cost 3e-6 here.
        check(runs[0], want, bounds, jnp.float32, float32_tolerance=1e-6)
    q, k = (jnp.pad(a, ((0, 0), (0, 10), (0, 0), (0, 0))) for a in (q, k))
    first_BHM = needed_blocks(q, k, STEEP, 32, 32).key_first_BHM
    assert first_BHM[0, 0, -1] > 2 and first_BHM[0, 1, -1] == 0  # the steep head skips


def test_what_is_skipped_is_not_read():
    """Not a number is written where nobody should look: the ranges were made before."""
    kernel = BLOCKS_OF_32
    q, k, v, g, _ = problem(256, 2, 16, jnp.float32)
    blocks = needed_blocks(q, k, STEEP, 32, 32)
    clean = Inputs(q, k, v, STEEP, None, None, blocks)
    context, lse = jit(kernel.forward)(clean)
    delta = jnp.moveaxis(jnp.sum(context * g, -1), 1, 2)
    dq, dk, dv = jit(kernel.backward)(clean, lse, delta, g)

    def same(a, b, is_clean):
        """Rows [B, H, blocks] either have the same bits or are poisoned."""
        assert is_clean.any() and not is_clean.all()
        a, b = (np.moveaxis(np.asarray(x), 2, 1).reshape(1, 2, 8, -1) for x in (a, b))
        np.testing.assert_array_equal(a[is_clean], b[is_clean])
        assert np.isnan(b[~is_clean]).any(-1).all()

    # The first keys, which the last queries of steep heads skip.
    poisoned = clean._replace(k_BSHK=k.at[:, :32].set(jnp.nan), v_BSHK=v.at[:, :32].set(jnp.nan))
    skips_first_BHM = np.asarray(blocks.key_first_BHM > 0)
    same(context, jit(kernel.forward)(poisoned)[0], skips_first_BHM)
    same(dq, jit(kernel.backward)(poisoned, lse, delta, g)[0], skips_first_BHM)
    # The last queries, which skip the first keys of steep heads.
    poisoned = clean._replace(q_BLHK=q.at[:, -32:].set(jnp.nan))
    found = jit(kernel.backward)(poisoned, lse, delta, g.at[:, -32:].set(jnp.nan))
    for a, b in zip((dk, dv), found[1:], strict=True):
        same(a, b, np.asarray(blocks.query_end_BHN < 8))


# ---- limits and costs ----


@pytest.mark.parametrize(
    ("K", "dtype", "words"),
    [
        (
            72,
            jnp.bfloat16,
            "'flash_gpu' takes a head_dim of 16, 32, ... or 128 in bfloat16 or float32, not 72 in",
        ),
        (256, jnp.bfloat16, "not 256"),
        (64, jnp.float16, "not 64 in float16; take 'xla_blocked'"),
    ],
)
def test_what_it_cannot_do(K, dtype, words):
    q, k, v, _, slopes = problem(32, 1, K, dtype)
    with pytest.raises(BadInput, match=re.escape(words)) as error:
        flash_attention(KERNEL, q, k, v, slopes)
    assert "\n" not in str(error.value)


def test_blocks_of_short_windows():
    assert KERNEL.block_sizes(2048, 64) == (128, 128)
    assert [KERNEL.block_sizes(L, 64)[0] for L in (1, 16, 17, 100)] == [16, 16, 32, 128]
    assert hash(KERNEL) == hash(TritonKernel())


@pytest.mark.parametrize("K", [64, 80, 96, 128])
def test_flops_of_a_causal_window(K):
    """Every tile with a visible score counts whole, in two, three and four matrix products."""
    q, _, _, _, slopes = problem(500, 3, K, jnp.bfloat16, B=2)

    def count(f):
        counted = jaxpr_flops.matmul_flops(jax.jit(f).trace(q, q, q).jaxpr)
        assert not counted.opaque
        return counted.flops

    def scores(tile, owns_keys):
        first, last = np.arange(0, 512, tile.own), np.arange(tile.step - 1, 512, tile.step)
        if owns_keys:
            needs = last[None, :] >= first[:, None]
        else:
            needs = last[None, :] - tile.step + 1 <= first[:, None] + tile.own - 1
        return 2 * 3 * needs.sum() * tile.own * tile.step

    attention = lambda q, k, v: flash_attention(KERNEL, q, k, v, slopes)  # noqa: E731
    tiles = default_tiles(K, jnp.bfloat16)
    forward = 2 * 2 * K * scores(tiles.forward, False)
    assert count(attention) == forward
    backward = 3 * 2 * K * scores(tiles.dq, False) + 4 * 2 * K * scores(tiles.dkdv, True)
    assert count(lambda *qkv: jax.vjp(attention, *qkv)[1](q)) == forward + backward


# ---- compiled, without the hardware ----

SHARED_MEMORY_BYTES = {"8.0": 166_912, "8.6": 101_376, "8.9": 101_376, "9.0": 232_448}
MISSING = targets.parse("1xa100").missing()


def device(capability):
    """One absent GPU: A100, H100, or a card for consumers: 86 is GeForce 30, 89 is GeForce 40."""
    chip = GPUS["h100_sxm" if capability == "9.0" else "a100_sxm_40"]
    config = targets.gpu_target_config(chip)
    if capability in ("8.6", "8.9"):
        config = config.replace("major: 8 minor: 0", f"major: 8 minor: {capability[2]}")
        config = re.sub(r"(per_block_optin|per_core): 16\d+", r"\1: 101376", config)
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return topology.devices[0]


def compiled(capability, K, dtype, folder, **seen):
    """The program of context, dq, dk and dv for 2 x 2048 tokens and 16 heads; what the compiler saw is in `folder`."""
    mesh = Mesh(np.array([device(capability)]), ("device",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    x, slopes = shape((2, 2048, 16, K), dtype), shape((16,), jnp.float32)
    seen = {name: shape((2, 2048), jnp.int32) for name in seen}

    def all_four(q, k, v, g, slopes, seen):
        attention = lambda *qkv: flash_attention(KERNEL, *qkv, slopes, **seen)  # noqa: E731
        context, pull = jax.vjp(attention, q, k, v)
        return context, *pull(g)

    with jax.set_mesh(mesh):  # newer versions of jax ask it which GPU it is for
        traced = jax.jit(all_four).trace(x, x, x, x, slopes, seen)
        lowered = traced.lower(lowering_platforms=("cuda",))
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    return lowered.compile(compiler_options=options)


def spilled_bytes(folder):
    """Of each kernel: loads of what did not fit the registers, as the assembler counts them."""
    found = {}
    (tools,) = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        name = re.search(r"\.entry (flash_attention_\w+)", text)
        if name is None:
            continue
        arch = re.search(r"\.target (\w+)", text)[1]
        command = [f"{tools}/bin/ptxas", "-v", f"-arch={arch}", path, "-o", folder / "cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name[1]] = int(re.search(r"(\d+) bytes spill loads", done.stderr)[1])
    return found


COMPILED = [("8.0", 80, jnp.bfloat16), ("9.0", 64, jnp.bfloat16)]
SLOW_COMPILED = [
    *((capability, K, jnp.bfloat16) for capability in SHARED_MEMORY_BYTES for K in (64, 80, 96, 128)),
    ("8.0", 64, jnp.float32), ("8.9", 128, jnp.float32), ("9.0", 80, jnp.float32),
]  # fmt: skip


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
@pytest.mark.parametrize(
    ("capability", "K", "dtype"),
    COMPILED
    + [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW_COMPILED if c not in COMPILED],
)
def test_compiled(capability, K, dtype, tmp_path):
    text = compiled(capability, K, dtype, tmp_path).as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert "2048,2048" not in text
    # Nothing of the size of q is copied, transposed or converted on its way into the kernels and out of them.
    made = re.findall(r"= \(?\w+\[([\d,]*)\]\S* .*?([\w-]+)\(", entry)
    large = {op for shape, op in made if math.prod(map(int, shape.split(","))) >= 2 * 2048 * 16 * K}
    assert large == {"parameter", "custom-call", "get-tuple-element", "tuple"}
    (sequence,) = tmp_path.glob("*.thunk_sequence.txt")
    kernels = re.findall(r"flash_attention_(\w+) .*shared_memory: (\d+)", sequence.read_text())
    assert sorted(name for name, _ in kernels) == ["dkdv", "dq", "forward"]
    assert max(int(size) for _, size in kernels) <= SHARED_MEMORY_BYTES[capability]
    # Outside of loops or, at 128, a few of a loop's hundreds of instructions; float32 is not made to be fast.
    limit = 64 if K < 128 else 320
    spilled = spilled_bytes(tmp_path)
    assert len(spilled) == 3
    assert dtype == jnp.float32 or max(spilled.values()) <= limit, spilled
    for path in tmp_path.glob("*.ptx"):
        ptx = path.read_text()
        assert dtype == jnp.bfloat16 or "mma" not in ptx  # TF32 would round q and k to 10 bits
        # Sums in the order of arrival would not be the same in every run.
        assert "flash_attention" not in ptx or not re.search(r"\b(atom|red)\.", ptx)


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "")
@pytest.mark.slow
@pytest.mark.parametrize(
    "seen", [["documents_BL"], ["last_key_BL"], ["documents_BL", "last_key_BL"]]
)
def test_compiled_with_masks(seen, tmp_path):
    text = compiled("8.0", 80, jnp.bfloat16, tmp_path, **dict.fromkeys(seen)).as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert max(spilled_bytes(tmp_path).values()) <= 64
