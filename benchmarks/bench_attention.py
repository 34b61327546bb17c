"""The attention kernels of this platform: are they right, and how fast, with ALiBi and without it.

    python benchmarks/bench_attention.py [--device gpu] [--size 560m 7b1] [--lengths 2048 8192 32768] [--kernels K ...]
        [--score_std 1] [--check_only] [--json] [--output FILE]

First each kernel's context, dq, dk and dv are compared with those of float64 in numpy, on windows of 300 tokens (no
multiple of a block): distance / norm, at most what TOLERANCES say. Cases: plain, for several head_dims; documents with
a prefix; wide: scores of standard deviation 15, among them some beyond 50; slopes of 112 heads; float32. A kernel that
is wrong in one is not timed, and the exit code is 1.

Then forward, and forward with backward: median of rounds, variants in turns, heads and head_dims of BLOOM's sizes.
FLOPs are those of the lower half of the scores, as if nothing was skipped: two products forward, five backward.

  ALiBi            every block of keys computed
  ALiBi, skipping  without the blocks that ALiBi puts out of float32's reach; how many those are depends on the spread
                   of the scores, which is why it is stated: q and k are normal, for scores of deviation --score_std
  no ALiBi         the same kernel without any bias, no skipping

`loss moves`: by how much skipping changes the mean and (largest) one token's cross-entropy of 512 classes that a random
matrix reads from the context.
"""

import argparse
import functools
import math
from typing import Any

import measure
import shapes

from bloomjax.errors import BadInput

CHECK_LENGTH, CHECK_ROWS, CHECK_HEADS = 300, 2, 4
HEAD_DIMS = (64, 80, 96, 128)
CASES = ("plain", "masks", "wide", "112 heads", "float32")
# Of bfloat16 that of wide scores is larger: few probabilities count, and each is rounded.
TOLERANCES = {"plain": 1e-2, "masks": 1e-2, "wide": 2e-2, "112 heads": 1e-2, "float32": 1e-4}
CUDNN_TOLERANCE = 3e-2  # its bias is rounded to bfloat16
WIDE_STD = 15.0
CLASSES = 512
DENSE, SKIPPING, PLAIN = "ALiBi", "ALiBi, skipping", "no ALiBi"


# ---- are they right ----


