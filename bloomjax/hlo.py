"""Reads a compiled program: which collectives it executes, how often, over which mesh axes, with how many bytes.

The text is that of `jax.stages.Compiled.as_text()`, from the compilers for TPU, GPU and CPU. They differ in how they
print groups of devices, asynchronous operations, reduce-scatters and loops; what is said here of each was seen in
programs of jax 0.10.2 (libtpu 0.0.42, CUDA 12).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bloomjax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of the program in which devices exchange data.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ..., and "send" for what
        leaves a TPU slice through the hosts' network.
      axes: mesh axes along which the devices of a group differ; ("?",) if the text does not say.
      whole_axes: whether a group is all devices along these axes, and not only some.
      dtype: of the largest part of the result.
      shape: largest array of the result, such as "bf16[8,2048,14336]".
      group_size: devices of a group; of a permutation, those that are linked by it.
      executed: times a step.
      result_bytes: of one execution on one device.
      wire_bytes: that one device sends in all executions, by the formulas of a ring (see `wire_bytes_of`).
      leaves_host: whether a group has devices of several hosts; None if the hosts were not given.
      op_name: the operation of the traced program that it came from; empty if the text does not say.
      source: file and line of that operation, such as "bloomjax/losses.py:117"; may be empty.
    """

    kind: str
    axes: tuple[str, ...]
    whole_axes: bool
    dtype: str
    shape: str
    group_size: int
    executed: int
    result_bytes: int
    wire_bytes: float
    leaves_host: bool | None
    op_name: str
    source: str


class Program(NamedTuple):
    """Collectives in no particular order; loops whose length the text does not tell, whose bodies count once."""

    collectives: list[Collective]
    num_unknown_loops: int


