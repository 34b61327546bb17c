"""Collectives of programs that the test compiles and counts by hand, and of fragments in each way a compiler prints."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_run import REPOSITORY

from bloomjax import hlo
from bloomjax.errors import BadInput

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ALL = P(("data", "fsdp", "tensor"))
BYTES = 8 * 16 * 4  # one device's part of what the programs below carry


@pytest.fixture
def text_of(mesh_of):
    """text_of(f): f on each device's f32[8, 16], compiled for 2 x 2 x 2 virtual devices."""
    mesh = mesh_of(2, 2, 2)

    def compile_(f):
        with jax.set_mesh(mesh):
            whole = jax.shard_map(f, in_specs=ALL, out_specs=ALL, check_vma=False)
            x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, ALL))
            return jax.jit(whole).lower(x).compile().as_text()

    return compile_


def loop(length, f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, length=length)[0]


def the_one(text, mesh=MESH, process_index=None):
    program = hlo.collectives(text, mesh, process_index)
    assert program.num_unknown_loops == 0
    (found,) = program.collectives
    return found


# ---- compiled ----


@pytest.mark.parametrize(
    ("f", "kind", "axes", "group_size", "executed", "result_bytes", "wire_bytes"),
    [
        (loop(5, lambda x: jnp.sin(lax.psum(x, "fsdp"))),
         "all-reduce", ("fsdp",), 2, 5, BYTES, 5 * BYTES),
        (loop(7, lambda x: jnp.sin(lax.psum(x, ("data", "fsdp")))),
         "all-reduce", ("data", "fsdp"), 4, 7, BYTES, 7 * 1.5 * BYTES),
        (loop(2, lambda x: jnp.sin(lax.psum(x, ("data", "fsdp", "tensor")))),
         "all-reduce", ("data", "fsdp", "tensor"), 8, 2, BYTES, 2 * 1.75 * BYTES),
        (loop(3, loop(4, lambda x: lax.all_gather(x, ("data", "tensor"), tiled=True)[:8] * x)),
         "all-gather", ("data", "tensor"), 4, 12, 4 * BYTES, 12 * 3 * BYTES),
        (loop(7, lambda x: jnp.tile(lax.psum_scatter(x, "tensor", tiled=True), (2, 1))),
         "reduce-scatter", ("tensor",), 2, 7, BYTES / 2, 7 * BYTES / 2),
        (loop(3, lambda x: jnp.tile(lax.psum_scatter(x, ("data", "tensor"), tiled=True), (4, 1))),
         "reduce-scatter", ("data", "tensor"), 4, 3, BYTES / 4, 3 * 3 * BYTES / 4),
        (loop(6, lambda x: jnp.sin(lax.ppermute(x, "data", [(0, 1), (1, 0)]))),
         "collective-permute", ("data",), 2, 6, BYTES, 6 * BYTES),
        (loop(4, lambda x: jnp.sin(lax.all_to_all(x, ("fsdp", "tensor"), 0, 0, tiled=True))),
         "all-to-all", ("fsdp", "tensor"), 4, 4, BYTES, 4 * 0.75 * BYTES),
        (lambda x: lax.fori_loop(3, 18, lambda i, x: jnp.sin(lax.psum(x, "fsdp") * i), x),
         "all-reduce", ("fsdp",), 2, 15, BYTES, 15 * BYTES),
        (lambda x: lax.while_loop(  # 40, 37, ..., 7
            lambda c: c[0] > 4, lambda c: (c[0] - 3, jnp.sin(lax.psum(c[1], "fsdp"))), (40, x))[1],
         "all-reduce", ("fsdp",), 2, 12, BYTES, 12 * BYTES),
        (lambda x: lax.while_loop(  # 0, 2, ..., 10
            lambda c: 10 >= c[0], lambda c: (2 + c[0], jnp.sin(lax.psum(c[1], "fsdp"))), (0, x))[1],
         "all-reduce", ("fsdp",), 2, 6, BYTES, 6 * BYTES),
    ],
)  # fmt: skip
def test_compiled(text_of, f, kind, axes, group_size, executed, result_bytes, wire_bytes):
    text = text_of(f)
    found = the_one(text)
    assert (found.kind, found.axes, found.group_size) == (kind, axes, group_size)
    assert (found.executed, found.result_bytes, found.wire_bytes) == (
        executed,
        result_bytes,
        wire_bytes,
    )
    assert found.dtype == "f32" and found.whole_axes and found.leaves_host is None
    assert found.op_name.startswith("jit(") and found.source.startswith("tests/test_hlo.py:")
    # TPU's compiler does not note how long a loop is: without the note it is read from the loop itself.
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert "known_trip_count" not in bare
    assert the_one(bare) == found


