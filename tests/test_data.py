from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from ars_kit import data, spool
from ars_kit.data import Corpus, prepare
from ars_kit.errors import ArsKitError, ConfigError, DataError
from ars_kit.spec import Document
from ars_kit.spool import Spool
from ars_kit.tokenizer import EOS, Pretrained, TrainBPE, load_fast, make_tokenizer
from ars_kit.tokens import Batches, heldout_windows, permuted


class Texts:
    """A source that counts how often it is read; a tuple is one document in parts."""

    def __init__(self, texts: Sequence[str | tuple[str, ...]]) -> None:
        self.texts = texts
        self.reads = 0

    def fingerprint(self) -> dict[str, object]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        for text in self.texts:
            parts = text if isinstance(text, tuple) else (text,)
            for i, part in enumerate(parts):
                yield Document(part, continues=i > 0)


def corpus_of(texts: Sequence[str | tuple[str, ...]], cache: Path) -> Corpus:
    return prepare(Texts(texts), tokenizer=TrainBPE(400), cache=cache)


def text_of(corpus: Corpus, part: str) -> str:
    core = load_fast(corpus.tokenizer_dir)
    return core.decode(list(getattr(corpus, part)), skip_special_tokens=False)


def documents_of(corpus: Corpus, part: str) -> list[str]:
    return text_of(corpus, part).split(EOS)[:-1]


def labels(text: str) -> set[str]:
    """Return the labels of all whole lines: every line of ``make_text`` has one of its own."""
    return {line.partition(":")[0] for line in text.split("\n")[1:-1] if ":" in line}


# --- Preparing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Größe, naïve . 🙂 \t 日本語\r\n  \n", "\x01\x7f\u2028\ufeff a"])
def test_any_text_round_trips(tmp_path: Path, text: str) -> None:
    texts = [f" {i} {text}" for i in range(60)]
    corpus = corpus_of(texts, tmp_path)
    assert corpus.facts.split == "documents"
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "heldout")) == sorted(texts)
    assert len(documents_of(corpus, "heldout")) == corpus.facts.heldout_documents


def test_text_that_spells_the_separator_is_text(tmp_path: Path) -> None:
    texts = [f"{i} {EOS} a" for i in range(40)]
    corpus = corpus_of(texts, tmp_path)
    end = load_fast(corpus.tokenizer_dir).token_to_id(EOS)
    ends = int((corpus.train == end).sum()) + int((corpus.heldout == end).sum())
    assert ends == corpus.facts.documents == 40


def test_the_tokenizer_loads_offline_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    corpus = corpus_of(make_text(30), tmp_path)
    fast = AutoTokenizer.from_pretrained(str(corpus.tokenizer_dir))
    text = "Straße ist größer . 🙂 ' s"
    assert fast.decode(fast(text)["input_ids"]) == text
    assert fast.eos_token == fast.pad_token == EOS
    assert corpus.train.max() < len(fast) <= 400


def test_duplicates_and_blank_documents_are_dropped(tmp_path: Path) -> None:
    texts = make_text(30)
    facts = corpus_of([*texts, "", " \n", *texts[:5], (texts[0][:9], texts[0][9:])], tmp_path).facts
    assert (facts.documents, facts.duplicates) == (30, 6)
    assert facts.data_hash == corpus_of(texts, tmp_path).facts.data_hash
    assert facts.data_hash != corpus_of(texts[::-1], tmp_path).facts.data_hash


@pytest.mark.parametrize("shape", ["few", "many", "dominated", "one-in-parts"])
def test_nothing_held_out_is_trained_on(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str | tuple[str, ...]] = {
        "few": make_text(4),
        "many": make_text(200),
        "dominated": ["\n".join(make_text(100, seed=1)), *make_text(30)],
        "one-in-parts": [tuple(text + "\n" for text in make_text(50))],
    }[shape]
    shown: list[str] = []
    real = data.make_tokenizer

    def spy(spec: Any, given: Iterator[str], directory: Path) -> Any:
        def listen() -> Iterator[str]:
            for text in given:
                shown.append(text)
                yield text

        return real(spec, listen(), directory)

    monkeypatch.setattr(data, "make_tokenizer", spy)
    corpus = corpus_of(texts, tmp_path)
    assert corpus.facts.split == ("documents" if shape == "many" else "spans")
    assert corpus.facts.documents == len(texts)
    heldout = labels(text_of(corpus, "heldout"))
    assert len(heldout) > 5
    assert not heldout & labels(text_of(corpus, "train"))
    assert not heldout & labels("".join(shown))
    assert shown
    share = corpus.facts.heldout_bytes / (corpus.facts.heldout_bytes + corpus.facts.train_bytes)
    assert 0.04 < share < 0.2


