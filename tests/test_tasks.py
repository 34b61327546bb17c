"""Reading text files and the table of languages, without TensorFlow."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from bloomjax.errors import BadInput
from bloomjax.tasks import languages
from bloomjax.tasks.text_files import LanguageText, find_languages, read_documents


def documents_of(path, data, **options):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_documents(path, **options))


def test_no_tensorflow_is_loaded():
    program = (
        "import bloomjax.prepare, bloomjax.tasks.languages, bloomjax.tasks.text_files, sys;"
        "import bloomjax.tasks.roots; assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_blank_line_ends_a_document(tmp_path):
    text = "\n \none\n  two\n\nthree \n\t\u3000\n\n\nfour\nfive"
    expected = ["one\n  two", "three ", "four\nfive"]
    path = tmp_path / "en.txt"
    assert documents_of(path, text) == expected
    assert documents_of(path, text.replace("\n", "\r\n")) == expected
    assert documents_of(path, b"\xef\xbb\xbf" + text.encode() + b"\n") == expected
    assert documents_of(path, b"\xef\xbb\xbfone\n\n\xef\xbb\xbftwo") == ["one", "\ufefftwo"]
    assert documents_of(path, "") == documents_of(path, " \n\n\t") == []
    # These break lines on a screen, not in a file.
    assert documents_of(path, "a\x0bb\x0cc\u2028d\re\x85f") == ["a\x0bb\x0cc\u2028d\re\x85f"]


def test_json_lines(tmp_path):
    path = tmp_path / "en.jsonl"
    lines = '{"text": "a\\n\\nb", "id": 1}\n\n{"id": 2, "text": ""}\r\n{"text": "\\ud83d\\ude00"}'
    assert documents_of(path, lines) == ["a\n\nb", "", "\U0001f600"]
    assert documents_of(path, '{"body": "x"}\n', text_field="body") == ["x"]


def test_code_is_kept_to_the_byte(tmp_path):
    code = "\n\nint main() {\r\n\treturn 0;   \n}\n\n"
    assert documents_of(tmp_path / "a.c", code) == [code]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"fine\n\nab\xffcd\n", r"a\.txt is not UTF-8: line 3, byte offset 8$"),
        ("a.txt", b"\xef\xbb\xbfab\xe3\x81", r"line 1, byte offset 5$"),
        ("a.txt", "ärger".encode("latin-1"), r"line 1, byte offset 0$"),
        ("a.py", b"one\ntwo\nx\xc3(\n", r"a\.py is not UTF-8: line 3, byte offset 9$"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"line 2, byte offset 25$"),
        ("a.jsonl", '{"text": "ok"}\nno\n', r"a\.jsonl line 2 is not JSON$"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "cu', r"a\.jsonl line 2 is cut in the middle"),
        ("a.jsonl", '{"text": "cu\n{"text": "ok"}\n', r"line 1 is not JSON$"),
        ("a.jsonl", '["text"]\n', r"line 1 is not a JSON object$"),
        ("a.jsonl", '{"b": 1, "a": 2}\n', r"line 1 has no text field 'text'; it has: a, b$"),
        ("a.jsonl", "{}", r"line 1 has no text field 'text'; it has: none$"),
        ("a.jsonl", '{"text": null}\n', r"line 1 has no text field 'text'; it has: text$"),
        ("a.jsonl", '{"text": "\\ud800"}\n', r"line 1: half of a surrogate pair, \\ud800"),
        ("a.jsonl", "[" * 100_000 + "\n", r"line 1 is not JSON$"),
    ],
)
def test_damage_is_located(tmp_path, name, data, message):
    with pytest.raises(BadInput, match=message):
        documents_of(tmp_path / name, data)


def test_whole_documents_come_before_the_damage(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\n\xff")
    reader = read_documents(tmp_path / "a.txt")
    assert [next(reader), next(reader)] == ["one", "two"]
    with pytest.raises(BadInput):
        next(reader)


def test_unreadable_files(tmp_path):
    with pytest.raises(BadInput, match="cannot read .*missing.txt: No such file"):
        list(read_documents(tmp_path / "missing.txt"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(BadInput, match="cannot read .*folder.jsonl: Is a directory"):
        list(read_documents(tmp_path / "folder.jsonl"))


def test_a_language_without_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "  "}\n')
    files = (tmp_path / "a.txt", tmp_path / "b.jsonl")
    with pytest.raises(BadInput, match="'xx' has no text: nothing but whitespace in .*a.txt"):
        list(LanguageText("xx", files).documents())
    (tmp_path / "c.txt").write_text("words")
    assert list(LanguageText("xx", (*files, tmp_path / "c.txt")).documents()) == ["  ", "words"]


def make_files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def test_languages_of_a_folder(tmp_path, caplog):
    make_files(
        tmp_path, "zhs.txt", "my_own-1.jsonl", "en/b.jsonl", "en/a.txt", "en/more/c.txt",
        "code-c/z.c", "code-c/a.h", "code-c/README.md", "code-c/Makefile", ".hidden/x.txt",
        "README.md", "notes.pdf",
    )  # fmt: skip
    found = find_languages(tmp_path)
    names = {
        label: [str(file.relative_to(tmp_path)) for file in files] for label, files in found.items()
    }
    assert names == {
        "code-c": ["code-c/a.h", "code-c/z.c"],
        "en": ["en/a.txt", "en/b.jsonl", "en/more/c.txt"],
        "my_own-1": ["my_own-1.jsonl"],
        "zhs": ["zhs.txt"],
    }
    assert list(found) == sorted(found)
    left_out = [record.getMessage().split(" is left out")[0] for record in caplog.records]
    assert left_out == [str(tmp_path / "code-c/Makefile"), str(tmp_path / "notes.pdf")]


def test_unusable_folders(tmp_path):
    with pytest.raises(BadInput, match="there is no folder .*missing"):
        find_languages(tmp_path / "missing")
    make_files(tmp_path, "file.txt")
    with pytest.raises(BadInput, match="cannot read the folder .*file.txt: Not a directory"):
        find_languages(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty has no text"):
        find_languages(tmp_path / "empty")
    (tmp_path / "one" / "xx").mkdir(parents=True)
    with pytest.raises(
        BadInput, match=r"'xx' has no text: no \.txt, \.jsonl or code file in .*/xx"
    ):
        find_languages(tmp_path / "one")
    make_files(tmp_path / "twice", "xx.txt", "xx.jsonl")
    with pytest.raises(BadInput, match=r"'xx' is there twice: .*xx\.jsonl and .*xx\.txt"):
        find_languages(tmp_path / "twice")
    make_files(tmp_path / "both", "xx.txt", "xx/a.txt")
    with pytest.raises(BadInput, match="'xx' is there twice"):
        find_languages(tmp_path / "both")
    make_files(tmp_path / "label", "my language.txt")
    with pytest.raises(BadInput, match="'my language' is no language label"):
        find_languages(tmp_path / "label")


def test_languages_of_roots(tmp_path):
    from bloomjax.tasks import roots

    make_files(tmp_path / "good", "en.txt", "zhs.txt", "code/python/a.py", "code/c/b.c")
    assert list(roots.find_languages(tmp_path / "good")) == ["code", "en", "zhs"]
    make_files(tmp_path / "bad", "en.txt", "de.txt")
    with pytest.raises(BadInput, match="no language of BLOOM is called de; there are: ak, ar"):
        roots.find_languages(tmp_path / "bad")
    make_files(tmp_path / "code", "en.txt", "code-c/a.c")
    with pytest.raises(BadInput, match="all programming languages are one"):
        roots.find_languages(tmp_path / "code")


def test_table_of_languages():
    natural = languages.NATURAL_LANGUAGES
    assert len(natural) == 46 and len(languages.PROGRAMMING_LANGUAGES) == 13
    assert len({language.code for language in natural}) == 46
    assert len({language.bcp47 for language in natural}) == 46
    assert {len(language.iso639_3) for language in natural} == {3}
    assert {len(language.script) for language in natural} == {4}
    # BLOOM paper, table 1: 1.61 TB in all; 30.04 % of the bytes are English.
    num_bytes = sum(language.num_bytes for language in natural) + languages.CODE_NUM_BYTES
    assert num_bytes == 1_614_479_114_961
    assert math.isclose(natural[0].num_bytes / num_bytes, 0.3004, abs_tol=5e-5)
    weights = languages.ROOTS_WEIGHTS
    assert len(weights) == 47
    assert math.isclose(sum(weights.values()), 1, abs_tol=1e-8)
    # The shares of one group of the published mixture: 0.00031588689199263235.
    families = {"Niger-Congo", "Mande"}
    niger_congo = [language for language in natural if language.family in families]
    assert len(niger_congo) == 22
    share = sum(weights[language.code] for language in niger_congo)
    assert math.isclose(share, 0.00031588689199263235, rel_tol=1e-7)
    # A weight is a share of tokens.
    num_tokens = sum(x.estimated_tokens for x in natural) + languages.CODE_ESTIMATED_TOKENS
    for language in natural:
        share = language.estimated_tokens / num_tokens
        assert math.isclose(share, language.weight, rel_tol=1e-4)


def test_demo_corpus_has_every_language():
    corpus = Path(languages.__file__).parent / "demo_corpus"
    natural, code = find_languages(corpus), find_languages(corpus / "code")
    assert set(natural) == {x.code for x in languages.NATURAL_LANGUAGES} | {"code"}
    assert {f"code-{name}" for name in code} == {x.code for x in languages.PROGRAMMING_LANGUAGES}
    for language in languages.PROGRAMMING_LANGUAGES:
        files = code[language.code.removeprefix("code-")]
        assert {file.suffix for file in files} <= set(language.extensions)
    for label, files in [*natural.items(), *code.items()]:
        num_documents = sum(1 for text in LanguageText(label, files).documents() if text.strip())
        assert num_documents >= 2, label
