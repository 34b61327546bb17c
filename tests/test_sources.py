"""Every kind of source gives the same documents, and what is wrong with one is named and counted."""

import gzip
import importlib.resources
import importlib.resources.abc
import json
import logging
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from bloomjax.errors import BadInput
from bloomjax.tasks import ablations, documents, languages, roots, text_files, tfds
from bloomjax.tasks.text_files import LanguageText, check_claims, find_languages, read_documents

pa = pytest.importorskip("pyarrow", reason="needs the extra `data`")
import pyarrow.parquet  # noqa: E402

CORPUS = Path(languages.__file__).parent / "demo_corpus"
COLUMNS = "id", "text"


# ---- writers, which share no code with the readers ----


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def paragraphs(texts):
    return "\n\n\n".join(texts).encode()


def json_lines(texts, field="text"):
    return "".join(json.dumps({"id": n, field: t}) + "\n" for n, t in enumerate(texts)).encode()


def table(texts, kind=None, field="text"):
    column = pa.array(texts, pa.string())
    if kind is not None:
        column = column.cast(kind) if kind != "dictionary" else column.dictionary_encode()
    return pa.table({"id": list(range(len(texts))), field: column})


def write_parquet(path, texts, **options):
    pyarrow.parquet.write_table(table(texts, **options), path, row_group_size=3)


def write_arrow(path, texts, new=None, rows=3, **options):
    data = table(texts, **options)
    with (new or pa.ipc.new_stream)(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)


def save_dataset(folder, texts, names=("data-b.arrow", "data-a.arrow", "data-c.arrow"), **state):
    """What `datasets.save_to_disk` 5.2 leaves behind; files in an order that names do not tell."""
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        first, last = (len(texts) * n // len(names) for n in (k, k + 1))
        write_arrow(folder / name, texts[first:last])
    state = {
        "_data_files": [{"filename": n} for n in names],
        "_fingerprint": "c61a04b521e66845",
    } | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    (folder / "cache-6f1ed002ab559585.arrow").write_bytes(b"not to be read")


WRITERS = {
    ".txt": lambda path, texts: path.write_bytes(paragraphs(texts)),
    ".txt.gz": lambda path, texts: path.write_bytes(gzip.compress(paragraphs(texts))),
    ".txt.zst": lambda path, texts: path.write_bytes(zstd(paragraphs(texts))),
    ".jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
    ".jsonl.zst": lambda path, texts: path.write_bytes(zstd(json_lines(texts))),
    ".json.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
    ".json.zst": lambda path, texts: path.write_bytes(zstd(json_lines(texts))),
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    "": save_dataset,
}


@pytest.fixture(scope="module")
def demo():
    """{language: documents} of the demo corpus: 46 natural languages and 13 programming languages."""
    found = find_languages(CORPUS)
    del found["code"]
    found |= {f"code-{name}": files for name, files in find_languages(CORPUS / "code").items()}
    assert len(found) == 59
    return {name: list(LanguageText(name, files).documents()) for name, files in found.items()}


@pytest.mark.parametrize("suffix", WRITERS, ids=lambda suffix: suffix or "saved data set")
def test_every_kind_gives_the_same_documents(suffix, demo, tmp_path):
    assert set(documents.SUFFIXES) <= WRITERS.keys()
    for language, texts in demo.items():
        if language.startswith("code-") and suffix.startswith(".txt"):
            texts = [t.replace("\n\n", "\n").strip("\n") for t in texts]  # no blank line inside
            texts = ["\n".join(line for line in t.split("\n") if line.strip()) for t in texts]
        WRITERS[suffix](tmp_path / (language + suffix), texts)
        demo = demo | {language: texts}
    found = find_languages(tmp_path)
    assert found.keys() == demo.keys()
    for language, files in found.items():
        assert list(LanguageText(language, files).documents()) == demo[language], language


def test_text_that_breaks_careless_readers(tmp_path):
    hard = [
        "",
        " \n",
        "a\n\nb\r\n",
        "\ufeffmark",
        "\u2028\x0b\x85\x1c",
        "\x00",
        "\U0001f600e\u0301",
        "x",
    ]
    for suffix, write in WRITERS.items():
        if not suffix.startswith(".txt"):
            write(tmp_path / f"en{suffix}", hard)
            files = (
                text_files.files_below(tmp_path / "en")
                if not suffix
                else [tmp_path / f"en{suffix}"]
            )
            assert [t for path in files for t in read_documents(path)] == hard, suffix


def test_many_pieces(tmp_path):
    """Row groups, record batches, gzip members and zstd frames end where documents do not."""
    texts = [f"{n}\n" + "é" * (n % 700) for n in range(2000)]
    write_parquet(tmp_path / "a.parquet", texts)
    write_arrow(tmp_path / "a.arrow", texts, rows=700)
    write_arrow(tmp_path / "file.arrow", texts, new=pa.ipc.new_file, rows=700)
    data = json_lines(texts)
    half = len(data) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(data[:half]) + zstd(data[half:]))
    for path in sorted(tmp_path.iterdir()):
        assert list(read_documents(path)) == texts, path.name


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), "dictionary"], ids=str)
def test_columns_of_text(kind, tmp_path):
    texts = ["one", "two", "", "one", "drei é"]
    if kind != pa.string_view():
        write_parquet(tmp_path / "a.parquet", texts, kind=kind, field="body")
        assert list(read_documents(tmp_path / "a.parquet", "body")) == texts
    write_arrow(tmp_path / "a.arrow", texts, kind=kind, field="body", rows=None)
    assert list(read_documents(tmp_path / "a.arrow", "body")) == texts