@pytest.mark.parametrize(("mine", "theirs"), [("spans", "documents"), ("documents", "spans")])
def test_what_is_held_out_of_one_text_is_trained_on_in_none_beside_it(
    tmp_path: Path, mine: str, theirs: str
) -> None:
    """A large text is divided by document, the same documents among a few others by span."""
    large = make_text(200)
    corpus = corpus_of(large, tmp_path)
    both = documents_of(corpus, "heldout" if mine == "documents" else "train")
    few = [*both[:5], *make_text(5, seed=1)]
    if mine == "spans":
        large, few = few, large
        corpus = corpus_of(large, tmp_path)
    spec = Pretrained(str(corpus.tokenizer_dir), ours=True)
    alone = prepare(Texts(few), tokenizer=spec, cache=tmp_path)
    other = prepare(Texts(few), tokenizer=spec, cache=tmp_path, beside=[corpus])
    assert (corpus.facts.split, other.facts.split) == (mine, theirs)
    heldout = labels(text_of(corpus, "heldout"))
    assert heldout & labels(text_of(alone, "train"))  # which is why it is told of the other
    assert not heldout & labels(text_of(other, "train"))
    assert not labels(text_of(other, "heldout")) & labels(text_of(other, "train"))
    again = prepare(Texts(few), tokenizer=spec, cache=tmp_path, beside=[corpus])
    assert again.tokenizer_dir == other.tokenizer_dir != alone.tokenizer_dir


def test_short_documents_beside_a_long_one_stay_whole(tmp_path: Path) -> None:
    short = [f"{i}: a line" for i in range(100)]
    corpus = corpus_of(["\n".join(make_text(100)), *short], tmp_path)
    assert corpus.facts.split == "spans"
    sides = [set(documents_of(corpus, part)) & set(short) for part in ("train", "heldout")]
    assert len(sides[0]) + len(sides[1]) == len(short)
    assert sides[1]


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    texts = make_text(120)
    before = set(documents_of(corpus_of(texts[40:], tmp_path), "heldout"))
    after = set(documents_of(corpus_of(texts, tmp_path), "heldout"))
    assert before < after


@given(text=st.text(min_size=1), fraction=st.floats(0.05, 0.5))
@settings(max_examples=60, deadline=None)
def test_spans_end_between_characters_and_leave_a_gap(
    tmp_path_factory: pytest.TempPathFactory, text: str, fraction: float
) -> None:
    whole = text.encode("utf-8", "replace").decode()
    pile = Spool(tmp_path_factory.mktemp("spool") / "spool")
    if not whole.strip():
        with pytest.raises(DataError, match="no text"):
            pile.fill(Texts([text]), lambda *_: None)
        pile.close()
        return
    pile.fill(Texts([text]), lambda *_: None)
    pile.divide(fraction)
    train = "".join(piece for piece, _ in pile.pieces("train"))
    heldout = "".join(piece for piece, _ in pile.pieces("heldout"))
    pile.close()
    assert whole.startswith(train)
    assert whole.endswith(heldout)
    if heldout:
        assert len(train) + len(heldout) < len(whole)


def test_long_documents_are_cut_where_their_tokens_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice(["word", " größer", "\n", "\n\n", "  ", "12"]) for _ in range(20_000))
    whole = corpus_of([text], tmp_path / "a")
    monkeypatch.setattr(spool, "PIECE", 3000)
    pieces = corpus_of([text], tmp_path / "b")
    assert np.array_equal(whole.train, pieces.train)
    assert np.array_equal(whole.heldout, pieces.heldout)


