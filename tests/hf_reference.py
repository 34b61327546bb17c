"""Random BLOOMs of transformers, the same ones as ours, and what transformers computes. Needs torch."""

import dataclasses
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.bloom import modeling_bloom

from bloomjax import hf
from bloomjax.model import Bloom

# Standard deviation by the end of the name, of a matrix times sqrt(its columns). Softmax has several keys, logits are
# far apart; the final norm has weights of both signs, else the tied head repeats the last token.
_STDS = {
    "word_embeddings.weight": 2.0, "layernorm.weight": 0.3, "ln_f.weight": 1.0,
    "query_key_value.weight": 1.4, "query_key_value.bias": 0.3, "self_attention.dense.weight": 2.0,
    "dense_h_to_4h.weight": 1.0, "dense_4h_to_h.weight": 1.0, "bias": 0.1,
}  # fmt: skip


def random_bloom(*, num_heads: int, head_dim: int, num_layers: int, vocab_size: int = 512, seed=0):
    """A float32 BloomForCausalLM in which every tensor is random: no error hides in a zero or a one."""
    config = transformers.BloomConfig(
        vocab_size=vocab_size, hidden_size=num_heads * head_dim, n_layer=num_layers, n_head=num_heads,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = transformers.BloomForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            std = next(std for end, std in _STDS.items() if name.endswith(end))
            std /= tensor.shape[1] ** 0.5 if tensor.ndim == 2 else 1
            tensor.normal_(float(name.endswith("layernorm.weight")), std, generator=generator)
    return model


def ours(model: Any, **options) -> tuple[Bloom, dict[str, Any]]:
    """Our model and float32 parameters of a BloomForCausalLM; `options` are of BloomConfig."""
    config, _ = hf.from_hf_config(model.config.to_dict(), "the configuration")
    tensors, state = hf.tensors(config), model.state_dict()
    params: dict[str, Any] = {}
    for tensor in tensors:
        same = [t for t in tensors if t.path == tensor.path]  # of every layer
        found = [t.from_hf(state[hf.PREFIX + t.name].float().numpy()) for t in same]
        branch = params
        for name in tensor.path[:-1]:
            branch = branch.setdefault(name, {})
        branch[tensor.path[-1]] = found[0] if tensor.layer is None else np.stack(found)
    return Bloom(dataclasses.replace(config, **options)), params


def logits(model: Any, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """float32 logits [B, L, V] of a BloomForCausalLM; `valid` is its attention_mask."""
    mask = None if valid is None else torch.tensor(valid.astype(np.int64))
    with torch.no_grad():
        return (
            model(torch.tensor(tokens.astype(np.int64)), attention_mask=mask).logits.float().numpy()
        )


def attention(q, k, v, g, valid: np.ndarray, dtype) -> list[np.ndarray]:
    """Context, dq, dk, dv [B, L, H, K] of BloomAttention without its two linear layers, computed in `dtype`.

    `g` is the cotangent of the context, `valid` [B, L] the attention_mask.
    """
    B, L, H, K = q.shape
    config = transformers.BloomConfig(
        hidden_size=H * K, n_head=H, attention_dropout=0.0, hidden_dropout=0.0
    )
    module: Any = modeling_bloom.BloomAttention(config, layer_idx=0)
    module.query_key_value = module.dense = torch.nn.Identity()
    q, k, v, g = (torch.tensor(np.asarray(a, np.float32)).to(dtype) for a in (q, k, v, g))
    fused = torch.stack([q, k, v], 3).reshape(B, L, -1).requires_grad_()
    alibi = modeling_bloom.build_alibi_tensor(torch.tensor(valid.astype(np.int64)), H, dtype)
    seen = torch.tensor(np.tri(L, dtype=bool) & valid[:, None, None])
    mask = torch.where(seen, 0.0, -3e38).to(dtype)
    context, _ = module(fused, torch.zeros(B, L, H * K, dtype=dtype), alibi, mask)
    context.backward(g.reshape(context.shape))
    assert fused.grad is not None
    gradients = fused.grad.reshape(B, L, H, 3, K).unbind(3)
    return [a.detach().float().numpy().reshape(B, L, H, K) for a in (context, *gradients)]


def root_mean_square(got, want) -> float:
    """Of the difference of two arrays, divided by that of `want`."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