def test_a_loop_of_unknown_length_counts_once_and_is_told(text_of):
    def f(x):
        return lax.while_loop(
            lambda x: jnp.sum(x) < 100, loop(3, lambda x: jnp.sin(lax.psum(x, "fsdp"))), x
        )

    (found,), num_unknown_loops = hlo.collectives(text_of(f), MESH)
    assert num_unknown_loops == 1 and found.executed == 3


def test_hosts(text_of):
    hosts = [0, 0, 0, 0, 1, 1, 1, 1]  # one for each place along `data`
    for axes, leaves in (("fsdp", False), ("tensor", False), ("data", True), (("data", "tensor"), True)):  # fmt: skip
        text = text_of(lambda x, axes=axes: jnp.sin(lax.psum(x, axes)))
        assert the_one(text, process_index=hosts).leaves_host is leaves
    swap = text_of(lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]))
    assert the_one(swap, process_index=hosts).leaves_host is False
    assert the_one(swap, process_index=[0, 1] * 4).leaves_host is True


def test_what_the_partitioner_adds(mesh_of):
    """A weight split over fsdp and used whole, in a loop over layers; its gradient goes back where it was."""
    mesh = mesh_of(1, 4, 2)

    def place(x, *spec):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def f(w, x):
        layer = lambda x, w: (place(jnp.sin(x @ place(w)), "fsdp"), None)  # noqa: E731
        return lax.scan(layer, x, w)[0]

    w = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))  # fmt: skip
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    found = hlo.collectives(jax.jit(f).lower(w, x).compile().as_text(), mesh.shape).collectives
    gathers = [e for e in found if e.kind == "all-gather" and e.axes == ("fsdp",)]
    assert sum(e.executed * e.result_bytes for e in gathers) == 6 * 32 * 32 * 4
    assert sum(e.wire_bytes for e in found) == pytest.approx(6 * 32 * 32 * 4 * 3 / 4)


# ---- how groups are printed ----


def program(body, *, num_devices=8, before="", last="ROOT %end = f32[] constant(0)"):
    """A program whose entry has these instructions."""
    return (
        f"HloModule jit_f, is_scheduled=true, num_partitions={num_devices}\n\n{before}\n"
        f"ENTRY %main (p: f32[8,16]) -> f32[] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n"
        f"{body}\n  {last}\n}}\n"
    )


def reduce_of(groups, more=", use_global_device_ids=true"):
    return f"  %r = f32[8,16]{{1,0}} all-reduce(%p), channel_id=3, replica_groups={groups}{more}, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("mesh['a'=2,'b'=2,'c'=2,'d'=1] {'a','c'}", ("data", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", ("data", "fsdp")),
        ("mesh['axis_0'=2,'axis_1'=4] , device_ids=([4,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("mesh['a'=8] {'a':(1)2}", ("data",)),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("data", "tensor")),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", ("fsdp", "tensor")),
    ],
)
def test_spellings_of_groups(groups, axes):
    found = the_one(program(reduce_of(groups)))
    assert found.axes == axes and found.whole_axes
    assert found.group_size == 2 ** len(axes)
    assert found.wire_bytes == 2 * BYTES * (1 - 1 / found.group_size)


def test_groups_against_numpy():
    """Each device's group in a mesh where no size repeats, in all three spellings."""
    mesh = {"data": 2, "fsdp": 5, "tensor": 3}
    ids = np.arange(30).reshape(2, 5, 3)
    lists = ids.transpose(0, 2, 1).reshape(6, 5).tolist()
    listed = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in lists) + "}"
    for groups in (
        listed, "[6,5]<=[2,5,3]T(0,2,1)", "mesh['a'=2,'b'=5,'c'=3] {'b'}",
        "mesh['c'=3,'a'=2,'b'=5], device_ids=([2,5,3]T(2,0,1)) {'b'}",
    ):  # fmt: skip
        assert hlo._groups(f"replica_groups={groups}, x", 30).tolist() in (
            lists,
            ids.transpose(2, 0, 1).reshape(6, 5).tolist(),
        )
        found = the_one(program(reduce_of(groups), num_devices=30), mesh)
        assert found.axes == ("fsdp",) and found.group_size == 5