class Row(NamedTuple):
    """A line of `table`."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    executed: int
    wire_bytes: float


KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


def collectives(
    text: str, mesh_shape: Mapping[str, int], process_index: Sequence[int] | None = None
) -> Program:
    """What one device exchanges in one execution of the program.

    Args:
      text: of the optimized program, compiled for the devices of the mesh in mesh order.
      mesh_shape: size of each mesh axis, outermost first (`Mesh.shape`).
      process_index: host of each device in mesh order. On TPUs, whose links connect the hosts of a slice, the slice of
        each device tells more.

    Every branch of a conditional counts as taken. A program for several TPU slices is that of one of them; they must
    follow each other along the outermost axis of the mesh, to which transfers between them are attributed. BadInput if
    the program was not compiled for the devices of the mesh.
    """
    module = _Module(text)
    walk = _Walk(module, _Places(dict(mesh_shape), module, process_index))
    walk.visit(module.entry, 1, None)
    return Program(walk.found(), walk.num_unknown_loops)


def table(found: Iterable[Collective]) -> list[Row]:
    """Sums by kind, axes and dtype, most bytes first."""
    sums: dict[tuple[str, tuple[str, ...], str], tuple[int, float]] = {}
    for each in found:
        key = each.kind, each.axes, each.dtype
        executed, wire = sums.get(key, (0, 0.0))
        sums[key] = executed + each.executed, wire + each.wire_bytes
    rows = [Row(*key, *values) for key, values in sums.items()]
    return sorted(rows, key=lambda row: -row.wire_bytes)


def largest(found: Iterable[Collective], n: int = 8) -> list[Collective]:
    """The `n` that send most."""
    return sorted(found, key=lambda each: -each.wire_bytes)[:n]


def wire_bytes_of(kind: str, result_bytes: float, group_size: int) -> float:
    """Bytes that each device of a ring of `group_size` sends so that each has its result of `result_bytes`.

    In g - 1 rounds each sends a g-th: of the result of an all-gather or all-to-all, of the g times larger operand of a
    reduce-scatter. An all-reduce is a reduce-scatter and an all-gather.
    """
    if group_size <= 1:
        return 0.0
    rounds = group_size - 1
    if kind == "all-reduce":
        return 2 * result_bytes * rounds / group_size
    if kind == "reduce-scatter":
        return float(result_bytes * rounds)
    if kind in ("all-gather", "all-to-all", "ragged-all-to-all"):
        return result_bytes * rounds / group_size
    return float(result_bytes)


# ---- what is likely to be a mistake ----


def lint(
    found: Iterable[Collective],
    *,
    num_layers: int,
    num_microbatches: int,
    min_weight_bytes: int = 4 * 2**20,
) -> list[str]:
    """One line for each kind of waste in a training step whose weights are split over `fsdp`; see its code for which.

    Arrays below `min_weight_bytes` are biases, norms and scalars, of which nothing is said.
    """
    found = list(found)
    large = [e for e in found if "fsdp" in e.axes and array_bytes(e.shape) >= min_weight_bytes]
    gathers = [e for e in large if e.kind == "all-gather"]
    # Tensor-parallel gathers and scatters stand between matmuls that need them: they want a host's own links.
    away = [e for e in found if e.axes == ("tensor",) and e.leaves_host]
    # It has fsdp times the bytes of a reduce-scatter as its result, and twice on the wire.
    reduces = [e for e in large if e.kind == "all-reduce"]
    lines = [
        _said("weights travel in float32", [e for e in gathers if e.dtype in ("f32", "f64")]),
        _said("all-reduce over fsdp where a reduce-scatter belongs", reduces),
        _said("groups of tensor leave their host", away),
    ]
    by_weight: dict[str, list[Collective]] = {}
    for each in gathers:
        by_weight.setdefault(_scope(each.op_name) or each.shape, []).append(each)
    for name, group in by_weight.items():
        times = sum(each.executed for each in group) / (num_layers * num_microbatches)
        # Once forward, once backward, once to compute again what was not kept. Without a name it may be two weights of
        # the same shape.
        if times > (6 if "[" in name else 3):
            lines.append(
                _said(f"{name} is gathered {times:.1f} times a layer and microbatch", group)
            )
    return [line for line in lines if line]


def _said(what: str, found: list[Collective]) -> str:
    """A line of `lint`, or nothing."""
    if not found:
        return ""
    top = largest(found, 1)[0]
    wire_gib = sum(each.wire_bytes for each in found) / 2**30
    where = ", ".join(part for part in (top.op_name, top.source) if part)
    return (
        f"{what}: {sum(each.executed for each in found)} executed, {wire_gib:,.2f} GiB on the wire, "
        f"largest {top.kind} {top.shape} over {'+'.join(top.axes)}{f' ({where})' if where else ''}"
    )


# What jax adds to the name of an operation around the names that a model gives.
_WRAPPERS = {"body", "closed_call", "checkpoint", "rematted_computation", "shard_map"}


def _scope(op_name: str) -> str:
    """The part of a model that an operation belongs to: ".../while/body/closed_call/layers/out/dot_general" is of
    "layers/out"."""
    parts = op_name.split("/")[:-1]
    inside = [i for i, part in enumerate(parts) if part in _WRAPPERS]
    return "/".join(
        part for part in parts[inside[-1] + 1 if inside else 1 :] if part.isidentifier()
    )


_REMATERIALIZATION = re.compile(
    r"Involuntary full rematerialization.*? from sharding (\{.*?\}) to (\{.*?\}) efficiently for HLO operation "
    r"%(\S+) = (\w+\[[\d,]*\])"
)


def remat_warnings(stderr_text: str) -> list[str]:
    """The partitioner's complaints that an array is replicated to get from one sharding to another, each once."""
    lines = []
    for line in stderr_text.splitlines():
        if "Involuntary full rematerialization" not in line:
            continue
        match = _REMATERIALIZATION.search(line)
        if match is None:
            lines.append(line.strip())
            continue
        before, after, name, shape = match.groups()
        op_name = _op_name(line) or name
        lines.append(
            f"involuntary full rematerialization of {shape} from {before} to {after} ({op_name})"
        )
    return list(dict.fromkeys(lines))