def test_the_program_zstd(tmp_path):
    """Its files have a checksum, which the ones made above lack."""
    data = json_lines(["eins", "zwei"] * 5000)
    try:
        packed = subprocess.run(["zstd", "-19"], input=data, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("zstd is not installed")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    assert list(read_documents(path)) == ["eins", "zwei"] * 5000
    path.write_bytes(packed[:-1] + bytes([packed[-1] ^ 1]))
    with pytest.raises(BadInput, match="a.jsonl.zst is damaged after line .*checksum"):
        list(read_documents(path))


# ---- bad input ----


def outcome(path, **options):
    """(documents, messages) with on_bad; without it the first message is raised, after the same documents."""
    told, before = [], []
    given = list(read_documents(path, on_bad=lambda error: told.append(str(error)), **options))
    if told:
        with pytest.raises(BadInput) as raised:
            before.extend(read_documents(path, **options))
        assert str(raised.value) == told[0] and "\n" not in told[0]
        assert str(path) in told[0]
    return given, [message.removeprefix(str(path)) for message in told]


def test_bad_lines_are_named_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "1"}', "no", '["text"]', '{"b": 1}', '{"text": null}', "", '{"text": "2"}']
    lines += ['{"text": "\\ud800"}', '{"text": "3"}', '{"text": "cu']
    path.write_bytes(b"\n".join(line.encode() for line in lines))
    assert outcome(path) == (
        ["1", "2", "3"],
        [
            " line 2 is not JSON",
            " line 3 is not a JSON object",
            " line 4 has no text field 'text'; it has: b",
            " line 5: the field 'text' is null, not text",
            " line 8: half of a surrogate pair, \\ud800, is no text",
            " line 10 is cut in the middle: the file ends inside it",
        ],
    )


def test_bad_utf8_costs_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nmore\n\nb\xffd\nof it\n\ntwo\n\nof\nb\xff\n\nthree\n\n\xff")
    assert outcome(path) == (
        ["one\nmore", "two", "three"],
        [
            f" is not UTF-8: line {line}, byte offset {at}"
            for line, at in ((4, 11), (10, 30), (14, 40))
        ],
    )
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "\xff"}\n{"text": "2"}\n')
    assert outcome(path) == (["1", "2"], [" is not UTF-8: line 2, byte offset 24"])
    path = tmp_path / "a.py"
    path.write_bytes(b"x = '\xff'")
    assert outcome(path) == ([], [" is not UTF-8: line 1, byte offset 5"])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".jsonl.zst", ".txt.zst"])