def test_a_part_of_an_axis_and_groups_of_unequal_size():
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    found = the_one(program(reduce_of("{{0,2},{4,6},{1,3},{5,7}}")), mesh)
    assert found.axes == ("fsdp",) and not found.whole_axes and found.group_size == 2
    found = the_one(program(reduce_of("{{0,2,4,6},{1,3},{5},{7}}")), mesh)
    assert found.axes == ("fsdp",) and found.group_size == 4


def test_numbers_that_are_not_those_of_devices():
    """Without use_global_device_ids they name replicas, of which there is one: everybody, or nobody."""
    found = the_one(program(reduce_of("{{0}}", more="")))
    assert found.axes == ("data", "fsdp", "tensor") and found.group_size == 8
    alone = program(reduce_of("{{0}}", more="").replace("channel_id=3, ", ""))
    assert the_one(alone).group_size == 1 and the_one(alone).wire_bytes == 0
    pairs = "  %a = f32[8,16]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    assert the_one(program(pairs)).axes == ("tensor",)


# ---- how operations are printed ----


@pytest.mark.parametrize(
    ("line", "kind", "result_bytes", "wire_bytes"),
    [
        ("(f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p)", "all-gather", 1024, 512),
        ("((f32[8,16]{1,0}, bf16[4]{0}), (f32[16,16]{1,0}, bf16[8]{0})) all-gather-start(%p, %q)",
         "all-gather", 1040, 520),
        ("f32[8,16]{1,0} all-reduce-start(%p)", "all-reduce", 512, 512),
        ("(f32[8,16]{1,0}, /*index=1*/f32[4]{0:T(1,128)S(1)}) all-reduce(%p, /*index=1*/%q)", "all-reduce", 528, 528),
        ("((f32[8,16]{1,0}), f32[4,16]{1,0}) reduce-scatter-start(%p)", "reduce-scatter", 256, 256),
        ("(f32[4,16]{1,0}, f32[4,16]{1,0}) all-to-all(%p, %q)", "all-to-all", 512, 256),
        ("pred[8,16]{1,0:T(8,128)(4,1)} collective-broadcast(%p)", "collective-broadcast", 128, 128),
        ("s4[8,15]{1,0} all-gather(%p)", "all-gather", 60, 30),
        ("f8e4m3fn[8,16]{1,0} all-gather(%p)", "all-gather", 128, 64),
        ("c64[<=8,16]{1,0} all-gather(%p)", "all-gather", 1024, 512),
    ],
)  # fmt: skip
def test_results(line, kind, result_bytes, wire_bytes):
    text = program(f"  %r = {line}, channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true")  # fmt: skip
    found = the_one(text)
    assert (found.kind, found.result_bytes, found.wire_bytes) == (kind, result_bytes, wire_bytes)
    assert found.dtype == line.strip("(").partition("[")[0]


def test_a_start_counts_and_its_done_does_not():
    body = (
        "  %g = (f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p), channel_id=1, replica_groups=[4,2]<=[8], "
        "use_global_device_ids=true\n"
        "  %d = f32[16,16]{1,0} all-gather-done(%g)"
    )
    assert the_one(program(body)).executed == 1


def test_permutations():
    line = (
        "  %s = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
        "channel_id=7, source_target_pairs={PAIRS}"
    )
    mesh = {"data": 1, "fsdp": 2, "tensor": 4}
    ring = "{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}"
    found = the_one(program(line.replace("PAIRS", ring)), mesh, [0] * 4 + [1] * 4)
    assert found.axes == ("tensor",) and found.whole_axes and found.group_size == 4
    assert found.wire_bytes == found.result_bytes == 64 and found.leaves_host is False
    chain = the_one(program(line.replace("PAIRS", "{0,0},{1,2},{3,7}")), mesh, [0] * 4 + [1] * 4)
    assert chain.axes == ("fsdp", "tensor") and chain.group_size == 2 and not chain.whole_axes
    assert chain.leaves_host is True
    nobody = the_one(program(line.replace("PAIRS", "{0,0},{1,1}")), mesh)
    assert nobody.axes == () and nobody.wire_bytes == 0
    send = (
        "  %s = (f32[8,16]{1,0}, u32[], token[]) send(%p, %t), channel_id=1, "
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{4,5}}"}'
    )
    assert the_one(program(send), mesh).axes == ("tensor",)
    to_host = (
        "  %s = (f32[8,16]{1,0}, u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true"
    )
    assert hlo.collectives(program(to_host), mesh).collectives == []


