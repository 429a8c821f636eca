"""``--document-mask``: a document in a packed window is computed as if it stood alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quiet
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MambaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from ars_kit.compiling import compiled
from ars_kit.data import prepare
from ars_kit.errors import ConfigError
from ars_kit.feed import Feed
from ars_kit.fitting import foreseen
from ars_kit.host import Host
from ars_kit.live import LiveBytes
from ars_kit.memory import RECIPES, ChunkedLoss, whole_loss
from ars_kit.memory import prepare as prepare_model
from ars_kit.models import build
from ars_kit.packing import forward, keeps_apart
from ars_kit.plan import RunPlan, plan_run
from ars_kit.resolving import resolve
from ars_kit.runs import execute
from ars_kit.source import NamedSource, parse_source
from ars_kit.texts import open_corpus
from ars_kit.tokenizer import Pretrained
from ars_kit.tokens import Batches, Replayed, positions_in

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.3,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3,
           "use_sliding_window": True}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "sliding": Qwen2Config(**SIZES, **SLIDING),
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
LENGTHS = ((7, 1, 4), (2, 5, 5))
"""Of the documents in each of two windows."""
POSITIONS = torch.tensor([[p for n in row for p in range(n)] for row in LENGTHS])
TOKENS = torch.randint(1, 300, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_document_in_a_window_has_the_logits_it_has_alone(config: PretrainedConfig) -> None:
    model = build(config, seed=0).eval()
    with torch.no_grad():
        packed = forward(model, TOKENS[:, :-1], POSITIONS).logits
        mixed = forward(model, TOKENS[:, :-1]).logits
        assert torch.equal(mixed, model(input_ids=TOKENS[:, :-1]).logits)  # off, nothing changes
        for row, lengths in enumerate(LENGTHS):
            begins = np.cumsum([0, *lengths])
            for begin, end in itertools.pairwise(begins):
                alone = model(input_ids=TOKENS[row : row + 1, begin:end]).logits[0]
                torch.testing.assert_close(packed[row, begin:end], alone, rtol=0, atol=1e-5)
    assert (packed - mixed)[:, 7:].abs().max() > 0.01
    assert keeps_apart(model)


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradients_of_packed_documents_are_those_of_each_alone(name: Any) -> None:
    """Each recipe's loss, activations computed again included; every target counts."""

    def made() -> Any:
        model = build(CONFIGS["qwen2"], seed=0)
        recipe = RECIPES[name]
        prepare_model(model, recipe)
        model.float().train()
        return model, ChunkedLoss(model, 300 * 5) if recipe.chunked else whole_loss

    model, loss_of = made()
    _, loss = loss_of(model, TOKENS, POSITIONS)
    loss.backward()
    found = [loss, *(p.grad for p in model.parameters())]
    model, loss_of = made()
    total: Any = 0.0
    for row, lengths in enumerate(LENGTHS):
        begins = np.cumsum([0, *lengths])
        for begin, end in itertools.pairwise(begins):
            _, part = loss_of(model, TOKENS[row : row + 1, begin : end + 1])
            total = total + part * (end - begin) / 24
    total.backward()
    torch.testing.assert_close(
        found, [total, *(p.grad for p in model.parameters())], rtol=1e-4, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_layers_keep_documents_apart() -> None:
    torch._dynamo.reset()
    model = build(CONFIGS["llama"], seed=0).train()
    plain = forward(model, TOKENS, None).logits, forward(model, TOKENS[:, :-1], POSITIONS).logits
    with compiled(model, backend="eager"):
        found = (
            forward(model, TOKENS, None).logits,
            forward(model, TOKENS[:, :-1], POSITIONS).logits,
        )
    torch._dynamo.reset()
    torch.testing.assert_close(found, plain)


def test_an_architecture_without_positions_is_found_out() -> None:
    mamba = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not keeps_apart(build(mamba, seed=0))


# --- Positions ---------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    begin=st.integers(0, 60),
    length=st.integers(1, 40),
)
def test_positions_restart_behind_every_end(lengths: list[int], begin: int, length: int) -> None:
    ends = np.cumsum(lengths)
    last, expected = 0, []
    for i in range(length):
        last = i if i and begin + i in ends else last
        expected.append(i - last)
    assert positions_in(ends, begin, length).tolist() == expected