def test_cut_short(suffix, tmp_path):
    texts = [
        "\n".join(
            [f"{n}", *("".join(chr(97 + n * k * k % 26) for k in range(20 * m)) for m in (1, 2, 9))]
        )
        for n in range(5000)
    ]
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, texts)
    data = path.read_bytes()
    few = 0
    for length in (0, 2, 5, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:length])
        given, told = outcome(path)
        assert len(told) == 1 and told[0].startswith(" is cut short"), (length, told)
        assert given == texts[: len(given)]
        few += 0 < len(given) < 5000
        place = " has no bytes at all" if length == 0 else " after line "
        assert place in told[0], told
    assert few  # documents before the cut are read


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_or_not_what_the_name_says(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b'{"text": "not compressed at all, whatever the name says"}\n' * 10)
    given, told = outcome(path)
    assert given == [] and len(told) == 1 and told[0].startswith(" is damaged after line 0: ")
    WRITERS[suffix](path, ["one", "two"])
    path.write_bytes(path.read_bytes() + b"junk at the end")
    given, told = outcome(path)
    assert set(given) <= {"one", "two"} and told[0].startswith(" is damaged after line")
    if suffix == ".jsonl.gz":
        data = bytearray(gzip.compress(json_lines(["one", "two"])))
        data[-6] ^= 1  # the CRC
        path.write_bytes(data)
        assert outcome(path)[1] == [" is damaged after line 2: " + outcome(path)[1][0][26:]]
        assert "CRC" in outcome(path)[1][0]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_bad_tables(suffix, tmp_path):
    path, write = tmp_path / f"a{suffix}", WRITERS[suffix]
    write(path, ["a", None, "b", "c", None])
    null = "the column 'text' is null, not text"
    assert outcome(path) == (["a", "b", "c"], [f" row 2: {null}", f" row 5: {null}"])
    assert outcome(path, text_field="body") == ([], [" has no column 'body'; it has: id, text"])
    assert outcome(path, text_field="id") == ([], [": the column 'id' is int64, not text"])
    texts = [f"{n:0900}" for n in range(100)]
    write(path, texts)
    data = path.read_bytes()
    for length in (0, 3, len(data) // 2, len(data) - 1, len(data) - 8):
        path.write_bytes(data[:length])
        given, told = outcome(path)
        assert len(told) == 1 and told[0].startswith(" is cut short or damaged after row "), told
        assert given == texts[: len(given)]
    path.write_bytes(b"no table, whatever the name says" * 10)
    assert outcome(path)[1][0].startswith(" is cut short or damaged after row 0: ")
    path.unlink()
    with pytest.raises(BadInput, match=f"cannot read .*a{suffix}: No such file or directory$"):
        list(read_documents(path))
    path.mkdir()
    with pytest.raises(BadInput, match=f"cannot read .*a{suffix}: Is a directory$"):
        list(read_documents(path))


def test_an_arrow_stream_cut_between_batches_is_not_whole(tmp_path):
    path = tmp_path / "a.arrow"
    write_arrow(path, ["a", "b", "c", "d"], rows=2)
    data = path.read_bytes()
    assert data.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    path.write_bytes(data[:-8])
    told = " is cut short or damaged after row 4: the stream has no end"
    assert outcome(path) == (["a", "b", "c", "d"], [told])


def test_bytes_in_a_column_that_are_no_utf8(tmp_path):
    bad = pa.array([b"fine", b"b\xffd"], pa.binary()).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    given, told = outcome(tmp_path / "a.parquet")
    assert given == ["fine"] and told == [" row 2 is not UTF-8: byte 1 of its text"]


def test_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    most = "a document may have 100 bytes"
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * n}) for n in (1, 87, 88, 5000, 2)]
    path.write_text("\n".join(lines) + "\n")
    assert [len(line) + 1 for line in lines[1:3]] == [100, 101]
    given, told = outcome(path)
    assert given == ["x", "x" * 87, "xx"]
    assert told == [f" line 3 has 101 bytes; {most}", f" line 4 has 5,013 bytes; {most}"]
    path = tmp_path / "a.txt"
    path.write_text("one\n\n" + "x" * 99 + "\n\n" + "ten chars\n" * 11 + "\ntwo\n\n" + "y" * 300)
    given, told = outcome(path)
    assert given == ["one", "x" * 99, "two"]
    assert told == [
        f": the document that begins at line 5 is too long: {most} (a blank line ends a document)",
        f" line 19 has 300 bytes; {most}",
    ]
    path = tmp_path / "a.c"
    path.write_text("z" * 101)
    assert outcome(path) == ([], [f" has 101 bytes; {most}"])
    for suffix in (".parquet", ".arrow"):
        WRITERS[suffix](tmp_path / f"a{suffix}", ["x", "y" * 101, "z" * 100])
        given, told = outcome(tmp_path / f"a{suffix}")
        assert given == ["x", "z" * 100] and told == [f" row 2 has 101 bytes; {most}"]


