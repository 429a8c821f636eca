"""How fast ``arskit serve`` answers, against ``transformers serve`` and ``generate()``.

All servers hold the same checkpoint and stand ready at once; in each round every one of them gets
the same load in an order drawn anew, while the others stand still. Ratios are of the same round.
Clients stream ``/v1/completions``, greedily, and answers have a fixed number of tokens. The time to
the first token is that to the first text; between tokens is the rest of an answer's time over its
other tokens. Medians over the clients of a round, then over rounds.

``--engine vllm`` also measures the vLLM behind the server, asked directly: what the way through the
server costs. ``--alone`` leaves ``transformers serve`` and ``generate()`` out.

Beside them stand the products with the model's matrices alone: what any server would take that
keeps the arithmetic and computes nothing else.

A server that runs already is measured too: ``--also vllm=http://127.0.0.1:9000/v1=MODEL``.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from ending import run
from speed.checkpoints import SHAPES, prompts, tokens_of, train, write_checkpoint
from speed.clients import Load, measure
from speed.figures import facts, spread
from speed.matrices import Matrices
from speed.servers import (
    DIRECT,
    PROXY,
    TRANSFORMERS,
    Server,
    arskit,
    on_cores,
    transformers,
    version_of_vllm,
    vllm,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

GENERATE, MATRICES = "generate()", "the matrices alone"
DEFAULT = "arskit serve, genai"
"""What ``auto`` chooses for these checkpoints."""
ROUNDED = {f"{DEFAULT}:precision={precision}": precision for precision in ("int8", "int4")}
"""The same with rounded weights, for who asks for them."""


@dataclass(frozen=True, slots=True)
class Size:
    """How a checkpoint is measured.

    Attributes:
        rounds: in which every server is measured once.
        tokens: of each answer.
        requests: by number of clients.
        letters: of each prompt.
    """

    rounds: int
    tokens: int
    requests: Mapping[int, int]
    letters: int = 96


SIZES = {
    "tiny": Size(1, 4, {1: 1, 2: 2}, 16),
    "2M": Size(5, 64, {1: 4, 8: 16, 32: 32}),
    "55M": Size(3, 24, {1: 2, 8: 8, 32: 32}),
}

PAIRED = {"2M": Size(9, 64, {1: 6, 8: 32}), "55M": Size(5, 24, {1: 4, 8: 16})}
"""How few servers alone are measured: longer, for they differ by little."""

Cells = dict[tuple[str, int], list[dict[str, float | None]]]


@dataclass(frozen=True, slots=True)
class Bar:
    """How many times as fast as another the default is to be.

    Attributes:
        than: the other's name.
        clients: how many ask.
        ratio: of tokens a second.
    """

    than: str
    clients: int
    ratio: float


SHARE, LATER = 0.95, 0.005
"""What is to be left of vLLM's throughput behind the server; seconds to the first token more."""

BARS = (Bar(TRANSFORMERS, 8, 3.0), Bar(GENERATE, 1, 5.0))