def reference(q, k, v, g, slopes_H, documents_BL=None, last_key_BL=None):
    """context, dq, dk, dv in float64, from the definition; arrays of numpy [B, L, H, K]."""
    import numpy as np

    L, K = q.shape[1], q.shape[3]
    distance_LS = np.arange(L)[None, :] - np.arange(L)[:, None]
    scores = np.einsum("blhk,bshk->bhls", q, k) / math.sqrt(K)
    scores += slopes_H[None, :, None, None] * distance_LS
    last_BL = np.arange(L)[None] if last_key_BL is None else last_key_BL
    visible = np.arange(L)[None, None, :] <= last_BL[:, :, None]
    if documents_BL is not None:
        visible = visible & (documents_BL[:, :, None] == documents_BL[:, None, :])
    scores = np.where(visible[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("blhk,bshk->bhls", g, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / math.sqrt(K)
    return (
        np.einsum("bhls,bshk->blhk", p, v), np.einsum("bhls,bshk->blhk", ds, k),
        np.einsum("bhls,blhk->bshk", ds, q), np.einsum("bhls,blhk->bshk", p, g),
    )  # fmt: skip


def with_grads(attention):
    """(q, k, v, g) -> context, dq, dk, dv."""
    import jax

    def both(q, k, v, g):
        context, pullback = jax.vjp(attention, q, k, v)
        return context, *pullback(g)

    return both


def differences(kernel: str, case: str, head_dim: int) -> dict[str, float]:
    """Distance to the reference divided by its norm, of context, dq, dk and dv."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bloomjax.attention import alibi_slopes, prefix_last_key
    from bloomjax.attention_kernels import attend

    dtype = jnp.float32 if case == "float32" else jnp.bfloat16
    B, L, H = CHECK_ROWS, CHECK_LENGTH, CHECK_HEADS
    rng = np.random.default_rng(head_dim)
    arrays = rng.standard_normal((4, B, L, H, head_dim))
    if case == "wide":
        arrays[:2] *= math.sqrt(WIDE_STD)
    q, k, v, g = (jnp.asarray(a, dtype) for a in arrays)
    # From the steepest on; of 112 heads those that stand beyond the power of two, too.
    slopes_H = alibi_slopes(112)[::28] if case == "112 heads" else alibi_slopes(16)[:: 16 // H]
    masks: dict[str, Any] = {}
    if case == "masks":
        documents_BL = jnp.asarray(np.arange(L) // 70 + np.array([[0], [1]]), jnp.int32)
        masks = {
            "documents_BL": documents_BL,
            "last_key_BL": prefix_last_key(jnp.array([33, 0]), L),
        }
    slopes = jnp.asarray(slopes_H, jnp.float32)
    highest = jax.default_matmul_precision("highest" if case == "float32" else None)
    with highest:
        found = jax.jit(with_grads(lambda q, k, v: attend(kernel, q, k, v, slopes, **masks)))(
            q, k, v, g
        )
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    # Slopes as the kernel has them, in float32.
    exact = reference(
        q, k, v, g, np.asarray(slopes, np.float64), **{name: np.asarray(a) for name, a in masks.items()}
    )  # fmt: skip
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for name, a, b in zip(("context", "dq", "dk", "dv"), found, exact, strict=True)
    }


def check_kernel(kernel: str, head_dims: list[int], cases: list[str]) -> dict[str, Any]:
    """{"worst", "cases": {case: differences or why it is refused}, "wrong": lines}. BadInput if it refuses all."""
    checked: dict[str, Any] = {}
    wrong = []
    for case in cases:
        for head_dim in head_dims if case == "plain" else [64]:
            name = f"{case}, head_dim {head_dim}"
            try:
                found = differences(kernel, case, head_dim)
            except BadInput as error:
                checked[name] = str(error)
                continue
            except Exception as error:  # of the compiler, of the device
                wrong.append(f"{name}: {measure.first_line(error, 300)}")
                continue
            checked[name] = found
            tolerance = CUDNN_TOLERANCE if kernel == "cudnn" else TOLERANCES[case]
            bad = [f"{what} {x:.2g}" for what, x in found.items() if not x <= tolerance]
            if bad:
                wrong.append(f"{name}: {', '.join(bad)} (allowed {tolerance:.0e})")
    found = [x for x in checked.values() if isinstance(x, dict)]
    if not found and not wrong:
        raise BadInput(next(iter(checked.values())))
    return {
        "worst": max((max(x.values()) for x in found), default=None),
        "cases": checked,
        "wrong": wrong,
    }


# ---- how fast are they ----


def normal_inputs(rows: int, length: int, heads: int, head_dim: int, score_std: float):
    """q, k, v and the context's gradient, bfloat16."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        shape = rows, length, heads, head_dim
        q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        spread = jnp.bfloat16(math.sqrt(score_std))
        return q * spread, k * spread, v, g

    return draw(0)


def spread_of_scores(q, k) -> dict[str, float]:
    """Standard deviation and largest size of scores before ALiBi, of the first 512 queries of a head."""
    import jax.numpy as jnp

    q, k = (a[0, :, 0].astype(jnp.float32) for a in (q[:, :512], k))
    scores = q @ k.T * q.shape[-1] ** -0.5
    return {"std": float(jnp.std(scores)), "largest": float(jnp.max(jnp.abs(scores)))}


def attention_of(kernel: str, variant: str, heads: int):
    """(q, k, v) -> context."""
    import jax
    import jax.numpy as jnp

    from bloomjax.attention import alibi_slopes
    from bloomjax.attention_kernels import attend

    if variant == PLAIN and kernel == "cudnn":
        return functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    slopes = None if variant == PLAIN else jnp.asarray(alibi_slopes(heads), jnp.float32)
    return lambda q, k, v: attend(kernel, q, k, v, slopes, skip_far_blocks=variant == SKIPPING)


def is_skipping(kernel: str) -> bool:
    return kernel.startswith("flash")


def kept_share(kernel: str, q, k, heads: int) -> float:
    """Of the blocks at or below the diagonal, those that are left; the kernel's own blocks."""
    import jax
    import jax.numpy as jnp

    from bloomjax.attention import alibi_slopes
    from bloomjax.attention_kernels import flash_kernel
    from bloomjax.block_skipping import keep_blocks

    block_q, block_k = flash_kernel(kernel).block_sizes(q.shape[1], q.shape[3])
    pad = -q.shape[1] % max(block_q, block_k)
    q, k = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))) for a in (q, k))
    slopes = jnp.asarray(alibi_slopes(heads), jnp.float32)

    @jax.jit
    def count(q, k):
        keep, every = (
            keep_blocks(q, k, slopes, block_q, block_k, skip_far_blocks=skip)
            for skip in (True, False)
        )
        return jnp.mean(keep.astype(jnp.float32)) / jnp.mean(every.astype(jnp.float32))

    return float(count(q, k))


