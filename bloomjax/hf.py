"""Our parameters and settings <-> those of transformers' BloomForCausalLM; the only place with the names of HF.

Layouts (transformers, models/bloom/modeling_bloom.py): a torch Linear is [out, in]; the rows of query_key_value are
[head, (q, k, v), head_dim], ours [(q, k, v), head, head_dim]. Dimension key V D H K F as in model.py.
"""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from bloomjax.errors import BadInput
from bloomjax.model import BloomConfig
from bloomjax.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID

PREFIX = "transformer."  # in front of every name that BloomForCausalLM saves; the released files have none
HEAD = "lm_head.weight"  # tied to the embedding, so not saved; some tools do
NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One HF tensor and where it lies in our parameters.

    Attributes:
      name: without PREFIX.
      path: of the leaf in our parameters; `layer` indexes its first dimension, None if it has no layers.
      our_shape: of the leaf, without the layers.
      axes: our dimensions in the order of the HF tensor, which then joins some of them to `shape`.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    our_shape: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether both sides hold the same numbers in the same order, so that it can be moved in blocks of rows."""
        return self.axes == tuple(range(len(self.axes))) and self.our_shape == self.shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """The HF tensor [shape] of our array [our_shape]."""
        return np.ascontiguousarray(x.transpose(self.axes)).reshape(self.shape)

    def from_hf(self, x: np.ndarray) -> np.ndarray:
        """Our array [our_shape] of the HF tensor [shape]."""
        permuted = tuple(self.our_shape[axis] for axis in self.axes)
        return np.ascontiguousarray(x.reshape(permuted).transpose(np.argsort(self.axes)))


def tensors(config: BloomConfig) -> list[Tensor]:
    """Every tensor of BloomForCausalLM in its own order, the tied head left out."""
    V, D, F = saved_vocab_size(config), config.emb_dim, config.mlp_width
    H, K = config.num_heads, config.head_dim
    found = [Tensor("word_embeddings.weight", ("embedding",), None, (V, D), (0, 1), (V, D))]
    found += _norm("word_embeddings_layernorm", "embedding_norm", D)
    for layer in range(config.num_layers):
        block = [
            *_norm("input_layernorm", "attention_norm", D),
            *_linear("self_attention.query_key_value", "qkv", (D, 3, H, K), (2, 1, 3, 0), 3 * D),
            *_linear("self_attention.dense", "out", (H, K, D), (2, 0, 1), D),
            *_norm("post_attention_layernorm", "mlp_norm", D),
            *_linear("mlp.dense_h_to_4h", "mlp_in", (D, F), (1, 0), F),
            *_linear("mlp.dense_4h_to_h", "mlp_out", (F, D), (1, 0), D),
        ]
        found += [
            dataclasses.replace(
                t, name=f"h.{layer}.{t.name}", path=("layers", *t.path), layer=layer
            )
            for t in block
        ]
    return found + _norm("ln_f", "final_norm", D)


def _norm(hf_name: str, our_name: str, D: int) -> list[Tensor]:
    return [
        Tensor(f"{hf_name}.{theirs}", (our_name, ours), None, (D,), (0,), (D,))
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]


def _linear(
    hf_name: str, our_name: str, kernel: tuple[int, ...], axes: tuple[int, ...], num_out: int
) -> list[Tensor]:
    num_in = math.prod(kernel) // num_out
    # query_key_value's bias [3, H, K] is interleaved as the rows of its kernel are; the others are vectors.
    bias, bias_axes = (kernel[1:], (1, 0, 2)) if len(kernel) == 4 else (kernel[-1:], (0,))
    return [
        Tensor(f"{hf_name}.weight", (our_name, "kernel"), None, kernel, axes, (num_out, num_in)),
        Tensor(f"{hf_name}.bias", (our_name, "bias"), None, bias, bias_axes, (num_out,)),
    ]


def saved_vocab_size(config: BloomConfig) -> int:
    """Rows of the exported embedding.

    transformers gives padding rows a probability. So did BLOOM; a model trained with mask_padding_vocab did not, and
    leaves its padding rows behind.
    """
    return config.num_valid_tokens or config.vocab_size


def to_hf_config(config: BloomConfig, sequence_length: int, dtype: str) -> dict[str, Any]:
    """config.json. BadInput for what BloomForCausalLM cannot be."""
    if config.departures:
        named = ", ".join(f"{name}={value}" for name, value in config.departures.items())
        raise BadInput(
            "BloomForCausalLM has ALiBi, GELU, an embedding LayerNorm and a tied head; it cannot be a model with "
            f"{named}"
        )
    if config.mlp_width != 4 * config.emb_dim:
        raise BadInput(
            f"BloomForCausalLM has mlp_dim = 4 * emb_dim = {4 * config.emb_dim}, this model has {config.mlp_width}"
        )
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": saved_vocab_size(config),
        "hidden_size": config.emb_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": sequence_length,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.init_std,
        "hidden_dropout": config.hidden_dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "unk_token_id": UNK_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": dtype,
        "use_cache": True,
    }


def to_hf_generation_config() -> dict[str, Any]:
    """generation_config.json: the special tokens; the text ends at </s>."""
    return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}


def from_hf_config(hf_config: Any, where: str) -> tuple[BloomConfig, int]:
    """Our configuration and the sequence length in tokens, of a config.json that was read from `where`.

    Old keys are known: n_embed (it wins over hidden_size, as in transformers), num_attention_heads. Nothing is
    guessed: a shape that is not written there is an error, though transformers has defaults.

    Raises BadInput naming the key: no BLOOM, a value of another kind, an option whose mathematics we do not have.
    """
    if not isinstance(hf_config, dict):
        raise BadInput(f"{where} is no JSON object")
    if hf_config.get("model_type") != "bloom":
        raise BadInput(f"{where} is no BLOOM: its model_type is {hf_config.get('model_type')!r}")

    def read(kind: type, *names: str, default: Any = None) -> Any:
        found = {name: hf_config[name] for name in names if hf_config.get(name) is not None}
        if not found and default is None:
            raise BadInput(f"{where} has no {' or '.join(names)}")
        for name, value in found.items():
            if not _is(kind, value):
                raise BadInput(f"{where}: {name} must be a {_KINDS[kind]}, it is {value!r}")
        return kind(next(iter(found.values()))) if found else default

    heads = {n: hf_config[n] for n in ("n_head", "num_attention_heads") if hf_config.get(n)}
    if len(set(map(str, heads.values()))) > 1:
        raise BadInput(f"{where} contradicts itself: {heads}")
    emb_dim = read(int, "n_embed", "hidden_size")
    if read(int, "n_inner", default=4 * emb_dim) != 4 * emb_dim:
        raise BadInput(
            f"{where}: n_inner {hf_config['n_inner']} is not 4 * {emb_dim}, as BLOOM's is"
        )
    if read(bool, "apply_residual_connection_post_layernorm", default=False):
        raise BadInput(f"{where}: apply_residual_connection_post_layernorm is not supported")
    for name, expected in (("bos", BOS_ID), ("eos", EOS_ID), ("pad", PAD_ID), ("unk", UNK_ID)):
        if hf_config.get(f"{name}_token_id") not in (None, expected):
            found = hf_config[f"{name}_token_id"]
            raise BadInput(f"{where}: {name}_token_id is {found!r}; BLOOM's is {expected}")
    sequence_length = read(int, "seq_length", default=2048)
    epsilon = read(float, "layer_norm_epsilon", default=1e-5)
    for name, value in (("seq_length", sequence_length), ("layer_norm_epsilon", epsilon)):
        if value <= 0:
            raise BadInput(f"{where}: {name} must be above 0, it is {value}")
    try:
        return BloomConfig(
            vocab_size=read(int, "vocab_size"),
            num_layers=read(int, "n_layer", "num_hidden_layers"),
            emb_dim=emb_dim,
            num_heads=read(int, "n_head", "num_attention_heads"),
            init_std=read(float, "initializer_range", default=0.02),
            layer_norm_epsilon=epsilon,
            hidden_dropout_rate=read(float, "hidden_dropout", default=0.0),
            attention_dropout_rate=read(float, "attention_dropout", default=0.0),
        ), sequence_length
    except BadInput as error:
        message = str(error)
        raise BadInput(message if message.startswith(where) else f"{where}: {message}") from None


# A number beyond this is damage, and would be hours of work for those who look at it.
_LARGEST = 2**24
_KINDS = {int: "whole number below 2^24", float: "number", bool: "truth value"}


def _is(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    # Not NaN either: it compares as False.
    return isinstance(value, int | float) and abs(value) <= _LARGEST and value == kind(value)


def leaf_shapes(config: BloomConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each of our parameters, layers first, by its path."""
    return {
        t.path: t.our_shape if t.layer is None else (config.num_layers, *t.our_shape)
        for t in tensors(config)
    }
