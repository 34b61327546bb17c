"""Words, tokens and bytes counted by hand; bits per byte and epochs by definition; warnings at their limits."""

import contextlib
import dataclasses
import io
import math
import re
import types

import numpy as np
import pytest
import tiny_run

from bloomjax import language_report, token_store, vocabulary
from bloomjax.errors import BadInput
from bloomjax.language_report import LanguageRow, bits_per_byte, with_warnings
from bloomjax.metrics import EventFileWriter, MetricsFile
from bloomjax.objectives import CausalLM, InputsTargets, PrefixLM, SpanCorruption
from bloomjax.phases import PhasedMixture, Stretch
from bloomjax.screen import print_losses
from bloomjax.vocabulary_report import Counts, Meter, count_words, measure

# ---- words ----


@pytest.mark.parametrize(
    "text, words, of_them_single_letters",
    [
        ("", 0, 0),
        (" \n.,;-- !", 0, 0),
        ("The river, 12 boats and a quay.", 7, 0),
        ("can't re-read x_1", 6, 0),  # punctuation ends a word
        ("e\u0301te\u0301 na\u00efve", 2, 0),  # a combining mark does not
        (
            "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
            2,
            0,
        ),  # Hindi, vowel signs
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1, 0),  # Persian, a joiner inside
        ("\u200c \u200d", 0, 0),
        ("\u6211\u7231\u5317\u4eac\u3002OK 12", 6, 4),  # Han: each character
        ("\u304b\u30ab\u3099", 2, 2),  # kana, the second with a voicing mark
        ("\u0e01\u0e34\u0e19", 2, 2),  # Thai: two letters, one vowel mark
        ("\u1780\u17b6", 1, 1),  # Khmer: a letter and its vowel
        ("\U00020000\U0001f600", 1, 1),  # Han beyond 16 bits; an emoji is no word
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", 2, 0),  # Korean has spaces
    ],
)
def test_words_counted_by_hand(text, words, of_them_single_letters):
    assert count_words(text) == (words, of_them_single_letters)


def test_words_against_another_engine():
    """The `regex` package knows the categories and scripts of Unicode by name."""
    regex = pytest.importorskip("regex")
    unspaced = (
        r"[\p{L}\p{Nl}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\u30fc]]"
    )
    word = regex.compile(
        rf"(?V1){unspaced}\p{{M}}*|(?:(?!{unspaced})[\p{{L}}\p{{M}}\p{{N}}])"
        rf"(?:(?!{unspaced})[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d])*"
    )
    from bloomjax.tasks.demo import CORPUS

    paths = sorted(CORPUS.glob("*.txt"))
    assert len(paths) >= 46
    for path in paths:
        text = path.read_text()[:1500]
        assert count_words(text)[0] == len(word.findall(text)), path.name
    english = (CORPUS / "en.txt").read_text()
    assert count_words(english) == (len(re.findall(r"[A-Za-z0-9]+", english)), 0)


# ---- a vocabulary on text ----