class Eager:
    """``generate()`` on one prompt after another, in this process."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.matrices = Matrices(self.model, self.tokenizer, torch.get_num_threads())

    def measure(self, load: Load) -> dict[str, float | None]:
        """Return tokens a second, and a CPU-second."""
        asked = [
            self.tokenizer(load.prompts[n % len(load.prompts)], return_tensors="pt")
            for n in range(load.requests)
        ]
        begun, cpu = time.perf_counter(), time.process_time()
        for one in asked:
            made = self.model.generate(**one, max_new_tokens=load.tokens, do_sample=False)
            if made.shape[1] != one["input_ids"].shape[1] + load.tokens:
                raise SystemExit("generate() stopped early")
        tokens = load.requests * load.tokens
        return {
            "tokens_per_second": tokens / (time.perf_counter() - begun),
            "tokens_per_cpu_second": tokens / (time.process_time() - cpu),
        }


def rounds(servers: Sequence[Server], eager: Eager | None, size: Size) -> Cells:
    """Measure every server at every number of clients, round by round."""
    texts = prompts(max(size.requests.values()), size.letters)
    loads = [Load(n, count, size.tokens, texts) for n, count in size.requests.items()]
    ways: dict[str, Any] = {s.name: lambda load, s=s: measure(s, load) for s in servers}
    if eager:
        ways[MATRICES] = eager.matrices.measure
    cells: Cells = {}
    single = {**ways, GENERATE: eager.measure} if eager else ways
    for way in single.values():  # warm, and not timed
        way(replace(loads[0], requests=1, tokens=2))
    draw = random.Random(0)
    for number in range(size.rounds):
        for load in draw.sample(loads, len(loads)):
            now = single if load.clients == 1 else ways
            for name in draw.sample(list(now), len(now)):
                cells.setdefault((name, load.clients), []).append(now[name](load))
        click.echo(f"round {number + 1} of {size.rounds}", err=True)
    return cells


def figures(cells: Cells) -> list[dict[str, Any]]:
    """Return each server's medians at each number of clients, and its ratio to its peer's.

    The peer is the vLLM behind it for one that has one, else ``transformers serve``.
    """
    rows = []
    for (name, clients), found in cells.items():
        row: dict[str, Any] = {"server": name, "clients": clients}
        for key in found[0]:
            values = [f[key] for f in found]
            row[key] = None if None in values else spread(values)
        peer = cells.get((DIRECT if name == PROXY else TRANSFORMERS, clients))
        if peer is not None and name != TRANSFORMERS:
            row["ratio"] = spread(ratios(found, peer))
        if peer is not None and name == PROXY:
            row["later_seconds"] = spread(delays(found, peer))
        rows.append(row)
    order = list(dict.fromkeys(name for name, _ in cells))
    return sorted(rows, key=lambda r: (r["clients"], order.index(r["server"])))


def ratios(
    one: Sequence[Mapping[str, float | None]], other: Sequence[Mapping[str, float | None]]
) -> list[float]:
    """Return how many times as fast one was, round by round."""
    key = "tokens_per_second"
    return [(a[key] or 0) / (b[key] or 1) for a, b in zip(one, other, strict=True)]


def delays(
    one: Sequence[Mapping[str, float | None]], other: Sequence[Mapping[str, float | None]]
) -> list[float]:
    """Return how many seconds later one's first token came, round by round."""
    key = "first_token_seconds"
    return [(a[key] or 0) - (b[key] or 0) for a, b in zip(one, other, strict=True)]


def judge_proxy(cells: Cells, checkpoint: str) -> list[dict[str, Any]]:
    """Return which bars the way through the server to vLLM met."""
    judged = []
    for (name, clients), found in cells.items():
        if name != PROXY:
            continue
        peer = cells[DIRECT, clients]
        many = f"{checkpoint}, {clients} client{'s' * (clients > 1)}"
        share, later = spread(ratios(found, peer)), spread(delays(found, peer))
        judged += [
            {
                "claim": f"{many}: {SHARE:.0%} of vLLM's own tokens a second",
                "met": share["median"] >= SHARE,
                "figures": f"{share['median']:.0%} ({share['lowest']:.0%} to "
                f"{share['highest']:.0%})",
            },
            {
                "claim": f"{many}: the first token at most {LATER * 1000:.0f} ms later",
                "met": later["median"] <= LATER,
                "figures": f"{later['median'] * 1000:.1f} ms ({later['lowest'] * 1000:.1f} to "
                f"{later['highest'] * 1000:.1f})",
            },
        ]
    return judged


