"""What the train step of a configuration needs on a target: memory, FLOPs, collectives, and an estimate of its time.

The figures are one flat dict, the object that `plan --json` prints; `plan_report` lays it out for a person. Names
ending in _gib and _tflops are of one device and one step.
"""

import dataclasses
import functools
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from bloomjax import (
    energy,
    flops,
    hlo,
    jaxpr_flops,
    out_of_memory,
    preflight,
    roofline,
    train_state,
    train_step,
)
from bloomjax.curriculum import LengthCurriculum
from bloomjax.data import check_filled_shares
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.objectives import CausalLM, Objective
from bloomjax.partitioning import MESH_AXES, MeshShape, num_batch_shards
from bloomjax.schedules import BatchSchedule
from bloomjax.targets import Target

_GIB = 2**30
# BLOOM wrote 2.3 TB in 40 s from 48 nodes (BigScience, chronicles of tr11-176B).
CHECKPOINT_BYTES_PER_SECOND_AND_HOST = 1.2e9


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run that decide about its step, as gin bound them."""

    model: Bloom
    optimizer: optax.GradientTransformation
    mesh: MeshShape
    step: train_step.StepOptions
    batch_schedule: BatchSchedule
    num_steps: int
    sequence_length: int  # the longest
    max_filled_share: float = 0.5
    is_guarded: bool = True  # by a SpikeGuard, which is a part of the step
    stretches: tuple[
        tuple[int, int], ...
    ] = ()  # first sample and sequence length; () for one length
    objective: Objective = CausalLM()

    curriculum: LengthCurriculum | None = None

    @property
    def planned_tokens(self) -> int:
        """Of the whole run."""
        num_samples = self.batch_schedule.samples_after(self.num_steps)
        if self.curriculum:
            return self.curriculum.tokens_after(num_samples)
        stretches = self.stretches or ((0, self.sequence_length),)
        ends = [first for first, _ in stretches[1:]] + [num_samples]
        return sum(
            max(0, min(end, num_samples) - first) * length
            for (first, length), end in zip(stretches, ends, strict=True)
        )

    @property
    def batch_size(self) -> int:
        """Of the last step: a ramp ends there."""
        return self.batch_schedule.batch_size(self.num_steps)


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no compiler knows: network of a host, power of a device, and where the electricity comes from."""

    network_bytes_per_second: float | None = None  # None: the chip's usual one
    watts: float | None = None
    pue: float = 1.2
    grams_co2_per_kwh: float = 57.0


def shape_figures(setup: Setup, target: Target, assumptions: Assumptions) -> dict[str, Any]:
    """All that needs no compiler; the other figures are None. BadInput where `train` would refuse the configuration."""
    mesh = abstract_mesh(setup.mesh, target)
    return _Plan(setup, target, assumptions, mesh).figures()


def compiled_figures(
    setup: Setup, target: Target, assumptions: Assumptions, stderr: Path
) -> dict[str, Any]:
    """The figures of the compiled step; the process must have the target's environment.

    `stderr` is the file that this process's standard error goes to: compilers put warnings there.
    """
    devices = target.devices()
    plan = _Plan(setup, target, assumptions, setup.mesh.build(devices))
    plan.compile(stderr)
    return plan.figures()