@pytest.fixture(scope="module", params=[".json", ".model"])
def vocab(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / f"v{request.param}"
    return vocabulary.TRAINERS[request.param](
        ["river boat river boat \u00e9\u00e9\u00e9"] * 5, path, 270
    )


def test_every_token_stands_for_its_bytes(vocab):
    """Decoded alone, wherever that is possible; and over whole texts, cut anywhere."""
    meter = Meter(vocab)
    assert meter.token_bytes[:4].tolist() == [0, 0, 0, 0] and (meter.token_bytes[4:] > 0).all()
    for i in range(4, vocab.size):
        text = vocab.decode([i])
        assert meter.token_bytes[i] == (1 if "\ufffd" in text else len(text.encode())), i
    text = "river \u00e9\u4f60 boat\n\tx\u2581 </s>"
    ids = vocab.encode(text)
    for cut in range(len(ids) + 1):
        if "\ufffd" not in (head := vocab.decode(ids[:cut])):
            assert meter.token_bytes[ids[:cut]].sum() == len(head.encode())


def test_counts_by_hand(vocab):
    """'river' and 'boat' were learnt, the Chinese character has three bytes and no piece."""
    found = Meter(vocab).count(["river \u4f60", "\u00e9\n"])
    ids = [*vocab.encode("river \u4f60"), *vocab.encode("\u00e9\n")]
    assert (found.num_documents, found.num_characters, found.num_bytes) == (2, 9, 6 + 3 + 2 + 1)
    assert (found.num_words, found.num_unspaced_words) == (3, 1)
    assert found.num_tokens == len(ids)
    assert found.num_broken_characters == 1 and found.unknown_rate == 1 / 9
    assert found.bytes_per_token == 12 / len(ids) and found.tokens_per_word == len(ids) / 3
    # Three bytes of the character and the newline, where pieces are not made of bytes anyway.
    is_sentencepiece = vocab.path.suffix == ".model"
    assert found.num_byte_tokens == (4 if is_sentencepiece else 0)
    assert found.byte_token_rate == found.num_byte_tokens / len(ids)
    assert not found.words_are_characters


def test_a_character_in_two_pieces_is_broken_once(vocab, monkeypatch):
    meter = Meter(vocab)
    monkeypatch.setattr(type(vocab), "encode_batch", lambda self, texts: [[4, 5, 6, 7]])
    meter.token_bytes[4:8] = [1, 1, 2, 2]  # of 'a', a character of four bytes and 'z'
    assert meter.count(["a\U0001f600z"]).num_broken_characters == 1
    meter.token_bytes[4:8] = [3, 1, 1, 1]  # the second and the third are cut
    assert meter.count(["\u00e9\u00e9\u00e9"]).num_broken_characters == 2
    meter.token_bytes[4:8] = [2, 2, 1, 1]
    assert meter.count(["\u00e9\u00e9\u00e9"]).num_broken_characters == 1
    meter.token_bytes[4:8] = [1, 2, 2, 1]
    assert meter.count(["\u00e9\u00e9\u00e9"]).num_broken_characters == 3


def test_a_vocabulary_that_changes_text_is_refused(vocab, monkeypatch):
    meter = Meter(vocab)
    monkeypatch.setattr(type(vocab), "encode_batch", lambda self, texts: [[] for _ in texts])
    with pytest.raises(BadInput, match=r"does not keep the text as it is .*: 'river'\.\.\."):
        meter.count(["river"])


def test_measuring_adds_up(vocab):
    texts = [f"river {number} boat" for number in range(600)] + [""]
    once, twice = measure(iter(texts), [Meter(vocab), Meter(vocab)])
    assert once == twice and once.num_documents == 601
    assert once.num_tokens == sum(len(vocab.encode(text)) for text in texts)
    assert once == sum((Meter(vocab).count([text]) for text in texts), Counts())
    assert measure([], [Meter(vocab)]) == [Counts()]
    assert Counts().tokens_per_word is None and Counts().bytes_per_token is None


# ---- a store and a mixture ----


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    texts = {
        "aa": [f"river {number} boat" for number in range(60)],
        "bb": [f"\u4f60\u597d{number}" for number in range(60)],
    }
    vocab = vocabulary.train_sentencepiece(sum(texts.values(), []), folder / "v.model", 290)
    made = token_store.write_store(folder / "tokens", texts, vocab, holdout_fraction=0.25)
    return types.SimpleNamespace(store=made, texts=texts, vocab=vocab)


def test_bits_per_byte_is_the_code_length_of_the_text(store):
    """A model that gives each token the probability 1/2 needs a bit a token, whatever the vocabulary."""
    assert bits_per_byte(math.log(2), 30, 60) == pytest.approx(0.5, rel=1e-15)
    losses = {"bb": math.log(2), "aa": 3 * math.log(2)}
    sources = {name: (store.store, name) for name in store.texts}
    found = language_report.held_out_bits_per_byte(losses, sources)
    assert list(found) == ["bb", "aa"]
    for name, bits_per_token in (("aa", 3), ("bb", 1)):
        held_out = store.texts[name][-15:]
        num_tokens = sum(len(store.vocab.encode(text)) + 1 for text in held_out)  # and </s>
        num_bytes = len("".join(held_out).encode())
        assert found[name] == pytest.approx(bits_per_token * num_tokens / num_bytes, rel=1e-12)


def mixture(store, stretches, block_tokens=8):
    num_tokens = {name: store.store.num_tokens(name, "train") for name in store.texts}
    return PhasedMixture(stretches, num_tokens, seed=1, block_tokens=block_tokens)


def test_tokens_and_epochs_against_every_sample(store):
    """Counted sample by sample, over a phase with other shares and another length."""
    mixed = mixture(
        store,
        [Stretch(0, {"aa": 0.75, "bb": 0.25}, 4), Stretch(40, {"aa": 0.5, "bb": 0.5}, 8)],
        block_tokens=32,
    )
    sources = {name: (store.store, name) for name in store.texts}
    for num_samples in (0, 1, 40, 41, 333):
        source, _, _ = mixed.locate(np.arange(num_samples))
        lengths = np.where(np.arange(num_samples) < 40, 4, 8)
        seen = mixed.tokens_by_source(num_samples)
        epochs = language_report.epochs_seen(mixed, sources, num_samples)
        shares = language_report.declared_shares(mixed, num_samples)
        assert sum(seen.values()) == mixed.tokens_after(num_samples)
        for number, name in enumerate(mixed.names):
            assert seen[name] == lengths[source == number].sum()
            num_blocks = (store.store.num_tokens(name, "train") - 1) // 32
            assert epochs[name] == pytest.approx(seen[name] / (32 * num_blocks), rel=1e-12)
            assert shares[name] * sum(seen.values()) == pytest.approx(seen[name], abs=16)
    assert language_report.declared_shares(mixed, 0) == {"aa": 0.75, "bb": 0.25}
    assert language_report.declared_shares(mixed, 80)["aa"] == pytest.approx((3 / 4 + 2 / 2) / 3)


def test_one_epoch_is_every_window_once(store):
    one = mixture(store, [Stretch(0, {"aa": 1.0}, 8)])
    num_windows = store.store.num_windows("aa", "train", 8)
    sources = {"aa": (store.store, "aa")}
    assert language_report.epochs_seen(one, sources, num_windows) == {"aa": 1.0}
    assert len(set(one.locate(np.arange(num_windows))[2].tolist())) == num_windows


def test_what_an_evaluation_records(store):
    mixed = mixture(store, [Stretch(0, {"aa": 0.75, "bb": 0.25}, 8)])
    sources = {name: (store.store, name) for name in store.texts}
    losses = {"aa": 2.0, "bb": 4.0}
    found = language_report.at_evaluation(losses, mixed, sources, 100, CausalLM())
    bits = language_report.held_out_bits_per_byte(losses, sources)
    assert found["bits_per_byte_by_language"] == bits
    assert found["validation_bits_per_byte"] == pytest.approx((bits["aa"] + bits["bb"]) / 2)
    epochs = language_report.epochs_seen(mixed, sources, 100)
    assert found["epochs_by_language"] == pytest.approx(epochs, abs=1e-6)
    lines = language_report.markdown_table(
        {"loss_by_language": losses, **found}, mixed.shares
    ).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    worst = max(bits, key=lambda name: bits[name])
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        worst, f"{mixed.shares[worst]:.4%}", f"{epochs[worst]:.3f}",
        f"{losses[worst]:.3f}", f"{bits[worst]:.3f}",
    ]  # fmt: skip


