"""Mesh shapes, the rules from logical to mesh axes, and the messages when something does not fit."""

import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.errors import BadInput
from bloomjax.partitioning import MeshShape, activation_spec, gathered_spec, parameter_spec
from bloomjax.train_state import abstract_state


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (MeshShape(), (1, 8, 1)),
        (MeshShape(2, -1, 2), (2, 2, 2)),
        (MeshShape(-1, 2, 1), (4, 2, 1)),
        (MeshShape(1, 1, -1), (1, 1, 8)),
        (MeshShape(1, 8, -1), (1, 8, 1)),
        (MeshShape(2, 1, 4), (2, 1, 4)),
    ],
)
def test_mesh_of_all_devices(shape, sizes):
    mesh = shape.build()
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    # jax.make_mesh would make Explicit axes, under which constraints are assertions.
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert partitioning.num_batch_shards(mesh) == sizes[0] * sizes[1]


def test_mesh_of_some_devices():
    mesh = MeshShape().build(jax.devices()[2:5])
    assert mesh.devices.shape == (1, 3, 1)
    assert list(mesh.devices.flat) == jax.devices()[2:5]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (MeshShape(-1, -1, 1), "at most one of them is -1"),
        (MeshShape(0, -1, 1), r"MeshShape\(data=0, .*: sizes are positive"),
        (MeshShape(1, 8, -2), "sizes are positive"),
        (MeshShape(3, -1, 1), "data=3 x fsdp=-1 x tensor=1 does not fit the 8 devices of this job"),
        (MeshShape(2, 2, 1), "data=2 x fsdp=2 x tensor=1 does not fit the 8 devices of this job"),
        (MeshShape(4, 4, 1), r"does not fit the 8 devices .*--gin.MeshShape.data"),
        (MeshShape(16, -1, 1), "does not fit the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit(shape, message):
    with pytest.raises(BadInput, match=message) as caught:
        shape.build()
    assert "\n" not in str(caught.value)


def test_where_parameters_live_and_where_they_are_used():
    names = ("layers", "embed", "qkv", "heads", "kv")
    assert parameter_spec(names) == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert gathered_spec(names) == PartitionSpec(None, None, None, "tensor", None)
    assert parameter_spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    assert gathered_spec(("vocab", "embed")) == PartitionSpec("tensor", None)
    assert gathered_spec(("mlp", "embed")) == PartitionSpec("tensor", None)
    assert parameter_spec(("norm",)) == parameter_spec((None,)) == PartitionSpec(None)


def test_where_activations_live():
    rows = ("data", "fsdp")
    assert activation_spec(("batch", "residual_length", "embed")) == PartitionSpec(rows, "tensor", None)  # fmt: skip
    assert activation_spec(("batch", "length", "heads", "kv")) == PartitionSpec(rows, None, "tensor", None)  # fmt: skip
    assert activation_spec(("batch", None)) == PartitionSpec(rows, None)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(BadInput, match=r"no parameter rule .* \['heds'\]; there are: .*heads"):
        parameter_spec(("embed", "heds", None))
    with pytest.raises(BadInput, match=r"no parameter rule for logical axes \['batch'\]"):
        gathered_spec(("batch", "embed"))
    with pytest.raises(BadInput, match=r"no activation rule for logical axes \['vocab'\]"):
        partitioning.constrain_activation(jnp.zeros((2, 2)), "batch", "vocab")


class OneParameter(nn.Module):
    names: tuple[str | None, ...] | None

    @nn.compact
    def __call__(self, tokens_BL):
        init = nn.initializers.zeros
        if self.names is not None:
            init = nn.with_logical_partitioning(init, self.names)
        return self.param("kernel", init, (16, 8))


def test_a_parameter_without_a_rule_is_an_error(mesh_of):
    mesh = mesh_of(1, 4, 2)
    state = abstract_state(OneParameter(("embed", "mlp")), optax.scale_by_adam(), mesh)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert state.params["kernel"].sharding == state.opt_state.mu["kernel"].sharding == split
    with pytest.raises(BadInput, match=r"no parameter rule for logical axes \['experts'\]"):
        abstract_state(OneParameter(("experts", "mlp")), optax.scale_by_adam(), mesh)


def test_a_parameter_without_axes_is_an_error(mesh_of):
    """It would be replicated by accident."""
    with pytest.raises(BadInput, match=r"kernel.* \(16, 8\) .*logical axes"):
        abstract_state(OneParameter(None), optax.scale_by_adam(), mesh_of(1, 4, 2))


def test_constrain(mesh_of):
    x = jnp.arange(64.0).reshape(8, 8)
    assert partitioning.constrain(x, PartitionSpec("fsdp")) is x  # no mesh is set
    with jax.set_mesh(mesh_of(2, 2, 2)):
        y = jax.jit(lambda x: partitioning.constrain_activation(x, "batch", "mlp"))(x)
    assert y.addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(x, y)


def demanded(function, *arguments, mesh):
    """The layouts in the StableHLO text, in order."""
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"sdy\.sharding_constraint .*<@mesh, (\[.*\])>", text)
    return [spec.replace('"', "") for spec in found]


