"""BLOOM: embedding -> LayerNorm -> pre-LN blocks with ALiBi -> LayerNorm -> tied logits; or with other positions,
activations and heads, as BloomConfig has them.

Linen declares parameters, initializers and logical axes; what is computed stands in functions of arrays.
Dimension key: B batch, L query length, S key length, V vocabulary, D emb_dim, H heads, K head_dim, F mlp_dim,
c the three of q, k, v. Arrays end in their letters.
"""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bloomjax import partitioning
from bloomjax.activations import Activation, Gelu
from bloomjax.attention import ALIBI_ROUNDINGS, document_numbers
from bloomjax.attention_kernels import attend, check_kernel
from bloomjax.cached_attention import cached, cached_attention
from bloomjax.dense import Dense
from bloomjax.embedding import Table, embed
from bloomjax.errors import BadInput
from bloomjax.layers import Dropout, LayerNorm
from bloomjax.mup import MuP, widths_of
from bloomjax.partitioning import constrain_activation, gather_length, scatter_length
from bloomjax.positions import Alibi, Places, Positions

# What a layer keeps for its backward pass. `minimal` keeps the results of matmuls and the residual streams (20 D bytes
# a token and layer in bf16) and recomputes norms and GELU; `full` keeps the layer's input only; `none` keeps all but
# the weights gathered over `fsdp`, which would stay on every device.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),
    "minimal": jax.checkpoint_policies.save_only_these_names(
        "qkv", "context", "residual", "pre_activation"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BloomConfig:
    """Shape and numerics of a BLOOM.

    Attributes:
      vocab_size: rows of the embedding, padding rows included (250,880 for BLOOM's 250,680 tokens).
      num_tokens_in_vocab: tokens the vocabulary has; only needed by mask_padding_vocab.
      mask_padding_vocab: give padding rows no probability. BLOOM and transformers do not.
      mlp_dim: None means 4 * emb_dim, or what keeps a gated activation at as many parameters.
      positions: an object of positions.py. activation: one of activations.py.
      embedding_norm: a LayerNorm behind the embedding.
      tied_head: the embedding is also the output matrix; False gives that a table of its own.
      dtype: of the compute ("bfloat16" or "float32"); parameters are always float32.
      gradient_dtype: in which the layers' weight gradients are summed over devices and microbatches; "bfloat16" sends
        and keeps half the bytes.
      matmul_dtype: of the operands of the blocks' four matrix products and their gradients; None for `dtype`, "float8"
        for 8 bits with a scale a tensor (see float8.py), which `float8.check_devices` has to allow.
      init_std: of all matrices; the two that write to the residual stream use init_std / sqrt(2 num_layers).
      mup: the base whose hyperparameters these are, scaled to this width (see mup.py); None takes them as they are.
      hidden_dropout_rate: on the embedding and on both residual branches. attention_dropout_rate: on the probabilities.
      attention_kernel: a name of attention_kernels.KERNELS; "auto" takes that of the platform.
      skip_far_blocks: let kernels leave out keys that ALiBi puts out of float32's reach (see block_skipping).
      document_end_id: the token that ends a document, 2 for BLOOM's </s>: attention then does not look beyond it. None
        for BLOOM's own way, where a window is one text. Decoding does not ask: a prompt is one document.
      alibi_rounding: "exact", or "bf16_hf" for comparisons with transformers in bfloat16 (see attention.alibi_scores).
      remat_policy: a name of REMAT_POLICIES.
      scan_layers: compile one layer and loop over it; False unrolls (faster steps, slower compile). Same parameters.
      expected_params: refused if the parameter count differs; None does not check.
    """

    vocab_size: int
    num_layers: int
    emb_dim: int
    num_heads: int
    mlp_dim: int | None = None
    positions: Positions = Alibi()
    activation: Activation = Gelu()
    embedding_norm: bool = True
    tied_head: bool = True
    num_tokens_in_vocab: int | None = None
    mask_padding_vocab: bool = False
    dtype: str = "bfloat16"
    gradient_dtype: str = "float32"
    matmul_dtype: str | None = None
    init_std: float = 0.0048
    mup: MuP | None = None
    layer_norm_epsilon: float = 1e-5
    hidden_dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention_kernel: str = "auto"
    skip_far_blocks: bool = True
    document_end_id: int | None = None
    alibi_rounding: str = "exact"
    remat_policy: str = "none"
    scan_layers: bool = True
    expected_params: int | None = None

    def __post_init__(self):
        sizes = "vocab_size", "num_layers", "emb_dim", "num_heads", "mlp_dim"
        for name in (*sizes, "num_tokens_in_vocab"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        for name in ("hidden_dropout_rate", "attention_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if (self.num_tokens_in_vocab or 0) > self.vocab_size:
            raise BadInput(
                f"num_tokens_in_vocab={self.num_tokens_in_vocab} is more than vocab_size={self.vocab_size}"
            )
        if self.emb_dim % self.num_heads:
            near = [n for n in range(1, self.emb_dim + 1) if self.emb_dim % n == 0]
            near = sorted(near, key=lambda n: abs(n - self.num_heads))[:2]
            raise BadInput(
                f"num_heads={self.num_heads} does not divide emb_dim={self.emb_dim}; near it "
                f"{' and '.join(map(str, sorted(near)))} do"
            )
        for name, there in (("remat_policy", REMAT_POLICIES), ("alibi_rounding", ALIBI_ROUNDINGS)):
            if getattr(self, name) not in there:
                raise BadInput(f"no {name} {getattr(self, name)!r}; there are: {', '.join(there)}")
        for name in ("dtype", "gradient_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                got = getattr(self, name)
                raise BadInput(f"{name} must be 'bfloat16' or 'float32', got {got!r}")
        if self.matmul_dtype not in (None, "float8"):
            raise BadInput(f"matmul_dtype must be None or 'float8', got {self.matmul_dtype!r}")
        if self.alibi_rounding == "bf16_hf" and self.dtype != "bfloat16":
            raise BadInput(f"alibi_rounding='bf16_hf' needs dtype='bfloat16', got {self.dtype!r}")
        if self.alibi_rounding != "exact" and self.positions.slopes(1, "exact") is None:
            raise BadInput(f"alibi_rounding={self.alibi_rounding!r} needs positions=@Alibi()")
        if self.mask_padding_vocab and self.num_tokens_in_vocab is None:
            raise BadInput("mask_padding_vocab needs num_tokens_in_vocab, how many tokens are real")
        check_kernel(self.attention_kernel)

    @property
    def head_dim(self) -> int:
        return self.emb_dim // self.num_heads

    @property
    def mlp_width(self) -> int:
        """mlp_dim, or what None stands for."""
        return self.mlp_dim or self.activation.default_mlp_dim(self.emb_dim)

    @property
    def shape(self) -> dict[str, int]:
        """What `flops` counts parameters and FLOPs of."""
        return {
            "vocab_size": self.vocab_size, "emb_dim": self.emb_dim, "num_layers": self.num_layers,
            "mlp_dim": self.mlp_width, "num_mlp_inputs": self.activation.num_inputs,
            "num_positions": self.positions.num_rows, "num_embedding_norms": int(self.embedding_norm),
            "num_vocab_tables": 1 if self.tied_head else 2,
        }  # fmt: skip

    @property
    def departures(self) -> dict[str, str]:
        """The parts of the architecture that are not BLOOM's."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        parts = "positions", "activation", "embedding_norm", "tied_head"
        return {name: str(values[name][0]) for name in parts if values[name][0] != values[name][1]}

    @property
    def num_valid_tokens(self) -> int | None:
        """From which column on logits are masked; None for nowhere."""
        return self.num_tokens_in_vocab if self.mask_padding_vocab else None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: BloomConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BLD, seen, start, k_valid_BS, turn):
        """`seen` is (documents_BL, last_key_BL), each or None. `start` and `k_valid_BS` belong to decoding with a cache
        (see decoding.py), `turn` to rotary positions."""
        c = self.config
        D, H, K, F = c.emb_dim, c.num_heads, c.head_dim, c.mlp_width
        widths = widths_of(c)
        std = widths.stds(c.init_std, c.num_layers)
        dropout = Dropout(c.hidden_dropout_rate, self.deterministic)
        matmul = functools.partial(
            Dense, gradient_dtype=c.gradient_dtype, is_float8=c.matmul_dtype == "float8"
        )

        h_BLD = LayerNorm(c.layer_norm_epsilon, name="attention_norm")(x_BLD)
        h_BLD = gather_length(h_BLD)
        qkv_BLcHK = matmul(
            "BLD,DcHK->BLcHK", ("embed", "qkv", "heads", "kv"), (D, 3, H, K), ("qkv", "heads", "kv"),
            std["qkv"], name="qkv",
        )(h_BLD)  # fmt: skip
        qkv_BLcHK = constrain_activation(qkv_BLcHK, "batch", "length", "qkv", "heads", "kv")
        # Not slices: the gradient of a split is one concatenation, that of slices a sum of three padded arrays. The
        # parts are kept: kernels want them apart, and would have them copied from the whole once more.
        q, k, v = (a.squeeze(2) for a in jnp.split(qkv_BLcHK, 3, axis=2))
        q, k = c.positions.rotate(q, k, turn)
        q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
        context_BLHK = self._attend(widths.scaled_query(q), k, v, seen, start, k_valid_BS)
        context_BLHK = constrain_activation(context_BLHK, "batch", "length", "heads", "kv")
        y_BLD = matmul(
            "BLHK,HKD->BLD", ("heads", "kv", "embed"), (H, K, D), ("norm",), std["out"], name="out"
        )(context_BLHK)
        y_BLD = scatter_length(y_BLD)
        x_BLD = checkpoint_name(x_BLD + dropout(y_BLD), "residual")

        h_BLD = LayerNorm(c.layer_norm_epsilon, name="mlp_norm")(x_BLD)
        h_BLD = gather_length(h_BLD)
        h_BLF = c.activation.mlp_in(matmul, h_BLD, F, std["mlp_in"])
        y_BLD = matmul(
            "BLF,FD->BLD", ("mlp", "embed"), (F, D), ("norm",), std["mlp_out"], name="mlp_out"
        )(h_BLF)
        y_BLD = scatter_length(y_BLD)
        return checkpoint_name(x_BLD + dropout(y_BLD), "residual"), None

    def _attend(self, q_BLHK, k_BLHK, v_BLHK, seen, start, k_valid_BS):
        c, (documents_BL, last_key_BL) = self.config, seen
        slopes_H = c.positions.slopes(c.num_heads, c.alibi_rounding)
        if k_valid_BS is None:
            rate = 0.0 if self.deterministic else c.attention_dropout_rate
            # For initial values any will do, and a kernel need not be where they are made: `plan` has no TPU.
            kernel = "xla" if self.is_initializing() else c.attention_kernel
            return attend(
                kernel, q_BLHK, k_BLHK, v_BLHK, slopes_H, documents_BL=documents_BL, last_key_BL=last_key_BL,
                rounding=c.alibi_rounding, dropout_rate=rate, skip_far_blocks=c.skip_far_blocks,
                dropout_rng=self.make_rng("dropout") if rate else None,
            )  # fmt: skip
        keys_BSHK, values_BSHK = cached(self, k_BLHK, v_BLHK, start, k_valid_BS.shape[1])
        return cached_attention(
            q_BLHK, keys_BSHK, values_BSHK, slopes_H, start=start, k_valid_BS=k_valid_BS,
            last_key_BL=last_key_BL, rounding=c.alibi_rounding,
        )  # fmt: skip


class Bloom(nn.Module):
    """The whole model: token ids to final hidden states, and hidden states to logits."""

    config: BloomConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.init_std), ("vocab", "embed"))
        shape = (c.vocab_size, c.emb_dim)
        self.embedding_VD: Any = self.param("embedding", init, shape, jnp.float32)
        if c.embedding_norm:
            self.embedding_norm = LayerNorm(c.layer_norm_epsilon)
        if not c.tied_head:
            self.head = Table(shape, ("vocab", "embed"), c.init_std)
        self.final_norm = LayerNorm(c.layer_norm_epsilon, widths_of(c).output_multiplier)

    @nn.compact
    def __call__(
        self, tokens_BL, *, deterministic: bool = True, start=None, k_valid_BS=None,
        documents_BL=None, last_key_BL=None,
    ):  # fmt: skip
        """Final hidden states [B, L, D] of int32 tokens. With `k_valid_BS` it decodes on the cache from `start` on.

        Without `documents_BL` those of config.document_end_id; `last_key_BL` as in `attention.xla_attention`.
        """
        c = self.config
        x_BLD = embed(c.dtype, self.embedding_VD, tokens_BL)
        x_BLD = self.embedding_norm(x_BLD) if c.embedding_norm else x_BLD
        if documents_BL is None and c.document_end_id is not None and k_valid_BS is None:
            documents_BL = document_numbers(tokens_BL, c.document_end_id)
        places = Places(tokens_BL.shape[1], documents_BL, start, k_valid_BS)
        word_std = 1.0 if c.embedding_norm else c.init_std
        x_BLD = c.positions.embed(x_BLD, places, init_std=c.init_std, word_std=word_std)
        x_BLD = Dropout(c.hidden_dropout_rate, deterministic)(x_BLD)
        x_BLD = constrain_activation(x_BLD, "batch", "residual_length", "embed")
        turn = c.positions.turn(places, c.head_dim)
        if self.is_initializing() and not c.tied_head:
            self.head()  # else not used before the logits
        block, broadcast = Block, cast(Any, nn.broadcast)
        if c.remat_policy != "none" or partitioning.on_mesh():
            policy = REMAT_POLICIES[c.remat_policy]
            # XLA must not take what is recomputed for what the forward pass had; in a loop it cannot. On one device it
            # may for the cast weights of unrolled layers: told apart, their float32 slices would be copied and kept.
            prevent_cse: Any = not c.scan_layers
            if prevent_cse and not partitioning.on_mesh():
                prevent_cse = (False, False) + (True,) * 5  # variables, random keys, arguments
            block = nn.remat(Block, policy=policy, prevent_cse=prevent_cse)
        x_BLD, _ = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0, "slots": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=broadcast,
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            c, deterministic, name="layers"
        )(x_BLD, (documents_BL, last_key_BL), start, k_valid_BS, turn)
        return gather_length(self.final_norm(x_BLD))

    def logits(self, x_BLD) -> jax.Array:
        """float32 logits [B, L, V] of final hidden states; for decoding and tests, training uses losses.py."""
        c = self.config
        w_VD = self.embedding_VD if c.tied_head else self.head()
        w_VD = w_VD.astype(x_BLD.dtype)
        logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, w_VD, preferred_element_type=jnp.float32)
        if c.num_valid_tokens is not None:
            valid_11V = (jnp.arange(c.vocab_size) < c.num_valid_tokens)[None, None]
            logits_BLV = jnp.where(valid_11V, logits_BLV, -jnp.inf)
        return logits_BLV
