"""The frame of the flash kernels, with a kernel of plain arrays that sees only the blocks it is told to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_bloom import jit

from bloomjax.attention import alibi_slopes, prefix_last_key, xla_attention
from bloomjax.flash_attention import flash_attention


def inside(first, end, size, length):
    """Which of `length` tokens lie in blocks [first, end) of `size`: [..., blocks] -> [..., blocks, length]."""
    number = jnp.broadcast_to(jnp.arange(length) // size, (*first.shape, length))
    return (number >= first[..., None]) & (number < end[..., None])


@dataclasses.dataclass(frozen=True)
class PlainKernel:
    """All scores at once, in float32; what lies outside of the blocks is as if it did not exist."""

    block_q: int = 16
    block_k: int = 8

    def takes(self, head_dim, dtype):
        del head_dim, dtype
        return True

    def block_sizes(self, length, head_dim):
        del length, head_dim
        return self.block_q, self.block_k

    def scores(self, inputs):
        """[B, H, L, S], -inf where not seen; and what the blocks keep, by query and by key."""
        q, k, _, slopes, documents, last_key, blocks = inputs
        L, K = q.shape[1], q.shape[3]
        assert L % self.block_q == 0 and L % self.block_k == 0
        position_1L = jnp.arange(L)[None]
        scores = jnp.einsum("BLHK,BSHK->BHLS", q, k) * K**-0.5
        distance = position_1L - position_1L.T
        if slopes is not None:
            scores += (slopes[:, None, None] * distance[None])[None]
        last_key = position_1L if last_key is None else last_key
        seen = (position_1L[None] <= last_key[:, :, None])[:, None]
        if documents is not None:
            seen &= (documents[:, :, None] == documents[:, None])[:, None]
        by_query = inside(blocks.key_first_BHM, blocks.key_end_BHM, self.block_k, L)
        by_key = inside(blocks.query_first_BHN, blocks.query_end_BHN, self.block_q, L)
        by_key = jnp.swapaxes(by_key.repeat(self.block_k, 2), 2, 3)
        return jnp.where(seen, scores, -jnp.inf), by_query.repeat(self.block_q, 2), by_key

    def forward(self, inputs):
        scores, kept, _ = self.scores(inputs)
        scores = jnp.where(kept, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - lse[..., None])
        return jnp.einsum("BHLS,BSHK->BLHK", p, inputs.v_BSHK), lse

    def backward(self, inputs, lse, delta, g):
        scores, by_query, by_key = self.scores(inputs)
        p = jnp.exp(scores - lse[..., None])
        dp = jnp.einsum("BLHK,BSHK->BHLS", g, inputs.v_BSHK)
        ds = p * (dp - delta[..., None]) * inputs.q_BLHK.shape[3] ** -0.5
        dq = jnp.einsum("BHLS,BSHK->BLHK", jnp.where(by_query, ds, 0), inputs.k_BSHK)
        dk = jnp.einsum("BHLS,BLHK->BSHK", jnp.where(by_key, ds, 0), inputs.q_BLHK)
        dv = jnp.einsum("BHLS,BLHK->BSHK", jnp.where(by_key, p, 0), g)
        return dq, dk, dv


def problem(B, L, H, K, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal((B, L, H, K)), jnp.float32) for _ in range(4)]
    return *arrays, jnp.asarray(alibi_slopes(H), jnp.float32)


def forward_and_backward(attention, q, k, v, g):
    context, pull = jax.vjp(attention, q, k, v)
    return context, *pull(g)


SEEN = {
    "causal": {},
    "prefix": {"last_key_BL": prefix_last_key(jnp.array([0, 41]), 75)},
    "documents": {"documents_BL": jnp.asarray(np.repeat([[0, 1, 2]], [20, 9, 46], 1).repeat(2, 0))},
}
SEEN["both"] = SEEN["prefix"] | SEEN["documents"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seen", SEEN)
def test_it_is_attention(seen, skip):
    *arrays, slopes = problem(2, 75, 6, 8)
    found = jit(
        lambda *a: forward_and_backward(
            lambda q, k, v: flash_attention(
                PlainKernel(), q, k, v, slopes, skip_far_blocks=skip, **SEEN[seen]
            ), *a,
        )
    )(*arrays)  # fmt: skip
    want = jit(
        lambda *a: forward_and_backward(
            lambda q, k, v: xla_attention(q, k, v, slopes, **SEEN[seen]), *a
        )
    )(*arrays)
    for name, a, b in zip(("context", "dq", "dk", "dv"), found, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6, err_msg=name)


def test_skipping_changes_nothing_and_skips():
    """Long enough that steep heads leave blocks out: then the kernel does not see them."""
    *arrays, slopes = problem(1, 400, 16, 8)
    runs = {}
    for skip in (True, False):
        attention = lambda q, k, v, skip=skip: flash_attention(  # noqa: E731
            PlainKernel(), q, k, v, slopes, skip_far_blocks=skip
        )
        runs[skip] = jit(lambda *a, f=attention: forward_and_backward(f, *a))(*arrays)
    for a, b in zip(runs[True], runs[False], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    # A value that no block of the last query holds any more is not read: of the steepest head, not of the flattest.
    q, k, v, _ = arrays
    context = jit(
        lambda v: flash_attention(PlainKernel(), q, k, v, slopes)
    )(v.at[:, 0].set(1e9))  # fmt: skip
    np.testing.assert_array_equal(context[0, -1, 0], runs[True][0][0, -1, 0])
    assert jnp.abs(context[0, -1, 15]).max() > 1e3


@pytest.mark.parametrize("policy", ["context", "nothing"])
def test_a_policy_that_keeps_the_context_spares_the_kernel(policy):
    """How often the forward kernel is in the program of a gradient under remat."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Counting(PlainKernel):
        def forward(self, inputs):
            context, lse = super().forward(inputs)
            context = jax.lax.cond(
                True, lambda a: a, lambda a: a * 2, context
            )  # a mark in the jaxpr
            calls.append(1)
            return context, lse

    *arrays, slopes = problem(1, 32, 2, 8)
    policies = {
        "context": jax.checkpoint_policies.save_only_these_names("context"),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
    attention = jax.checkpoint(
        lambda q, k, v: flash_attention(Counting(), q, k, v, slopes), policy=policies[policy]
    )
    program = jax.make_jaxpr(jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2)))(
        *arrays[:3]
    )
    assert calls
    assert str(program).count("cond[") == (1 if policy == "context" else 2)
