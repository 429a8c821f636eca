from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ars_kit.data import prepare
from ars_kit.errors import ConfigError, DataError, PluginError
from ars_kit.host import Host, Plugin
from ars_kit.resolving import resolve
from ars_kit.schema import Choice
from ars_kit.source import NamedSource
from ars_kit.spec import Document, Offer, hookimpl
from ars_kit.tokenizer import TrainBPE
from ars_kit_plugins import stdlib_docs, text_files
from ars_kit_plugins.hubs import HubDataset, KaggleDataset
from ars_kit_plugins.sources import arskit_data_sources
from ars_kit_plugins.stdlib_docs import StandardLibrary, docstrings
from ars_kit_plugins.text_files import TextFiles, read_plain

ROWS = [
    {"n": i, "text": text} for i, text in enumerate(["größer", "NA", "12", "2020-01-01", "a\nb"])
]
TEXTS = [str(row["text"]) for row in ROWS]


def read(path: Path, column: str = "text") -> list[str]:
    return [document.text for document in TextFiles(str(path), column).documents()]


def as_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv() -> bytes:
    return ("n,text\n" + "".join(f'{r["n"]},"{r["text"]}"\n' for r in ROWS)).encode()


def as_parquet(*texts: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in texts] or ROWS), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", as_lines()),
        ("a.jsonl", b"\xef\xbb\xbf" + as_lines()),
        ("a.JSONL.gz", gzip.compress(as_lines(), mtime=0)),
        ("a.json", as_lines()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.json", json.dumps(TEXTS).encode()),
        ("a.json", b"\n \r\n" + as_lines()),
        ("a.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1).encode()),
        ("a.csv", as_csv()),
        ("a.csv", b"\xef\xbb\xbf" + as_csv()),
        ("a.csv.gz", gzip.compress(as_csv(), mtime=0)),
        ("a.parquet", as_parquet()),
        ("brackets [1] *?.parquet", as_parquet()),
        ("brackets [1] *?.csv", as_csv()),
    ],
)
def test_a_row_is_a_document_and_its_text_stays_text(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == TEXTS


def test_lines_of_a_csv_end_as_lines_do_and_fields_may_be_long_or_missing(tmp_path: Path) -> None:
    long = "x" * 200_000
    content = f'n,text\r\n1,"a\r\nb"\r\n\r\n2\r\n3,c,\r\n4,"{long}"'
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert read(tmp_path) == ["a\nb", "c", long]


def test_a_folder_is_read_in_order_without_what_is_hidden_or_of_another_kind(
    tmp_path: Path,
) -> None:
    run = ("run/.arskit/lock", "run/best.json", "run/d2/README.md")
    for name in ("b/2.md", "b/10.txt", "a.txt", ".git/c.txt", ".d.txt", "e.bin", "F.TXT", *run):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["F.TXT", "a.txt", "b/10.txt", "b/2.md"]


def test_links_are_read_as_hugging_face_reads_them(tmp_path: Path) -> None:
    """Those to files are, those to folders are not; the folder that is named may be one."""
    from datasets.data_files import resolve_pattern

    texts, others = tmp_path / "texts", tmp_path / "others"
    for file in (texts / "a" / "1.txt", others / "2.txt"):
        file.parent.mkdir(parents=True)
        file.write_text(file.name)
    try:
        (texts / "b.txt").symlink_to(others / "2.txt")
        (texts / "others").symlink_to(others)
        (texts / "a" / "up").symlink_to(texts)
        (tmp_path / "link").symlink_to(texts)
    except OSError:
        pytest.skip("links need a privilege here")
    assert read(texts) == read(tmp_path / "link") == ["1.txt", "2.txt"]
    found = TextFiles(str(texts)).files()
    assert [str(file) for file in found] == sorted(resolve_pattern("**", str(texts)))
    (texts / "b.txt").unlink()
    (texts / "a" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"others is a link, name the folder it leads to"):
        TextFiles(str(texts)).files()


@pytest.mark.parametrize("written", ["", "files:path=", "{}/../"])
def test_the_folder_of_the_text_is_no_place_for_a_run(tmp_path: Path, written: str) -> None:
    from ars_kit.runs import check_folder

    texts, host = tmp_path / "texts", Host.installed()
    texts.mkdir()
    source = f"{written.format(texts)}{'texts' if '..' in written else texts}"
    settings = resolve({"data.source": source}, {})
    check_folder(texts / "run", settings, host, restart=False)
    with pytest.raises(ConfigError, match="is the folder of the text"):
        check_folder(texts, settings, host, restart=False)


def test_lines_whose_other_columns_change_type_are_read(tmp_path: Path) -> None:
    lines = [
        '{"text": "a", "n": 1}',
        '{"text": "b", "n": {"k": [1]}}',
        '{"text": null}',
        '{"n": 2}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"body": "x"}\n'), ("a.csv", b"body\nx\n"), ("a.parquet", as_parquet())],
)
def test_a_missing_column_names_those_there_are(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    there = "n, text" if name == "a.parquet" else "body"
    with pytest.raises(DataError, match=f"no column 'story'; it has {there}. .*column=NAME"):
        read(tmp_path, "story")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\0cd", "a zero byte at 2"),
        ("a.txt", b"ab\xff\xfecd", "not UTF-8: .* at byte 2"),
        ("a.txt", b"x" * (text_files.CHUNK - 1) + b"\xc3x", f"at byte {text_files.CHUNK - 1}"),
        ("a.txt", b"ab\xc3", "ends inside a character"),
        ("a.txt", "äh".encode("utf-16"), "UTF-16; convert it"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:30], "ended before"),
        ("a.txt.gz", b"hello", "Not a gzipped file"),
        ("a.parquet", b"nonsense", "not a parquet file"),
        ("a.jsonl", b'{"text": "a"}\n{nonsense\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "line 2 holds int"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'\n{"text": "a"}\n{nonsense\n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3\xa4b\\u0000"}\n', "row 2 is not text: .* at 3"),
        ("a.json", b'["a", "b", "\\u0000"]', "row 3 is not text: a zero byte at 0"),
        ("a.csv", b"text\na\nb\0\n", "row 2 is not text: a zero byte at 1"),
        ("a.parquet", as_parquet("a\0"), "row 1 is not text: a zero byte at 1"),
        ("a.csv", b"text\nh\xe4llo\n", "not UTF-8"),
        ("a.csv", b"\n", "no column .text.; it has none"),
        ("a.csv", b'text\n"never closed\n', "line 2: EOF inside string"),
        ("a.csv", b"text,n\nto be, or not,1\n", "line 2 has 3 fields, where its first line has 2"),
        ("a.csv", b"text,n\na,1\nto be, or not,1\n", "line 3 has 3 fields"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    tmp_path: Path,
    name: str,
    content: bytes,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such file or folder"),
        ("empty", "holds no file of .txt"),
        ("a.bin", "of no kind that can be read; there are .txt"),
        ("a" * 300, "no such file or folder: .*aaa"),
    ],
)
def test_an_unusable_path_is_said_before_anything_is_read(
    tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=message):
        TextFiles(str(tmp_path / path)).fingerprint()


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    source = TextFiles(str(tmp_path))
    before = source.fingerprint()
    assert source.fingerprint() == before
    assert json.loads(json.dumps(before))["column"] == "text"
    (tmp_path / "a.txt").write_text("ab")
    assert source.fingerprint() != before


@pytest.mark.parametrize("at", range(-3, 4))
def test_a_large_file_comes_in_parts_that_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 64)
    text = "x" * (64 + at) + "ü\r\ny\rz\r\n" + "größer\n" * 20
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    parts = list(read_plain(tmp_path / "a.txt"))
    assert "".join(p.text for p in parts) == text.replace("\r\n", "\n").replace("\r", "\n")
    assert [p.continues for p in parts] == [False] + [True] * (len(parts) - 1)
    assert max(len(p.text) for p in parts) <= 65