def loss_moves(contexts) -> dict[str, float]:
    """Absolute differences of the cross-entropy between two contexts: of the mean and of one token at most."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def losses(context, seed):
        B, L, H, K = context.shape
        one, two = jax.random.split(jax.random.key(seed))
        read = jax.random.normal(one, (H * K, CLASSES)) * (H * K) ** -0.5
        target = jax.random.randint(two, (B, L, 1), 0, CLASSES)
        logits = jnp.dot(
            context.reshape(B, L, H * K).astype(jnp.float32), read, precision="highest"
        )
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=-1)[..., 0]

    a, b = (losses(context, 0) for context in contexts)
    difference = a - b  # the mean of differences: that of means would round at 1e-7 of the loss
    return {
        "mean": abs(float(jnp.mean(difference))), "largest": float(jnp.max(jnp.abs(difference))),
        "loss": float(jnp.mean(a)),
    }  # fmt: skip


def compiled(attention, arrays, needs_grads: bool, device: Any):
    """(program of no arguments, bytes). BadInput, saying how much, if it does not fit the device."""
    import jax

    q, k, v, g = arrays
    function, inputs = (
        (with_grads(attention), (q, k, v, g)) if needs_grads else (attention, (q, k, v))
    )
    executable = jax.jit(function).lower(*inputs).compile()
    need, limit = measure.program_bytes(executable), measure.memory_limit_bytes(device)
    if need > 0.9 * limit:
        raise BadInput(f"needs {need / 1e9:.1f} GB of {limit / 1e9:.1f}")
    return functools.partial(executable, *inputs), need


def time_kernel(
    kernel: str, setting: shapes.Setting, rows: int, length: int, args: Any, device: Any
):
    """(rows of the report, lines about what was left out)."""
    import jax

    c = setting.config
    arrays = normal_inputs(rows, length, c.num_heads, c.head_dim, args.score_std)
    names = [DENSE, *[SKIPPING] * is_skipping(kernel), PLAIN]
    found, skipped, contexts = [], [], {}
    common = {
        "kernel": kernel, "size": setting.size, "heads": c.num_heads, "head_dim": c.head_dim, "rows": rows,
        "length": length, "score_std": args.score_std, "scores": spread_of_scores(*arrays[:2]),
    }  # fmt: skip
    for what, needs_grads, num_products in (("forward", False, 2), ("forward+backward", True, 7)):
        calls: dict[str, Any] = {}
        memory: dict[str, int] = {}
        for name in names:
            try:
                calls[name], memory[name] = compiled(
                    attention_of(kernel, name, c.num_heads), arrays, needs_grads, device
                )
                result = jax.block_until_ready(calls[name]())
                if not needs_grads:
                    contexts[name] = result
            except Exception as error:
                calls.pop(name, None)
                why = measure.first_line(error)
                skipped.append(f"{kernel}, {setting.size}, {length} tokens, {name}, {what}: {why}")
        times = measure.time_in_turns(list(calls.values()), args.rounds, args.round_seconds)
        for name, time in zip(calls, times, strict=True):
            flops = num_products * rows * c.num_heads * length**2 * c.head_dim  # 2mkn, halved
            found.append(common | {
                "variant": name, "pass": what, "seconds": time.median, "best_seconds": time.best,
                "tflops": flops / time.median / 1e12, "program_bytes": memory[name],
                "times_no_alibi": None, "kept_share": None, "loss_moves": None,
            })  # fmt: skip
        plain = [r["seconds"] for r in found if r["variant"] == PLAIN and r["pass"] == what]
        for r in found:
            if plain and r["pass"] == what:
                r["times_no_alibi"] = plain[0] / r["seconds"]
    if SKIPPING in contexts:
        q, k, _, _ = arrays
        share = kept_share(kernel, q, k, c.num_heads)
        moves = loss_moves([contexts[SKIPPING], contexts[DENSE]]) if DENSE in contexts else None
        for r in found:
            if r["variant"] == SKIPPING:
                r |= {"kept_share": share, "loss_moves": moves}
    return found, skipped


# ---- the report ----


def table(report: dict[str, Any]) -> str:
    lines = [measure.headline(report)]
    for kernel, check in report["checks"].items():
        worst = "-" if check["worst"] is None else f"{check['worst']:.1e}"
        lines.append(
            f"{kernel}: {'WRONG' if check['wrong'] else 'right'}, at most {worst} of the norm off float64"
        )
        lines += [f"  {line}" for line in check["wrong"]]
        lines += [
            f"  no {name}: {why}" for name, why in check["cases"].items() if isinstance(why, str)
        ]
    lines += [f"{kernel}: not here: {why}" for kernel, why in report["refused"].items()]
    lines += [f"not timed: {line}" for line in report["skipped"]]
    if not report["rows"]:
        return "\n".join(lines)
    names = [
        "kernel",
        "size",
        "heads",
        "head_dim",
        "rows",
        "length",
        "variant",
        "scores' std",
        "pass",
        "ms",
        "TFLOP/s",
    ]
    names += ["times no ALiBi", "blocks kept", "loss moves", "GB"]
    rows = []
    for r in report["rows"]:
        moves = r["loss_moves"]
        rows.append([
            r["kernel"], r["size"], r["heads"], r["head_dim"], r["rows"], r["length"], r["variant"], r["scores"]["std"],
            r["pass"], r["seconds"] * 1e3, r["tflops"], r["times_no_alibi"], r["kept_share"],
            moves and f"{moves['mean']:.1e} ({moves['largest']:.1e})", r["program_bytes"] / 1e9,
        ])  # fmt: skip
    lines.append(
        "TFLOP/s: products of the lower half of the scores, 2 forward and 5 backward, skipped ones included"
    )
    lines.append(measure.columns(names, rows, left=("variant", "pass", "size")))
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.Parser(__doc__)
    parser.add_argument(
        "--size",
        nargs="+",
        choices=shapes.SIZES,
        default=["560m"],
        metavar="S",
        help="for heads and head_dim",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=measure.whole_number,
        help="on CPUs 512 2048, else 2048 8192 32768",
    )
    parser.add_argument(
        "--tokens", type=measure.whole_number, help="of all rows together; on CPUs 2048, else 32768"
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="K", help="of attention_kernels.KERNELS; by default all"
    )
    parser.add_argument(
        "--head_dims",
        nargs="+",
        type=measure.whole_number,
        default=list(HEAD_DIMS),
        help="to check",
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="C", help=", ".join(CASES)
    )
    parser.add_argument("--score_std", type=float, default=1.0, help="standard deviation of scores")
    parser.add_argument("--check_only", action="store_true", help="time nothing")
    parser.add_argument("--rounds", type=measure.whole_number, default=9)
    parser.add_argument("--round_seconds", type=float, default=0.05)
    args = parser.parse_args(argv)
    if not 0 <= args.score_std < 1e3:
        parser.error(f"--score_std={args.score_std} must be from 0 to 1000")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    measure.choose_platform(args.device)
    measure.check_output(args.output)
    from bloomjax import startup

    startup.claim_gpu_memory()
    import jax

    from bloomjax import attention_kernels
    from bloomjax.partitioning import MeshShape

    kernels = args.kernels or [name for name in attention_kernels.KERNELS if name != "auto"]
    for kernel in kernels:
        attention_kernels.check_kernel(kernel)
    device = measure.device(args.device)
    on_cpu = device.platform == "cpu"
    lengths = args.lengths or ([512, 2048] if on_cpu else [2048, 8192, 32768])
    tokens = args.tokens or (2048 if on_cpu else 32768)
    settings = [shapes.setting(size, measure.platform_of(device)) for size in args.size]
    report: dict[str, Any] = measure.circumstances(device)
    report |= {"checks": {}, "refused": {}, "skipped": [], "rows": []}
    with jax.default_device(device), jax.set_mesh(MeshShape(1, 1, 1).build([device])):
        for kernel in kernels:
            measure.say(f"checking {kernel}")
            try:
                report["checks"][kernel] = check_kernel(kernel, args.head_dims, args.cases)
            except BadInput as error:
                report["refused"][kernel] = str(error)
        wrong = [kernel for kernel, check in report["checks"].items() if check["wrong"]]
        right = [kernel for kernel in report["checks"] if kernel not in wrong]
        for setting in settings if not args.check_only else []:
            for length in lengths:
                for kernel in right:
                    measure.say(f"timing {kernel}, {setting.size}, {length} tokens")
                    rows = max(1, tokens // length)
                    found, skipped = time_kernel(kernel, setting, rows, length, args, device)
                    report["rows"] += found
                    report["skipped"] += skipped
    measure.finish(args, report, table(report))
    return 0 if right and not wrong else 1


if __name__ == "__main__":
    measure.run(main)