# ---- the text ----


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    arguments: str  # between its parentheses
    attributes: str  # behind them

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return [
            part.split()[-1].lstrip("%") for part in _split(self.arguments) if part and part.split()
        ]

    def called(self) -> list[str]:
        """Names of the computations that it runs, other than those of a loop."""
        names = re.findall(
            r"\b(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-~]+)",
            self.attributes,
        )
        for several in re.findall(
            r"\b(?:called_computations|branch_computations)=\{([^}]*)\}", self.attributes
        ):
            names += [name.strip().lstrip("%") for name in several.split(",")]
        return names

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else None


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = ")
_BEGINS = re.compile(f"{_HEAD.pattern}|{_INSTRUCTION.pattern}")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")


class _Module:
    """Computations of a program by name, instructions by name, and where the lines of the source are."""

    def __init__(self, text: str):
        lines = text.splitlines()
        header = lines[0] if lines else ""
        if not header.startswith("HloModule"):
            raise BadInput(f"no compiled program: it begins with {header[:40]!r}, not HloModule")
        self.num_partitions = int(_first(r"num_partitions=(\d+)", header) or 1)
        self.num_devices = self.num_partitions * int(_first(r"replica_count=(\d+)", header) or 1)
        self.is_of_a_slice = "_xla_megascale_target" in text
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.roots: dict[str, _Instruction] = {}
        self.entry = ""
        self._read(lines)
        if not self.entry:
            raise BadInput("no compiled program: it has no ENTRY")
        self.sources = _sources(lines)

    def _read(self, lines: list[str]) -> None:
        name, position = "", 0
        while position < len(lines):
            line = lines[position]
            position += 1
            if head := _HEAD.match(line):
                name = head.group(2)
                self.computations[name] = {}
                self.entry = name if head.group(1) else self.entry
            elif name and (match := _INSTRUCTION.match(line)):
                # Attributes of Pallas calls go over several lines, some of which look like the end of a computation.
                depth = _depth(line)
                while depth > 0 and position < len(lines) and not _BEGINS.match(lines[position]):
                    line += "\n" + lines[position]
                    depth += _depth(lines[position])
                    position += 1
                instruction = _instruction(match.group(2), line[match.end() :])
                self.computations[name][instruction.name] = instruction
                if match.group(1):
                    self.roots[name] = instruction
            elif line.startswith("}"):
                name = ""


def _instruction(name: str, rest: str) -> _Instruction:
    """`rest` is "shape opcode(arguments), attributes"."""
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return _Instruction(
        name, _COMMENT.sub("", shape), rest[:opening], _COMMENT.sub("", rest[opening + 1 : closing]),
        rest[closing + 1 :],
    )  # fmt: skip


def _depth(line: str) -> int:
    """How many braces stay open at the end of the line."""
    bare = _STRING.sub("", line)
    return bare.count("{") - bare.count("}")


def _closing(text: str, opening: int = 0) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise BadInput(f"no compiled program: a parenthesis stays open in {text[:60]!r}")


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match.group() in "({[":
            depth += 1
        elif match.group() in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _op_name(text: str) -> str:
    return _first(r'op_name="([^"]*)"', text) or ""


