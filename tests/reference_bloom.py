"""BLOOM in a page of float64, straight from its definition; shares no code with the package.

embedding -> LayerNorm -> blocks -> LayerNorm -> tied logits; a block is x + dense(attention(LN(x))),
then x + mlp(LN(x)); every linear layer has a bias, GELU is the tanh form
(bigscience-workshop/Megatron-DeepSpeed, megatron/model/transformer.py). ALiBi is the bias
slope * key position, as there: equal to slope * distance up to a constant a row, which the softmax
drops. `xp` is numpy, or jax.numpy where a gradient is wanted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _fast_compile():
    """Options that make XLA compile for the CPU 4 times faster; empty where it does not know them."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return None
    return options


# For programs that run once or twice: nearly all their time is compilation.
jit = functools.partial(jax.jit, compiler_options=_fast_compile())

SLOPES = {  # Megatron-DeepSpeed, _build_alibi_tensor
    4: [0.25, 0.0625, 0.015625, 0.00390625],
    6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
}


def random_params(*, vocab_size, emb_dim, num_layers, num_heads, mlp_dim, seed=0):
    """Float32 parameters in the package's tree, every tensor random: no error hides in a zero."""
    rng = np.random.default_rng(seed)
    D, H, K, F, L = emb_dim, num_heads, emb_dim // num_heads, mlp_dim, num_layers

    def normal(std, *shape, mean=0.0):
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def norm(*shape):
        return {"scale": normal(0.3, *shape, mean=1.0), "bias": normal(0.3, *shape)}

    def linear(fan_in, kernel, bias):
        return {"kernel": normal(fan_in**-0.5, L, *kernel), "bias": normal(0.3, L, *bias)}

    return {
        "embedding": normal(0.2, vocab_size, D),
        "embedding_norm": norm(D),
        "final_norm": norm(D),
        "layers": {
            "attention_norm": norm(L, D),
            "qkv": linear(D, (D, 3, H, K), (3, H, K)),
            "out": linear(D, (H, K, D), (D,)),
            "mlp_norm": norm(L, D),
            "mlp_in": linear(D, (D, F), (F,)),
            "mlp_out": linear(F, (F, D), (D,)),
        },
    }


def to_float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _layer_norm(x, p, xp):
    x = x - x.mean(-1, keepdims=True)
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def _attention(x, p, xp, seen=None):
    length = x.shape[1]
    q, k, v = (xp.einsum("bld,dhk->bhlk", x, p["qkv"]["kernel"][:, i])
               + p["qkv"]["bias"][i][:, None] for i in range(3))  # fmt: skip
    slopes = xp.asarray(SLOPES[q.shape[1]])
    scores = xp.einsum("bhlk,bhsk->bhls", q, k) / q.shape[-1] ** 0.5
    scores = scores + slopes[:, None, None] * xp.arange(length)
    seen = np.tri(length, dtype=bool) if seen is None else seen
    scores = xp.where(seen, scores, -np.inf)
    e = xp.exp(scores - scores.max(-1, keepdims=True))
    context = xp.einsum("bhls,bhsk->blhk", e / e.sum(-1, keepdims=True), v)
    return xp.einsum("blhk,hkd->bld", context, p["out"]["kernel"]) + p["out"]["bias"]


def _mlp(x, p, xp):
    h = x @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
    h = 0.5 * h * (1 + xp.tanh(0.79788456080286535588 * (h + 0.044715 * h * h * h)))
    return h @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]


def _block(x, p, xp, seen=None):
    x = x + _attention(_layer_norm(x, p["attention_norm"], xp), p, xp, seen)
    return x + _mlp(_layer_norm(x, p["mlp_norm"], xp), p, xp)


def logits(params, tokens, xp=np, seen=None):
    """Logits [B, L, V] in the precision of `params`; `seen` [L, L]: the keys each query sees; None for those before."""
    x = _layer_norm(params["embedding"][tokens], params["embedding_norm"], xp)
    if xp is np:
        for i in range(params["layers"]["qkv"]["bias"].shape[0]):
            x = _block(x, jax.tree.map(lambda a, i=i: a[i], params["layers"]), xp, seen)
    else:
        x, _ = jax.lax.scan(lambda x, p: (_block(x, p, xp, seen), None), x, params["layers"])
    return _layer_norm(x, params["final_norm"], xp) @ params["embedding"].T


def token_losses(params, tokens, xp=np):
    """-log softmax at the next token [B, L] for tokens [B, L + 1]."""
    z = logits(params, tokens[:, :-1], xp)
    z = z - z.max(-1, keepdims=True)
    gold = xp.take_along_axis(z, tokens[:, 1:, None], axis=-1)[..., 0]
    return xp.log(xp.exp(z).sum(-1)) - gold


@jit
@jax.value_and_grad
def _loss_and_grads(params, tokens, row_weights):
    return (token_losses(params, tokens, jnp).mean(1) * row_weights).sum()


def loss_and_grads(params, tokens, row_weights=None):
    """Loss and gradient in float64, by jax autodiff of this file.

    The loss is the mean over the tokens of all rows, or the mean weighted by `row_weights`.
    """
    weights = np.ones(len(tokens)) if row_weights is None else np.asarray(row_weights)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        loss, grads = _loss_and_grads(to_float64(params), tokens, weights / weights.sum())
        return float(loss), jax.tree.map(np.asarray, grads)
