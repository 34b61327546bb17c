"""The fastest layout that fits: formulas sort all of them, the compiler judges the best.

The formulas need microseconds a layout and are right to a fifth; what each compilation shows corrects them.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bloomjax import flops, loss_chunks, plan_measure, roofline
from bloomjax.data import check_filled_shares
from bloomjax.errors import BadInput
from bloomjax.partitioning import MeshShape, check_divisible
from bloomjax.plan_measure import Assumptions, Setup
from bloomjax.targets import Target

_GIB = 2**30
_MAX_TENSOR = 16
_NUM_FITTING = 3  # so many compiled layouts that fit are enough to choose from
# Of the time that the estimate hides behind other work. Two layouts of one estimate are not as good when one of them
# needs all of its traffic hidden.
_SHARE_NOT_HIDDEN = 0.25


class Layout(NamedTuple):
    """What `suggest` may change. microbatch: rows of a batch shard at a time, None for all."""

    data: int
    fsdp: int
    tensor: int
    microbatch: int | None
    remat_policy: str

    def bindings(self) -> list[str]:
        """As gin lines."""
        return [
            f"MeshShape.data = {self.data}",
            f"MeshShape.fsdp = {self.fsdp}",
            f"MeshShape.tensor = {self.tensor}",
            f"StepOptions.microbatch_size_samples = {self.microbatch}",
            f"BloomConfig.remat_policy = {self.remat_policy!r}",
        ]


@dataclasses.dataclass
class Candidate:
    """A layout, what formulas say of it, and what the compiler did (None: not asked)."""

    layout: Layout
    guessed_gib: float
    guessed_seconds: float
    guessed_serial_seconds: float
    fits: bool | None = None
    peak_gib: float | None = None
    step_seconds: float | None = None
    serial_seconds: float | None = None  # without any overlap

    @property
    def cost(self) -> float:
        """Seconds by which layouts are compared."""
        step = self.step_seconds or self.guessed_seconds
        serial = self.serial_seconds or self.guessed_serial_seconds
        return step + _SHARE_NOT_HIDDEN * (serial - step)


class _Traffic(NamedTuple):
    kind: str
    axes: tuple[str, ...]
    wire_bytes: float


def search(
    setup: Setup,
    target: Target,
    assumptions: Assumptions,
    compile_layout: Callable[[Layout], dict[str, Any]] | None,
    max_seconds: float,
) -> list[Candidate]:
    """Candidates that fit, the fastest first, then those that were tried and do not.

    `compile_layout` makes the figures of one layout; without it only formulas speak. No compilation begins that would
    probably end after `max_seconds`. BadInput if no layout divides the model.
    """
    limit_bytes = target.memory_limit_bytes
    if limit_bytes is None or target.chip is None:
        raise BadInput(
            f"target {target.name}: nothing to suggest for a CPU, whose memory is not known"
        )
    started, longest = time.monotonic(), 0.0
    candidates = [_guess(layout, setup, target, assumptions) for layout in _layouts(setup, target)]
    if not candidates:
        raise BadInput(
            f"target {target.name}: no mesh of {target.num_devices} devices divides this model and batch"
        )
    candidates.sort(key=lambda c: c.cost)
    limit = limit_bytes / _GIB
    correction: dict[str, float] = {}  # measured over guessed peak, by remat policy
    tried: list[Candidate] = []
    for candidate in candidates:
        layout = candidate.layout
        # Not corrected yet, a guess is trusted to a fifth.
        guess = candidate.guessed_gib * correction.get(layout.remat_policy, 0.8)
        if guess > limit:
            continue
        if compile_layout is None:
            if candidate.guessed_gib <= limit:
                candidate.fits = True
                tried.append(candidate)
        elif time.monotonic() - started + longest <= max_seconds:
            begun = time.monotonic()
            try:
                found = compile_layout(layout)
            except (
                BadInput
            ) as error:  # its process was killed, or the compiler has a fault: one of many
                print(f"{layout}: {error}", file=sys.stderr)
                continue
            longest = max(longest, time.monotonic() - begun)
            candidate.fits, candidate.peak_gib = found["fits"], found["peak_gib"]
            if found["estimate"]:
                candidate.step_seconds = found["step_seconds"]
                candidate.serial_seconds = found["estimate"]["no_overlap_seconds"]
            correction[layout.remat_policy] = found["peak_gib"] / candidate.guessed_gib
            tried.append(candidate)
        if sum(c.fits is True for c in tried) == _NUM_FITTING:
            break
    # What is as fast to three digits goes by memory.
    return sorted(
        tried,
        key=lambda c: (
            not c.fits, float(f"{c.cost:.3g}"), c.peak_gib or c.guessed_gib,
        ),
    )  # fmt: skip


def _layouts(setup: Setup, target: Target) -> Iterator[Layout]:
    c, num = setup.model.config, target.num_devices
    max_tensor = min(
        _MAX_TENSOR, target.devices_per_host if target.platform == "cuda" else _MAX_TENSOR
    )
    for tensor, data in itertools.product(range(1, max_tensor + 1), range(1, num + 1)):
        if num % (tensor * data) or data % target.num_slices:
            continue
        fsdp = num // tensor // data
        mesh: Any = plan_measure.abstract_mesh(MeshShape(data, fsdp, tensor), target)
        try:
            check_divisible(
                mesh, sequence_length=setup.sequence_length, vocab_size=c.vocab_size, num_heads=c.num_heads,
                mlp_dim=c.mlp_width, emb_dim=c.emb_dim,
            )  # fmt: skip
        except BadInput:
            continue
        rows = math.ceil(setup.batch_size / (data * fsdp))
        sizes = {math.ceil(rows / num_micro) for num_micro in (2, 3, 4, 6, 8, 12, 16, 24, 32)} | {1}
        for microbatch in [None, *sorted(sizes - {rows})]:
            step = dataclasses.replace(setup.step, microbatch_size_samples=microbatch)
            try:
                num_rows = functools.partial(step.num_rows, mesh=mesh)
                check_filled_shares(
                    setup.batch_schedule, setup.num_steps, num_rows, setup.max_filled_share
                )
            except BadInput:
                continue
            for remat_policy in ("none", "minimal", "full"):
                yield Layout(data, fsdp, tensor, microbatch, remat_policy)


def _guess(layout: Layout, setup: Setup, target: Target, assumptions: Assumptions) -> Candidate:
    c, length = setup.model.config, setup.sequence_length
    shards = layout.data * layout.fsdp
    step = dataclasses.replace(setup.step, microbatch_size_samples=layout.microbatch)
    mesh: Any = plan_measure.abstract_mesh(
        MeshShape(layout.data, layout.fsdp, layout.tensor), target
    )
    num_rows = step.num_rows(setup.batch_size, mesh)
    num_micro = step.num_microbatches(num_rows // shards)
    num_params = flops.num_params(**c.shape)
    recomputes = layout.remat_policy == "full"
    model = flops.flops_per_step(
        **c.shape, sequence_length_tokens=length, batch_size_samples=num_rows
    )
    hardware = model.causal * (1.25 if recomputes else 1.0) / target.num_devices
    tokens = num_rows * length / shards
    traffic = roofline.memory_bytes(
        params=num_params / layout.tensor / layout.fsdp, gathered_params=num_params / layout.tensor,
        num_microbatches=num_micro, tokens=tokens, emb_dim=c.emb_dim, mlp_dim=c.mlp_width, num_layers=c.num_layers,
        num_mlp_inputs=c.activation.num_inputs, num_heads=c.num_heads, vocab_size=c.vocab_size, sequence_length=length,
        num_tensor=layout.tensor, passes=4.0 if recomputes else 3.0,
        scores_in_memory=c.attention_kernel == "xla",
    )  # fmt: skip
    mesh_shape = {"data": layout.data, "fsdp": layout.fsdp, "tensor": layout.tensor}
    times = roofline.estimate(
        plan_measure.cluster_of(target, assumptions), mesh_shape, hardware_flops=hardware,
        memory_bytes=traffic, traffic=_traffic(layout, target.num_slices, num_params, num_micro, tokens, c),
    )  # fmt: skip
    peak = _peak_bytes(layout, num_params, num_micro, tokens / num_micro, setup, target.platform)
    return Candidate(layout, peak / _GIB, times.step_seconds, times.no_overlap_seconds)


def _traffic(
    layout: Layout, num_slices: int, num_params: int, num_micro: int, tokens: float, c: Any
) -> list[_Traffic]:
    """A microbatch gathers bf16 weights over `fsdp` twice, scatters float32 gradients and adds them over `data`; a
    layer gathers and scatters bf16 activations over `tensor`, 10 times and 4 more to recompute."""
    gathered = num_params / layout.tensor
    num = 10 + 4 * (layout.remat_policy == "full")
    fsdp, tensor = 1 - 1 / layout.fsdp, 1 - 1 / layout.tensor
    crossing = "send" if num_slices > 1 else "all-reduce"
    return [
        _Traffic("all-gather", ("fsdp",), num_micro * gathered * (2 * 2 + 4) * fsdp),
        _Traffic(
            crossing, ("data",), num_micro * gathered / layout.fsdp * 2 * 4 * (1 - 1 / layout.data)
        ),
        _Traffic("all-gather", ("tensor",), num * c.num_layers * tokens * c.emb_dim * 2 * tensor),
    ]


def _peak_bytes(
    layout: Layout, num_params: int, num_micro: int, tokens: float, setup: Setup, platform: str
) -> float:
    """Of one device; `tokens` of its rows in one microbatch."""
    c = setup.model.config
    D, F, t, inputs = c.emb_dim, c.mlp_width, layout.tensor, c.activation.num_inputs
    held = num_params / t / layout.fsdp
    state = held * (12 + 4 * (2 if num_micro > 1 else 1))  # gradients, and their sum
    kept = {"full": D, "minimal": 6 * D + inputs * F, "none": 20 * D + (3 + inputs) * F}[
        layout.remat_policy
    ]
    saved = c.num_layers * tokens * 2 * kept / t
    layer = 4 * D * D + (1 + inputs) * D * F
    # bf16 weights of this layer and the next, float32 gradients of one before they are scattered.
    weights = layer / t * (2 * 2 + 2 * 4)
    working = tokens * 2 * (3 * D + (6 * D + (3 + inputs) * F) / t)
    vocabulary = c.vocab_size * D / t * (2 + 4 + 4)
    columns = c.vocab_size // t
    chunk = setup.step.loss_chunk_tokens or loss_chunks.chunk_tokens_for(
        math.ceil(tokens), columns, D, platform=platform
    )
    logits = loss_chunks.chunk_bytes(min(math.ceil(tokens), chunk), columns, platform)
    return state + saved + weights + working + vocabulary + logits
