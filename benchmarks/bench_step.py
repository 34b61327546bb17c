"""A training step with its optimizer: is it right, and how fast.

    python benchmarks/bench_step.py [--size 7b1] [--device gpu] [--kernel K] [--remat P] [--microbatch N] [--float8]
        [--set NAME.FIELD=VALUE] [--json] [--output FILE]

First the attention kernel is compared with float32 scores (`bloomjax.kernel_check`), then the step on a short window
with the same model in float32 and plain attention: loss, global gradient norm, and the norm of each parameter's
gradient. Nothing is timed if they differ by more than TOLERANCES. Then the rate of matrix products of the model's own
widths, then steps: compiled and warmed up before, state donated, no waiting from step to step, median of rounds.

Rows: as configured; "no skipping", every block of keys computed; "no ALiBi", the same without any bias. They take
turns. How much is skipped depends on q and k: weights are initial ones, but the query and key projections are scaled so
that scores have the standard deviation --score_std where the input is that of a LayerNorm.

FLOPs are the model's, without recomputation, in two conventions of `bloomjax.flops`: causal (`mfu`) and Megatron's.
HFU counts the products of the traced step, recomputation included; kernels count what they would compute if nothing was
skipped. Memory: of the program by its compiler, and the peak of the process until then (the device's own count where
it has one, else what is resident).
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import matmul_ceiling
import measure
import shapes

from bloomjax import flops
from bloomjax.errors import BadInput

RATE = 1e-4
CHECK_ROWS, CHECK_LENGTH = 2, 256
# Relative, to float32: the loss, the norm of all gradients and that of each parameter's.
TOLERANCES = {
    "float32": {"loss": 1e-4, "grad_norm": 5e-3, "parameter": 1e-2},
    "bfloat16": {"loss": 2e-3, "grad_norm": 2e-2, "parameter": 5e-2},
    "float8": {"loss": 1e-2, "grad_norm": 1e-1, "parameter": 2.5e-1},
}
VARIANTS = ("as configured", "no skipping", "no ALiBi")


# ---- what is run ----


def configured(args: argparse.Namespace, platform: str) -> shapes.Setting:
    """The setting that the command line describes. BadInput."""
    changes = []
    for name, value in (
        ("BloomConfig.attention_kernel", args.kernel),
        ("BloomConfig.remat_policy", args.remat),
        ("StepOptions.microbatch_size_samples", args.microbatch),
    ):
        changes += [] if value is None else [f"{name}={value}"]
    if args.float8:
        changes.append("BloomConfig.matmul_dtype=float8")
    return shapes.setting(
        args.size, platform, rows=args.batch, length=args.length, hardware=args.gin_file,
        changes=changes + args.set,
    )  # fmt: skip


def precision(config: Any) -> str:
    """The name in TOLERANCES."""
    return config.matmul_dtype or config.dtype


def variants(setting: shapes.Setting, wanted: Sequence[str]) -> dict[str, shapes.Setting]:
    """Settings by name; without "no skipping" where the kernel skips nothing anyway."""
    from bloomjax import attention_kernels
    from bloomjax.positions import NoPositions

    kernel = setting.config.attention_kernel
    on_cpu = attention_kernels.platform() == "cpu"
    skips = setting.config.skip_far_blocks and "xla" not in kernel and kernel != "cudnn"
    skips = skips and not (kernel == "auto" and on_cpu)
    all_blocks = setting.with_config(skip_far_blocks=False)
    settings = (setting, all_blocks, all_blocks.with_config(positions=NoPositions()))
    found = dict(zip(VARIANTS, settings, strict=True))
    return {
        name: each for name, each in found.items() if name in wanted and (skips or name != "no skipping")
    }  # fmt: skip


def spread_scores(params: Any, score_std: float) -> Any:
    """Initial parameters with queries and keys scaled: score_std is std(w)^2 emb_dim for inputs of variance 1."""
    import jax.numpy as jnp

    kernel_nDcHK = params["layers"]["qkv"]["kernel"]
    factor = math.sqrt(score_std / kernel_nDcHK.shape[1]) / jnp.std(kernel_nDcHK)
    factor_c = jnp.stack([factor, factor, jnp.float32(1.0)])  # values stay
    scaled = kernel_nDcHK * factor_c[None, None, :, None, None]
    qkv = params["layers"]["qkv"] | {"kernel": scaled}
    return params | {"layers": params["layers"] | {"qkv": qkv}}


def random_batch(setting: shapes.Setting, rows: int, length: int) -> dict[str, Any]:
    import jax.numpy as jnp
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, setting.config.vocab_size, (rows, length + 1))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "weights": jnp.ones(rows)}


# ---- is it right ----


def recording_norms() -> Any:
    """An optimizer that leaves the parameters to a learning rate of 0 and keeps the norm of each gradient."""
    import jax
    import jax.numpy as jnp
    import optax

    def norms(grads):
        return jax.tree.map(lambda g: jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))), grads)

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: jnp.zeros((), jnp.float32), params),
        lambda updates, state, params=None: (updates, norms(updates)),
    )


def check_step(setting: shapes.Setting, mesh: Any, score_std: float) -> dict[str, Any]:
    """Relative differences to float32 of a step on a short window. BadInput if one is too large."""
    import jax
    import numpy as np

    from bloomjax.train_state import init_state, state_of
    from bloomjax.train_step import make_train_step

    # Looped over the layers: it compiles faster, and computes the same.
    ours = setting.with_config(scan_layers=True)
    exact = ours.with_config(
        dtype="float32", attention_kernel="xla", remat_policy="none", matmul_dtype=None
    )
    micro = CHECK_ROWS // 2 if setting.step.microbatch_size_samples else None
    options = dataclasses.replace(setting.step, microbatch_size_samples=micro)
    batch = random_batch(setting, CHECK_ROWS, min(setting.length, CHECK_LENGTH))
    optimizer, key = recording_norms(), jax.random.key(0)

    @jax.jit
    def start(seed):  # a constant one would have XLA compute all weights while it compiles
        params = init_state(exact.model, optimizer, seed).params
        return state_of(optimizer, spread_scores(params, score_std))

    state = start(0)
    found = {}
    for name, each in (("ours", ours), ("exact", exact)):
        # Ours with the compiler's options that are timed.
        compiler_options = setting.step.compiler_options if name == "ours" else None
        step = jax.jit(
            make_train_step(each.model, optimizer, options, mesh), donate_argnums=0,
            compiler_options=dict(compiler_options or {}) or None,
        )  # fmt: skip
        highest = jax.default_matmul_precision("highest" if name == "exact" else None)
        with jax.set_mesh(mesh), highest:
            state, metrics = step(state, batch, np.float32(0.0), key)
        norms = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        found[name] = {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
        found[name]["parameters"] = {
            "/".join(part.key for part in path): float(x) for path, x in norms
        }
    return compare(found["ours"], found["exact"], precision(setting.config))


def compare(ours: dict[str, Any], exact: dict[str, Any], precision: str) -> dict[str, Any]:
    """Relative differences of loss, norm and norms. BadInput for one beyond its tolerance, and for NaN."""
    allowed = TOLERANCES[precision]
    found = {"precision": precision, "tolerances": allowed, "loss": ours["loss"], "differences": {}}

    def check(name, a, b, tolerance):
        difference = abs(a - b) / abs(b) if b else abs(a)
        if not difference <= tolerance:
            raise BadInput(
                f"the step is wrong: {name} is {a:.6g}, in float32 {b:.6g}, off by {difference:.2g} "
                f"({precision} allows {tolerance:.2g}); nothing was timed"
            )
        return difference

    for name in ("loss", "grad_norm"):
        found["differences"][name] = check(name, ours[name], exact[name], allowed[name])
    differences = {
        name: check(f"the gradient norm of {name}", norm, exact["parameters"][name], allowed["parameter"])
        for name, norm in ours["parameters"].items()
        # The bias of keys moves all scores of a query alike: its gradient is rounding.
        if exact["parameters"][name] > 1e-6 * exact["grad_norm"]
    }  # fmt: skip
    worst = max(differences, key=lambda name: differences[name])
    found["differences"]["parameter"] = differences[worst]
    return found | {"worst_parameter": worst}


# ---- how fast is it ----


class Step:
    """One variant, compiled; `state` is that of all variants, for there may be room for one only."""

    def __init__(self, name: str, setting: shapes.Setting, mesh: Any, abstract: Any):
        import jax
        import numpy as np

        from bloomjax import jaxpr_flops
        from bloomjax.train_step import jit_programs

        self.name, self.mesh = name, mesh
        programs = jit_programs(setting.model, setting.optimizer, setting.step, mesh, abstract)
        batch = jax.device_put(
            random_batch(setting, setting.rows, setting.length), mesh.devices[0, 0, 0]
        )
        self.arguments = batch, np.float32(RATE), jax.random.key(0)
        with jax.set_mesh(mesh):
            traced = programs[2].trace(abstract, *self.arguments)
            self.matmuls = jaxpr_flops.matmul_flops(traced.jaxpr)
            self.executable = traced.lower().compile()
        self.program_bytes = measure.program_bytes(self.executable)
        self.losses: list[Any] = []

    def __call__(self, holder: dict[str, Any]) -> Any:
        holder["state"], metrics = self.executable(holder["state"], *self.arguments)
        self.losses.append(metrics["loss"])
        return metrics["loss"]


def start_state(setting: shapes.Setting, mesh: Any, abstract: Any, score_std: float) -> Any:
    import jax

    from bloomjax.train_state import init_state, state_of

    def start(seed):
        params = init_state(setting.model, setting.optimizer, seed).params
        return state_of(setting.optimizer, spread_scores(params, score_std))

    return jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(0)


def time_steps(settings: dict[str, shapes.Setting], mesh: Any, args: argparse.Namespace):
    """[(Step, Times), ...], all on one state."""
    from bloomjax.train_state import abstract_state

    first = next(iter(settings.values()))
    abstract = abstract_state(first.model, first.optimizer, mesh)
    steps = []
    for name, setting in settings.items():
        measure.say(f"compiling: {name}")
        steps.append(Step(name, setting, mesh, abstract))
        need, limit = steps[-1].program_bytes, measure.memory_limit_bytes(mesh.devices[0, 0, 0])
        if need > limit:
            raise BadInput(
                f"{setting} needs {need / 1e9:.1f} GB of {limit / 1e9:.1f}: take fewer rows (--batch), fewer at a time "
                "(--microbatch), --remat full or --set adamw.first_moment_dtype=bfloat16"
            )
    holder = {"state": start_state(first, mesh, abstract, args.score_std)}
    for step in steps:
        for _ in range(2):
            float(step(holder))
    calls = [functools.partial(step, holder) for step in steps]
    return list(
        zip(steps, measure.time_in_turns(calls, args.rounds, args.round_seconds), strict=True)
    )


def row(step: Step, times: measure.Times, setting: shapes.Setting, ceiling: dict, device: Any):
    """The figures of one variant."""
    count = flops.flops_per_step(
        **setting.dims, sequence_length_tokens=setting.length, batch_size_samples=setting.rows
    )
    peak = flops.peak_flops_per_second(device.device_kind)
    share = functools.partial(
        flops.mfu, seconds=times.median, num_devices=1, device_peak_flops_per_second=peak
    )
    known = not step.matmuls.opaque
    return {
        "name": step.name, "device": device.device_kind, "dtype": precision(setting.config),
        "tokens_per_second": round(setting.tokens / times.median, 1),
        "step_seconds": times.median, "best_step_seconds": times.best,
        "rounds": times.num_rounds, "steps_per_round": times.num_calls,
        "model_tflops": count.causal / times.median / 1e12,
        "mfu": share(count.causal), "mfu_megatron": share(count.megatron_model),
        "hfu": share(step.matmuls.flops) if known else None, "not_in_hfu": step.matmuls.opaque,
        "share_of_ceiling": count.causal / times.median / 1e12 / ceiling["tflops"],
        "program_bytes": step.program_bytes, "peak_bytes": measure.peak_memory_bytes(device),
        "first_loss": float(step.losses[0]), "last_loss": float(step.losses[-1]),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """For people."""
    check, ceiling = report["check"], report["ceiling"]
    lines = [measure.headline(report), report["shape"], report["options"]]
    differences = ", ".join(
        f"{name} {x:.1e} (allowed {check['tolerances'][name]:.0e})"
        for name, x in check["differences"].items()
    )
    lines.append(
        f"right: off from float32 by {differences}; attention kernel {report['kernel_check']}"
    )
    lines.append(
        f"ceiling: {ceiling['tflops']:.4g} TFLOP/s in matrix products of these widths "
        f"({min(p['tflops'] for p in ceiling['products']):.4g} to {max(p['tflops'] for p in ceiling['products']):.4g})"
    )
    names = [
        "",
        "tokens/s",
        "of 'no ALiBi'",
        "s/step",
        "TFLOP/s",
        "MFU causal",
        "MFU Megatron",
        "HFU",
        "of ceiling",
    ]
    names += ["program GB", "peak GB"]
    plain = [r["tokens_per_second"] for r in report["rows"] if r["name"] == "no ALiBi"]
    rows = []
    for r in report["rows"]:
        of_peak = [r["mfu"], r["mfu_megatron"], r["hfu"]]
        if r["mfu"] is None:
            of_peak = ["no peak known"] * 3
        rows.append([
            r["name"], f"{r['tokens_per_second']:,.0f}", r["tokens_per_second"] / plain[0] if plain else None,
            f"{r['step_seconds']:.4g}", r["model_tflops"], *of_peak, r["share_of_ceiling"],
            r["program_bytes"] / 1e9, r["peak_bytes"] / 1e9,
        ])  # fmt: skip
    lines.append(measure.columns(names, rows))
    opaque = sorted({name for r in report["rows"] for name in r["not_in_hfu"]})
    if opaque:
        lines.append(f"HFU unknown: nothing tells how much these compute: {', '.join(opaque)}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = measure.Parser(__doc__)
    parser.add_argument("--size", default="small", help=", ".join(shapes.SIZES))
    parser.add_argument("--batch", type=measure.whole_number, help="rows")
    parser.add_argument("--length", type=measure.whole_number, help="tokens of a row")
    parser.add_argument("--kernel", help="BloomConfig.attention_kernel")
    parser.add_argument("--remat", help="BloomConfig.remat_policy")
    parser.add_argument("--microbatch", type=measure.whole_number, help="rows worked on at a time")
    parser.add_argument(
        "--float8",
        action="store_true",
        help="products of the blocks in 8 bits: BloomConfig.matmul_dtype",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="NAME.FIELD=VALUE of BloomConfig, adamw, StepOptions",
    )
    parser.add_argument(
        "--gin_file", action="append",
        help="of the hardware; by default hardware/laptop.gin on CPUs, hardware/h200_1.gin on GPUs",
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--score_std", type=float, default=1.0, help="standard deviation of scores")
    parser.add_argument("--rounds", type=measure.whole_number, default=9)
    parser.add_argument("--round_seconds", type=float, default=0.5)
    args = parser.parse_args(argv)
    if not 0 < args.score_std < 1e3:
        parser.error(f"--score_std={args.score_std} must be positive and below 1000")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    measure.choose_platform(args.device)
    measure.check_output(args.output)
    from bloomjax import startup

    startup.claim_gpu_memory()
    startup.keep_freed_memory()  # as tiny.gin does
    import jax

    from bloomjax.kernel_check import check_attention_kernel
    from bloomjax.partitioning import MeshShape

    device = measure.device(args.device)
    mesh = MeshShape(1, 1, 1).build([device])
    setting = configured(args, measure.platform_of(device))
    c = setting.config
    with jax.default_device(device):
        worst = check_attention_kernel(
            c.attention_kernel, c.num_heads, c.head_dim, c.dtype, device, has_masks=c.document_end_id is not None
        )  # fmt: skip
        check = check_step(setting, mesh, args.score_std)
        measure.say("right; measuring the ceiling")
        ceiling = matmul_ceiling.ceiling(setting, device)
        with jax.set_mesh(mesh):
            settings = variants(setting, args.variants)
        timed = time_steps(settings, mesh, args)
    rows = [row(step, times, setting, ceiling, device) for step, times in timed]
    kernel = f"{c.attention_kernel}" + ("" if worst is None else f" within {worst:.1e} of it")
    layers = "looped over" if c.scan_layers else "unrolled"
    options = f"{c.dtype}, {setting.step}, remat {c.remat_policy}, layers {layers}"
    report = measure.circumstances(device) | {
        "shape": str(setting), "options": f"{options}, scores spread by {args.score_std}",
        "config": dataclasses.asdict(c), "step_options": dataclasses.asdict(setting.step), "changes": args.set,
        "score_std": args.score_std, "kernel_check": kernel, "check": check, "ceiling": ceiling, "rows": rows,
    }  # fmt: skip
    measure.finish(args, report, table(report))
    return 0


if __name__ == "__main__":
    measure.run(main)