def _sources(lines: list[str]) -> dict[str, str]:
    """stack_frame_id -> "folder/file.py:line", from the tables before the first computation."""
    tables: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith(("%", "ENTRY")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif line[:1].isdigit():
            number, _, value = line.partition(" ")
            current[number] = value
    places = {}
    for number, frame in tables.get("StackFrames", {}).items():
        place = tables["FileLocations"].get(_first(r"file_location_id=(\d+)", frame) or "", "")
        name = tables["FileNames"].get(_first(r"file_name_id=(\d+)", place) or "", "").strip('"')
        if name:
            places[number] = f"{'/'.join(name.split('/')[-2:])}:{_first(r'line=([0-9]+)', place)}"
    return places


# ---- arrays ----

_ARRAY = re.compile(r"\b((?:pred|[a-z]+\d\w*)\[[\d,<=]*\])")


def array_bytes(shape: str) -> int:
    """Bytes of an array such as "bf16[8,2048]", without the padding of its layout."""
    dtype, _, dims = shape.rstrip("]").partition("[")
    bits = 8 if dtype == "pred" else int(_first(r"(\d+)", dtype) or 0)
    return math.ceil(math.prod(int(d.strip("<=")) for d in dims.split(",") if d) * bits / 8)


def _result(instruction: _Instruction) -> list[str]:
    """Arrays of the result; an asynchronous start names (operands, results, ...), but for all-reduce."""
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        shape = _split(shape[1:-1])[1]
    elif instruction.opcode == "send":
        shape = _split(shape[1:-1])[0]
    return _ARRAY.findall(shape)


# ---- groups of devices ----


def _groups(text: str, num_devices: int) -> np.ndarray | None:
    """The groups [number, size] of `replica_groups=`, in each of its three spellings; None if there are none.

    {{0,1},{2,3}}, {} for all; [2,2]<=[2,2]T(1,0), an iota that is reshaped, transposed and reshaped; and
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, the groups along some axes of a mesh or along parts of them.
    """
    if match := re.search(r"replica_groups=(\{\{[\d,{}\s]*\}\}|\{\})", text):
        groups = [
            [int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,\s]+)\}", match.group(1))
        ]
        if not groups:
            return np.arange(num_devices)[None]
        size = max(map(len, groups))
        return np.array(
            [g + g[:1] * (size - len(g)) for g in groups]
        )  # a repeated device changes nothing
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match.group(2)).reshape(_integers(match.group(1)))
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\]\s*(?:,\s*device_ids=\(((?:[^()]|\([^()]*\))*)\))?\s*\{([^}]*)\}",
        text,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        order = match.group(2)
        if not order:
            ids = np.arange(math.prod(sizes.values()))
        else:
            ids = _iota(order) if order.startswith("[") else np.array(_integers(order))
        return _along(ids.reshape(-1), sizes, match.group(3))
    return None


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """0, 1, 2, ... in the order of "[64,8]T(1,0)"."""
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(order)) if order else ids


