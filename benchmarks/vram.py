"""Peak memory by recipe, model size and sequence length: foreseen, and measured where it can be.

    python benchmarks/vram.py --json benchmarks/results/vram.json
    python benchmarks/vram.py --trainable lora:r=16 --json benchmarks/results/vram_lora.json

On the CPU small models are measured by the live bytes of two real steps; on a GPU
(``--device cuda``) by torch's allocator, with a Qwen2.5-7B of random weights (``--large``) where it
fits. The tables of ``docs/memory.md`` are made from the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ending import run
from transformers import PretrainedConfig, Qwen2Config, __version__

from ars_kit.adapters import Adapters
from ars_kit.backward import InBackward
from ars_kit.figures import device_name
from ars_kit.footprint import Work, footprint
from ars_kit.host import Host
from ars_kit.live import LiveBytes
from ars_kit.lora import Lora, parse_trainable
from ars_kit.memory import RECIPES, ChunkedLoss, Recipe, prepare, whole_loss
from ars_kit.models import build, count_parameters, parameter_groups
from ars_kit.optim import build_optimizer, make_base, under_recipe
from ars_kit.schema import parse_choice
from ars_kit.settings import Settings
from ars_kit.shapes import embedded_config

LARGE = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32_768, "tie_word_embeddings": False,
}  # fmt: skip
"""Qwen2.5-7B."""
SMALL = ((2, 64, 128), (4, 128, 128), (4, 128, 512), (8, 256, 32))
"""Layers, width, tokens of a sequence."""


def foresee(
    config: PretrainedConfig,
    recipe: Recipe,
    shape: tuple[int, int],
    device: str,
    host: Host,
    lora: Lora | None = None,
) -> dict[str, int]:
    """Return what two steps take by :mod:`ars_kit.footprint`."""
    sequences, length = shape
    bf16 = device != "cpu"
    return footprint(
        config,
        recipe=recipe,
        work=Work(sequences=sequences, length=length, bf16=bf16, device=device, lora=lora),
        make=lambda groups: make_base(
            host, under_recipe(host, Settings().optimizer, recipe), groups
        ),
    ).facts()


def measure(
    config: PretrainedConfig,
    recipe: Recipe,
    shape: tuple[int, int],
    device: str,
    host: Host,
    lora: Lora | None = None,
) -> int:
    """Return the peak of two real steps: torch's allocator on a GPU, live bytes on the CPU."""
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.empty_cache()
        for _ in _steps(config, recipe, shape, place, host, lora):
            torch.cuda.reset_peak_memory_stats(place)
        return int(torch.cuda.max_memory_allocated(place))
    with LiveBytes() as live:
        for _ in _steps(config, recipe, shape, place, host, lora):
            live.peak = live.now
    return live.peak


def _steps(
    config: PretrainedConfig,
    recipe: Recipe,
    shape: tuple[int, int],
    device: torch.device,
    host: Host,
    lora: Lora | None,
) -> Iterator[None]:
    """Yield once the model is made, whose weights were fp32 first; then take two steps."""
    with device:  # random weights of 7B parameters would not fit many a host twice
        model = build(config, seed=0)
    prepare(model, recipe)
    if lora is not None:
        Adapters(model, lora)
    model.train()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, lr_width=None, lr_vectors=1e-3)
    optimizer = _optimizer(host, recipe, groups)
    loss_of = ChunkedLoss(model) if recipe.chunked else whole_loss
    bf16 = device.type == "cuda" and not recipe.bf16_weights
    yield
    for _ in range(2):
        window = torch.zeros((shape[0], shape[1] + 1), dtype=torch.int64, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, loss = loss_of(model, window)
        del logits
        if isinstance(optimizer, InBackward):
            optimizer.observe(loss)
            with optimizer.in_backward():
                loss.backward()
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(host: Host, recipe: Recipe, groups: list[dict[str, Any]]) -> Any:
    """Return the bare base, or what steps it within the backward pass, with its gates."""
    settings = under_recipe(host, Settings().optimizer, recipe)
    if recipe.in_backward:
        return build_optimizer(host, settings, groups, lr=1e-3, position=0.0, in_backward=True)
    return make_base(host, settings, groups)


def row(
    name: str, config: PretrainedConfig, shape: tuple[int, int], **facts: Any
) -> dict[str, Any]:
    """Return one line of the result."""
    return {
        "model": name,
        "parameters": count_parameters(config),
        "sequences": shape[0],
        "length": shape[1],
        **facts,
    }


def main() -> None:
    """Print every row, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--large", action="store_true", help="also measure the 7B model")
    parser.add_argument("--trainable", default="all", help="all, or lora:r=16")
    options = parser.parse_args()
    lora = parse_trainable(parse_choice(options.trainable))
    host, rows, begin = Host.installed(), [], time.perf_counter()
    for layers, width, length in SMALL:
        sizes = {"hidden_size": width, "num_attention_heads": width // 16,
                 "num_key_value_heads": width // 16, "head_dim": 16}  # fmt: skip
        config = embedded_config(layers, vocab_size=2000, context=length, sizes=sizes)
        for name, recipe in RECIPES.items():
            facts = foresee(config, recipe, (2, length), options.device, host, lora)
            peak = measure(config, recipe, (2, length), options.device, host, lora)
            label = f"{layers} layers, width {width}"
            rows.append(row(label, config, (2, length), recipe=name, measured=peak, **facts))
            print(rows[-1])
    large = Qwen2Config(**LARGE)
    for name, recipe in RECIPES.items():
        shape = (1, 2048)
        facts: dict[str, Any] = foresee(large, recipe, shape, "cuda", host, lora)
        peak = None
        if options.large:
            try:
                peak = measure(large, recipe, shape, options.device, host, lora)
            except torch.OutOfMemoryError:  # which is a finding; the next recipe takes less
                facts["ran_out"] = True
        rows.append(row("Qwen2.5-7B", large, shape, recipe=name, measured=peak, **facts))
        print(rows[-1])
    result = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": __version__,
            "device": device_name(torch.device(options.device)),
        },
        "trainable": options.trainable,
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