def test_a_line_of_a_gigabyte_does_not_come_into_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "before"}\n')
        file.truncate(1 << 30)  # zeros, which take no room on the disk
        file.seek(0, 2)
        file.write(b'\n{"text": "after"}\n')
    tracemalloc.start()
    try:
        told = []
        assert list(read_documents(path, on_bad=told.append)) == ["before", "after"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(told[0]).endswith(
        "line 2 has 1,073,741,806 bytes; a document may have 67,108,864 bytes"
    )
    assert peak < 3 * documents.MAX_DOCUMENT_BYTES


def test_without_pyarrow_one_line_says_so(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b'{"text": "x"}'))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from bloomjax.tasks.text_files import read_documents as read\n"
        f"assert list(read(r'{tmp_path}/a.jsonl.gz')) == ['x']\n"
        "for name in ('a.parquet', 'a.jsonl.zst'):\n"
        f"    try: list(read(r'{tmp_path}/' + name))\n"
        "    except ValueError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr == ""
    needs = "needs pyarrow, of the extra `data`: pip install 'bloomjax[data]'"
    assert result.stdout.splitlines() == [
        f"reading {tmp_path}/{name} {needs}" for name in ("a.parquet", "a.jsonl.zst")
    ]


# ---- folders ----


def test_saved_data_sets(tmp_path, caplog):
    save_dataset(tmp_path / "en", list("abcdef"))
    save_dataset(tmp_path / "sw" / "train", ["x"], names=["one.arrow"])
    save_dataset(tmp_path / "sw" / "test", ["y"], names=["one.arrow"])
    (tmp_path / "sw" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    save_dataset(tmp_path / "yo" / "parts" / "1", ["p"], names=["one.arrow"])
    save_dataset(tmp_path / "yo" / "parts" / "2", ["q"], names=["one.arrow"])
    found = find_languages(tmp_path)
    texts = {name: list(LanguageText(name, files).documents()) for name, files in found.items()}
    assert texts == {"en": list("abcdef"), "sw": ["x"], "yo": ["p", "q"]}
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'sw'}: the splits test are left out"
    ]