def _along(ids: np.ndarray, sizes: dict[str, int], selection: str) -> np.ndarray:
    """Groups along the selected axes: "'a','b':(2)4" is all of a and of b the digit of 4 below a more significant 2."""
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", selection)
    dims, is_chosen = [], []
    for axis, size in sizes.items():
        spans = [
            (int(p or 1), int(p or 1) * int(s or size)) for name, p, s in chosen if name == axis
        ]
        cuts = sorted({1, size, *(cut for span in spans for cut in span)})
        for low, high in zip(cuts, cuts[1:], strict=False):
            dims.append(high // low)
            is_chosen.append(any(first <= low and high <= last for first, last in spans))
    outer = [i for i, inside in enumerate(is_chosen) if not inside]
    inner = [i for i, inside in enumerate(is_chosen) if inside]
    size = math.prod(dims[i] for i in inner)
    return ids.reshape(dims).transpose(outer + inner).reshape(-1, size)


class _Place(NamedTuple):
    axes: tuple[str, ...]
    whole_axes: bool
    group_size: int
    leaves_host: bool | None


class _Places:
    """Where groups of devices lie in the mesh."""

    def __init__(
        self, mesh_shape: dict[str, int], module: _Module, process_index: Sequence[int] | None
    ):
        self._mesh_shape, self._slice_shape = mesh_shape, dict(mesh_shape)
        self._num_partitions, self.num_devices = module.num_partitions, module.num_devices
        num_slices, rest = divmod(math.prod(mesh_shape.values()), self.num_devices)
        outermost = next((axis for axis, size in mesh_shape.items() if size > 1), None)
        if rest == 0 and num_slices > 1 and module.is_of_a_slice and outermost is not None:
            self._slice_shape[outermost], rest = divmod(mesh_shape[outermost], num_slices)
        if rest or math.prod(self._slice_shape.values()) != self.num_devices:
            shape = " x ".join(f"{axis}={size}" for axis, size in mesh_shape.items())
            raise BadInput(
                f"the program was compiled for {self.num_devices} devices, not for the mesh {shape}"
            )
        if process_index is not None and len(process_index) != math.prod(mesh_shape.values()):
            raise BadInput(
                f"process_index has the hosts of {len(process_index)} devices, the mesh has "
                f"{math.prod(mesh_shape.values())}"
            )
        self._hosts = None if process_index is None else np.asarray(process_index)
        self._outermost = outermost or "?"

    def of(self, kind: str, attributes: str) -> _Place:
        """Of the instruction with these attributes."""
        if kind in ("collective-permute", "send"):
            return self._of_pairs(attributes)
        groups = _groups(attributes, self.num_devices)
        if "use_global_device_ids=true" not in attributes and self._num_partitions > 1:
            # Then the numbers are those of replicas, and jax has one of the whole mesh.
            if "channel_id=" not in attributes:
                groups = np.arange(self.num_devices)[:, None]
            elif kind in ("all-gather", "all-reduce", "reduce-scatter"):
                groups = np.arange(self.num_devices)[None]
        return self._unknown() if groups is None else self._of_groups(groups, groups.shape[1])

    def _of_pairs(self, attributes: str) -> _Place:
        """Of a permutation: pairs of a source and a target, linked to rings."""
        match = re.search(r"source_target_pairs=\"?\{((?:\{\d+,\d+\},?)*)\}", attributes)
        if match is None:
            return self._unknown()
        pairs = np.array(_integers(match.group(1)), int).reshape(-1, 2)
        head = list(range(self.num_devices))  # of the ring that a device is in

        def find(device: int) -> int:
            while head[device] != device:
                head[device] = device = head[head[device]]
            return device

        for source, target in pairs.tolist():
            head[find(source)] = find(target)
        rings = np.bincount([find(device) for device in range(self.num_devices)])
        return self._of_groups(pairs, int(rings.max()))

    def _of_groups(self, groups: np.ndarray, group_size: int) -> _Place:
        coordinates = np.unravel_index(groups, tuple(self._slice_shape.values()))
        axes = tuple(
            axis for axis, c in zip(self._mesh_shape, coordinates, strict=True) if (c != c[:, :1]).any()
        )  # fmt: skip
        leaves = None
        if self._hosts is not None:
            hosts = self._hosts[groups]
            leaves = bool((hosts != hosts[:, :1]).any())
        whole = group_size == math.prod(self._mesh_shape[axis] for axis in axes)
        return _Place(axes, whole, group_size, leaves)

    def between_slices(self, attributes: str) -> _Place:
        """Of a transfer of TPU's runtime for several slices: target "{1,2}x{0:15}" is slices x devices of a slice."""
        target = _first(r'_xla_megascale_target="\{([\d,:]*)\}', attributes) or ""
        ranges = [_integers(part) for part in target.split(",")]
        count = sum(numbers[-1] - numbers[0] + 1 for numbers in ranges if numbers)
        return _Place(
            (self._outermost,), self._mesh_shape.get(self._outermost) == count, count, True
        )

    def _unknown(self) -> _Place:
        return _Place(("?",), False, self.num_devices, None)


# ---- how often ----


class _Linear(NamedTuple):
    """The value `offset`, plus that of one element of a loop's state if `element` is not None."""

    element: int | None
    offset: int


_UNCHANGED = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}