GROUPS = "channel_id=5, replica_groups=[4,2]<=[8], use_global_device_ids=true"


def test_tpu_reduce_scatter_is_a_fusion_with_an_all_reduce():
    before = (
        "%all-reduce-scatter.2.clone (i: f32[8,16]) -> f32[4,16] {\n"
        "  %i = f32[8,16]{1,0:T(8,128)} parameter(0)\n"
        f"  %all-reduce.65 = f32[8,16]{{1,0:T(8,128)}} all-reduce(%i), {GROUPS}, to_apply=%add\n"
        "  ROOT %slice = f32[4,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.65, %n), dynamic_slice_sizes={4,16}\n"
        "}\n"
    )
    body = (
        "  %fusion.1 = f32[4,16]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2.clone, "
        'metadata={op_name="jit(f)/layers/mlp_in/dot_general" stack_frame_id=3}'
    )
    found = the_one(program(body, before=before))
    assert (found.kind, found.result_bytes, found.wire_bytes) == ("reduce-scatter", 256, 256)
    assert found.op_name == "jit(f)/layers/mlp_in/dot_general"


def test_collectives_of_tpu7x_run_on_another_thread():
    before = (
        "%called_computation.7 (a: bf16[8,8], t: token[]) -> bf16[8,16] {\n"
        "  %t = token[] parameter(1)\n  %a = bf16[8,8]{1,0} parameter(0)\n"
        f"  ROOT %all-gather.74 = bf16[8,16]{{1,0:T(16,128)(2,1)}} all-gather(%a), {GROUPS}, dimensions={{1}}\n"
        '}, execution_thread="sparsecore"\n\n'
        "%unused (a: bf16[8,8]) -> bf16[8,16] {\n"
        f"  ROOT %all-gather.75 = bf16[8,16]{{1,0}} all-gather(%a), {GROUPS}\n}}\n"
    )
    body = (
        "  %c = ((bf16[8,8]{1,0}, token[]), bf16[8,16]{1,0}) call-start(%p, %t), async_execution_thread="
        '"sparsecore", to_apply=%called_computation.7\n'
        "  %d = bf16[8,16]{1,0} call-done(%c)\n"
        "  %e = ((bf16[8,8]{1,0}), bf16[8,16]{1,0}, u32[]) async-start(%p), calls=%called_computation.7\n"
        "  %u = ((bf16[8,8]{1,0}), bf16[8,16]{1,0}, u32[]) async-update(%e), calls=%called_computation.7\n"
        "  %f = bf16[8,16]{1,0} async-done(%e), calls=%called_computation.7"
    )
    found = hlo.collectives(program(body, before=before), MESH).collectives
    assert [(e.executed, e.wire_bytes) for e in found] == [(1, 128), (1, 128)]


def async_fusions(chain='frontend_attributes={chain_id="0"}, '):
    """A gather that starts before a loop of 4, goes on inside of it twice and ends behind it, as TPU prints it."""
    gather = f"all-gather(%a), {GROUPS}, {chain}dimensions={{0}}"
    parts = [
        f"%{name} (a: f32[8,16]) -> f32[16,16] {{\n  %a = f32[8,16]{{1,0}} parameter(0)\n"
        f"  ROOT %all-gather.{i} = f32[16,16]{{1,0}} {gather}\n}}\n"
        for i, name in enumerate(
            ("fused_computation.1", "async_collective_fusion.1", "async_collective_fusion.2", "fused_computation.2")
        )
    ]  # fmt: skip
    loop = (
        "%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {\n  %s = (s32[], f32[8,16]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n  %one = s32[] constant(1)\n"
        "  %q = f32[8,16]{1,0} get-tuple-element(%s), index=1\n  %next = s32[] add(%one, %i)\n"
        "  %fusion.606 = f32[16,16]{1,0} fusion(%q), kind=kOutput, calls=%async_collective_fusion.1\n"
        "  %fusion.611 = f32[16,16]{1,0} fusion(%q), kind=kOutput, calls=%async_collective_fusion.2\n"
        "  ROOT %t = (s32[], f32[8,16]) tuple(%next, %q)\n}\n\n"
        "%cond (s: (s32[], f32[8,16])) -> pred[] {\n  %s = (s32[], f32[8,16]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n  %four = s32[] constant(4)\n"
        "  ROOT %c = pred[] compare(%i, %four), direction=LT\n}\n"
    )
    body = (
        "  %zero = s32[] constant(0)\n  %state = (s32[], f32[8,16]) tuple(%zero, %p)\n"
        "  %async-collective-start = f32[16,16]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation.1\n"
        "  %while.1 = (s32[], f32[8,16]) while(%state), condition=%cond, body=%body\n"
        "  %async-collective-done = f32[16,16]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation.2"
    )
    return body, "\n".join([*parts, loop])