def test_a_feed_sends_the_positions_of_what_it_sends() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    ends = np.arange(7, 1000, 7)

    def read(first: int, **more: Any) -> Batches:
        return Batches(
            stream + first, sequence_length=16, batch_size=4, seed=0, ends=ends + 3 * first, **more
        )

    mixed = Replayed(read(0), [(read(1), 50)], 0.5)
    for micro in Feed(mixed, 2, torch.device("cpu"), apart=True).take(3):
        assert micro.positions is not None
        assert micro.window.shape == (2, 17)
        for row, found in zip(micro.window[:, :-1], micro.positions, strict=True):
            # Every seventh token begins a document; three later in the text that is replayed.
            first = int(row[0])
            at = [i for i in range(16) if found[i] == 0 and i]
            assert at == [i for i in range(1, 16) if (first + i) % 7 == 0] or at == [
                i for i in range(1, 16) if (first - 1 + i) % 7 == 3
            ]


def test_documents_are_known_where_a_text_spells_their_end(cache: Path, tmp_path: Path) -> None:
    """What a text spells is no boundary: in a chat's text each turn ends with such a marker."""
    rows = [f"{i} one<|endoftext|> two three{i % 7}" for i in range(400)]
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(rows) + "\n", "utf-8")
    flags = {"data.source": str(tmp_path / "rows.csv"), "family.vocab_size": 300}
    settings, host = resolve(flags, {}), Host.installed()
    ours = open_corpus(settings, host, cache)
    source = NamedSource(host, parse_source(settings.data.source, host))
    corpus = prepare(source, tokenizer=Pretrained(str(ours.tokenizer_dir)), cache=cache)
    for found, markers in ((ours, 1), (corpus, 2)):
        assert len(found.train_ends) == 400 - found.facts.heldout_documents
        assert found.train_ends[-1] == found.facts.train_tokens == len(found.train)
        assert (found.train[found.train_ends - 1] == 0).all()
        assert (found.train == 0).sum() == markers * len(found.train_ends)


# --- Runs --------------------------------------------------------------------------------------


def planned(text: Path, **flags: Any) -> RunPlan:
    small = {
        "family.members": "d2,d3", "family.vocab_size": 300, "family.aspect": 4.0,
        "train.iterations": (2, 1), "train.batch_size": 4, "data.source": str(text),
        "data.sequence_length": 64, "data.heldout_tokens": 256, "train.accumulation": 2,
        "data.document_mask": True,
    }  # fmt: skip
    return plan_run(resolve({**small, **flags}, {}), Host.installed())


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a dozen words."""
    folder = tmp_path_factory.mktemp("rows")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [f"{i} " + " ".join(words[(i * 7 + j) % 10] for j in range(8)) for i in range(600)]
    (folder / "rows.csv").write_text("text\n" + "\n".join(rows) + "\n", "utf-8")
    return folder


def test_a_masked_run_sees_its_mask_and_is_judged_as_any(
    short_documents: Path, cache: Path, tmp_path: Path
) -> None:
    host = Host.installed()
    losses = []
    for masked in (True, False):
        plan = planned(short_documents, **{
            "data.document_mask": masked, "family.strategy": "distill",
            "run.heldout_every": 3,
        })  # fmt: skip
        out = tmp_path / str(masked)
        metrics, _ = execute(plan, host, out, cache, watcher=Quiet())
        history = (out / "d3" / "history.jsonl").read_text("utf-8").splitlines()
        losses.append([row.partition('"loss":')[2][:12] for row in history])
        assert metrics[1]["heldout_loss"] > 0
    assert losses[0] != losses[1]


def test_the_mask_s_memory_is_foreseen(short_documents: Path) -> None:
    host = Host.installed()
    plan = planned(short_documents, **{"family.members": "d3", "data.sequence_length": 512})
    member, recipe = plan.members[0], RECIPES["full"]
    expected = foreseen(plan, host, member, recipe).peak
    with LiveBytes() as live:
        model = build(member.config, seed=0).train()
        positions = torch.arange(512).remainder(50).expand(2, -1)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            logits, loss = whole_loss(model, torch.zeros((2, 513), dtype=torch.int64), positions)
            del logits
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert expected == pytest.approx(live.peak, rel=0.1)


def test_what_cannot_keep_documents_apart_is_refused(
    short_documents: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ars_kit import dealing

    monkeypatch.setattr(dealing, "packing", SimpleNamespace(keeps_apart=lambda _: False))
    with pytest.raises(ConfigError, match="a qwen2 cannot keep the documents of a sequence apart"):
        execute(planned(short_documents), Host.installed(), tmp_path, cache, watcher=Quiet())
    assert not (tmp_path / "d2").exists()
