"""Two processes (gloo, CPU) under FSDP2: one bears a member, and the other never holds it whole."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import rendezvous, run_two
from test_ranks import FSDP, rows, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ars_kit import dealing, family, readying
from ars_kit.errors import ArsKitError, PluginError
from ars_kit.sharding import gathered

GROWN, TAUGHT, LOOKS = "grown", "taught", "looks"
RUNS = (GROWN, TAUGHT)


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, of those made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            tensor = getattr(found, "_local_tensor", found)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@contextmanager
def watched(home: Path, rank: int) -> Iterator[None]:
    """Note what a birth holds at its peak, and whether what was dealt out is what was borne."""
    plain, load, bear = dealing.delivered, readying.load_named_state, dealing.bear
    borne: dict[str, Any] = {}
    peak = Peak()

    def bear_once(*given: Any) -> Any:
        assert rank == 0, "this process has nothing to bear"
        born = bear(*given)
        borne["weights"] = {n: w.clone() for n, w in dealing.weights_of(born.model).items()}
        borne["state"] = born.opt_state
        return born

    def deliver(cradle: Any, member: Any, accelerator: Any) -> Any:
        with peak:
            born = plain(cradle, member, accelerator)
        weights = gathered(dealing.weights_of(born.model), keep=rank == 0)
        borne["same"] = all(torch.equal(w, weights[n]) for n, w in borne.get("weights", {}).items())
        sizes = [w.numel() * w.element_size() for w in dealing.weights_of(born.model).values()]
        note(member.name, sizes)
        return born

    def load_state(optimizer: Any, state: Any, **options: Any) -> None:
        with peak:
            load(optimizer, state, **options)
        whole = gathered(dict(optimizer.state), keep=rank == 0)
        names = {
            p: n
            for g in optimizer.param_groups
            for n, p in zip(g["names"], g["params"], strict=True)
        }
        if rank == 0:
            borne["same"] &= all(
                torch.equal(value, whole[p][key])
                for p, name in names.items()
                for key, value in borne["state"].get(name, {}).items()
            )
            borne["same"] &= any(e.get("exp_avg") is not None for e in borne["state"].values())
        note("d3", json.loads((home / f"d3-{rank}").read_text())["sizes"])

    def note(name: str, sizes: list[int]) -> None:
        said = {"peak": peak.most, "sizes": sizes, "same": borne["same"]}
        (home / f"{name}-{rank}").write_text(json.dumps(said))

    family.delivered, readying.load_named_state = deliver, load_state
    dealing.bear = bear_once
    try:
        yield
    finally:
        family.delivered, readying.load_named_state = plain, load
        dealing.bear = bear


def options(home: Path, name: str) -> list[str]:
    base = ["--base", str(home / "one" / GROWN / "d3"), "--depth", "grow"]
    return ["--iterations", "2,2"] + {
        GROWN: [],
        TAUGHT: [*base, "--strategy", "distill:weight=2", "--base-optimizer", "muon"],
        LOOKS: [*base, "--strategy", "ewc:sequences=2"],
    }[name]


def rank_main(rank: int, home: Path, texts: str) -> None:
    os.environ.update(FSDP)
    with watched(home, rank):
        train(home / "two" / GROWN, texts, *options(home, GROWN))
    train(home / "two" / TAUGHT, texts, *options(home, TAUGHT))

    def words(name: str, *more: str) -> None:
        try:
            train(home / "two" / name, texts, *more)
        except ArsKitError as error:
            said = f"{type(error).__name__}: {error}"
            (home / f"{name}{rank}").write_text(said)

    words(LOOKS, *options(home, LOOKS))
    bear = dealing.bear

    def unsendable(*given: Any) -> Any:
        born = bear(*given)
        born.seed = dealing.replace(born.seed, hints={"a": lambda: None})
        return born

    def failing(*given: Any) -> Any:
        raise PluginError("it is no use")

    def broken(*given: Any) -> Any:
        raise ZeroDivisionError("a bug")

    for name, way in (("unsendable", unsendable), ("failing", failing)):
        dealing.bear = way
        words(name)
    dealing.bear = broken
    try:
        words("broken")
    except ZeroDivisionError as error:
        (home / f"broken{rank}").write_text(repr(error))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, cache: Path) -> Path:
    """Run folders in ``one`` of one process, in ``two`` of two, and what these noted."""
    home, texts = tmp_path_factory.mktemp("births"), str(text_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARSKIT_CACHE", str(cache))
        for name in RUNS:
            train(home / "one" / name, texts, *options(home, name))
    shared = {**rendezvous(), "ARSKIT_CACHE": str(cache)}
    run_two(__file__, home, texts, environment=shared)
    return home


def noted(home: Path, member: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / f"{member}-{rank}").read_text())
    return found


def test_what_is_dealt_out_is_what_was_borne_to_the_bit(trained: Path) -> None:
    """Weights of both members, and the moments that d3 inherits."""
    assert noted(trained, "d2", 0)["same"]
    assert noted(trained, "d3", 0)["same"]


def test_who_does_not_bear_holds_its_part_and_one_tensor(trained: Path) -> None:
    main, other = (noted(trained, "d3", rank) for rank in range(2))
    total, largest = sum(main["sizes"]), max(main["sizes"])
    part = 3 * total / 2  # weights and two moments
    assert other["peak"] < 1.1 * part + 2.2 * largest < 3 * total
    assert main["peak"] > 4 * total  # the count does see what is whole


@pytest.mark.parametrize("name", RUNS)
def test_sharded_births_train_as_those_of_one_process(trained: Path, name: str) -> None:
    for member in ("d2", "d3"):
        for record in ("history", "heldout"):
            one, two = (rows(trained / world / name, member, record) for world in ("one", "two"))
            losses = [[r["loss"] for r in record] for record in (one, two)]
            assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize("name", RUNS)
def test_a_birth_s_figures_are_those_of_one_process(trained: Path, name: str) -> None:
    one, two = (
        json.loads((trained / world / name / "d3" / "metrics.json").read_text())
        for world in ("one", "two")
    )
    for key in ("preserves", "inherited_share", "optimizer_state", "phase", "note"):
        assert one["birth"][key] == two["birth"][key]
    assert two["birth"]["birth_logits_difference"] < 1e-4
    assert two["setup_flops"] == one["setup_flops"]  # borne once, not by each
    assert two["loss_flops"] == pytest.approx(one["loss_flops"])


def test_what_fails_at_a_birth_fails_everywhere_with_one_line(trained: Path) -> None:
    for name, line in (
        (LOOKS, "ConfigError: inheritance strategy 'ewc' of plugin 'strategies'"),
        ("unsendable", "PluginError: inheritance strategy 'progressive' of plugin 'strategies'"),
        ("failing", "PluginError: it is no use"),
    ):
        first, second = ((trained / f"{name}{rank}").read_text() for rank in range(2))
        assert first == second
        assert first.startswith(line), first
    assert (trained / "broken0").read_text() == "ZeroDivisionError('a bug')"
    assert (trained / "broken1").read_text() == (
        "ArsKitError: the main process failed: ZeroDivisionError('a bug')"
    )


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
