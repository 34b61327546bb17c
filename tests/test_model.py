"""The model against float64 BLOOM, against transformers, and its options against each other."""

import dataclasses
import functools
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom
from reference_bloom import jit

from bloomjax import flops
from bloomjax.embedding import embed
from bloomjax.errors import BadInput
from bloomjax.losses import linear_cross_entropy
from bloomjax.model import Bloom, BloomConfig

B, L = 2, 17
SIX_HEADS = {"vocab_size": 96, "emb_dim": 48, "num_layers": 3, "num_heads": 6, "mlp_dim": 80}
FOUR_HEADS = SIX_HEADS | {"num_heads": 4}
F32 = BloomConfig(**SIX_HEADS, dtype="float32")

# L, h, heads and parameters of the released models: bigscience-workshop/bigscience,
# train/tr11-176B-ml/*.slurm and smaller_models/*.slurm; BLOOM's vocabulary is padded to 250,880.
PUBLISHED = {
    "560m": (24, 1024, 16, 559_214_592),
    "1b1": (24, 1536, 16, 1_065_314_304),
    "1b7": (24, 2048, 16, 1_722_408_960),
    "3b": (30, 2560, 32, 3_002_557_440),
    "7b1": (30, 4096, 32, 7_069_016_064),
    "176b": (70, 14336, 112, 176_247_271_424),
}


@functools.cache
def params_of(num_heads):
    return reference_bloom.random_params(**SIX_HEADS | {"num_heads": num_heads})


@functools.cache
def some_tokens():
    return np.random.default_rng(1).integers(0, SIX_HEADS["vocab_size"], (B, L + 1), np.int32)


@functools.partial(jit, static_argnums=0, static_argnames="deterministic")
def hidden(config, params, tokens, *, deterministic=True, key=None):
    rngs = None if key is None else {"dropout": key}
    return Bloom(config).apply({"params": params}, tokens, deterministic=deterministic, rngs=rngs)


@functools.partial(jit, static_argnums=0)
def logits(config, params, tokens):
    model = Bloom(config)
    x = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, x, method="logits")


@functools.cache
def compiled_gradient(config):
    def loss(params, tokens):
        x = Bloom(config).apply({"params": params}, tokens[:, :-1])
        weights = jnp.full((B, L), 1 / (B * L))
        return linear_cross_entropy(x, params["embedding"], tokens[:, 1:], weights)[0]

    return jit(jax.value_and_grad(loss)).lower(params_of(6), some_tokens()).compile()


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def assert_close(got, want, *, relative):
    """Every tensor within `relative` of the largest element of its counterpart."""
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = np.abs(got[name] - expected).max()
        assert error <= relative * np.abs(expected).max(), (name, error, np.abs(expected).max())


@pytest.mark.parametrize("num_heads", [4, 6])
def test_logits_equal_float64(num_heads):
    params = params_of(num_heads)
    config = dataclasses.replace(F32, num_heads=num_heads)
    got = logits(config, params, some_tokens()[:, :-1])
    want = reference_bloom.logits(reference_bloom.to_float64(params), some_tokens()[:, :-1])
    assert got.dtype == jnp.float32 and got.shape == (B, L, SIX_HEADS["vocab_size"])
    assert_close(got, want, relative=2e-6)


def test_loss_and_every_gradient_equal_float64():
    loss, grads = compiled_gradient(F32)(params_of(6), some_tokens())
    want_loss, want_grads = reference_bloom.loss_and_grads(params_of(6), some_tokens())
    assert float(loss) == pytest.approx(want_loss, rel=1e-6)
    assert min(np.abs(g).max() for g in jax.tree.leaves(want_grads)) > 1e-3
    assert_close(grads, want_grads, relative=5e-6)


def test_scan_unroll_and_remat_change_nothing():
    want_loss, want = compiled_gradient(F32)(params_of(6), some_tokens())
    for policy, scan in (("none", False), ("minimal", True), ("full", True)):
        config = dataclasses.replace(F32, remat_policy=policy, scan_layers=scan)
        loss, grads = compiled_gradient(config)(params_of(6), some_tokens())
        assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
        assert_close(grads, want, relative=3e-6)