def abstract_mesh(shape: MeshShape, target: Target) -> AbstractMesh:
    """The mesh without devices, which knows their kind. BadInput if it does not fit so many."""
    kind = target.chip.device_kind if target.chip else "cpu"
    platform = "gpu" if target.platform == "cuda" else target.platform
    return AbstractMesh(
        _mesh_sizes(shape, target.num_devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3,
        abstract_device=jax.sharding.AbstractDevice(kind, None, platform),
    )  # fmt: skip


def check_kernel_of(target: Target, model: Bloom) -> None:
    """BadInput for an attention kernel of another generation; of another platform the kernel itself says it."""
    is_hopper = target.chip is not None and target.chip.device_kind in ("H100", "H200")
    if (
        model.config.attention_kernel == "flash_hopper"
        and target.platform == "cuda"
        and not is_hopper
    ):
        raise BadInput(
            f"target {target.name}: attention kernel 'flash_hopper' is for H100 and H200; take 'flash_gpu'"
        )


def _mesh_sizes(shape: MeshShape, num_devices: int) -> tuple[int, ...]:
    sizes = [shape.data, shape.fsdp, shape.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or num_devices % known or (-1 not in sizes and known != num_devices):
        raise BadInput(
            f"mesh data={shape.data} x fsdp={shape.fsdp} x tensor={shape.tensor} does not fit the {num_devices} "
            "devices of this target (set --gin.MeshShape.data, .fsdp, .tensor)"
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)


class _Plan:
    """One configuration on one target."""

    def __init__(self, setup: Setup, target: Target, assumptions: Assumptions, mesh: Any):
        self.setup, self.target, self.assumptions, self.mesh = setup, target, assumptions, mesh
        self.limit_bytes = target.memory_limit_bytes
        curriculum, lengths = setup.curriculum, {setup.sequence_length}
        if curriculum:
            curriculum.check(setup.batch_schedule)
            lengths |= {*curriculum.buckets}
        preflight.check_model(setup.model, mesh, lengths)
        check_kernel_of(target, setup.model)
        num_rows = functools.partial(setup.step.num_rows, mesh=mesh)
        check_filled_shares(setup.batch_schedule, setup.num_steps, num_rows, setup.max_filled_share)
        self.num_rows = num_rows(setup.batch_size)
        self.num_microbatches = setup.step.num_microbatches(self.num_rows // num_batch_shards(mesh))
        self.state = train_state.abstract_state(setup.model, setup.optimizer, mesh)
        self.batch = train_step.abstract_batch(
            self.num_rows,
            setup.sequence_length,
            mesh,
            setup.objective,
            is_padded=curriculum is not None,
        )
        self.curriculum = curriculum.lines(setup.num_steps, num_rows) if curriculum else []
        self.compiled: dict[str, Any] = {}
        self.program: hlo.Program | None = None
        key = jax.eval_shape(lambda: jax.random.key(0))
        limits = jax.ShapeDtypeStruct((2,), jnp.float32) if setup.is_guarded else None
        arguments = self.state, self.batch, jax.ShapeDtypeStruct((), jnp.float32), key, limits
        step = train_step.jit_programs(setup.model, setup.optimizer, setup.step, mesh, self.state)[
            2
        ]
        with _use(mesh):
            self.traced = step.trace(*arguments)
        self.matmuls = jaxpr_flops.matmul_flops(self.traced.jaxpr)

    def compile(self, stderr: Path) -> None:
        """Runs the target's compiler; one that finds too little memory is an answer, too."""
        started = time.monotonic()
        try:
            with _use(self.mesh):
                executable = self.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            self.compiled = _refusal(str(error), self.target)
        else:
            stats = executable.memory_analysis()
            peak = stats.peak_memory_in_bytes
            if self.target.platform == "cpu":  # where that is the arguments alone
                peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes
            self.compiled = {"peak_bytes": peak, "arguments_bytes": stats.argument_size_in_bytes}
            # What should not be left: a GPU host's own links, a TPU's slice.
            name = "process_index" if self.target.platform == "cuda" else "slice_index"
            places = [getattr(device, name, None) or 0 for device in self.mesh.devices.flat]
            self.program = hlo.collectives(executable.as_text(), self.mesh.shape, places)
        self.compiled["seconds"] = time.monotonic() - started
        self.compiled["warnings"] = hlo.remat_warnings(
            stderr.read_text(encoding="utf-8", errors="replace")
        )

    # ---- figures ----

    def figures(self) -> dict[str, Any]:
        """All of them; what was not compiled is None."""
        found = self._description() | self._memory() | self._flops() | self._collectives()
        found["fits"] = self._fits(found)
        return found | self._time(found)

    def _description(self) -> dict[str, Any]:
        setup, target = self.setup, self.target
        c = setup.model.config
        return {
            "target": target.name,
            "mode": "compile" if self.compiled else "shape",
            "device_kind": target.chip.device_kind if target.chip else "cpu",
            "num_devices": target.num_devices,
            "num_hosts": target.num_hosts,
            "mesh": dict(self.mesh.shape),
            "params": sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params)),
            "batch_size_samples": setup.batch_size,
            "num_rows": self.num_rows,
            "num_microbatches": self.num_microbatches,
            "sequence_length_tokens": setup.sequence_length,
            "curriculum": self.curriculum,
            "remat_policy": c.remat_policy,
            "attention_kernel": c.attention_kernel,
            "compile_seconds": self.compiled.get("seconds"),
        }

    def _memory(self) -> dict[str, Any]:
        params = device_bytes(self.state.params)
        optimizer = device_bytes(self.state.opt_state)
        batch = device_bytes(self.batch)
        peak = self.compiled.get("peak_bytes")
        state = params + optimizer + batch
        return {
            "params_gib": params / _GIB,
            "optimizer_gib": optimizer / _GIB,
            "batch_gib": batch / _GIB,
            "temporaries_gib": (peak - state) / _GIB if peak else None,
            "peak_gib": peak / _GIB if peak else None,
            "limit_gib": self.limit_bytes / _GIB if self.limit_bytes else None,
        }

    def _fits(self, found: dict[str, Any]) -> bool | None:
        if found["limit_gib"] is None:
            return None
        if found["peak_gib"] is None:
            state = found["params_gib"] + found["optimizer_gib"] + found["batch_gib"]
            return False if state > found["limit_gib"] else None
        return "refused" not in self.compiled and found["peak_gib"] <= found["limit_gib"]

    def _flops(self) -> dict[str, Any]:
        c, setup = self.setup.model.config, self.setup
        model = flops.flops_per_step(
            **c.shape, sequence_length_tokens=setup.sequence_length, batch_size_samples=setup.batch_size,
        )  # fmt: skip
        hardware = self.matmuls.flops / self.target.num_devices
        return {
            "model_tflops": model.causal / self.target.num_devices / 1e12,
            "hardware_tflops": hardware / 1e12,
            "flops_per_step": model._asdict() | {"hardware": self.matmuls.flops},
            "uncounted_calls": list(self.matmuls.opaque),
        }

    def _collectives(self) -> dict[str, Any]:
        if self.program is None:
            return {"wire_gib": None, "collectives": None, "largest": None, "lint": None}
        found = [each for each in self.program.collectives if each.group_size > 1]
        lint = hlo.lint(
            found,
            num_layers=self.setup.model.config.num_layers,
            num_microbatches=self.num_microbatches,
        )
        if self.program.num_unknown_loops:
            lint.append(f"{self.program.num_unknown_loops} loops of unknown length, counted once")
        rows = [
            {"kind": row.kind, "axes": "+".join(row.axes), "dtype": row.dtype,
             "executed": row.executed, "wire_gib": row.wire_bytes / _GIB}
            for row in hlo.table(found)
        ]  # fmt: skip
        return {
            "wire_gib": sum(row.wire_bytes for row in hlo.table(found)) / _GIB,
            "collectives": rows,
            "largest": _largest(found),
            "lint": [*lint, *self.compiled["warnings"]],
        }

    def _time(self, found: dict[str, Any]) -> dict[str, Any]:
        setup, target = self.setup, self.target
        tokens = setup.planned_tokens
        state = jax.tree.leaves(self.state)
        result: dict[str, Any] = {
            "planned_tokens": tokens,
            "checkpoint_gib": sum(math.prod(x.shape) * x.dtype.itemsize for x in state) / _GIB,
            "estimate": None,
            "step_seconds": None,
            "tokens_per_second": None,
            "mfu": None,
            "days": None,
            "kwh": None,
            "co2_tonnes": None,
            "embodied_tonnes": None,
        }
        rate = CHECKPOINT_BYTES_PER_SECOND_AND_HOST * target.num_hosts
        result["checkpoint_seconds"] = result["checkpoint_gib"] * _GIB / rate
        if target.chip is None or self.program is None:
            return result
        cluster = cluster_of(target, self.assumptions)
        times = roofline.estimate(
            cluster, self.mesh.shape, hardware_flops=found["hardware_tflops"] * 1e12,
            memory_bytes=self._memory_traffic_bytes(), traffic=self.program.collectives,
        )  # fmt: skip
        watts = self.assumptions.watts or target.chip.watts
        step_tokens = setup.batch_size * setup.sequence_length
        days = tokens / step_tokens * times.step_seconds / 86_400
        hours = days * 24 * target.num_devices
        kwh = None if watts is None else hours * watts / 1000
        site = energy.Site(self.assumptions.grams_co2_per_kwh, self.assumptions.pue)
        mfu = flops.mfu(
            found["model_tflops"] * 1e12, times.step_seconds, 1, target.chip.peak_flops_per_second
        )
        assumed = {
            "watts": watts,
            "pue": self.assumptions.pue,
            "grams_co2_per_kwh": self.assumptions.grams_co2_per_kwh,
            "network_gbit_per_second_and_host": cluster.network_bytes_per_second * 8 / 1e9,
            "sustained_fraction": target.chip.sustained_fraction,
            "sustained_source": target.chip.sustained_source,
            "link_fraction": target.chip.link_fraction,
        }
        return result | {
            "estimate": dataclasses.asdict(times) | assumed,
            "step_seconds": times.step_seconds,
            "tokens_per_second": step_tokens / times.step_seconds,
            "mfu": mfu,
            "days": days,
            "kwh": kwh,
            "co2_tonnes": None if kwh is None else energy.dynamic_tonnes(kwh, site),
            "embodied_tonnes": sum(energy.embodied(hours, hours / target.chip.devices_per_host)),
        }  # fmt: skip

    def _memory_traffic_bytes(self) -> float:
        c, tensor = self.setup.model.config, self.mesh.shape["tensor"]
        num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params))
        shards = self.mesh.size // tensor
        return roofline.memory_bytes(
            params=num_params / tensor / self.mesh.shape["fsdp"], gathered_params=num_params / tensor,
            num_microbatches=self.num_microbatches,
            tokens=self.num_rows * self.setup.sequence_length / shards,
            emb_dim=c.emb_dim, mlp_dim=c.mlp_width, num_layers=c.num_layers, num_heads=c.num_heads,
            num_mlp_inputs=c.activation.num_inputs,
            vocab_size=c.vocab_size, sequence_length=self.setup.sequence_length, num_tensor=tensor,
            passes=4.0 if c.remat_policy == "full" else 3.0,
            scores_in_memory=c.attention_kernel == "xla",
        )  # fmt: skip