class _Loops:
    """Lengths of loops: from the compiler's note (GPU, CPU), else from condition, body and first value (TPU)."""

    def __init__(self, module: _Module):
        self._module = module

    def length(self, computation: str, loop: _Instruction) -> int | None:
        """How often the body of a `while` of this computation runs; None if that cannot be told."""
        if known := loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
            return int(known)
        compared = self._comparison(loop.attribute(r"condition=%?([\w.\-~]+)") or "")
        if compared is None:
            return None
        counter, direction, limit = compared
        first, step = self._course(computation, loop, counter)
        last, limit_step = self._course(computation, loop, limit)
        if first is None or last is None or limit_step != 0 or not step:
            return None
        # TPU's loops of a matmul that is split over a ring of devices take two steps at a time.
        return _steps(first, last, step, direction)

    def _course(
        self, computation: str, loop: _Instruction, value: _Linear
    ) -> tuple[int | None, int | None]:
        """What a value of the condition is at first, and what each iteration adds to it."""
        if value.element is None:
            return value.offset, 0
        start = self._part(computation, loop.operands[0], value.element, [])
        body = loop.attribute(r"body=%?([\w.\-~]+)") or ""
        following = self._part(body, self._module.roots[body].name, value.element, None)
        if start is None or start.element is not None:
            return None, None
        first = start.offset + value.offset
        if following is None or following.element != value.element:
            return first, None
        return first, following.offset

    def _comparison(self, condition: str) -> tuple[_Linear, str, _Linear] | None:
        root, name, arguments = self._module.roots.get(condition), condition, None
        while root is not None and root.opcode in ("fusion", "call"):
            arguments = [self._value(name, operand, arguments) for operand in root.operands]
            name = root.called()[0]
            root = self._module.roots.get(name)
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return None
        left, right = (self._value(name, operand, arguments) for operand in root.operands)
        direction = root.attribute(r"direction=(\w+)") or ""
        if left is None or right is None:
            return None
        if left.element is None:
            flipped = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
            left, right, direction = right, left, flipped.get(direction, direction)
        return left, direction, right

    def _value(
        self, computation: str, name: str, arguments: list[_Linear | None] | None
    ) -> _Linear | None:
        """Of an instruction. `arguments` are those of the computation; None for one whose parameter is the state."""
        instruction = self._module.computations[computation].get(name)
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            number = re.fullmatch(r"-?\d+", instruction.arguments.strip())
            return _Linear(None, int(number.group())) if number else None
        if opcode == "parameter":
            position = int(instruction.arguments)
            return arguments[position] if arguments and position < len(arguments) else None
        if opcode in _UNCHANGED:
            return self._value(computation, operands[0], arguments)
        if opcode == "get-tuple-element":
            element = int(instruction.attribute(r"index=(\d+)") or 0)
            return self._part(computation, operands[0], element, arguments)
        if opcode in ("fusion", "call"):
            inner = [self._value(computation, operand, arguments) for operand in operands]
            called = instruction.called()[0]
            root = self._module.roots.get(called)
            return self._value(called, root.name, inner) if root else None
        if opcode in ("add", "subtract"):
            left, right = (self._value(computation, operand, arguments) for operand in operands)
            if opcode == "add" and left is not None and left.element is None:
                left, right = right, left
            if left is None or right is None or right.element is not None:
                return None
            sign = 1 if opcode == "add" else -1
            return _Linear(left.element, left.offset + sign * right.offset)
        return None

    def _part(
        self, computation: str, name: str, element: int, arguments: list[_Linear | None] | None
    ) -> _Linear | None:
        """Of one element of an instruction whose result is a tuple."""
        instruction = self._module.computations[computation].get(name)
        if instruction is None:
            return None
        if instruction.opcode == "parameter" and arguments is None:
            return _Linear(element, 0)
        if instruction.opcode == "tuple":
            return self._value(computation, instruction.operands[element], arguments)
        if instruction.opcode in _UNCHANGED:
            return self._part(computation, instruction.operands[0], element, arguments)
        if instruction.opcode == "fusion":
            inner = [self._value(computation, each, arguments) for each in instruction.operands]
            called = instruction.called()[0]
            root = self._module.roots.get(called)
            return self._part(called, root.name, element, inner) if root else None
        return None


def _steps(first: int, limit: int, step: int, direction: str) -> int | None:
    """Values that a counter takes while it is LT, LE, GT, GE or NE the limit; None if it never stops."""
    if direction == "NE":
        return (limit - first) // step if step and (limit - first) % step == 0 else None
    if direction in ("LT", "LE") and step > 0:
        return len(range(first, limit + (direction == "LE"), step))
    if direction in ("GT", "GE") and step < 0:
        return len(range(first, limit - (direction == "GE"), step))
    return None


# ---- all of it ----


class _Call(NamedTuple):
    computation: str
    instruction: _Instruction