def judge(cells: Cells, checkpoint: str) -> list[dict[str, Any]]:
    """Return which bars the default met, and its rounded forms that were measured."""
    judged = []
    measured = [name for name in (DEFAULT, *ROUNDED) if name == DEFAULT or (name, 1) in cells]
    for name, bar in product(measured, BARS):
        mine, peer = cells.get((name, bar.clients)), cells.get((bar.than, bar.clients))
        many = f"{bar.clients} client{'s' * (bar.clients > 1)}"
        whose = checkpoint if name == DEFAULT else f"{checkpoint}, {ROUNDED[name]}"
        claim = f"{whose}: {bar.ratio:g} times as fast as {bar.than} for {many}"
        if mine is None or peer is None:
            judged.append({"claim": claim, "met": None, "figures": "-"})
            continue
        found = spread(ratios(mine, peer))
        text = f"{found['median']:.1f} ({found['lowest']:.1f} to {found['highest']:.1f})"
        if name == DEFAULT and (bound := cells.get((MATRICES, bar.clients))):
            most = spread(ratios(bound, peer))
            text += f"; {MATRICES}: {most['median']:.1f} ({most['lowest']:.1f} to "
            text += f"{most['highest']:.1f})"
        judged.append({"claim": claim, "met": found["median"] >= bar.ratio, "figures": text})
    return judged


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), help="Repeatable.")
@click.option("--tiny", is_flag=True, help="A checkpoint and loads so small that nothing is shown.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    default=("genai", "onnx", "transformers"),
    show_default=True,
    help="Of arskit serve. Repeatable.",
)
@click.option("--cores", default=1, show_default=True, help="That each server may use.")
@click.option("--also", multiple=True, metavar="NAME=URL=MODEL", help="A server that runs already.")
@click.option(
    "--alone", is_flag=True, help="Without transformers serve and generate(), on all cores."
)
@click.option(
    "--trained",
    default=0,
    metavar="STEPS",
    help="Train the checkpoint first: what rounds is compared with it, and it must have learned.",
)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    *,
    sizes: tuple[str, ...],
    tiny: bool,
    engines: tuple[str, ...],
    cores: int,
    also: tuple[str, ...],
    alone: bool,
    trained: int,
    target: Path | None,
) -> None:
    """Measure, print, and write the figures where they are asked for."""
    chosen = ("tiny",) if tiny else sizes or ("2M", "55M")
    cores = (os.cpu_count() or 1) if alone else cores
    others = [Server(*one.split("=", 2)) for one in also]
    torch.set_num_threads(cores)
    report: dict[str, Any] = {"facts": {**facts(), "cores": cores}, "checkpoints": [], "bars": []}
    if "vllm" in engines:
        report["facts"]["environment"] |= version_of_vllm()
    for name in chosen:
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checkpoint = work / name
            parameters = write_checkpoint(SHAPES[name], checkpoint, 0.02 if trained else 0.1)
            if trained:
                train(checkpoint, tokens_of(checkpoint)[0], trained)
            size = PAIRED.get(name, SIZES[name]) if alone else SIZES[name]
            servers = list(others)
            starting: list[Any] = [
                vllm(checkpoint, work) if e == "vllm" else arskit(e, checkpoint, work)
                for e in engines
            ]
            starting += [] if alone else [transformers(checkpoint, work)]
            for one in starting:
                with nullcontext() if alone else on_cores(cores):
                    made = stack.enter_context(one)
                servers += made if isinstance(made, tuple) else [made]
                servers[-1].sleep()
            if alone:  # they are one: nothing has to stand still, and on all cores
                for server in servers:
                    server.wake()
                servers = [replace(server, process=None) for server in servers]
            cells = rounds(servers, None if alone else Eager(checkpoint), size)
        report["checkpoints"].append(
            {
                "name": name,
                "parameters": parameters,
                "trained_steps": trained,
                "rounds": size.rounds,
                "tokens": size.tokens,
                "requests": {str(n): count for n, count in size.requests.items()},
                "rows": figures(cells),
            }
        )
        report["bars"] += [] if alone else judge(cells, name)
        report["bars"] += judge_proxy(cells, name)
    click.echo(json.dumps(report["bars"], indent=1))
    if target:
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