def _largest(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """The eight that send most; those of one line of code that exchange equal arrays are one."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for e in found:
        key = e.kind, "+".join(e.axes), e.shape, e.op_name, e.source
        total = groups.setdefault(key, [0, 0.0])
        total[0] += e.executed
        total[1] += e.wire_bytes / _GIB
    names = "kind", "axes", "shape", "op", "source"
    largest = sorted(groups.items(), key=lambda item: -item[1][1])[:8]
    return [
        dict(zip(names, key, strict=True)) | {"executed": total[0], "wire_gib": total[1]}
        for key, total in largest
    ]


def device_bytes(tree: Any) -> int:
    """Of one device: the parts of the arrays that it holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def cluster_of(target: Target, assumptions: Assumptions) -> roofline.Cluster:
    """The target as the roofline sees it."""
    assert target.chip is not None
    is_torus = target.platform == "tpu"
    return roofline.Cluster(
        target.chip, target.devices_per_host,
        assumptions.network_bytes_per_second or target.chip.network_bytes_per_second,
        num_slices=target.num_slices, sides=target.topology if is_torus else (),
        wraps=target.wraps if is_torus else (),
    )  # fmt: skip


def _use(mesh: Any):
    if isinstance(mesh, AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)


def _refusal(message: str, target: Target) -> dict[str, Any]:
    """What a compiler's error says about memory. BadInput for every other error."""
    option = re.search(r"No such compile option: '?([\w]+)", message)
    if option:
        raise BadInput(
            f"target {target.name}: its compiler has no option {option[1]!r} (StepOptions.compiler_options)"
        )
    if needed := out_of_memory.needed(message):
        return {"peak_bytes": needed[0], "refused": True}
    raise BadInput(f"target {target.name}: its compiler says: {message.splitlines()[0][:500]}")