@pytest.mark.parametrize("name", ["gather_length", "scatter_length"])
def test_a_gradient_takes_the_way_back(name, mesh_of):
    """A gathered stream has a gradient to be scattered; autodiff of a constraint would keep it whole."""
    reshard = getattr(partitioning, name)
    x = jnp.ones((8, 4, 16))
    whole, split = "[{data, fsdp}, {}, {}]", "[{data, fsdp}, {tensor}, {}]"
    there_and_back = [whole, split] if name == "gather_length" else [split, whole]
    mesh = mesh_of(2, 2, 2)
    assert demanded(reshard, x, mesh=mesh) == there_and_back[:1]
    pull = lambda x, g: jax.vjp(reshard, x)[1](g)  # noqa: E731
    assert demanded(pull, x, x, mesh=mesh)[-1] == there_and_back[1]
    with jax.set_mesh(mesh):
        y, (g,) = jax.jit(lambda x: (reshard(x), pull(x, 3 * x)))(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(g, 3 * x)


def test_is_split(mesh_of):
    assert not partitioning.is_split(["heads"])  # no mesh is set
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert partitioning.is_split(["heads"]) and partitioning.is_split(["kv", "mlp"])
        assert not partitioning.is_split(["embed"])  # gathered over fsdp where it is used
    with jax.set_mesh(mesh_of(1, 8, 1)):
        assert not partitioning.is_split(["heads", "mlp", "vocab"])


def test_slices_of_a_pod_need_the_data_axis():
    devices = [types.SimpleNamespace(slice_index=i // 4, platform="tpu", id=i) for i in range(8)]
    with pytest.raises(BadInput, match="data=1 must be a multiple of the 2 slices of this job"):
        MeshShape(1, 4, 2).build(devices)


def test_hosts_of_gpus_are_no_slices():
    """JAX gives each host of GPUs a slice_index of its own."""
    devices = [
        types.SimpleNamespace(slice_index=i // 4, platform="gpu", device_kind="H100", id=i)
        for i in range(8)
    ]
    found = partitioning._arrange(devices, (1, 4, 2))
    assert [device.id for device in found.flat] == list(range(8)) and found.shape == (1, 4, 2)


SIZES = {"vocab_size": 64, "emb_dim": 32, "num_heads": 8, "mlp_dim": 64, "sequence_length": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 10}, "num_heads=10 cannot be .* axis tensor=4; the nearest sizes that divide it are 2 and 5"),
        ({"vocab_size": 250_682}, "vocab_size=250682 cannot be split over mesh axis tensor=4"),
        ({"mlp_dim": 75}, "mlp_dim=75 cannot be split over mesh axis tensor=4; .* 3 and 5"),
        ({"emb_dim": 33}, "emb_dim=33 cannot be split over mesh axis fsdp=2; .* 1 and 3"),
        ({"sequence_length": 15}, "sequence_length=15 cannot be .* axis tensor=4; .* 3 and 5"),
    ],
)  # fmt: skip
def test_a_model_that_the_mesh_does_not_divide(change, message, mesh_of):
    mesh = mesh_of(1, 2, 4)
    partitioning.check_divisible(mesh, **SIZES)
    with pytest.raises(BadInput, match=message) as caught:
        partitioning.check_divisible(mesh, **SIZES | change)
    assert "\n" not in str(caught.value)


def test_rows_need_not_be_divided_by_the_model(mesh_of):
    partitioning.check_divisible(mesh_of(8, 1, 1), **SIZES | {"emb_dim": 33, "num_heads": 3})
