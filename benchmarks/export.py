"""What each export format costs and gives: size, parity, decoded tokens per CPU-second.

Every format is made from the same checkpoint, compared with it as ``arskit export`` does, on text
that was held out, and then decodes through the engine that ``arskit serve`` runs it in, in turns
with the others. One thread computes, so that a CPU-second is one.

Parity of a format that rounds is judged by the loss, which means something only for a model that
has learned: the smaller checkpoint is trained for a moment, the larger has random weights.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from ending import run
from speed.checkpoints import SHAPES, tokens_of, train, write_checkpoint
from speed.figures import facts, spread
from transformers import AutoModelForCausalLM, PreTrainedModel

from ars_kit.errors import ParityError
from ars_kit.spec import Engine, Exporter, Service
from ars_kit_serving.decoder import OnnxExporter
from ars_kit_serving.engines.eager import EagerEngine
from ars_kit_serving.genai import GenaiExporter
from ars_kit_serving.parity import JUDGED, compare

FORMATS: dict[str, Callable[[], Exporter]] = {
    "onnx": OnnxExporter,
    "genai": GenaiExporter,
    "genai:precision=int8": lambda: GenaiExporter(precision="int8"),
    "genai:precision=int4": lambda: GenaiExporter(precision="int4"),
}
EAGER = "transformers, eager"
PROMPT = 32
ROWS = (1, 8)


@dataclass(frozen=True, slots=True)
class Size:
    """How a checkpoint is measured.

    Attributes:
        training: steps, of 8 x 64 tokens.
        steps: tokens that each row is decoded by.
        rounds: in which every format is measured once.
    """

    training: int
    steps: int
    rounds: int


SIZES = {"tiny": Size(2, 2, 1), "2M": Size(200, 64, 5), "55M": Size(0, 16, 3)}


def windows(ids: list[int], length: int) -> Iterator[list[int]]:
    """Yield texts to compare on."""
    for start in range(0, len(ids) - length, length):
        yield ids[start : start + length]


def parity(
    model: PreTrainedModel, engine: Engine, texts: list[list[int]], exporter: Exporter
) -> dict[str, Any]:
    """Return what the comparison found, or why the format would be refused."""
    try:
        return {**compare(model, engine, texts, exporter.tolerance), "refused": None}
    except ParityError as error:
        return {"refused": str(error).removesuffix("; nothing was written")}


def decoded(engine: Engine, rows: int, steps: int, ids: list[int]) -> float:
    """Return tokens per CPU-second of decoding, prompts left out."""
    for slot in range(rows):
        engine.prefill(slot, ids[slot : slot + PROMPT])
    engine.decode(dict.fromkeys(range(rows), ids[0]))  # makes the batch, and is not timed
    begun = time.process_time()
    for step in range(steps):
        engine.decode(dict.fromkeys(range(rows), ids[step]))
    took = time.process_time() - begun
    for slot in range(rows):
        engine.release(slot)
    return rows * steps / took


def weights(folder: Path) -> int:
    """Return the bytes of a model's files."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model."))


def formats(name: str, size: Size, work: Path) -> dict[str, Any]:
    """Make, compare and time every format of one checkpoint."""
    checkpoint = work / name
    spread_of_weights = 0.02 if size.training else 0.1
    parameters = write_checkpoint(SHAPES[name], checkpoint, spread_of_weights)
    ids, held = tokens_of(checkpoint)
    if size.training:
        train(checkpoint, ids, size.training)
    context = SHAPES[name].context
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    texts = list(islice(windows(held, context), 1 + JUDGED // context))
    rows: dict[str, dict[str, Any]] = {EAGER: {"bytes": weights(checkpoint), "parity": None}}
    service = Service(name, checkpoint, "0" * 64, work, context, max(ROWS), click.echo)
    engines: dict[str, Engine] = {EAGER: EagerEngine(service, device="cpu", dtype="fp32")}
    for form, make in FORMATS.items():
        exporter, target = make(), work / form.replace(":", "-")
        target.mkdir()
        begun = time.perf_counter()
        exporter.export(checkpoint, target)
        seconds = time.perf_counter() - begun
        engine = exporter.open(target, context=context, slots=max(ROWS), threads=1)
        found = parity(model, engine, texts, exporter)
        rows[form] = {"bytes": weights(target), "export_seconds": seconds, "parity": found}
        engine.close()
        engines[form] = exporter.open(target, context=context, slots=max(ROWS), threads=1)
        click.echo(f"{name}, {form}: {json.dumps(found)}", err=True)
    speeds = timed(engines, size, held)
    for form, engine in engines.items():
        engine.close()
        rows[form]["tokens_per_cpu_second"] = speeds[form]
    listed = [{"format": form, **row} for form, row in rows.items()]
    return {"name": name, "parameters": parameters, "training": size.training, "formats": listed}


def timed(
    engines: Mapping[str, Engine], size: Size, ids: list[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each format's speed by rows, measured in turns."""
    found: dict[str, dict[str, list[float]]] = {
        form: {str(rows): [] for rows in ROWS} for form in engines
    }
    draw = random.Random(0)
    for number in range(1 + size.rounds):
        for rows in ROWS:
            for form in draw.sample(list(engines), len(engines)):
                speed = decoded(engines[form], rows, size.steps, ids)
                if number:  # the first round is warm-up
                    found[form][str(rows)].append(speed)
    return {form: {r: spread(v) for r, v in by.items()} for form, by in found.items()}


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(SIZES)), help="Repeatable.")
@click.option("--tiny", is_flag=True, help="A checkpoint so small that nothing is shown.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the figures here.")
def main(sizes: tuple[str, ...], tiny: bool, target: Path | None) -> None:
    """Measure, print, and write the figures where they are asked for."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {"facts": facts(), "checkpoints": []}
    for name in ("tiny",) if tiny else sizes or ("2M", "55M"):
        with tempfile.TemporaryDirectory() as work:
            report["checkpoints"].append(formats(name, SIZES[name], Path(work)))
    click.echo(json.dumps(report["checkpoints"], indent=1))
    if target:
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