def test_docstrings_are_parsed_not_imported_in_the_order_of_the_source() -> None:
    source = (
        b'"""Top."""\nraise SystemExit\nclass A:\n    """Of\n      A."""\n'
        b'    def f(self): "of f"\ndef g(): "of g"\nif x:\n    def h(): "of h"\n"\\d"\n'
    )
    assert docstrings(source) == "Top.\n\nA\nOf\nA.\n\nf\nof f\n\ng\nof g\n\nh\nof h"
    assert docstrings(b"def (") == docstrings(b"x = 1") == ""


def test_the_standard_library_is_read_in_order_and_without_its_tests(tmp_path: Path) -> None:
    for name in ("b.py", "a/c.py", "test/d.py", "site-packages/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""{name}"""')
    source = StandardLibrary(tmp_path)
    found = [d for d in source.documents() if d.origin.startswith("module:")]
    assert [d.text for d in found] == ["a/c.py", "b.py"]
    before = source.fingerprint()
    (tmp_path / "b.py").write_text('"""Another."""')
    assert source.fingerprint() != before


def test_this_machine_has_documentation() -> None:
    first = next(StandardLibrary().documents())
    assert len(first.text) > 20
    assert StandardLibrary().fingerprint() == StandardLibrary().fingerprint()


def test_a_python_without_documentation_is_told_of_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    assert stdlib_docs._topics() == {}
    with pytest.raises(DataError, match="--data PATH"):
        StandardLibrary(tmp_path).fingerprint()


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(DataError, match="cannot reach dataset hf:owner/name") as caught:
        HubDataset("owner/name", None, "train", "text", None).fingerprint()
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_is_read_at_the_commit_its_fingerprint_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    def info(self: object, name: str, **settings: object) -> SimpleNamespace:
        assert settings["revision"] == "main"
        return SimpleNamespace(sha="c0ffee")

    def load(name: str, config: str, **settings: object) -> list[dict[str, str]]:
        assert (settings["revision"], settings["streaming"]) == ("c0ffee", True)
        return [{"story": "a"}, {"story": "b"}]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubDataset("owner/name", "en", "train", "story", "main")
    assert source.fingerprint()["commit"] == "c0ffee"
    assert [d.text for d in source.documents()] == ["a", "b"]
    source.column = "text"
    with pytest.raises(DataError, match="no column 'text'; it has story"):
        list(source.documents())


def test_kaggle_needs_its_extra_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(DataError, match=r"pip install 'ars-kit\[kaggle\]'"):
        KaggleDataset("owner/name", "text").fingerprint()


def test_kaggle_files_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))
    source = KaggleDataset("owner/name", "text")
    assert source.fingerprint()["kaggle"] == "owner/name"
    assert [d.text for d in source.documents()] == ["a"]
    assert asked == ["owner/name"]


