"""Hugging Face BLOOM folders made without transformers and without bloomjax.hf: names and shapes stand here."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

NUMPY = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
SMALL = dict(vocab_size=48, emb_dim=24, num_layers=3, num_heads=6)


def shapes(*, vocab_size: int, emb_dim: int, num_layers: int, num_heads: int) -> dict[str, tuple]:
    """Shape of every tensor (transformers, models/bloom/modeling_bloom.py), without prefix."""
    D = emb_dim
    found = {
        "word_embeddings.weight": (vocab_size, D),
        "word_embeddings_layernorm.weight": (D,),
        "word_embeddings_layernorm.bias": (D,),
    }
    block = {
        "input_layernorm.weight": (D,), "input_layernorm.bias": (D,),
        "self_attention.query_key_value.weight": (3 * D, D), "self_attention.query_key_value.bias": (3 * D,),
        "self_attention.dense.weight": (D, D), "self_attention.dense.bias": (D,),
        "post_attention_layernorm.weight": (D,), "post_attention_layernorm.bias": (D,),
        "mlp.dense_h_to_4h.weight": (4 * D, D), "mlp.dense_h_to_4h.bias": (4 * D,),
        "mlp.dense_4h_to_h.weight": (D, 4 * D), "mlp.dense_4h_to_h.bias": (D,),
    }  # fmt: skip
    for layer in range(num_layers):
        found |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"ln_f.weight": (D,), "ln_f.bias": (D,)}


def random_tensors(seed: int = 0, dtype: str = "float32", **shape: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=each).astype(NUMPY[dtype])
        for name, each in shapes(**(SMALL | shape)).items()
    }


def config(**changes) -> dict:
    """config.json as transformers 5 writes it."""
    return {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": SMALL["vocab_size"],
        "hidden_size": SMALL["emb_dim"], "n_layer": SMALL["num_layers"], "n_head": SMALL["num_heads"],
        "seq_length": 32, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        "dtype": "float32", "use_cache": True, "pretraining_tp": 1, "slow_but_exact": False,
    } | changes  # fmt: skip


def legacy_config() -> dict:
    """config.json as the released models have it."""
    old = config(n_embed=SMALL["emb_dim"], num_attention_heads=SMALL["num_heads"], pad_token_id=3)
    for name in ("hidden_size", "n_head", "dtype", "tie_word_embeddings"):
        del old[name]
    return old | {"unk_token_id": 0, "n_inner": None, "offset_alibi": 100, "skip_bias_add": True}


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: dict,
    *,
    prefix: str = "transformer.",
    files: list[list[str]] | None = None,
    with_index: bool = True,
) -> Path:
    """Writes a folder; `files` lists the names (without prefix) of each shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files is None:
        named = {prefix + name: x for name, x in tensors.items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model_{number:05d}-of-{len(files):05d}.safetensors"
        save_file({prefix + n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {prefix + name: file for name in names}
    if with_index:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def layer_files(tensors: dict[str, np.ndarray]) -> list[list[str]]:
    """One file for what comes before the layers, one a layer, one for what comes after: as the 72 of 176B."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        key = name.split(".")[1] if name.startswith("h.") else name.split(".")[0][:4]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by its name without prefix, read by the safetensors library."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            assert name not in found
            found[name.removeprefix("transformer.")] = x
    return found


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        np.testing.assert_array_equal(found[name].view(np.uint8), x.view(np.uint8), name)
