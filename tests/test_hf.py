"""Names, layouts and settings of transformers' BLOOM, against what is written out in hf_folders.py."""

import hf_folders
import numpy as np
import pytest

from bloomjax import hf
from bloomjax.errors import BadInput
from bloomjax.model import BloomConfig

CONFIG = BloomConfig(vocab_size=48, emb_dim=24, num_layers=3, num_heads=6)


def test_every_tensor_has_its_name_and_shape():
    found = {tensor.name: tensor.shape for tensor in hf.tensors(CONFIG)}
    assert found == hf_folders.shapes(**hf_folders.SMALL)
    assert len(found) == len(hf.tensors(CONFIG))


def test_each_parameter_is_covered_once():
    pieces: dict[tuple, list] = {}
    for tensor in hf.tensors(CONFIG):
        pieces.setdefault(tensor.path, []).append(tensor.layer)
    assert all(layers in ([None], [0, 1, 2]) for layers in pieces.values())
    sizes = {path: int(np.prod(shape)) for path, shape in hf.leaf_shapes(CONFIG).items()}
    assert sizes.keys() == pieces.keys()
    assert sum(sizes.values()) == sum(tensor.num_elements for tensor in hf.tensors(CONFIG))


def test_there_and_back():
    rng = np.random.default_rng(0)
    for tensor in hf.tensors(CONFIG):
        x = rng.normal(size=tensor.our_shape)
        y = tensor.to_hf(x)
        assert y.shape == tensor.shape and y.flags.c_contiguous
        np.testing.assert_array_equal(tensor.from_hf(y), x)
        if tensor.is_plain:
            np.testing.assert_array_equal(y, x)


def tensor(name):
    (found,) = (each for each in hf.tensors(CONFIG) if each.name == name)
    return found


def test_rows_of_query_key_value_are_interleaved_by_head():
    weight, bias = (tensor(f"h.1.self_attention.query_key_value.{x}") for x in ("weight", "bias"))
    D, H, K = 24, 6, 4
    kernel = np.arange(D * 3 * H * K).reshape(D, 3, H, K)
    vector = np.arange(3 * H * K).reshape(3, H, K)
    theirs, their_bias = weight.to_hf(kernel), bias.to_hf(vector)
    for head in range(H):
        for part in range(3):
            for k in range(K):
                row = (head * 3 + part) * K + k
                np.testing.assert_array_equal(theirs[row], kernel[:, part, head, k])
                assert their_bias[row] == vector[part, head, k]


def test_other_matrices_are_transposed():
    out = np.arange(6 * 4 * 24).reshape(6, 4, 24)
    np.testing.assert_array_equal(
        tensor("h.0.self_attention.dense.weight").to_hf(out), out.reshape(24, 24).T
    )
    mlp_in, mlp_out = np.arange(24 * 96).reshape(24, 96), np.arange(96 * 24).reshape(96, 24)
    np.testing.assert_array_equal(tensor("h.2.mlp.dense_h_to_4h.weight").to_hf(mlp_in), mlp_in.T)
    np.testing.assert_array_equal(tensor("h.2.mlp.dense_4h_to_h.weight").to_hf(mlp_out), mlp_out.T)


def test_masked_padding_rows_stay_behind():
    masked = BloomConfig(
        vocab_size=48, emb_dim=24, num_layers=1, num_heads=6, num_tokens_in_vocab=40,
        mask_padding_vocab=True,
    )  # fmt: skip
    assert hf.tensors(masked)[0].shape == (40, 24)
    assert hf.to_hf_config(masked, 32, "float32")["vocab_size"] == 40


def test_settings_there_and_back():
    ours = BloomConfig(
        vocab_size=48, emb_dim=24, num_layers=3, num_heads=6, layer_norm_epsilon=1e-6,
        init_std=0.0048, hidden_dropout_rate=0.1, attention_dropout_rate=0.2,
    )  # fmt: skip
    found = hf.from_hf_config(hf.to_hf_config(ours, 77, "bfloat16"), "config.json")
    assert found == (ours, 77)


def test_old_and_new_keys_mean_the_same():
    new = hf.from_hf_config(hf_folders.config(), "config.json")
    assert new == hf.from_hf_config(hf_folders.legacy_config(), "config.json")
    assert new[0].emb_dim == 24 and new[0].num_heads == 6 and new[1] == 32
    # transformers, too: n_embed wins.
    both = hf_folders.config(n_embed=24, hidden_size=64)
    assert hf.from_hf_config(both, "config.json") == new


def test_a_model_that_bloom_cannot_be():
    narrow = BloomConfig(vocab_size=48, emb_dim=24, num_layers=3, num_heads=6, mlp_dim=64)
    with pytest.raises(BadInput, match="mlp_dim = 4 . emb_dim = 96, this model has 64"):
        hf.to_hf_config(narrow, 32, "float32")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "is no BLOOM: its model_type is 'gpt2'"),
        ({"model_type": None}, "is no BLOOM: its model_type is None"),
        ({"n_layer": None}, "has no n_layer or num_hidden_layers"),
        ({"hidden_size": None}, "has no n_embed or hidden_size"),
        ({"n_layer": "3"}, "n_layer must be a whole number below 2.24, it is '3'"),
        ({"n_layer": True}, "n_layer must be a whole number below 2.24, it is True"),
        ({"n_layer": 3.5}, "n_layer must be a whole number"),
        ({"n_layer": 10**30}, "n_layer must be a whole number below 2.24"),
        ({"n_layer": float("inf")}, "n_layer must be a whole number"),
        ({"n_layer": float("nan")}, "n_layer must be a whole number"),
        ({"n_layer": [3]}, "n_layer must be a whole number"),
        ({"n_layer": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -48}, "vocab_size must be at least 1"),
        ({"seq_length": 0}, "seq_length must be above 0, it is 0"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be above 0, it is -1e-05"),
        ({"n_head": 5}, "num_heads=5 does not divide emb_dim=24"),
        ({"n_head": 6, "num_attention_heads": 8}, "contradicts itself"),
        ({"n_inner": 100}, "n_inner 100 is not 4 . 24"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be a number"),
        ({"hidden_dropout": 1.5}, "hidden_dropout_rate must lie in"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm is not supported"),
        ({"apply_residual_connection_post_layernorm": 1}, "must be a truth value"),
        ({"eos_token_id": 7}, "eos_token_id is 7; BLOOM's is 2"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(BadInput, match=message) as error:
        hf.from_hf_config(hf_folders.config(**changes), "x/config.json")
    assert str(error.value).startswith("x/config.json") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], "bloom", 3, None])
def test_settings_that_are_no_object(value):
    with pytest.raises(BadInput, match="is no JSON object"):
        hf.from_hf_config(value, "config.json")
