"""Each kind of position against another implementation, and what all must keep: causality, documents, the cache."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_bloom
from reference_bloom import jit

from bloomjax import preflight
from bloomjax.activations import SwiGlu
from bloomjax.decoding import generate, next_logits, pad_left
from bloomjax.embedding import head_table
from bloomjax.errors import BadInput
from bloomjax.model import Bloom, BloomConfig
from bloomjax.optimizer import decay_mask
from bloomjax.positions import (
    Alibi,
    LearnedPositions,
    NoPositions,
    Places,
    Rotary,
    SinusoidalPositions,
)

SHAPE = {"vocab_size": 40, "emb_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
END = 2  # in no text but that of documents
BLOOM = BloomConfig(**SHAPE, dtype="float32", document_end_id=END)
KINDS = {
    "none": NoPositions(),
    "learned": LearnedPositions(24),
    "sinusoidal": SinusoidalPositions(),
    "rotary": Rotary(),
    "part of rotary": Rotary(base=500.0, fraction=0.5),
    "alibi": Alibi(),
}
OF_KINDS = pytest.mark.parametrize("kind", KINDS)


def config_of(kind, **changes):
    return dataclasses.replace(BLOOM, positions=KINDS[kind], **changes)


@functools.cache
def params_of(config):
    """Random, biases too; scales around 1."""
    model = Bloom(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: (path[-1].key == "scale") + 0.15 * rng.standard_normal(a.shape, np.float32),
        nn.unbox(shapes),
    )


@functools.partial(jit, static_argnums=0)
def logits(config, params, tokens):
    x = Bloom(config).apply({"params": params}, tokens)
    return Bloom(config).apply({"params": params}, x, method="logits")


def some_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, 40, shape, np.int32)


def assert_near(got, want, relative=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= relative * np.abs(want).max()


@pytest.mark.parametrize("config", [
    *(config_of(kind) for kind in KINDS),
    config_of("rotary", activation=SwiGlu(), tied_head=False, embedding_norm=False),
], ids=[*KINDS, "with other parts"])  # fmt: skip
def test_a_token_changes_nothing_before_it(config):
    tokens = np.repeat(some_tokens(1, 12), 2, axis=0)
    tokens[1, 7] = (tokens[1, 7] + 1) % 40
    a, b = np.asarray(logits(config, params_of(config), tokens))
    np.testing.assert_array_equal(a[:7], b[:7])
    assert (np.abs(a[7:] - b[7:]).max(axis=1) > 1e-3).all()


def test_every_kind_computes_something_else():
    tokens = some_tokens(2, 12)
    found = {}
    for kind in KINDS:
        params = dict(params_of(config_of("none")))
        if kind == "learned":
            params["positions"] = params_of(config_of("learned"))["positions"]
        found[kind] = np.asarray(logits(config_of(kind), params, tokens))
    for a in KINDS:
        for b in KINDS:
            assert (a == b) == (np.abs(found[a] - found[b]).max() < 1e-3), (a, b)


def test_without_positions_one_layer_does_not_see_the_order():
    """Attention of one layer is a sum over the tokens before; two layers with a causal mask do."""
    tokens = np.repeat(some_tokens(1, 12), 2, axis=0)
    tokens[1, :11] = tokens[1, 10::-1]
    for num_layers in (1, 2):
        config = config_of("none", num_layers=num_layers)
        a, b = np.asarray(logits(config, params_of(config), tokens))[:, -1]
        assert (np.abs(a - b).max() < 1e-4) == (num_layers == 1)


@OF_KINDS
def test_documents_are_what_they_are_alone(kind):
    config = config_of(kind)
    rows = some_tokens(2, 12, seed=4)
    rows[0, 4] = END
    rows[1, :7] = rows[0, 5:]
    together, alone = np.asarray(logits(config, params_of(config), rows))
    assert_near(together[5:], alone[:7])
    assert np.abs(together[5:] - alone[5:]).max() > 1e-3


@OF_KINDS
def test_decoding_with_a_cache_is_the_whole_text(kind):
    """Three times four tokens; the second row is padded on the left by three."""
    config = config_of(kind)
    texts = some_tokens(2, 12, seed=1)
    tokens, valid = pad_left([texts[0].tolist(), texts[1, :9].tolist()])
    step = functools.partial(next_logits, Bloom(config))
    variables = {"params": params_of(config)}
    cache = jax.eval_shape(step, variables, tokens[:, :4], 0, valid)[1]
    cache, step = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), cache), jit(step)
    want = np.asarray(logits(config, params_of(config), texts))
    for start in (0, 4, 8):
        # What is not written yet counts as valid when text is generated.
        known = valid | (np.arange(12) >= start + 4)
        got, cache = step(variables | {"cache": cache}, tokens[:, start : start + 4], start, known)
        assert_near(got, [want[0, start + 3], want[1, start]])


@pytest.mark.slow
def test_scan_unroll_and_remat_change_no_gradient():
    config = config_of("rotary", activation=SwiGlu(), tied_head=False)

    def gradient(config):
        def loss(params):
            x = Bloom(config).apply({"params": params}, some_tokens(2, 12))
            return jnp.mean(jnp.square(x - head_table(params)[:12][None]))

        return jit(jax.grad(loss))(params_of(config))

    want = gradient(config)
    for policy, scan in (("minimal", False), ("full", True)):
        got = gradient(dataclasses.replace(config, remat_policy=policy, scan_layers=scan))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            near_zero = path[-1].key == "bias" and "qkv" in str(path)  # that of the keys is zero
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + near_zero * 1e-7, (policy, path)


def test_rotary_in_bfloat16_is_turned_in_float32():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 512, 2, 64), jnp.bfloat16)
    rotary = Rotary()
    got = rotary.rotate(q, k, rotary.turn(Places(512), 64))[0]
    angle = np.arange(512)[:, None] * 10_000.0 ** (-np.arange(32) / 32)
    q64 = np.asarray(q, np.float64)[0]
    turned = (q64[..., :32] + 1j * q64[..., 32:]) * np.exp(1j * angle)[:, None]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float64)[0] - want).max() <= 2**-8 * np.abs(want).max()


def test_sinusoidal_is_the_papers_formula():
    places = Places(50)
    x = jnp.zeros((2, 50, 12))
    got = SinusoidalPositions().embed(x, places, init_std=0.02, word_std=0.5)
    for position in (0, 1, 17, 49):
        for i in range(6):
            angle = position / 10_000 ** (2 * i / 12)
            np.testing.assert_allclose(got[1, position, 2 * i], 0.5 * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[0, position, 2 * i + 1], 0.5 * np.cos(angle), atol=1e-5)
    louder = SinusoidalPositions(amplitude=2.0).embed(x, places, init_std=0.02, word_std=0.5)
    np.testing.assert_allclose(louder, 4 * got, rtol=1e-6)


# ---- other implementations ----


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_a_whole_gpt_neox():
    """Rotary positions on half of the dimensions, a head of its own, no embedding LayerNorm."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    D, H, V, N = 32, 4, 40, 2
    theirs = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=N,
            num_attention_heads=H,
            intermediate_size=4 * D,
            hidden_act="gelu_new",
            rotary_pct=0.5,
            rotary_emb_base=10_000,
            use_parallel_residual=False,
            max_position_embeddings=64,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            tie_word_embeddings=False,
        )  # fmt: skip
    ).eval()
    config = BloomConfig(
        V, N, D, H, dtype="float32", positions=Rotary(fraction=0.5), embedding_norm=False, tied_head=False
    )  # fmt: skip
    params = jax.tree.map(np.copy, params_of(config))
    state = dict(theirs.state_dict())
    state["gpt_neox.embed_in.weight"] = params["embedding"]
    head = "embed_out" if "embed_out.weight" in state else "lm_head"
    state[f"{head}.weight"] = params["head"]["embedding"]
    state["gpt_neox.final_layer_norm.weight"] = params["final_norm"]["scale"]
    state["gpt_neox.final_layer_norm.bias"] = params["final_norm"]["bias"]
    for i in range(N):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        layer = {
            "input_layernorm.weight": p["attention_norm"]["scale"],
            "input_layernorm.bias": p["attention_norm"]["bias"],
            "post_attention_layernorm.weight": p["mlp_norm"]["scale"],
            "post_attention_layernorm.bias": p["mlp_norm"]["bias"],
            "attention.query_key_value.weight": p["qkv"]["kernel"]
            .transpose(2, 1, 3, 0)
            .reshape(3 * D, D),
            "attention.query_key_value.bias": p["qkv"]["bias"].swapaxes(0, 1).reshape(-1),
            "attention.dense.weight": p["out"]["kernel"].reshape(D, D).T,
            "attention.dense.bias": p["out"]["bias"],
            "mlp.dense_h_to_4h.weight": p["mlp_in"]["kernel"].T,
            "mlp.dense_h_to_4h.bias": p["mlp_in"]["bias"],
            "mlp.dense_4h_to_h.weight": p["mlp_out"]["kernel"].T,
            "mlp.dense_4h_to_h.bias": p["mlp_out"]["bias"],
        }
        state |= {f"gpt_neox.layers.{i}.{name}": value for name, value in layer.items()}
    tokens = some_tokens(2, 30)
    assert_near(logits(config, params, tokens), of_torch(torch, theirs, state, tokens), 2e-6)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_a_whole_gpt2():
    """Learned positions, no embedding LayerNorm."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    D, H, V, N, L = 32, 4, 40, 2, 30
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_embd=D,
            n_layer=N,
            n_head=H,
            n_positions=L,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )  # fmt: skip
    ).eval()
    config = BloomConfig(
        V, N, D, H, dtype="float32", positions=LearnedPositions(L), embedding_norm=False
    )
    params = params_of(config)
    state = dict(theirs.state_dict())
    state["transformer.wte.weight"] = state["lm_head.weight"] = params["embedding"]
    state["transformer.wpe.weight"] = params["positions"]["embedding"]
    state["transformer.ln_f.weight"] = params["final_norm"]["scale"]
    state["transformer.ln_f.bias"] = params["final_norm"]["bias"]
    for i in range(N):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        layer = {
            "ln_1.weight": p["attention_norm"]["scale"],
            "ln_1.bias": p["attention_norm"]["bias"],
            "ln_2.weight": p["mlp_norm"]["scale"],
            "ln_2.bias": p["mlp_norm"]["bias"],
            "attn.c_attn.weight": p["qkv"]["kernel"].reshape(D, 3 * D),
            "attn.c_attn.bias": p["qkv"]["bias"].reshape(-1),
            "attn.c_proj.weight": p["out"]["kernel"].reshape(D, D),
            "attn.c_proj.bias": p["out"]["bias"],
            "mlp.c_fc.weight": p["mlp_in"]["kernel"],
            "mlp.c_fc.bias": p["mlp_in"]["bias"],
            "mlp.c_proj.weight": p["mlp_out"]["kernel"],
            "mlp.c_proj.bias": p["mlp_out"]["bias"],
        }
        state |= {f"transformer.h.{i}.{name}": value for name, value in layer.items()}
    tokens = some_tokens(2, L)
    assert_near(logits(config, params, tokens), of_torch(torch, theirs, state, tokens), 2e-6)


def of_torch(torch, model, state, tokens):
    state = {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(torch.tensor(tokens.astype(np.int64))).logits.numpy()


# ---- what is refused, and what belongs to them ----


def test_more_tokens_than_learned_positions_are_refused():
    config = config_of("learned")
    message = "max_length=24 positions are learned, 25 tokens need more"
    with pytest.raises(BadInput, match=message):
        logits(config, params_of(config), some_tokens(1, 25))
    with pytest.raises(BadInput, match=message):
        generate(Bloom(config), params_of(config), [[3] * 20], max_new_tokens=5, eos_id=END)
    assert (
        len(generate(Bloom(config), params_of(config), [[3] * 20], max_new_tokens=4, eos_id=40)[0])
        == 4
    )


def test_a_run_with_too_few_positions_is_refused_before_it_starts(mesh_of):
    preflight.check_model(Bloom(config_of("learned")), mesh_of(1, 1, 1), [24])
    with pytest.raises(BadInput, match="32 tokens need more"):
        preflight.check_model(Bloom(config_of("learned")), mesh_of(1, 1, 1), [16, 32])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedPositions(0), "max_length must be at least 1, got 0"),
        (lambda: Rotary(fraction=1.5), "0 < fraction <= 1; got 10000.0, 1.5"),
        (lambda: Rotary(base=1.0), "base > 1"),
        (lambda: Rotary(fraction=0.4).turn(Places(3), 8), "fraction=0.4 of head_dim=8 is 3, which must be even"),
        (lambda: config_of("rotary", dtype="bfloat16", alibi_rounding="bf16_hf"), "needs positions=@Alibi()"),
    ],
)  # fmt: skip
def test_bad_positions(make, message):
    with pytest.raises(BadInput) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_position_table_and_head_are_decayed_as_embeddings():
    config = config_of("learned", tied_head=False)
    mask = decay_mask(params_of(config))
    assert mask["positions"]["embedding"] and mask["head"]["embedding"] and mask["embedding"]
    assert not mask["final_norm"]["scale"]
    assert params_of(config)["positions"]["embedding"].shape == (24, 32)


def test_the_default_is_bloom():
    assert BloomConfig(**SHAPE).departures == {}
    names = set(params_of(BLOOM))
    assert names == {"embedding", "embedding_norm", "layers", "final_norm"}
    tokens = some_tokens(2, 17)
    params = reference_bloom.random_params(**SHAPE)
    want = reference_bloom.logits(reference_bloom.to_float64(params), tokens)
    assert_near(logits(BLOOM, params, tokens), want, 2e-6)