def test_a_gather_spread_over_fusions_counts_once():
    body, before = async_fusions()
    assert the_one(program(body, before=before)).executed == 1
    # Without the start, the part that runs least often stands for it.
    lost = body.replace("async-collective-start", "fusion.9")
    assert the_one(program(lost, before=before)).executed == 1
    # Names alone tell, too.
    unnamed, before_unnamed = async_fusions(chain="")
    assert the_one(program(unnamed, before=before_unnamed)).executed == 1
    # An unrolled loop has two starts of the same channel.
    twice = body + "\n" + body.splitlines()[2].replace("start =", "start.1 =")
    found = hlo.collectives(program(twice, before=before), MESH).collectives
    assert sum(each.executed for each in found) == 2


def test_two_chains_of_one_channel_count_twice():
    body, before = async_fusions()
    lines = body.replace("async-collective-start", "fusion.9").splitlines()
    other = before.replace('chain_id="0"', 'chain_id="1"', 1)  # that of what starts it
    found = hlo.collectives(program("\n".join(lines), before=other), MESH).collectives
    assert [each.executed for each in found] == [1, 1]


def test_the_same_channel_elsewhere_is_another_collective():
    """shard_map gives all its collectives channel 1."""
    line = f"  %NAME = f32[16,16]{{1,0}} all-gather(%p), {GROUPS}, dimensions={{0}}\n"
    text = program(line.replace("NAME", "a") + line.replace("NAME", "b"))
    assert len(hlo.collectives(text, MESH).collectives) == 2


def test_attributes_over_several_lines():
    """Pallas prints its metadata so; a line that begins with a brace is not the end of the computation."""
    body = (
        '  %k = f32[8,16]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"a":"}{",\n"b":"d"\n}\n}, metadata={op_name="jit(f)/x"}\n'
        + reduce_of("{}").replace("(%p)", "(%k)")
    )
    found = the_one(program(body))
    assert found.kind == "all-reduce" and found.op_name == "jit(f)/x"  # of its operand
    # A brace that stays open loses nothing of what follows.
    broken = body.replace("\n}\n}, metadata", "\n}, metadata")
    assert the_one(program(broken)).group_size == 8
    empty = body.replace('"a":"}{",\n"b":"d"\n', "")
    assert the_one(program(empty)) == found


@pytest.mark.parametrize(
    ("first", "step", "limit", "direction", "length"),
    [
        (0, 2, 8, "LT", 4),  # a matmul in a ring of 8, two steps at a time
        (0, 2, 7, "LT", 4),
        (1, 2, 7, "LE", 4),
        (5, 1, 5, "LT", 0),
        (8, -1, 0, "GT", 8),
        (8, -3, 2, "GE", 3),
        (0, 3, 12, "NE", 4),
        (0, -1, 8, "LT", None),
        (0, 0, 8, "LT", None),
        (0, 3, 10, "NE", None),
    ],
)
def test_lengths_of_loops(first, step, limit, direction, length):
    body, before = async_fusions()
    before = before.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
    before = before.replace("%four = s32[] constant(4)", f"%four = s32[] constant({limit})")
    before = before.replace("direction=LT", f"direction={direction}")
    # A reduce besides, whose number of executions is that of the loop.
    reduce = reduce_of("{}").replace("%p", "%q")
    before = before.replace("  ROOT %t = (s32[]", f"{reduce}\n  ROOT %t = (s32[]")
    body = body.replace("constant(0)", f"constant({first})")
    flipped = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}[direction]
    fused = (
        "%compared (a: s32[], b: s32[]) -> pred[] {\n  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n"
        f"  ROOT %c = pred[] compare(%b, %a), direction={flipped}\n}}\n\n{before}"
    ).replace(f"compare(%i, %four), direction={direction}", "fusion(%i, %four), calls=%compared")
    backwards = before.replace("add(%one, %i)", "subtract(%i, %one)")
    backwards = backwards.replace(f"constant({step})", f"constant({-step})")
    copied = before.replace("add(%one, %i)", "add(%j, %one)").replace(
        "  %one = ", "  %j = s32[] copy(%i)\n  %one = "
    )
    for variant in (before, fused, backwards, copied):
        found, num_unknown_loops = hlo.collectives(program(body, before=variant), MESH)
        (reduce,) = [each for each in found if each.kind == "all-reduce"]
        assert num_unknown_loops == (length is None)
        assert reduce.executed == (1 if length is None else length)


