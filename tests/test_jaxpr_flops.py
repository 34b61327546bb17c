"""FLOPs of traced programs against sums by hand, the CPU compiler's own count and the formulas of flops.py."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from bloomjax.flops import flops_per_step
from bloomjax.jaxpr_flops import FlopsOf, matmul_flops
from bloomjax.model import Bloom, BloomConfig
from bloomjax.train_state import abstract_state
from bloomjax.train_step import StepOptions, abstract_batch, make_train_step


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(f, *arguments) -> FlopsOf:
    return matmul_flops(jax.jit(f).trace(*arguments).jaxpr)


def flops_of(f, *arguments) -> float:
    flops, opaque = count(f, *arguments)
    assert opaque == ()
    return flops


SQUARE = 2 * 4 * 4 * 4  # of x @ x, x of 4 x 4


@pytest.mark.parametrize(
    ("spec", "a", "b", "flops"),
    [
        ("ij,jk->ik", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("i,i->", (11,), (11,), 2 * 11),
        ("i,j->ij", (3,), (5,), 2 * 15),
        ("bij,bjk->bik", (2, 3, 5), (2, 5, 7), 2 * 2 * 3 * 5 * 7),
        ("BLHK,BSHK->BHLS", (2, 3, 4, 5), (2, 6, 4, 5), 2 * 2 * 4 * 3 * 6 * 5),
        ("BLD,DcHK->BLcHK", (2, 3, 8), (8, 3, 2, 4), 2 * 2 * 3 * 8 * 24),
        ("ijk,ijk->", (2, 3, 4), (2, 3, 4), 2 * 24),
    ],
)
def test_products(spec, a, b, flops):
    def f(x, y):
        return jnp.einsum(spec, x, y)

    assert flops_of(f, f32(*a), f32(*b)) == flops
    # XLA:CPU counts the same where nothing loops; outer and inner products of vectors are elementwise operations to it.
    if spec.endswith("->") or spec == "i,j->ij":
        return
    cost = jax.jit(f).lower(f32(*a), f32(*b)).compile().cost_analysis()
    assert cost is not None and cost["flops"] == flops


def test_nothing_else_counts():
    assert count(lambda x: jnp.cumsum(jnp.sort(jnp.exp(x) / x)), f32(4, 4)) == FlopsOf(0.0, ())


def test_a_closed_jaxpr_and_an_open_one():
    closed = jax.make_jaxpr(lambda x: x @ x)(jnp.ones((4, 4)))
    assert matmul_flops(closed) == matmul_flops(closed.jaxpr) == FlopsOf(SQUARE, ())


def test_loops():
    def loop(n, f):
        return lambda x: lax.scan(lambda c, _: (f(c), None), x, length=n)[0]

    assert flops_of(loop(7, lambda x: x @ x), f32(4, 4)) == 7 * SQUARE
    nested = loop(3, lambda x: loop(5, lambda y: y @ x)(x @ x))
    assert flops_of(nested, f32(4, 4)) == 3 * (1 + 5) * SQUARE
    assert flops_of(lambda x: lax.fori_loop(0, 9, lambda i, y: y @ x, x), f32(4, 4)) == 9 * SQUARE
    assert flops_of(lambda x: lax.map(lambda row: row @ x, x), f32(4, 4)) == SQUARE
    # An inner product costs one product of matrices forward and two backward.
    backward = jax.grad(lambda x: jnp.sum(loop(7, lambda y: jnp.sin(y @ x))(jnp.ones((4, 4)))))
    assert flops_of(backward, f32(4, 4)) == 3 * 7 * SQUARE


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    def f(x, n):
        x = lax.fori_loop(0, n, lambda i, y: y @ x, x)
        return lax.while_loop(lambda y: jnp.sum(y @ x) < 1, lambda y: 2 * y, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    assert count(f, f32(4, 4), n) == FlopsOf(2 * SQUARE, ("while",))
    without = count(lambda x: lax.while_loop(lambda y: jnp.sum(y) < 1, jnp.exp, x) @ x, f32(4, 4))
    assert without == FlopsOf(SQUARE, ())


def test_a_conditional_counts_as_its_most_expensive_branch():
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert flops_of(lambda i, x: lax.switch(i, branches, x), index, f32(4, 4)) == 2 * SQUARE


def test_what_is_computed_again_counts_again():
    def layer(x):
        return jnp.sin(jnp.sin(x @ x) @ x)

    def gradient(f):
        return jax.grad(lambda x: jnp.sum(f(x)))

    assert flops_of(gradient(layer), f32(4, 4)) == 6 * SQUARE
    # The argument of the outer sine is needed again, and so are both products.
    assert flops_of(gradient(jax.checkpoint(layer)), f32(4, 4)) == 8 * SQUARE
    saved = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    assert flops_of(gradient(saved), f32(4, 4)) == 6 * SQUARE


def test_own_derivatives():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x @ x,))
    assert flops_of(f, f32(4, 4)) == SQUARE
    assert flops_of(jax.grad(lambda x: jnp.sum(f(x))), f32(4, 4)) == 4 * SQUARE

    @jax.custom_jvp
    def g(x):
        return x @ x

    g.defjvp(lambda x, dx: (x[0] @ x[0], dx[0] @ x[0]))
    assert flops_of(jax.jit(g), f32(4, 4)) == SQUARE


def test_shard_map_counts_every_device(mesh_of):
    mesh = mesh_of(2, 2, 2)

    def f(axes, **some):
        return lambda x: jax.shard_map(
            lambda a: a @ a.T, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False, **some
        )(x)  # fmt: skip

    rows = 2 * 2 * 2 * 4  # a of 2 x 4
    assert flops_of(f(("data", "fsdp", "tensor")), f32(16, 4)) == 8 * rows
    # Devices along `fsdp` and `tensor` compute the same, and all of them do.
    assert flops_of(f("data"), f32(4, 4)) == 8 * rows
    # Here the compiler may split what the others do.
    assert flops_of(f("data", axis_names={"data"}), f32(4, 4)) == 2 * rows


def test_what_cannot_be_counted_is_named():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    def f(x):
        for name in ("flash", "flash", "other"):
            x = pl.pallas_call(kernel, out_shape=f32(4, 4), name=name)(x)
        x = jax.ffi.ffi_call("fmha", f32(4, 4))(x)
        x = jax.pure_callback(lambda a: a, f32(4, 4), x)
        return jnp.linalg.cholesky(x @ x)

    assert count(f, f32(4, 4)) == FlopsOf(
        SQUARE,
        ("pallas_call flash", "pallas_call other", "ffi_call fmha", "pure_callback", "cholesky"),
    )


# ---- the training step ----

# No size repeats, so that no product can stand for another.
V, L, D, H, F, S, B = 384, 3, 48, 4, 160, 40, 16
TOKENS = B * S


def step_flops(mesh, remat_policy="none", scan_layers=True, microbatch=None, chunk=4 * S) -> float:
    config = BloomConfig(
        vocab_size=V, num_layers=L, emb_dim=D, num_heads=H, mlp_dim=F, remat_policy=remat_policy,
        scan_layers=scan_layers,
    )  # fmt: skip
    model, optimizer = Bloom(config), optax.adamw(1e-3)
    options = StepOptions(microbatch_size_samples=microbatch, loss_chunk_tokens=chunk)
    step = make_train_step(model, optimizer, options, mesh)
    arguments = (
        abstract_state(model, optimizer, mesh), abstract_batch(B, S, mesh), f32(),
        jax.eval_shape(lambda: jax.random.key(0)),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        return flops_of(step, *arguments)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1), {}),
        ((1, 1, 1), {"scan_layers": False}),
        ((1, 1, 1), {"microbatch": 4}),
        ((2, 2, 2), {"microbatch": 2}),
        ((1, 1, 4), {}),
    ],
)
def test_a_step_without_recomputation_is_the_formula(mesh_of, shape, options):
    """Of `full_attention`: this kernel computes the whole square. Optimizer, embedding and norms have no products."""
    formula = flops_per_step(
        vocab_size=V, emb_dim=D, num_layers=L, mlp_dim=F, sequence_length_tokens=S, batch_size_samples=B
    )  # fmt: skip
    assert step_flops(mesh_of(*shape), **options) == formula.full_attention


def test_the_chunks_of_the_loss_cost_nothing(mesh_of):
    """Whatever their length: 40 tokens do not divide a window."""
    mesh = mesh_of(1, 1, 1)
    assert step_flops(mesh, chunk=40) == step_flops(mesh, chunk=16) == step_flops(mesh)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_full_remat_adds_the_forward_pass_of_the_layers_but_their_last_product(mesh_of, shape):
    """Nothing needs what mlp_out gave; the head, whose gradients are made on the way forward, runs once."""
    kept = step_flops(mesh_of(*shape))
    again = 3 * D * D + D * D + D * F + 2 * S * D  # qkv, out, mlp_in; scores and weighted sum
    assert step_flops(mesh_of(*shape), "full") == kept + 2 * TOKENS * L * again
    forward = again + D * F
    assert kept == 3 * 2 * TOKENS * (L * forward + V * D)