class _Walk:
    """Goes through the program as it is executed."""

    def __init__(self, module: _Module, places: _Places):
        self._module, self._places, self._loops = module, places, _Loops(module)
        self._found: list[Collective] = []
        # TPU: a collective hidden behind matmuls is printed in the fusion that starts it, in each fusion that goes on
        # with it and in the one that ends it, and these may lie in an inner loop. Only the start counts.
        self._spread: dict[tuple, list[tuple[bool, Collective]]] = {}
        self.num_unknown_loops = 0

    def found(self) -> list[Collective]:
        result = list(self._found)
        for parts in self._spread.values():
            starts = [each for is_start, each in parts if is_start]
            result += starts or [min((each for _, each in parts), key=lambda e: e.executed)]
        return result

    def visit(self, computation: str, executed: int, caller: _Call | None) -> None:
        """One computation that runs `executed` times."""
        for instruction in self._module.computations.get(computation, {}).values():
            opcode = instruction.opcode
            if opcode.removesuffix("-start") in KINDS or opcode == "send":
                self._add(computation, instruction, executed, caller)
            elif opcode == "while":
                length = self._loops.length(computation, instruction)
                if length is None:
                    self.num_unknown_loops += 1
                body = instruction.attribute(r"body=%?([\w.\-~]+)") or ""
                call = _Call(computation, instruction)
                self.visit(body, executed * (1 if length is None else length), call)
            elif not opcode.endswith(("-done", "-update")):
                for called in instruction.called():
                    self.visit(called, executed, _Call(computation, instruction))

    def _add(
        self, computation: str, instruction: _Instruction, executed: int, caller: _Call | None
    ) -> None:
        kind, attributes = instruction.opcode.removesuffix("-start"), instruction.attributes
        if "_xla_megascale_target" in attributes:
            place = self._places.between_slices(attributes)
        elif kind == "send" and "source_target_pairs" not in attributes:
            return  # to this device's own host
        else:
            place = self._places.of(kind, attributes)
        arrays = _result(instruction)
        shape = max(arrays, key=array_bytes, default="")
        result_bytes = sum(map(array_bytes, arrays))
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            # TPU prints a reduce-scatter as a fusion of an all-reduce and the slice that the device keeps of it.
            kind, result_bytes = "reduce-scatter", result_bytes // place.group_size
        operation = _first(r'_xla_megascale_transfer_type="(\w+)"', attributes)
        if operation:
            wire = _sent_bytes(operation.lower().replace("_", "-"), result_bytes, place.group_size)
        else:
            wire = wire_bytes_of(kind, result_bytes, place.group_size)
        described = self._described(_Call(computation, instruction), caller)
        found = Collective(
            kind, place.axes, place.whole_axes, shape.partition("[")[0], shape, place.group_size, executed,
            result_bytes, executed * wire, place.leaves_host, _op_name(described),
            self._module.sources.get(_first(r"stack_frame_id=(\d+)", described) or "", ""),
        )  # fmt: skip
        chain = instruction.attribute(r'chain_id="(\d+)"')
        name = caller.instruction.name if caller else ""
        if chain or name.startswith("async-collective") or "async_collective" in computation:
            key = chain, instruction.attribute(r"channel_id=(\d+)"), kind, place, shape
            self._spread.setdefault(key, []).append(("async-collective-start" in name, found))
        else:
            self._found.append(found)

    def _described(self, *calls: _Call | None) -> str:
        """The attributes that name the operation: those of the first of these instructions, or of their operands."""
        around = [call.instruction for call in calls if call is not None]
        for call in calls:
            if call is not None and call.instruction.opcode != "while":
                computation = self._module.computations[call.computation]
                around += [computation[n] for n in call.instruction.operands if n in computation]
        return next((each.attributes for each in around if _op_name(each.attributes)), "")


def _sent_bytes(kind: str, operand_bytes: int, group_size: int) -> float:
    """As `wire_bytes_of`, of what a slice hands to the hosts' network."""
    if kind == "all-gather":
        return wire_bytes_of(kind, operand_bytes * group_size, group_size)
    if kind == "reduce-scatter":
        return wire_bytes_of(kind, operand_bytes / group_size, group_size)
    return wire_bytes_of(kind, operand_bytes, group_size)
