"""Loss and gradients of a linear head over a large vocabulary, one chunk of tokens after the other, on one device.

How a chunk is worked off differs by platform, as their compilers do (read in their programs for H200, v5p and CPU):
* XLA:GPU keeps dlogits for both matmuls of the backward pass, so float32 logits need not exist of as many tokens:
  `_by_parts` of a chunk. Logits are written, read for maximum and sum at once, and read for dlogits.
* XLA:TPU takes the maximum in the first matmul and makes dlogits anew inside the two others: one part, whole logits.
* XLA:CPU is fast only on what its caches hold: `_by_blocks` of the vocabulary.

Logits stay float32 in memory: near 100 a bfloat16 is a multiple of 0.5, and nothing in training holds their common
offset at 0.

Dimension key: T tokens of one chunk or part, V vocabulary, N blocks of it, K columns of a block, P parts of a chunk,
D emb_dim.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# What `chunk_tokens_for` lets the loss of one device take, beside its results; 10^9 bytes are meant by GB here.
TEMPORARY_BYTES = 4 * 10**9
# Tokens whose float32 logits exist at a time on a GPU. Their matmul does 512 FLOPs for each byte of bfloat16 weights it
# reads; below 295 an H100's memory would be its limit.
PART_TOKENS = 512
_MIN_CHUNK_TOKENS, _MAX_CHUNK_TOKENS = 1024, {"cpu": 1024, "tpu": 2048, "cuda": 4096}
_CPU_BLOCK_COLUMNS = (
    512  # with 1,024 tokens 2 MB of float32 logits, about what a core's cache holds
)
# For columns without a probability and for maxima of nothing: unlike -inf it has a difference to itself.
_NOTHING = -1e30


def chunk_tokens_for(
    num_tokens: int, vocab_size: int, emb_dim: int, *, platform: str, itemsize_bytes: int = 2
) -> int:
    """Tokens of a chunk where none are given: as many as fit `TEMPORARY_BYTES` beside the weights, within bounds.

    Args:
      num_tokens: of one device.
      vocab_size: columns of the head that one device holds, V.
      emb_dim: D.
      platform: "cpu", "tpu" or "cuda".
      itemsize_bytes: of the compute dtype.

    Each chunk of T tokens reads and writes the float32 accumulator of dW, 8VD bytes, and computes 6TVD FLOPs. With F
    FLOPs and M bytes a second the first takes (4/3)(F/M)/T of the time of the second, unless it hides behind it: at 989
    TFLOP/s and 4.8 TB/s (H200) 27 % for 1024 tokens, 13 % for 2048, 7 % for 4096; for 128 tokens, which a rule by V/D
    would give BLOOM 560m, twice that time. Hence 1024 at least, whatever the memory.
    """
    weights_bytes = itemsize_bytes * vocab_size * emb_dim
    fitting = [
        n
        for n in range(_MIN_CHUNK_TOKENS, _MAX_CHUNK_TOKENS[platform] + 1, PART_TOKENS)
        if weights_bytes + chunk_bytes(n, vocab_size, platform, itemsize_bytes) <= TEMPORARY_BYTES
    ]
    most = max(fitting, default=_MIN_CHUNK_TOKENS) // PART_TOKENS
    num_parts = math.ceil(num_tokens / PART_TOKENS)
    even = [
        n for n in range(most // 2, most + 1) if num_parts % n == 0
    ]  # else the last is filled up
    return min(num_tokens, PART_TOKENS * (even[-1] if even else most))


def chunk_bytes(num_tokens: int, vocab_size: int, platform: str, itemsize_bytes: int = 2) -> int:
    """Of a chunk's arrays of tokens by V: float32 logits on a TPU; on a GPU their gradient in the compute dtype, and
    float32 logits of a part; on a CPU exponentials in the compute dtype."""
    if platform == "tpu":
        return 4 * num_tokens * vocab_size
    part_tokens = min(num_tokens, PART_TOKENS) if platform == "cuda" else 0
    return (itemsize_bytes * num_tokens + 4 * part_tokens) * vocab_size


class Head(NamedTuple):
    """z_loss and num_tokens_in_vocab of `linear_cross_entropy`, and the mesh axis that V is split over, if it is."""

    z_loss: float
    num_valid: int | None
    vocab_axis: str | None

    def first_column(self, w_VD):
        """Number in the whole vocabulary of the first column of this device."""
        return jax.lax.axis_index(self.vocab_axis) * w_VD.shape[0] if self.vocab_axis else 0

    def logits(self, x_TD, w_KD, first):
        """float32 [T, K]; `first` is the number of the first of these columns."""
        logits_TK = jnp.einsum("TD,KD->TK", x_TD, w_KD, preferred_element_type=jnp.float32)
        if self.num_valid is None:
            return logits_TK
        column_1K = first + jnp.arange(w_KD.shape[0])[None, :]
        return jnp.where(column_1K < self.num_valid, logits_TK, _NOTHING)

    def whole(self, max_T, sum_T, gold_T, targets_T):
        """The same of the whole vocabulary, from those of what this device holds; and logsumexp and loss."""
        if self.vocab_axis:
            whole_max_T = jax.lax.pmax(max_T, self.vocab_axis)
            parts_2T = jnp.stack([sum_T * jnp.exp(max_T - whole_max_T), gold_T])
            max_T, (sum_T, gold_T) = whole_max_T, jax.lax.psum(parts_2T, self.vocab_axis)
        if self.num_valid is not None:
            gold_T = jnp.where(targets_T < self.num_valid, gold_T, -jnp.inf)
        lse_T = max_T + jnp.log(sum_T)
        return max_T, sum_T, lse_T, lse_T - gold_T

    def scale(self, weights_T, lse_T, sum_T):
        """What exp(logit - max) is to be multiplied by in the gradient."""
        return weights_T * (1.0 + 2.0 * self.z_loss * lse_T) / sum_T


def head_in_chunks(head, with_grads, chunk_tokens, w_VD, x_TD, targets_T, weights_T):
    """logsumexp and loss of each token, float32 [T], and, if wanted, dx [T, D] and dW [V, D] of the weighted loss.

    Args:
      head: a `Head`.
      with_grads: whether dx, of x's dtype, and dW, float32, are wanted. dx is that of this device's columns only.
      chunk_tokens: tokens of a chunk, at most; None leaves it to `chunk_tokens_for`.
      w_VD: the columns of the head that this device holds, in x's dtype.
      x_TD: final hidden states.
      targets_T: int32, numbers in the whole vocabulary.
      weights_T: float32.
    """

    def way(platform, function, *more):
        limit = chunk_tokens or chunk_tokens_for(
            len(x_TD), *w_VD.shape, platform=platform, itemsize_bytes=x_TD.dtype.itemsize
        )
        return functools.partial(function, head, with_grads, limit, *more)

    return jax.lax.platform_dependent(
        w_VD,
        x_TD,
        targets_T,
        weights_T,
        cpu=way("cpu", _by_blocks),
        tpu=way("tpu", _by_parts, len(x_TD), _max_and_sum_in_two_reads),
        default=way("cuda", _by_parts, PART_TOKENS, _max_and_sum_in_one_read),
    )


def _gold(logits_TK, row_T):
    """The logit of each token's target; 0 where it is not among these columns."""
    gold_T = jnp.take_along_axis(logits_TK, row_T[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where((row_T >= 0) & (row_T < logits_TK.shape[1]), gold_T, 0.0)


def _less_gold(dlogits_TK, row_T, weights_T):
    """Compared, not scattered: it fuses."""
    hit_TK = jnp.arange(dlogits_TK.shape[1])[None, :] == row_T[:, None]
    return dlogits_TK - jnp.where(hit_TK, weights_T[:, None], 0.0)


def _cut(sizes: tuple[int, ...], *arrays):
    """[T, ...] -> [*sizes, ...], filled up with zeros: tokens of weight 0."""
    num_tokens = math.prod(sizes)
    for a in arrays:
        a = jnp.pad(a, ((0, num_tokens - a.shape[0]),) + ((0, 0),) * (a.ndim - 1))
        yield a.reshape(*sizes, *a.shape[1:])


# ---- accelerators: parts of the tokens ----


def _by_parts(
    head, with_grads, chunk_tokens, part_tokens, max_and_sum, w_VD, x_TD, targets_T, weights_T
):
    """logsumexp and loss of each token (and dx and dW)."""
    (num_tokens, D), V = x_TD.shape, w_VD.shape[0]
    num_chunks = math.ceil(num_tokens / chunk_tokens)
    num_parts = math.ceil(num_tokens / num_chunks / part_tokens)
    sizes = (num_chunks, num_parts, math.ceil(num_tokens / num_chunks / num_parts))
    first = head.first_column(w_VD)

    def part(x_TD, targets_T, weights_T) -> tuple[Any, Any]:
        logits_TV = head.logits(x_TD, w_VD, first)
        row_T = targets_T - first
        max_T, sum_T, lse_T, nll_T = head.whole(
            *max_and_sum(logits_TV), _gold(logits_TV, row_T), targets_T
        )
        if not with_grads:
            return None, (lse_T, nll_T)
        exp_TV = jnp.exp(logits_TV - max_T[:, None])
        dlogits_TV = head.scale(weights_T, lse_T, sum_T)[:, None] * exp_TV
        return _less_gold(dlogits_TV, row_T, weights_T).astype(x_TD.dtype), (lse_T, nll_T)

    def next_part(dlogits_PTV, inputs) -> tuple[Any, Any]:
        p, *inputs = inputs
        dlogits_TV, outputs = part(*inputs)
        return _put(dlogits_PTV, dlogits_TV, p) if with_grads else None, outputs

    def chunk(carry, inputs):
        dw_VD, dlogits_PTV = carry
        if num_parts == 1:
            dlogits_PTV, outputs = part(*(a[0] for a in inputs))
        else:
            parts = (jnp.arange(num_parts), *inputs)
            dlogits_PTV, outputs = jax.lax.scan(next_part, dlogits_PTV, parts)
        if not with_grads:
            return carry, outputs
        x_TD, dlogits_TV = inputs[0].reshape(-1, D), dlogits_PTV.reshape(-1, V)
        dx_TD = jnp.einsum("TV,VD->TD", dlogits_TV, w_VD, preferred_element_type=jnp.float32)
        dw_VD += jnp.einsum("TV,TD->VD", dlogits_TV, x_TD, preferred_element_type=jnp.float32)
        carry = (dw_VD, None if num_parts == 1 else dlogits_PTV)
        return carry, (*outputs, dx_TD.astype(x_TD.dtype))

    dw_VD: Any = None
    dlogits_PTV: Any = None
    if with_grads:
        dw_VD = jnp.zeros(w_VD.shape, jnp.float32)
        if (
            num_parts > 1
        ):  # carried on: made anew for each chunk it would be written once more, with zeros
            dlogits_PTV = jnp.zeros((*sizes[1:], V), x_TD.dtype)
    inputs = tuple(_cut(sizes, x_TD, targets_T, weights_T))
    (dw_VD, _), (lse, nll, *dx) = jax.lax.scan(chunk, (dw_VD, dlogits_PTV), inputs)
    outputs = lse.reshape(-1)[:num_tokens], nll.reshape(-1)[:num_tokens]
    return (*outputs, dx[0].reshape(-1, D)[:num_tokens], dw_VD) if with_grads else outputs


def _max_and_sum_in_two_reads(logits_TV):
    """Maximum, and sum of exp(logit - maximum), of each row. For XLA:TPU, which takes the maximum in the matmul."""
    max_T = jnp.max(logits_TV, axis=1)
    return max_T, jnp.sum(jnp.exp(logits_TV - max_T[:, None]), axis=1)


def _max_and_sum_in_one_read(logits_TV):
    """The same for XLA:GPU, which takes neither in the matmul."""

    def merge(a, b):
        (max_a, sum_a), (max_b, sum_b) = a, b
        less = jnp.exp(-jnp.abs(max_a - max_b))
        total = jnp.where(max_a > max_b, sum_a + sum_b * less, sum_a * less + sum_b)
        return jnp.maximum(max_a, max_b), total

    nothing = (jnp.float32(_NOTHING), jnp.float32(0))
    return jax.lax.reduce((logits_TV, jnp.ones_like(logits_TV)), nothing, merge, (1,))


# ---- XLA:CPU: blocks of the vocabulary ----


def _by_blocks(head, with_grads, chunk_tokens, w_VD, x_TD, targets_T, weights_T):
    """The same. A first loop over the blocks keeps exp(logit - maximum so far) in the compute dtype; a second one, when
    maximum and sum are known, makes dlogits of them, and adds to dx and dW."""
    (num_tokens, D), V = x_TD.shape, w_VD.shape[0]
    num_chunks = math.ceil(num_tokens / chunk_tokens)
    T = math.ceil(num_tokens / num_chunks)
    N = _num_blocks(V)
    K = V // N
    dtype = x_TD.dtype
    blocks = (
        head.first_column(w_VD) + K * jnp.arange(N),
        jnp.arange(N),
        _bits(w_VD).reshape(N, K, D),
    )

    def chunk(carry, inputs):
        dw_NKD, exp_NTK = carry
        x_bits_TD, targets_T, weights_T = inputs
        x_TD = _of_bits(x_bits_TD, dtype)

        def first_loop(carry, block):
            max_T, sum_T, gold_T, exp_NTK = carry
            first, n, w_bits_KD = block
            logits_TK = head.logits(x_TD, _of_bits(w_bits_KD, dtype), first)
            new_max_T = jnp.maximum(max_T, jnp.max(logits_TK, axis=1))
            exp_TK = jnp.exp(logits_TK - new_max_T[:, None])
            sum_T = sum_T * jnp.exp(max_T - new_max_T) + jnp.sum(exp_TK, axis=1)
            gold_T += _gold(logits_TK, targets_T - first)
            if with_grads:
                exp_NTK = _put(exp_NTK, _bits(exp_TK.astype(dtype)), n)
            return (new_max_T, sum_T, gold_T, exp_NTK), new_max_T

        def second_loop(carry, block):
            dx_TD, dw_NKD = carry
            (first, n, w_bits_KD), scale_T = block
            exp_TK = _of_bits(_take(exp_NTK, n), dtype).astype(jnp.float32)
            dlogits_TK = _less_gold(scale_T[:, None] * exp_TK, targets_T - first, weights_T)
            dlogits_TK = dlogits_TK.astype(dtype)
            dx_TD += jnp.einsum(
                "TK,KD->TD",
                dlogits_TK,
                _of_bits(w_bits_KD, dtype),
                preferred_element_type=jnp.float32,
            )
            dw_KD = jnp.einsum(
                "KT,TD->KD",
                _transpose_in_memory(dlogits_TK),
                x_TD,
                preferred_element_type=jnp.float32,
            )
            return (dx_TD, _put(dw_NKD, _take(dw_NKD, n) + dw_KD, n)), None

        zeros_T = jnp.zeros(T, jnp.float32)
        (max_T, sum_T, gold_T, exp_NTK), maxima_NT = jax.lax.scan(
            first_loop, (zeros_T + _NOTHING, zeros_T, zeros_T, exp_NTK), blocks
        )
        max_T, sum_T, lse_T, nll_T = head.whole(max_T, sum_T, gold_T, targets_T)
        if not with_grads:
            return carry, (lse_T, nll_T)
        scale_1T = head.scale(weights_T, lse_T, sum_T)[None, :]
        scale_NT = scale_1T * jnp.exp(maxima_NT - max_T[None, :])
        scale_NT = jax.lax.optimization_barrier(scale_NT)  # or XLA takes exp for each logit
        zeros_TD = jnp.zeros((T, D), jnp.float32)
        (dx_TD, dw_NKD), _ = jax.lax.scan(second_loop, (zeros_TD, dw_NKD), (blocks, scale_NT))
        return (dw_NKD, exp_NTK), (lse_T, nll_T, _bits(dx_TD.astype(dtype)))

    carry: Any = (None, None)
    if with_grads:
        carry = (jnp.zeros((N, K, D), jnp.float32), _bits(jnp.zeros((N, T, K), dtype)))
    inputs = tuple(_cut((num_chunks, T), _bits(x_TD), targets_T, weights_T))
    carry, (lse, nll, *dx) = jax.lax.scan(chunk, carry, inputs)
    outputs = lse.reshape(-1)[:num_tokens], nll.reshape(-1)[:num_tokens]
    if not with_grads:
        return outputs
    dx_TD = _of_bits(dx[0], dtype).reshape(-1, D)[:num_tokens]
    return (*outputs, dx_TD, carry[0].reshape(V, D))


def _num_blocks(V: int) -> int:
    """The divisor of V whose blocks are nearest to `_CPU_BLOCK_COLUMNS`."""
    divisors = (n for n in range(1, V // 128 + 2) if V % n == 0)
    return min(divisors, key=lambda n: abs(math.log(V / n / _CPU_BLOCK_COLUMNS)))


def _bits(a):
    """What XLA:CPU should carry through loops: it converts all of a bfloat16 array to write a slice of it."""
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a


def _of_bits(a, dtype):
    return jax.lax.bitcast_convert_type(a, dtype)


def _transpose_in_memory(a):
    """For XLA:CPU, whose bfloat16 matmuls contract rows only; left to itself it takes float32 ones, 4x slower."""
    return with_layout_constraint(a.T, Layout(major_to_minor=(0, 1)))


def _take(a, n):
    return jax.lax.dynamic_index_in_dim(a, n, keepdims=False, allow_negative_indices=False)


def _put(a, value, n):
    return jax.lax.dynamic_update_index_in_dim(a, value, n, 0, allow_negative_indices=False)
