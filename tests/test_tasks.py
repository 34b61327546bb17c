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
        ("a.jsonl", '{"text": null}\n', r"line 1: the field 'text' is null, not text$"),
        ("a.jsonl", '{"text": true}\n', r"line 1: the field 'text' is true or false, not text$"),
        ("a.jsonl", '\n{"text": 1.5}\n', r"line 2: the field 'text' is a number, not text$"),
        ("a.jsonl", '{"text": ["a"]}\n', r"line 1: the field 'text' is a list, not text$"),
        ("a.jsonl", '{"text": {}}\n', r"line 1: the field 'text' is an object, not text$"),
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
        BadInput, match=r"'xx' has no text: no \.txt, \.jsonl, \.parquet or code file in .*/xx"
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


# BigScience, data/catalogue/training_dataset_ratios_merged_nigercongo_v3.json: all 28 groups.
PUBLISHED = {
    "ar": 0.0330676168743166, "ca": 0.011242051312222764, "code": 0.13027200903379185,
    "en": 0.22171164529099704, "es": 0.10667815627928671, "eu": 0.0015595123898173287,
    "fr": 0.13054018439603915, "id": 0.01091803753667153, "as": 0.00011021422347108609,
    "bn": 0.005492381453597748, "gu": 0.0004021215011318779, "hi": 0.007470068593492175,
    "kn": 0.0006190467776576425, "ml": 0.0010335296343329384, "mr": 0.0005012010684646179,
    "ne": 0.0006672772956128299, "or": 0.00035928138344705506, "pa": 0.0005084433130291778,
    "ta": 0.0021137328219915496, "te": 0.0009129946225980253, "ur": 0.0012454301613725426,
    "nigercongo-all": 0.00031588689199263235, "oscar-en": 0.08137213783015229,
    "oscar-zh": 0.055293935695898196, "pt": 0.04954150576361177, "vi": 0.02461641286531197,
    "zhs": 0.12091748245519074, "zht": 0.0005177025345001541,
}  # fmt: skip
# training_dataset_ratios.json beside it: the languages of nigercongo-all, in that mixture.
NIGER_CONGO = {
    "tum": 1.6908712906621913e-07, "ki": 3.825549510416119e-07, "bm": 4.096353790340665e-07,
    "ak": 6.938762268345196e-07, "ts": 7.058099259657895e-07, "st": 7.211293983608406e-07,
    "ny": 1.0802142612678056e-06, "tw": 1.254210185754728e-06, "tn": 1.4345976209947068e-06,
    "ln": 1.5615957880343798e-06, "nso": 1.5685487152725018e-06, "fon": 2.4181733912998574e-06,
    "rn": 2.6240721674330045e-06, "wo": 3.788035372978134e-06, "lg": 4.411728781061637e-06,
    "sn": 5.462081443441739e-06, "zu": 7.960494206222536e-06, "ig": 1.1476452755243308e-05,
    "xh": 1.420376509569156e-05, "rw": 3.211033678381048e-05, "yo": 5.92174680475419e-05,
    "sw": 0.00016215947420710153,
}  # fmt: skip


def test_weights_are_the_published_ones():
    weights = dict(languages.ROOTS_WEIGHTS)
    assert len(PUBLISHED) == 28 and len(NIGER_CONGO) == 22 and len(weights) == 47
    assert math.isclose(weights.pop("en"), PUBLISHED["en"] + PUBLISHED["oscar-en"], rel_tol=1e-15)
    assert math.isclose(weights.pop("zhs"), PUBLISHED["zhs"] + PUBLISHED["oscar-zh"], rel_tol=1e-15)
    group, total = PUBLISHED["nigercongo-all"], math.fsum(NIGER_CONGO.values())
    for language, ratio in NIGER_CONGO.items():
        assert math.isclose(weights.pop(language), group * ratio / total, rel_tol=1e-14), language
    assert all(PUBLISHED[language] == weight for language, weight in weights.items())
    assert len(weights) == 28 - 5
    assert math.isclose(math.fsum(languages.ROOTS_WEIGHTS.values()), 1, abs_tol=1e-15)


def test_table_of_languages():
    natural = languages.NATURAL_LANGUAGES
    assert len(natural) == 46 and len(languages.PROGRAMMING_LANGUAGES) == 13
    assert len({language.code for language in natural}) == 46
    assert len({language.bcp47 for language in natural}) == 46
    assert len({language.name for language in natural}) == 46
    assert {len(language.iso639_3) for language in natural} == {3}
    assert len({language.iso639_3 for language in natural}) == 45  # Chinese twice
    scripts = {language.script for language in natural}
    indic = {"Beng", "Deva", "Gujr", "Guru", "Knda", "Mlym", "Orya", "Taml", "Telu"}
    assert scripts == {"Arab", "Hans", "Hant", "Latn"} | indic
    # BLOOM paper, table 1: 1.61 TB in all; 30.04 % of the bytes are English.
    num_bytes = sum(language.num_bytes for language in natural) + languages.CODE_NUM_BYTES
    assert num_bytes == 1_614_479_114_961
    assert math.isclose(natural[0].num_bytes / num_bytes, 0.3004, abs_tol=5e-5)
    weights = [language.weight for language in natural]
    assert weights == sorted(weights, reverse=True)
    families = {"Niger-Congo", "Mande"}
    assert {x.code for x in natural if x.family in families} == NIGER_CONGO.keys()
    # A weight is a share of tokens.
    assert list(languages.ROOTS_TOKENS) == list(languages.ROOTS_WEIGHTS)
    num_tokens = sum(languages.ROOTS_TOKENS.values())
    assert math.isclose(num_tokens, 342.1e9, rel_tol=1e-4)
    for code, tokens in languages.ROOTS_TOKENS.items():
        assert math.isclose(tokens / num_tokens, languages.ROOTS_WEIGHTS[code], rel_tol=1e-5), code


def test_table_of_programming_languages():
    code = {x.name: set(x.extensions) for x in languages.PROGRAMMING_LANGUAGES}
    # The model card of BLOOM; for C it has .C alone.
    php = {".php", ".phpt", ".php3", ".phps", ".php5", ".php4"}
    assert code == {
        "Java": {".java"}, "PHP": php, "Python": {".py"}, "JavaScript": {".js"}, "C#": {".cs"},
        "C++": {".cpp", ".cc", ".hpp", ".hh", ".H", ".c++", ".h++"}, "Ruby": {".rb"},
        "Lua": {".lua"}, "TypeScript": {".ts", ".tsx"}, "Go": {".go"}, "C": {".c", ".h", ".C"},
        "Scala": {".scala"}, "Rust": {".rs"},
    }  # fmt: skip
    assert len(languages.CODE_EXTENSIONS) == sum(map(len, code.values()))  # none is of two


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