def test_bits_per_byte_are_of_tokens_of_the_text_alone(store):
    mixed = mixture(store, [Stretch(0, {"aa": 0.75, "bb": 0.25}, 8)])
    sources = {name: (store.store, name) for name in store.texts}
    losses = {"aa": 2.0, "bb": 4.0}
    with_bits = language_report.at_evaluation(losses, mixed, sources, 100, PrefixLM())
    assert with_bits["bits_per_byte_by_language"]  # a target is a token from what is before it
    for objective in (InputsTargets(), SpanCorruption(40, 8), PrefixLM(targets_only=False)):
        found = language_report.at_evaluation(losses, mixed, sources, 100, objective)
        assert found == {"epochs_by_language": with_bits["epochs_by_language"]}
        table = language_report.markdown_table(
            {"loss_by_language": losses, **found}, mixed.shares
        ).splitlines()
        assert [line.count("|") for line in table] == [5] * 4 and "bits" not in table[0]
        assert table[2].startswith("| bb |") and table[2].endswith("| 4.000 |")


def test_rows_of_a_store(store):
    sources = {name: (store.store, name) for name in store.texts}
    described = {"aa": ("Aaish", "Latn"), "bb": ("Beeish", "Hani")}
    found = language_report.rows(
        {"aa": 1.0}, described, sources=sources, vocabulary=store.vocab, epochs={"aa": 2.5}
    )
    assert [row.language for row in found] == ["aa", "bb"]
    total = sum(store.store.num_tokens(name, "train") for name in sources)
    for row in found:
        texts = store.texts[row.language][:45]
        ids = [store.vocab.encode(text) for text in texts]
        assert row.tokens == sum(map(len, ids)) + 45
        assert row.share_in_store == row.tokens / total
        assert row.bytes_per_token == len("".join(texts).encode()) / row.tokens
        words = sum(count_words(text)[0] for text in texts)
        assert row.fertility == pytest.approx(sum(map(len, ids)) / words, rel=1e-12)
    assert found[0].epochs == 2.5 and found[0].warnings == ()
    assert [row.words_are_characters for row in found] == [False, True]
    assert (found[1].share_declared, found[1].epochs) == (0.0, 0.0)
    assert found[1].warnings == ("in the store, not in the mixture",)
    # A sample ends where it ends, in the middle of a document.
    fertility, _ = language_report.sample_fertility(store.store, store.vocab, "aa", 40)
    assert fertility == pytest.approx(found[0].fertility, rel=0.3)
    without = language_report.rows({"aa": 0.25, "bb": 0.75}, {})
    assert [row.language for row in without] == ["bb", "aa"]
    assert {row.tokens for row in without} == {row.name for row in without} == {None}


# ---- warnings ----