@pytest.mark.parametrize(("next_limit", "executed"), [("%m", 6), ("%next", None), ("%x", None)])
def test_a_limit_that_the_loop_carries(next_limit, executed):
    """It must stay what it is at first."""
    state = "(s32[], s32[], f32[8,16])"
    before = (
        f"%body (s: {state}) -> {state} {{\n  %s = {state} parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n  %m = s32[] get-tuple-element(%s), index=1\n"
        "  %q = f32[8,16]{1,0} get-tuple-element(%s), index=2\n  %one = s32[] constant(1)\n"
        "  %next = s32[] add(%i, %one)\n  %x = s32[] add(%m, %one)\n"
        f"{reduce_of('{}').replace('%p', '%q')}\n  ROOT %t = {state} tuple(%next, {next_limit}, %r)\n}}\n\n"
        f"%cond (s: {state}) -> pred[] {{\n  %s = {state} parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n  %m = s32[] get-tuple-element(%s), index=1\n"
        "  ROOT %c = pred[] compare(%i, %m), direction=LT\n}\n"
    )
    body = (
        f"  %zero = s32[] constant(0)\n  %six = s32[] constant(6)\n  %state = {state} tuple(%zero, %six, %p)\n"
        f"  %while.1 = {state} while(%state), condition=%cond, body=%body"
    )
    (found,), num_unknown_loops = hlo.collectives(program(body, before=before), MESH)
    assert (found.executed, num_unknown_loops) == ((executed, 0) if executed else (1, 1))
    unknown = program(body.replace("constant(6)", "parameter(1)"), before=before)
    assert hlo.collectives(unknown, MESH).num_unknown_loops == 1


def test_slices():
    """Of two slices the program is that of one; transfers between them go through the hosts."""
    body = (
        reduce_of("[4,2]<=[8]") + "\n"
        "  %send = (f32[8,16]{1,0:T(8,128)}, u32[], token[]) send(%r, %t), channel_id=3, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %recv = (f32[8,16]{1,0}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true"
    )
    mesh = {"data": 4, "fsdp": 2, "tensor": 2}
    reduce, send = hlo.collectives(program(body), mesh, [0] * 8 + [1] * 8).collectives
    assert (reduce.axes, reduce.leaves_host, reduce.wire_bytes) == (("tensor",), False, BYTES)
    assert (send.kind, send.axes, send.whole_axes, send.group_size) == ("send", ("data",), False, 2)
    assert send.wire_bytes == BYTES and send.leaves_host is True  # 2 (g - 1) / g
    inside = hlo.collectives(program(body.replace("[4,2]<=[8]", "{{0,4},{1,5},{2,6},{3,7}}")), mesh)
    assert inside.collectives[0].axes == ("data",) and not inside.collectives[0].whole_axes
    three = program(body.replace("{1,2}", "{1:3}"), num_devices=4).replace("[4,2]<=[8]", "{}")
    found = hlo.collectives(three, {"data": 3, "fsdp": 2, "tensor": 2}).collectives
    assert found[1].whole_axes and found[1].wire_bytes == pytest.approx(BYTES * 4 / 3)
    factors = {"ALL_GATHER": 1, "REDUCE_SCATTER": 1 / 2, "ALL_TO_ALL": 1 / 2, "ONE_TO_ONE": 1}
    for kind, factor in factors.items():
        other = program(body.replace("ALL_REDUCE", kind))
        assert hlo.collectives(other, mesh).collectives[1].wire_bytes == factor * BYTES