def test_a_tokenizer_learns_from_all_of_a_large_text(tmp_path: Path) -> None:
    pile = Spool(tmp_path / "spool")
    pile.fill(Texts(make_text(400)), lambda *_: None)
    pile.divide(0.1)
    every = [text for text, _ in pile.pieces("train")]
    total = sum(len(t.encode()) for t in every)
    some = list(pile.sample(total // 4))
    assert list(pile.sample(total)) == every
    pile.close()
    assert total / 4 <= sum(len(t.encode()) for t in some) < total / 3
    places = [every.index(text) for text in some]
    assert max(np.diff([0, *places, len(every)])) <= 8


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_said(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        corpus_of(texts, tmp_path)


def test_too_little_text_is_said_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too little text: \d+ training tokens where .* 10000"):
        prepare(Texts(["word " * 50]), tokenizer=TrainBPE(300), cache=tmp_path, need_train=10000)


# --- The cache ---------------------------------------------------------------------------------


def test_a_second_run_reads_nothing(tmp_path: Path) -> None:
    source = Texts(make_text(30))
    first = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    second = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    assert source.reads == 1
    assert first.facts == second.facts
    assert isinstance(second.train, np.memmap)
    assert [p.name for p in tmp_path.iterdir()] == [first.tokenizer_dir.parent.name]
    prepare(source, tokenizer=TrainBPE(401), cache=tmp_path)
    prepare(source, tokenizer=TrainBPE(400), cache=tmp_path, heldout_fraction=0.2)
    assert source.reads == 3


@pytest.mark.parametrize(
    "name",
    [
        "train.bin",
        "heldout.bin",
        "corpus.json",
        "tokenizer",
        "passages.npy",
        "train.ends",
        "division.npy",
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, name: str) -> None:
    source = Texts(make_text(30))
    first = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    path = first.tokenizer_dir.parent / name
    if name == "tokenizer":
        (path / "tokenizer.json").write_text("{}")
    else:
        path.write_bytes(b"" if path.suffix == ".npy" else path.read_bytes()[:-2])
    second = prepare(source, tokenizer=TrainBPE(400), cache=tmp_path)
    assert (source.reads, second.facts) == (2, first.facts)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Texts):
        def documents(self) -> Iterator[Document]:
            yield Document("a")
            raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        prepare(Broken([]), tokenizer=TrainBPE(400), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    old, new, mine = f"{'a' * data.DIGITS}-x1_old", f"{'b' * data.DIGITS}-new", "my-thesis"
    for name, age in ((old, 2 * data.ABANDONED), (new, 60.0), (mine, 9 * data.ABANDONED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.spool").write_text("x")
        for path in (tmp_path / name / "text.spool", tmp_path / name):
            then = path.stat().st_mtime - age
            os.utime(path, (then, then))
    corpus = corpus_of(make_text(3), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {new, mine, corpus.tokenizer_dir.parent.name}


def test_a_preparation_that_ends_while_it_is_looked_at_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = tmp_path / f"{'a' * data.DIGITS}-x"
    temp.mkdir()
    (temp / "text.spool").write_text("x")
    real = Path.iterdir

    def looked_at(path: Path) -> Iterator[Path]:
        found = list(real(path))
        if path == temp:
            (temp / "text.spool").unlink(missing_ok=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", looked_at)
    assert corpus_of(make_text(3), tmp_path).facts.documents == 3


def test_of_two_preparations_at_once_both_have_the_corpus(tmp_path: Path) -> None:
    class Overtaken(Texts):
        def documents(self) -> Iterator[Document]:
            if not self.reads:
                self.reads = 1
                prepare(self, tokenizer=TrainBPE(400), cache=tmp_path)
            yield from super().documents()

    corpus = prepare(Overtaken(make_text(30)), tokenizer=TrainBPE(400), cache=tmp_path)
    assert corpus.facts.documents == 30
    assert [p.name for p in tmp_path.iterdir()] == [corpus.tokenizer_dir.parent.name]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArsKitError, match="no space left to write"):
        corpus_of(make_text(3), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Pretrained tokenizers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory whose end-of-text token is not ours, and which says to truncate."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    made = make_tokenizer(TrainBPE(300), iter(make_text(5)), folder / "first")
    made.core.enable_truncation(4)
    fast = PreTrainedTokenizerFast(tokenizer_object=made.core, eos_token="<end>")
    fast.save_pretrained(folder / "base")
    return folder / "base"


def test_a_pretrained_tokenizer_is_used_as_it_is(base: Path, tmp_path: Path) -> None:
    texts = make_text(100)
    corpus = prepare(Texts(texts), tokenizer=Pretrained(str(base)), cache=tmp_path)
    core = load_fast(base)
    end = core.token_to_id("<end>")
    assert corpus.facts.split == "documents"
    assert int((corpus.train == end).sum()) == 100 - corpus.facts.heldout_documents
    first = corpus.train[: int(np.argmax(corpus.train == end))]
    assert core.decode(list(first)) in texts


def test_a_home_is_found_where_no_shell_has_written_it_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    source = Texts(make_text(9))
    home = prepare(source, tokenizer=Pretrained("~/base"), cache=tmp_path / "cache")
    whole = prepare(source, tokenizer=Pretrained(str(base)), cache=tmp_path / "cache")
    assert home.facts == whole.facts


def test_another_tokenizer_under_the_same_name_is_another_corpus(
    base: Path, tmp_path: Path
) -> None:
    name = tmp_path / "member"
    shutil.copytree(base, name)
    source = Texts(make_text(30))
    before = prepare(source, tokenizer=Pretrained(str(name)), cache=tmp_path / "cache")
    shutil.rmtree(name)
    make_tokenizer(TrainBPE(500), iter(make_text(5)), name)
    after = prepare(source, tokenizer=Pretrained(str(name)), cache=tmp_path / "cache")
    assert source.reads == 2
    assert before.facts.tokenizer_hash != after.facts.tokenizer_hash
    assert before.facts.data_hash == after.facts.data_hash


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "cannot load the tokenizer"), ({"model_type": "qwen2"}, "holds no tokenizer")],
)
def test_a_base_without_a_tokenizer_is_said(
    tmp_path: Path, config: dict[str, str] | None, message: str
) -> None:
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message) as caught:
        prepare(Texts(["a"]), tokenizer=Pretrained(str(tmp_path)), cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_training_a_tokenizer_is_repeatable(tmp_path: Path) -> None:
    texts = make_text(50)
    hashes = {make_tokenizer(TrainBPE(600), iter(texts), tmp_path / str(i)).hash for i in range(3)}
    assert len(hashes) == 1


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts at 257"):
        make_tokenizer(TrainBPE(256), iter(["a"]), tmp_path)


# --- Batches -----------------------------------------------------------------------------------


@given(size=st.integers(1, 700), key=st.integers(0, 2**70))
@settings(max_examples=40, deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key=key) for i in range(size)) == list(range(size))


def test_permutation_spreads_and_differs_by_key() -> None:
    size = 2000
    orders = np.array([[permuted(i, size, key=k) for i in range(size)] for k in range(6)])
    for order in orders:
        # Neither neighbours nor the whole keep their order; chance is 1 / sqrt(size) = 0.022.
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
    for i in range(6):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.01


def test_permutation_of_a_huge_range_is_quick() -> None:
    size = 10**12 + 39
    found = {permuted(i, size, key=1) for i in range(1000)}
    assert len(found) == 1000
    assert max(found) < size
    assert max(found) > 0.9 * size


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    step=st.integers(0, 300),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_a_step_reads_the_same_whoever_reads_it(
    world: int, micro: int, step: int, seed: int, start: int
) -> None:
    stream = np.arange(5000, dtype=np.uint16)

    def at(rank: int, world: int) -> Batches:
        return Batches(
            stream, sequence_length=16, batch_size=8, seed=seed, rank=rank, world_size=world,
            start=start,
        )  # fmt: skip

    whole = at(0, 1).batch(step)
    parts = [at(rank, world).batch(step, m, micro) for rank in range(world) for m in range(micro)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole[:, 1:], whole[:, :-1] + 1)
    assert whole.dtype == np.int64


@given(length=st.integers(2, 40), extra=st.integers(0, 39), epochs=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_an_epoch_reads_every_window_once_and_the_next_cuts_elsewhere(
    length: int, extra: int, epochs: int
) -> None:
    stream = np.arange(length * 20 + extra)
    batches = Batches(stream, sequence_length=length, batch_size=1, seed=3)
    for epoch in range(epochs):
        first = epoch * batches.windows
        starts = sorted(int(batches.batch(first + i)[0, 0]) for i in range(batches.windows))
        assert 0 <= starts[0] < length
        assert set(np.diff(starts)) == {length}
        assert starts[0] == 0 or epoch
    offsets = {int(batches.batch(e * batches.windows)[0, 0]) % length for e in range(30)}
    assert len(offsets) > 1


def test_a_lineage_goes_on_where_it_stopped() -> None:
    one = Batches(np.arange(1000), sequence_length=10, batch_size=2, seed=3)
    later = Batches(np.arange(1000), sequence_length=10, batch_size=2, seed=3, start=10)
    assert np.array_equal(one.batch(8), later.batch(3))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="over 3 processes"):
        Batches(np.arange(100), sequence_length=10, batch_size=4, seed=0, world_size=3)
    batches = Batches(np.arange(100), sequence_length=10, batch_size=4, seed=0, world_size=2)
    with pytest.raises(ConfigError, match="3 equal micro-batches"):
        batches.batch(0, 0, 3)


def test_a_stream_too_short_for_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="20 training tokens do not hold two sequences of 10"):
        Batches(np.arange(20), sequence_length=10, batch_size=1, seed=0)


@given(tokens=st.integers(0, 200), context=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_held_out_windows_predict_each_token_once(tokens: int, context: int) -> None:
    windows = list(heldout_windows(np.arange(tokens, dtype=np.uint16), context))
    assert all(2 <= len(w) <= context + 1 and w.dtype == np.int64 for w in windows)
    predicted = [int(t) for w in windows for t in w[1:]]
    assert predicted == list(range(1, tokens))
    limited = list(heldout_windows(np.arange(tokens), context, limit=25))
    assert sum(len(w) - 1 for w in limited) == min(25, max(0, tokens - 1))