def row(language="xx", **fields):
    return LanguageRow(
        language, None, fields.pop("script", None), fields.pop("share", 0.1), **fields
    )


def warned(*found):
    return [row.warnings for row in with_warnings(found)]


def test_warning_of_epochs():
    assert warned(row(epochs=4.0), row(epochs=4.01), row(epochs=None)) == [(), ("4.0 epochs",), ()]


def test_warning_of_a_script_counts_all_its_languages():
    rare, half = row(script="Gujr", share=0.0009), row(script="Deva", share=0.0005)
    assert warned(rare, half, half, row(share=1e-9)) == [
        ("script Gujr has 0.090% of the tokens",), (), (), (),
    ]  # fmt: skip


def test_warning_of_fertility_leaves_out_languages_without_spaces():
    ordinary = [row(fertility=2.0)] * 4
    chinese = row(fertility=9.0, words_are_characters=True)
    assert warned(*ordinary, row(fertility=4.0), row(fertility=4.2), chinese)[4:] == [
        (), ("fertility 2.1x the median",), (),
    ]  # fmt: skip
    assert warned(row(fertility=None)) == [()]
    both = dataclasses.replace(row(fertility=4.2), epochs=5.0)
    assert len(warned(*ordinary, both)[-1]) == 2


# ---- a run ----


@pytest.fixture(scope="module")
def finished(tiny_text, tmp_path_factory):
    """A run of 4 steps of 8 samples: its text, its folder and what it printed."""
    model_dir = tmp_path_factory.mktemp("run") / "model"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = tiny_run.run(
            tiny_text, model_dir, train_steps=4, eval_every_steps=2, writer=EventFileWriter
        )
    assert code == 0
    return tiny_text, model_dir, printed.getvalue()


def test_each_evaluation_of_a_run_has_bits_per_byte(finished):
    text, model_dir, printed = finished
    evaluations = [r for r in tiny_run.records(model_dir) if "loss_by_language" in r]
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    for record in evaluations:
        bits = record["bits_per_byte_by_language"]
        assert list(bits) == list(record["loss_by_language"]) == ["aa", "bb", "cc"]
        for name, found in bits.items():
            held_out = text.documents[name][-2:]  # 5 % of 40
            num_tokens = sum(len(text.vocabulary.encode(each)) + 1 for each in held_out)
            num_bytes = len("".join(held_out).encode())
            nats = record["loss_by_language"][name] * num_tokens
            assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)
        assert record["validation_bits_per_byte"] == pytest.approx(np.mean(list(bits.values())))
        # Shares are those of the store, so all languages are in the same epoch.
        num_tokens = sum(text.store.num_tokens(name, "train") for name in bits)
        for epochs in record["epochs_by_language"].values():
            assert epochs == pytest.approx(record["tokens"] / num_tokens, rel=0.15, abs=1e-6)
    first, last = (evaluations[i]["validation_bits_per_byte"] for i in (0, -1))
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("all languages: "))
    assert lines[at + 1] == f"bits per byte, mean over languages: {first:.3f} -> {last:.3f}"


def test_tensorboard_shows_the_table(finished):
    from tensorboardX.proto.event_pb2 import Event

    _, model_dir, _ = finished
    (path,) = model_dir.glob("events.*")
    data, at, scalars, texts = path.read_bytes(), 0, {}, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 12 + size + 4  # length, its checksum, record, its checksum
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
            texts[value.tag, event.step] = b"".join(value.tensor.string_val).decode()
    for record in tiny_run.records(model_dir):
        step = record["step"]
        for key in ("loss_by_language", "bits_per_byte_by_language", "epochs_by_language"):
            for name, x in record.get(key, {}).items():
                assert scalars[f"{key}/{name}", step] == pytest.approx(x, rel=1e-6)
        if "loss_by_language" in record:
            bits = record["validation_bits_per_byte"]
            assert scalars["validation_bits_per_byte", step] == pytest.approx(bits, rel=1e-6)
            table = texts["languages/text_summary", step].splitlines()
            assert len(table) == 2 + 3 and "bits per byte" in table[0]
            worst = max(record["bits_per_byte_by_language"].values())
            assert f"| {worst:.3f} |" in table[2]


def test_records_of_earlier_versions_can_be_printed(tmp_path, capsys):
    metrics = MetricsFile(tmp_path)
    metrics.write({"step": 0, "loss_by_language": {"aa": 5.0}, "validation_loss": 5.0})
    metrics.write(
        {"step": 1, "loss_by_language": {"aa": 4.0}, "validation_loss": 4.0}
        | {"validation_bits_per_byte": 1.0}
    )
    print_losses(metrics)
    assert capsys.readouterr().out.splitlines()[-1] == "all languages: 5.000 -> 4.000 (20% lower)"