def test_offers_are_made_without_touching_disk_or_network() -> None:
    made = {
        "stdlib": {},
        "files": {"path": "nowhere"},
        "hf": {"name": "owner/name"},
        "kaggle": {"name": "owner/name"},
    }
    assert {offer.name for offer in arskit_data_sources()} == set(made)
    for offer in arskit_data_sources():
        offer.make(**made[offer.name])


def test_offers_are_light_to_import() -> None:
    heavy = "torch, transformers, datasets, pyarrow, pandas, huggingface_hub"
    code = (
        "import sys; import ars_kit_plugins.sources; import ars_kit_plugins.text_files; "
        f"print(sorted(set('{heavy}'.split(', ')) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("fingerprint", "documents", "message"),
    [
        ({}, [Document("a"), None, Document("b")], "at document 1: .*it yielded None, no Document"),
        ({}, [Document("a", Path("a.txt"))], "at document 0: .*a document is no text: Po"),
        ({("a", 1): 2}, [], "saying what it holds: TypeError"),
        ({"a": 1, 2: 3}, [], "saying what it holds: TypeError"),
    ],
)
def test_a_source_that_yields_something_else_is_named(
    tmp_path: Path, fingerprint: Any, documents: list[Any], message: str
) -> None:
    class Source:
        def fingerprint(self) -> Any:
            return fingerprint

        def documents(self) -> Any:
            return iter(documents)

    host = Host()
    module = SimpleNamespace(
        arskit_data_sources=hookimpl(lambda: [Offer("mine", "for a test", Source)])
    )
    host.register(module, Plugin("stranger", "arskit-stranger", "1"))
    with pytest.raises(PluginError, match=f"'mine' of plugin 'stranger' .* failed {message}"):
        prepare(NamedSource(host, Choice("mine")), tokenizer=TrainBPE(300), cache=tmp_path)
    assert not list(tmp_path.iterdir())
