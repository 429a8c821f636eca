from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from ars_kit import data
from ars_kit.data import Corpus, prepare
from ars_kit.errors import DataError
from ars_kit.spec import Document
from ars_kit.tokens import Batches, TrainBPE, heldout_windows, load_fast, permuted
from ars_kit_plugins.stdlib_docs import docstrings
from ars_kit_plugins.text_files import CHUNK, TextFiles, read_plain


class Texts:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.reads = 0

    def fingerprint(self) -> dict[str, object]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        yield from (Document(t) for t in self.texts)


def corpus_of(texts: list[str], cache: Path) -> Corpus:
    return prepare(Texts(texts), tokenizer=TrainBPE(400), cache=cache)


def text_of(corpus: Corpus, part: str) -> str:
    return load_fast(corpus.tokenizer_dir).decode(list(getattr(corpus, part)))


def test_text_round_trips_through_tokens(tmp_path: Path) -> None:
    text = "Größe, naïve 🙂 \t 日本語\n" * 200
    corpus = corpus_of([text], tmp_path)
    assert text_of(corpus, "train").strip()[:500] == text.strip()[:500]


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    texts = make_text(30)
    facts = corpus_of([*texts, *texts[:5]], tmp_path).facts
    assert (facts.documents, facts.duplicates) == (30, 5)


@pytest.mark.parametrize("count", [2, 200])
def test_nothing_held_out_is_trained_on(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    real = data._capped

    def spy(texts: Iterator[str]) -> Iterator[str]:
        for text in real(texts):
            shown.append(text)
            yield text

    monkeypatch.setattr(data, "_capped", spy)
    corpus = corpus_of(make_text(count), tmp_path)
    assert corpus.facts.split == ("documents" if count > 20 else "spans")
    heldout = text_of(corpus, "heldout")
    # Every line starts with a number of its own, so a line that leaked is found.
    lines = {line.partition(":")[0] for line in heldout.splitlines()[1:-1]}
    assert len(lines) >= 4
    for side in (text_of(corpus, "train"), "\n".join(shown)):
        assert not lines & {line.partition(":")[0] for line in side.splitlines()}
    share = corpus.facts.heldout_bytes / (corpus.facts.heldout_bytes + corpus.facts.train_bytes)
    assert 0.04 < share < 0.2


def test_a_second_run_reads_nothing(tmp_path: Path) -> None:
    source = Texts(make_text(30))
    first = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    second = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    assert source.reads == 1
    assert first.facts == second.facts
    assert [p.name for p in tmp_path.iterdir()] == [first.tokenizer_dir.parent.name]


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Texts):
        def documents(self) -> Iterator[Document]:
            yield Document("a")
            raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        prepare(Broken([]), tokenizer=TrainBPE(400), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_said(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        corpus_of(texts, tmp_path)


def test_too_little_text_is_said_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too little text: \d+ training tokens where .* 10000"):
        prepare(Texts(["word " * 50]), tokenizer=TrainBPE(300), cache=tmp_path, need_train=10000)


@given(size=st.integers(1, 700), key=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key=key) for i in range(size)) == list(range(size))


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    step=st.integers(0, 300),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_a_step_reads_the_same_whoever_reads_it(
    world: int, micro: int, step: int, seed: int
) -> None:
    stream = np.arange(5000, dtype=np.uint16)
    whole = Batches(stream, sequence_length=16, batch_size=8, seed=seed).batch(step)
    parts = [
        Batches(
            stream, sequence_length=16, batch_size=8, seed=seed, rank=rank, world_size=world
        ).batch(step, m, micro)
        for rank in range(world)
        for m in range(micro)
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole[:, 1:], whole[:, :-1] + 1)


def test_an_epoch_reads_every_window_once() -> None:
    batches = Batches(np.arange(1000), sequence_length=10, batch_size=1, seed=3)
    starts = [int(batches.batch(i)[0, 0]) for i in range(batches.windows)]
    assert sorted(starts) == [10 * i for i in range(batches.windows)]
    later = Batches(np.arange(1000), sequence_length=10, batch_size=1, seed=3, start=5)
    assert int(later.batch(0)[0, 0]) == starts[5]


def test_held_out_windows_predict_each_token_once() -> None:
    predicted = np.concatenate([w[1:] for w in heldout_windows(np.arange(103), 10)])
    assert np.array_equal(predicted, np.arange(1, 103))
    assert sum(len(w) - 1 for w in heldout_windows(np.arange(103), 10, limit=25)) == 25


def test_tables_and_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"Zeile {i} größer"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "b.csv").write_text("text\n" + "\n".join(r["text"] for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfeins\r\nzwei")
    (tmp_path / "e.bin").write_bytes(b"\0\1")
    found = [d.text for d in TextFiles(str(tmp_path)).documents()]
    assert found == [r["text"] for r in rows] * 3 + ["eins\nzwei"]


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no column 'text'; it has body"):
        list(TextFiles(str(tmp_path)).documents())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\0cd", "a zero byte at 2"),
        ("a.txt", b"ab\xff\xfecd", "not UTF-8"),
        ("a.txt", b"ab\xc3", "ends inside a character"),
        ("a.parquet", b"nonsense", "cannot read"),
        ("a.jsonl", b"{nonsense", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(TextFiles(str(tmp_path)).documents())
    assert "\n" not in str(caught.value)


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "größer als eine Zeile\n" * (3 * CHUNK // 20)
    path.write_text(text, encoding="utf-8")
    pieces = [d.text for d in read_plain(path)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * CHUNK


def test_docstrings_are_parsed_not_imported() -> None:
    source = b'"""Top."""\nraise SystemExit\nclass A:\n    """Of A."""\n'
    assert docstrings(source) == "Top.\n\nA\nOf A."
    assert docstrings(b"def (") == ""