@pytest.mark.parametrize(
    ("text", "mesh", "hosts", "message"),
    [
        (program(""), {"data": 4}, None, "compiled for 8 devices, not for the mesh data=4"),
        (program(""), {"data": 16}, None, "compiled for 8 devices, not for the mesh data=16"),
        (program(""), MESH, [0] * 4, "process_index has the hosts of 4 devices, the mesh has 8"),
        ("", MESH, None, "no compiled program: it begins with ''"),
        ("module @jit_f {", MESH, None, "begins with 'module @jit_f {', not HloModule"),
        ("HloModule x, num_partitions=8\n", MESH, None, "no ENTRY"),
    ],
)
def test_bad_input(text, mesh, hosts, message):
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        hlo.collectives(text, mesh, hosts)
    assert "\n" not in str(caught.value)


# ---- sums and lint ----


def collective(kind="all-gather", axes=("fsdp",), shape="bf16[2048,1024]", executed=1, **more):
    values = {
        "whole_axes": True, "dtype": shape.partition("[")[0], "group_size": 8, "leaves_host": False, "source": "",
        "op_name": "jit(step)/while/body/closed_call/layers/out/convert_element_type",
        "result_bytes": hlo.array_bytes(shape),
    } | more  # fmt: skip
    wire = executed * hlo.wire_bytes_of(kind, values["result_bytes"], values["group_size"])
    return hlo.Collective(kind=kind, axes=axes, shape=shape, executed=executed, wire_bytes=wire, **values)  # fmt: skip


def test_table_and_largest():
    found = [
        collective(executed=2),
        collective(shape="bf16[8,8]"),
        collective(kind="all-reduce"),
        collective(shape="f32[2048,1024]"),
        collective(axes=("data", "fsdp"), shape="bf16[16]"),
    ]
    rows = hlo.table(found)
    assert [(r.kind, r.axes, r.dtype, r.executed) for r in rows] == [
        ("all-gather", ("fsdp",), "bf16", 3),
        ("all-reduce", ("fsdp",), "bf16", 1),
        ("all-gather", ("fsdp",), "f32", 1),
        ("all-gather", ("data", "fsdp"), "bf16", 1),
    ]
    assert rows[0].wire_bytes == (2 * 2048 * 1024 + 64) * 2 * 7 / 8
    assert sum(r.wire_bytes for r in rows) == sum(e.wire_bytes for e in found)
    assert hlo.largest(found, 2) == [found[0], found[2]]


def lint(*found, num_layers=10, num_microbatches=2):
    return hlo.lint(found, num_layers=num_layers, num_microbatches=num_microbatches)


def test_lint_says_nothing_of_what_is_right():
    scatter = collective(kind="reduce-scatter", shape="f32[4096,1024]")
    small = collective(kind="all-reduce", axes=("data", "fsdp"), shape="f32[10,4096]")
    replicas = collective(kind="all-reduce", axes=("data",), shape="f32[4096,4096]")
    activations = collective(axes=("tensor",), shape="f32[8,2048,4096]")
    wide = collective(kind="all-reduce", axes=("data", "tensor"), leaves_host=True)
    gathers = [collective(executed=20), collective(executed=40)]
    assert lint(scatter, small, replicas, activations, wide, *gathers) == []


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (collective(shape="f32[2048,1024]", executed=20, source="bloomjax/model.py:7"),
         "weights travel in float32: 20 executed, 0.14 GiB on the wire, largest all-gather f32[2048,1024] over fsdp "
         "(jit(step)/while/body/closed_call/layers/out/convert_element_type, bloomjax/model.py:7)"),
        (collective(kind="all-reduce", axes=("data", "fsdp"), shape="f32[2048,1024]", op_name=""),
         "all-reduce over fsdp where a reduce-scatter belongs: 1 executed, 0.01 GiB on the wire, "
         "largest all-reduce f32[2048,1024] over data+fsdp"),
        (collective(executed=70),
         "layers/out is gathered 3.5 times a layer and microbatch: 70 executed, "),
        (collective(executed=130, op_name="jit(step)/while"),
         "bf16[2048,1024] is gathered 6.5 times a layer and microbatch: "),
        (collective(axes=("tensor",), leaves_host=True), "groups of tensor leave their host: 1 "),
    ],
)  # fmt: skip
def test_lint(found, line):
    (said,) = lint(found)
    assert said.startswith(line) and "\n" not in said