def test_saved_data_sets_that_are_not_whole(tmp_path):
    save_dataset(tmp_path / "a" / "en", ["x"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(BadInput, match=r"/en is a selection of rows .* flatten_indices"):
        find_languages(tmp_path / "a")
    save_dataset(tmp_path / "b" / "en", ["x", "y", "z"])
    (tmp_path / "b" / "en" / "data-a.arrow").unlink()
    with pytest.raises(BadInput, match="en is not whole: 1 of 3 files are missing.*data-a.arrow$"):
        find_languages(tmp_path / "b")
    for number, state in enumerate(["{", "[]", "{}", '{"_data_files": [{"filename": "../x"}]}']):
        folder = tmp_path / str(number) / "en"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(state)
        with pytest.raises(BadInput, match="state.json is damaged: it"):
            find_languages(folder.parent)
    splits = {"[]": "none", '["test", "dev"]': "test, dev"}
    for number, (names, there) in enumerate(splits.items()):
        folder = tmp_path / f"dict{number}" / "en"
        folder.mkdir(parents=True)
        (folder / "dataset_dict.json").write_text(f'{{"splits": {names}}}')
        with pytest.raises(BadInput, match=f"has no split 'train'; it has: {there}$"):
            find_languages(folder.parent)


def test_a_language_twice(tmp_path):
    for suffix in (".txt", ".jsonl.gz"):
        WRITERS[suffix](tmp_path / f"en{suffix}", ["x"])
    with pytest.raises(BadInput, match=r"'en' is there twice: .*en\.jsonl\.gz and .*en\.txt; put"):
        find_languages(tmp_path)


def test_two_languages_that_claim_one_file(tmp_path):
    for name in ("en", "fr"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.txt").write_text(name)
    check_claims(find_languages(tmp_path))
    (tmp_path / "sw").symlink_to(tmp_path / "fr")
    with pytest.raises(
        BadInput,
        match=r"one file is claimed by 'fr' and 'sw': .*fr/0.txt is .*sw/0.txt \(and 2 more files\)$",
    ):
        text_files.register(tmp_path)
    (tmp_path / "sw").unlink()
    (tmp_path / "en" / "again.txt").hardlink_to(tmp_path / "en" / "1.txt")
    with pytest.raises(BadInput, match="claimed by 'en' twice: .*/1.txt is .*/again.txt$"):
        roots.register(tmp_path)
    both = {"a": (tmp_path / "fr" / "0.txt",), "b": (tmp_path / "fr" / "0.txt",)}
    with pytest.raises(BadInput, match="claimed by 'a' and 'b': .*fr/0.txt$"):
        text_files.register_mixture("x", both, {"a": 1.0, "b": 1.0})


def test_rates_that_do_not_fit(tmp_path):
    (tmp_path / "en.txt").write_text("x")
    found = find_languages(tmp_path)
    with pytest.raises(BadInput, match="the Mixture 'x' gives no weight to: en$"):
        text_files.register_mixture("x", found, {"fr": 1.0})
    with pytest.raises(BadInput, match="each rate must be a positive number: 'en' has -1.0$"):
        text_files.register_mixture("x", found, {"en": -1.0})


# ---- Tasks and Mixtures ----


@pytest.fixture(scope="module")
def seqio():
    pytest.importorskip("seqio", reason="needs the extra `data`")
    from bloomjax.prepare import import_seqio

    return import_seqio()


def rates(seqio, mixture):
    found = seqio.MixtureRegistry.get(mixture)
    return {task.name: found.get_rate(task) for task in found.tasks}


def test_mixtures_of_roots(seqio, tmp_path):
    for name in ("en", "tum", "zhs"):
        WRITERS[".jsonl.gz"](tmp_path / f"{name}.jsonl.gz", [name, "two"])
    roots.register(tmp_path)
    tables = {
        "roots": languages.ROOTS_WEIGHTS,
        "roots_temperature": roots.ROOTS_TEMPERATURE_WEIGHTS,
        "roots_unimax": roots.ROOTS_UNIMAX_WEIGHTS,
    }
    for mixture, weights in tables.items():
        expected = {f"roots.{name}": weights[name] for name in ("en", "tum", "zhs")}
        assert rates(seqio, mixture) == expected, mixture
    task = seqio.TaskRegistry.get("roots.tum")
    assert task.source.language_text.files == (tmp_path / "tum.jsonl.gz",)
    data = task.get_dataset(None, "train", shuffle=False)
    assert [example["text"] for example in data.as_numpy_iterator()] == [b"tum", b"two"]


def test_a_47th_language(seqio, tmp_path):
    (tmp_path / "en.txt").write_text("x")
    (tmp_path / "de.txt").write_text("x")
    with pytest.raises(BadInput, match="no language of BLOOM is called de"):
        roots.register(tmp_path)
    roots.register(tmp_path, weights=languages.ROOTS_WEIGHTS | {"de": 0.02})
    expected = {"roots.de": 0.02, "roots.en": languages.ROOTS_WEIGHTS["en"]}
    assert rates(seqio, "roots") == expected


def test_ablations(seqio, tmp_path, caplog):
    for name in (
        "c4-train.00000-of-00002",
        "c4-train.00001-of-00002",
        "c4-validation.00000-of-00001",
    ):
        (tmp_path / "c4-en").mkdir(exist_ok=True)
        WRITERS[".json.gz"](tmp_path / "c4-en" / f"{name}.json.gz", [name])
    (tmp_path / "oscar-en").mkdir()
    WRITERS[".txt.gz"](tmp_path / "oscar-en" / "en_part_1.txt.gz", ["one", "two"])
    (tmp_path / "pile" / "arxiv").mkdir(parents=True)
    WRITERS[".jsonl.zst"](tmp_path / "pile" / "arxiv" / "00.jsonl.zst", ["a"])
    WRITERS[".jsonl.zst"](tmp_path / "pile" / "dm-mathematics.jsonl.zst", ["b"])
    ablations.register(tmp_path)
    assert rates(seqio, "c4_en") == {"c4_en.en": 1.0}
    assert rates(seqio, "oscar_en") == {"oscar_en.en": 1.0}
    assert rates(seqio, "pile") == {"pile.arxiv": 0.0896, "pile.dm_mathematics": 0.0124}
    text = seqio.TaskRegistry.get("c4_en.en").source.language_text
    assert [d[:14] for d in text.documents()] == ["c4-train.00000", "c4-train.00001"]
    assert "pile has no pile-cc, pubmed-central, books3" in caplog.records[0].getMessage()
    (tmp_path / "pile" / "books.txt").write_text("x")
    with pytest.raises(BadInput, match="the Pile has no books; it has: pile-cc, pubmed-central"):
        ablations.register(tmp_path)
    with pytest.raises(BadInput, match="pile has no text: no folder oscar-en, c4-en or pile$"):
        ablations.register(tmp_path / "pile")
    with pytest.raises(BadInput, match="there is no folder .*nowhere$"):
        ablations.register(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def tfds_dir(seqio, tmp_path_factory):
    """A folder in the format of TensorFlow Datasets with a few lines of mC4 and of Wiki40B."""
    import tensorflow as tf
    import tensorflow_datasets

    folder = str(tmp_path_factory.mktemp("tfds"))

    def store(name, version, config, **splits):
        features = {
            "text": tensorflow_datasets.features.Text(),
            "url": tensorflow_datasets.features.Text(),
        }
        tensorflow_datasets.dataset_builders.store_as_tfds_dataset(
            name=name, version=version, config=config, data_dir=folder, disable_shuffling=True,
            features=tensorflow_datasets.features.FeaturesDict(features),
            split_datasets={
                split.replace("_", "-"): tf.data.Dataset.from_tensor_slices({"text": texts, "url": texts})
                for split, texts in splits.items()
            },
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:  # TFDS 4.9.10 wants it when it writes
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        patch.setitem(sys.modules, "importlib_resources.abc", importlib.resources.abc)
        logging.getLogger("absl").setLevel(logging.ERROR)
        store("c4", "3.1.0", "multilingual", sw=["habari\n\nmoja", "mbili é"], sw_validation=["no"],
              zh=["一"], de=["nein"])  # fmt: skip
        article = "\n_START_ARTICLE_\nÀ\n_START_SECTION_\nB\n_START_PARAGRAPH_\nc d_NEWLINE_e"
        store("wiki40b", "1.3.0", "zh-tw", train=[article, "\n_START_ARTICLE_\nF\n"], test=["no"])
    return folder


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_datasets(seqio, tfds_dir):
    tfds.register(tfds_dir)
    weights = languages.ROOTS_WEIGHTS
    assert rates(seqio, "mc4") == {"mc4.sw": weights["sw"], "mc4.zhs": weights["zhs"]}
    assert rates(seqio, "wiki40b") == {"wiki40b.zht": weights["zht"]}
    texts = {}
    for name in ("mc4.sw", "mc4.zhs", "wiki40b.zht"):
        data = seqio.TaskRegistry.get(name).get_dataset(None, "train", shuffle=False)
        examples = list(data.as_numpy_iterator())
        assert all(set(example) == {"text"} for example in examples)
        texts[name] = [example["text"].decode() for example in examples]
    assert texts == {
        "mc4.sw": ["habari\n\nmoja", "mbili é"],
        "mc4.zhs": ["一"],
        "wiki40b.zht": ["À\n\nB\n\nc d\ne", "F\n"],
    }


def test_names_of_tensorflow_datasets(seqio, tfds_dir):
    """Against the lists of the data sets themselves."""
    from tensorflow_datasets.text import c4, wiki40b

    known = set(languages.ROOTS_WEIGHTS) - {"code", "zhs", "zht"}
    assert tfds.MC4_LANGUAGES.keys() - {"zhs"} == known & set(c4.MC4_LANGUAGES)
    assert "zh" in c4.MC4_LANGUAGES
    configs = {config.name for config in wiki40b.Wiki40b.BUILDER_CONFIGS}
    assert set(tfds.WIKI40B_LANGUAGES.values()) <= configs
    assert tfds.WIKI40B_LANGUAGES.keys() - {"zhs", "zht"} == known & configs
    assert str(wiki40b.Wiki40b.BUILDER_CONFIGS[0].version) == tfds.WIKI40B_VERSION
    multilingual = next(x for x in c4.C4.BUILDER_CONFIGS if x.name == "multilingual")
    assert str(multilingual.version) == tfds.MC4_VERSION


def test_unprepared_tensorflow_datasets(tmp_path):
    with pytest.raises(BadInput, match=r"has no prepared c4/multilingual/3\.1\.0 or wiki40b/<lang"):
        tfds.register(tmp_path)
    info = tmp_path / "c4" / "multilingual" / "3.1.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    for damaged in ("{", "[]", '{"splits": [1]}'):
        info.write_text(damaged)
        with pytest.raises(BadInput, match="dataset_info.json is damaged: it does not name its"):
            tfds.register(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_prepare_reads_tensorflow_datasets(seqio, tfds_dir, tmp_path):
    from bloomjax.prepare import prepare
    from bloomjax.token_store import TokenStore
    from bloomjax.vocabulary import open_vocabulary

    options = {
        "task_module": "bloomjax.tasks.tfds", "mixture_or_task_name": "wiki40b", "vocab_size": 263,
        "vocabulary_path": str(tmp_path / "v.json"), "store_dir": str(tmp_path / "store"),
    }  # fmt: skip
    prepare(**options, text_dir=tfds_dir)
    store, vocab = TokenStore(tmp_path / "store"), open_vocabulary(options["vocabulary_path"])
    for split, text in (("train", "À\n\nB\n\nc d\ne"), ("validation", "F\n")):
        ids = store.read("zht", split, 0, store.num_tokens("zht", split)).tolist()
        assert vocab.decode(ids[:-1]) == text


def test_prepare_reads_a_mixed_folder(seqio, demo, tmp_path, capsys):
    """From every kind of file to a store that decodes to the same text."""
    from bloomjax.prepare import prepare
    from bloomjax.token_store import TokenStore
    from bloomjax.vocabulary import open_vocabulary

    folder = tmp_path / "text"
    folder.mkdir()
    natural = [x.code for x in languages.NATURAL_LANGUAGES]
    texts = {}
    for language, suffix in zip(natural, WRITERS, strict=False):
        texts[language] = demo[language][:8]
        blank = ["", " \n"] if not suffix.startswith(".txt") else []
        WRITERS[suffix](folder / f"{language}{suffix}", texts[language] + blank)
    texts["code"] = [text for name in ("code-c", "code-go") for text in demo[name]]
    for number, text in enumerate(texts["code"]):
        path = folder / "code" / "more" / f"{number:03}.rs"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    options = {
        "task_module": "bloomjax.tasks.roots", "mixture_or_task_name": "roots_unimax",
        "vocab_size": 300, "vocabulary_path": str(tmp_path / "v.json"),
        "store_dir": str(tmp_path / "store"), "text_dir": str(folder),
    }  # fmt: skip
    prepare(**options)
    store, vocab = TokenStore(tmp_path / "store"), open_vocabulary(options["vocabulary_path"])
    store.verify()
    assert set(store.languages) == texts.keys() and len(texts) == 12
    for language, expected in texts.items():
        decoded = []
        for split in ("train", "validation"):
            ids = store.read(language, split, 0, store.num_tokens(language, split))
            first = 0
            for last in store.read_document_ends(language, split).tolist():
                decoded.append(vocab.decode(ids[first : last - 1].tolist()))
                first = last
        assert decoded == expected, language
    skipped = {name: store.manifest["languages"][name]["num_skipped_documents"] for name in texts}
    suffixes = dict(zip(natural, WRITERS, strict=False))
    for language, number in skipped.items():
        is_blank_free = language == "code" or suffixes[language].startswith(".txt")
        assert number == (0 if is_blank_free else 2), language
    prepare(**options)
    assert "is up to date" in capsys.readouterr().out