@pytest.mark.slow
def test_bf16_hf_trains_with_scan_unroll_and_remat():
    """Gradients of three layers of 17 tokens: near those of float32, where the bias reaches 8 and rounds by 2^-6."""
    want_loss, want = compiled_gradient(F32)(params_of(6), some_tokens())
    bf16 = dataclasses.replace(F32, dtype="bfloat16")
    losses = []
    for change in (
        {},
        {"alibi_rounding": "bf16_hf"},
        {"alibi_rounding": "bf16_hf", "scan_layers": False, "remat_policy": "minimal"},
    ):
        config = dataclasses.replace(bf16, **change)
        loss, grads = compiled_gradient(config)(params_of(6), some_tokens())
        assert float(loss) == pytest.approx(float(want_loss), rel=2e-3)
        for path, gradient in leaves(grads).items():
            difference = np.linalg.norm(gradient - leaves(want)[path])
            assert difference <= 0.05 * np.linalg.norm(gradient), (change, path)
        losses.append(float(loss))
    assert losses[0] != losses[1]  # the option reaches attention


def test_remat_policies_keep_less_and_less():
    kept = {}
    for policy in ("none", "minimal", "full"):
        compiled = compiled_gradient(dataclasses.replace(F32, remat_policy=policy))
        kept[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert kept["full"] < kept["minimal"] < kept["none"], kept


def test_scan_compiles_one_layer():
    count = {}
    for scan in (True, False):
        config = dataclasses.replace(F32, scan_layers=scan)
        text = compiled_gradient(config).as_text()
        count[scan] = len(re.findall(r" tanh\(", text))
    assert 0 < F32.num_layers * count[True] <= count[False], count


def test_bf16_is_close_to_float32():
    config = dataclasses.replace(F32, dtype="bfloat16")
    tokens = some_tokens()[:, :-1]
    assert hidden(config, params_of(6), tokens).dtype == jnp.bfloat16
    got, want = (np.asarray(logits(c, params_of(6), tokens)) for c in (config, F32))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 1.5e-2  # 3 layers of about ten roundings of 2^-9 each, added in squares


def test_initial_values():
    shape = {"vocab_size": 512, "emb_dim": 64, "num_layers": 3, "num_heads": 4, "mlp_dim": 96}
    init = jit(Bloom(BloomConfig(**shape)).init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    tensors = leaves(params)
    stds = {
        "['embedding']": 0.0048,
        "['layers']['qkv']['kernel']": 0.0048,
        "['layers']['mlp_in']['kernel']": 0.0048,
        "['layers']['out']['kernel']": 0.0048 / 6**0.5,
        "['layers']['mlp_out']['kernel']": 0.0048 / 6**0.5,
    }
    assert {n for n in tensors if n.endswith("['kernel']") or "embedding']" in n} == stds.keys()
    for name, tensor in tensors.items():
        if name in stds:
            for layer in tensor if "layers" in name else [tensor]:
                assert layer.std() == pytest.approx(stds[name], rel=4 / np.sqrt(2 * layer.size))
                assert abs(layer.mean()) < 4 * stds[name] / np.sqrt(layer.size)
                assert np.abs(layer).max() > 3 * stds[name]  # normal, not cut off
        else:
            assert np.all(tensor == (1.0 if name.endswith("['scale']") else 0.0)), name
    kernel = tensors["['layers']['qkv']['kernel']"]
    assert np.abs(np.corrcoef(kernel.reshape(3, -1)) - np.eye(3)).max() < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def num_params(config):
    shapes = jax.eval_shape(Bloom(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "shape",
    [SIX_HEADS, FOUR_HEADS | {"mlp_dim": None}, {"vocab_size": 7, "emb_dim": 8, "num_layers": 1, "num_heads": 1}],
)  # fmt: skip
def test_number_of_parameters(shape):
    sizes = shape | {"mlp_dim": shape.get("mlp_dim") or 4 * shape["emb_dim"]}
    del sizes["num_heads"]
    assert num_params(BloomConfig(**shape)) == flops.num_params(**sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    num_layers, emb_dim, num_heads, published = PUBLISHED[name]
    started = time.thread_time()
    config = BloomConfig(
        vocab_size=250_880, num_layers=num_layers, emb_dim=emb_dim, num_heads=num_heads
    )
    assert num_params(config) == published
    assert time.thread_time() - started < 1  # shapes only, one layer traced


def test_deterministic_ignores_dropout_rates():
    config = dataclasses.replace(F32, hidden_dropout_rate=0.5, attention_dropout_rate=0.5)
    tokens = some_tokens()[:, :-1]
    np.testing.assert_array_equal(
        hidden(config, params_of(6), tokens), hidden(F32, params_of(6), tokens)
    )


@pytest.mark.parametrize("rate", ["hidden_dropout_rate", "attention_dropout_rate"])
def test_dropout_is_drawn_from_its_key(rate):
    config = dataclasses.replace(F32, **{rate: 0.1})
    draw = functools.partial(
        hidden, config, params_of(6), some_tokens()[:, :-1], deterministic=False
    )
    one, same, other = (np.asarray(draw(key=jax.random.key(n))) for n in (1, 1, 2))
    without = np.asarray(hidden(F32, params_of(6), some_tokens()[:, :-1]))
    assert np.all(one == same)
    for a, b in ((one, other), (one, without)):
        assert np.linalg.norm(a - b) > 0.05 * np.linalg.norm(without)


def test_hidden_dropout_covers_embedding_and_both_branches():
    """With a rate of almost 1 nothing of the three is left, and the last LayerNorm sees zeros."""
    config = dataclasses.replace(F32, hidden_dropout_rate=1.0 - 1e-9)
    x = hidden(config, params_of(6), some_tokens()[:, :-1], deterministic=False, key=jax.random.key(0))  # fmt: skip
    bias = params_of(6)["final_norm"]["bias"]
    np.testing.assert_allclose(x, np.broadcast_to(bias, x.shape), rtol=1e-6)


def test_every_layer_draws_its_own_dropout_mask():
    params = jax.tree.map(np.zeros_like, params_of(6))
    params["layers"]["mlp_out"]["bias"] += 1  # every layer adds mask / (1 - rate), nothing else
    params["final_norm"]["scale"] += 1
    config = dataclasses.replace(F32, hidden_dropout_rate=0.5)
    x = hidden(config, params, some_tokens()[:, :-1], deterministic=False, key=jax.random.key(0))
    num_kept = [len(np.unique(np.round(row, 4))) for row in np.asarray(x).reshape(-1, x.shape[-1])]
    assert max(num_kept) == 4  # 0, 1, 2 or 3 of 3 layers; one mask for all gives 2 values


def test_mask_padding_vocab():
    valid = 90
    masked = dataclasses.replace(F32, mask_padding_vocab=True, num_tokens_in_vocab=valid)
    unmasked = dataclasses.replace(F32, num_tokens_in_vocab=valid)
    assert (masked.num_valid_tokens, unmasked.num_valid_tokens) == (valid, None)
    tokens = some_tokens()[:, :-1]
    got, want = (np.asarray(logits(c, params_of(6), tokens)) for c in (masked, unmasked))
    np.testing.assert_array_equal(got[..., :valid], want[..., :valid])
    assert np.all(got[..., valid:] == -np.inf) and np.all(np.isfinite(want))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide emb_dim=48; near it 4 and 6 do"),
        ({"emb_dim": 50}, "num_heads=6 does not divide emb_dim=50; near it 2 and 5 do"),
        ({"remat_policy": "some"}, "no remat_policy 'some'; there are: none, minimal, full"),
        ({"dtype": "float16"}, "dtype must be 'bfloat16' or 'float32', got 'float16'"),
        ({"mask_padding_vocab": True}, "mask_padding_vocab needs num_tokens_in_vocab"),
        ({"attention_kernel": "cuda"}, "no attention kernel 'cuda'; there are: .*xla"),
        ({"alibi_rounding": "bf16"}, "no alibi_rounding 'bf16'; there are: exact, bf16_hf"),
        (
            {"alibi_rounding": "bf16_hf", "dtype": "float32"},
            "alibi_rounding='bf16_hf' needs dtype='bfloat16', got 'float32'",
        ),
    ],
)
def test_bad_configurations_are_refused_in_a_line(change, message):
    with pytest.raises(BadInput, match=message) as caught:
        BloomConfig(**SIX_HEADS | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_embedding_gradient_adds_equal_tokens_in_float32(mesh, mesh_of):
    """In bf16 a sum of ones stops at 256."""
    table = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 16, (8, 256), np.int32)
    tokens[:, :200] = 3

    def run():
        x, pull = jax.vjp(lambda t: embed("bfloat16", t, tokens), table)
        return x, pull(jnp.ones_like(x))[0]

    with jax.set_mesh(mesh_of(*mesh or (1, 1, 1))):
        x, gradient = jax.jit(run)()
    assert x.dtype == jnp.bfloat16 and gradient.dtype == jnp.float32
    np.testing.assert_array_equal(x, table.astype(jnp.bfloat16)[tokens])
    counts = np.bincount(tokens.ravel(), minlength=16)
    assert counts[3] >= 1600
    np.testing.assert_array_equal(gradient, np.repeat(counts[:, None], 8, 1).astype(np.float32))


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_logits_equal_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params, tokens = params_of(6), some_tokens()[:, :-1]
    D, H = F32.emb_dim, F32.num_heads
    # transformers has no mlp_dim: BLOOM's is 4 D, ours is filled up with units that do nothing.
    idle = 4 * D - SIX_HEADS["mlp_dim"]
    config = transformers.BloomConfig(
        vocab_size=F32.vocab_size, hidden_size=D, n_layer=F32.num_layers, n_head=H,
        layer_norm_epsilon=1e-5, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    theirs = transformers.BloomForCausalLM(config).eval()
    state = {
        "word_embeddings.weight": params["embedding"],
        "word_embeddings_layernorm.weight": params["embedding_norm"]["scale"],
        "word_embeddings_layernorm.bias": params["embedding_norm"]["bias"],
        "ln_f.weight": params["final_norm"]["scale"],
        "ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(F32.num_layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        qkv = p["qkv"]["kernel"].transpose(
            2, 1, 3, 0
        )  # D 3 H K -> H 3 K D, torch has outputs first
        layer = {
            "input_layernorm.weight": p["attention_norm"]["scale"],
            "input_layernorm.bias": p["attention_norm"]["bias"],
            "self_attention.query_key_value.weight": qkv.reshape(3 * D, D),
            "self_attention.query_key_value.bias": p["qkv"]["bias"].swapaxes(0, 1).reshape(-1),
            "self_attention.dense.weight": p["out"]["kernel"].reshape(D, D).T,
            "self_attention.dense.bias": p["out"]["bias"],
            "post_attention_layernorm.weight": p["mlp_norm"]["scale"],
            "post_attention_layernorm.bias": p["mlp_norm"]["bias"],
            "mlp.dense_h_to_4h.weight": np.pad(p["mlp_in"]["kernel"].T, ((0, idle), (0, 0))),
            "mlp.dense_h_to_4h.bias": np.pad(p["mlp_in"]["bias"], (0, idle)),
            "mlp.dense_4h_to_h.weight": np.pad(p["mlp_out"]["kernel"].T, ((0, 0), (0, idle))),
            "mlp.dense_4h_to_h.bias": p["mlp_out"]["bias"],
        }
        state |= {f"h.{i}.{name}": value for name, value in layer.items()}
    state = {f"transformer.{n}": torch.tensor(np.ascontiguousarray(v)) for n, v in state.items()}
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    assert_close(logits(F32, params, tokens), want, relative=2e-6)
