"""Two processes (gloo, CPU) bear, teach and hold their members as one process does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import rendezvous, run_two

STRATEGIES = {"distill": "distill:weight=2", "ewc": "ewc:sequences=2,strength=100"}


def train(folder: Path, texts: str) -> None:
    """Train a small family under each strategy that has a loss of its own."""
    from ars_kit.cli import cli

    for name, strategy in STRATEGIES.items():
        options = [
            "run", "--members", "d2,d3", "--strategy", strategy, "--iterations", "2,3",
            "--data", texts, "--sequence-length", "32", "--batch-size", "4", "--device", "cpu",
            "--set", "family.vocab_size=300", "--set", "family.aspect=4",
            "--out", str(folder / name),
        ]  # fmt: skip
        cli.main(options, standalone_mode=False)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, text_folder: Path, cache: Path
) -> dict[int, Path]:
    """The run folders, by the number of processes that trained them."""
    found = {n: tmp_path_factory.mktemp(f"world{n}") for n in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARSKIT_CACHE", str(cache))
        train(found[1], str(text_folder))
    shared = {**rendezvous(), "ARSKIT_CACHE": str(cache)}
    run_two(__file__, found[2], text_folder, environment=shared)
    return found


def metrics(folder: Path, strategy: str, member: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / strategy / member / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_s_loss_is_minimised_alike(trained: dict[int, Path], strategy: str) -> None:
    one, two = (
        [
            json.loads(line)["loss"]
            for line in (trained[n] / strategy / "d3" / "history.jsonl").read_text().splitlines()
        ]
        for n in (1, 2)
    )
    assert len(one) == 9
    assert two == pytest.approx(one, abs=2e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_process_s_products_are_counted(trained: dict[int, Path], strategy: str) -> None:
    """A batch's are shared among the processes; what each does alike is counted for each."""
    one, two = (metrics(trained[n], strategy, "d3") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["flops"] == two["flops"]
    times = {"distill": 1, "ewc": 2}[strategy]
    assert one["loss_flops"] > 0
    assert two["loss_flops"] == pytest.approx(times * one["loss_flops"])
    assert two["setup_flops"] == pytest.approx(2 * one["setup_flops"])


if __name__ == "__main__":
    train(Path(sys.argv[2]), sys.argv[3])