def test_lint_adds_up_the_gathers_of_one_weight():
    names = (
        "jit(step)/jvp(Bloom)/while/body/closed_call/layers/out/convert_element_type",
        "jit(step)/transpose(jvp(Bloom))/while/body/closed_call/checkpoint/rematted_computation/layers/out/BLD,DF->BLF/dot_general",
    )
    (said,) = lint(*(collective(executed=40, op_name=name) for name in names))
    assert said.startswith("layers/out is gathered 4.0 times")


def test_warnings_of_the_partitioner():
    known = (
        "W1121 03:29:15.076842 21421 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler "
        "cannot go from sharding {devices=[8,1,1]<=[8]} to {devices=[1,4,2]<=[8]} efficiently for HLO operation "
        "%sharding_constraint.0 = f32[2,64,256]{2,1,0} copy(%select_n.6), sharding={devices=[8,1,1]<=[8]}, "
        'metadata={op_name="jit(f)/sharding_constraint" stack_frame_id=3}. As the last resort, SPMD will replicate\n'
    )
    other = "E0000 [SPMD] Involuntary full rematerialization of something else\n"
    lines = hlo.remat_warnings("I0000 nothing\n" + known + other + known)
    assert lines == [
        "involuntary full rematerialization of f32[2,64,256] from {devices=[8,1,1]<=[8]} to {devices=[1,4,2]<=[8]} "
        "(jit(f)/sharding_constraint)",
        other.strip(),
    ]
    assert hlo.remat_warnings("") == []


# ---- the compilers of absent accelerators ----

# Six layers, their weights split over fsdp: a bf16 gather and an f32 gradient scatter each, by the partitioner and by
# hand; and the sum of a scalar over all.
ABSENT = """
import functools, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
platform, name, config = sys.argv[1:4]
if config:
    topology = topologies.get_topology_desc("", platform, target_config=config, topology=name)
else:
    topology = topologies.get_topology_desc(name, platform, chips_per_host_bounds=(2, 2, 1))
devices = topology.devices
mesh = Mesh(np.array(devices).reshape(1, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
def scattered(dw):
    return jax.shard_map(lambda a: jax.lax.psum_scatter(a, "fsdp", tiled=True), in_specs=P(), out_specs=P("fsdp"),
                         check_vma=False)(dw)
def layer(x, w):
    w = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), P())
    y = jnp.tanh(x @ w)
    dw = jax.lax.with_sharding_constraint(jnp.einsum("bi,bo->io", x, y, preferred_element_type=jnp.float32), P("fsdp"))
    return y, (dw, scattered(jnp.tanh(w).astype(jnp.float32)))
with jax.set_mesh(mesh):
    given = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    f = jax.jit(functools.partial(jax.lax.scan, layer))
    print(f.lower(given((1024, 512), jnp.bfloat16, "fsdp"), given((6, 512, 512), jnp.float32, None, "fsdp"))
          .compile().as_text())
"""
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024 thread_dim_limit_z: 64 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
"""


@pytest.mark.parametrize(
    ("needed", "platform", "topology", "config"),
    [
        ("libtpu", "tpu", "v5e:2x2", ""),
        ("jax_plugins.xla_cuda12", "cuda", "1x1x4", H100),
    ],
)
def test_absent_accelerators(needed, platform, topology, config):
    package = needed.partition(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} of the extra `plan` is not installed")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", ABSENT, platform, topology, config], env=environment, cwd=REPOSITORY,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found, num_unknown_loops = hlo.collectives(
        result.stdout, {"data": 1, "fsdp": 4, "tensor": 1}, [0] * 4
    )
    assert num_unknown_loops == 0
    assert all(each.axes == ("fsdp",) and each.leaves_host is False for each in found)
    weight = 512 * 512
    rows = {(row.kind, row.dtype): row for row in hlo.table(found)}
    assert rows["all-gather", "bf16"].executed == 6
    assert rows["all-gather", "bf16"].wire_bytes == 6 * 2 * weight * 3 / 4
    assert rows["reduce-scatter", "f32"].executed == 12
    assert rows["reduce-scatter", "f32"].wire_bytes == 12 * 4 * weight * 3 / 4
    assert set(rows) == {("all-gather", "bf16"), ("reduce-scatter", "f32")}
