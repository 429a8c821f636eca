"""What keeping documents apart costs: forward and backward with and without, in turns.

    python benchmarks/packing.py --json benchmarks/results/packing.json

On the CPU the clock is the process's own time, which neighbours on a shared machine do not stretch;
on a GPU (``--device cuda``) it is the wall's, in bf16. The table of ``docs/speed.md`` is made from
the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ending import run
from transformers import __version__

from ars_kit.figures import device_name
from ars_kit.memory import whole_loss
from ars_kit.models import build, count_parameters
from ars_kit.shapes import embedded_config

LENGTHS = (128, 256, 512, 1024)
DOCUMENT = 100
"""Tokens of each document."""
TOKENS = 2048
"""Tokens of a micro-batch."""
ROUNDS = 15


def compare(length: int, width: int, device: torch.device) -> dict[str, Any]:
    """Return the times at one length."""
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32, "head_dim": 32}
    config = embedded_config(
        6, vocab_size=1024, context=length, sizes={"hidden_size": width, **heads}
    )
    model = build(config, seed=0).train().to(device)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(1, 1000, (TOKENS // length, length + 1), generator=draw).to(device)
    positions = (torch.arange(length) % DOCUMENT).expand(len(window), -1).contiguous().to(device)
    rounds = [
        [seconds(model, window, told, device) for told in (None, positions)] for _ in range(ROUNDS)
    ][2:]
    ratios = [apart / plain for plain, apart in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "length": length,
        "parameters": count_parameters(config),
        "plain": statistics.median(plain for plain, _ in rounds),
        "apart": statistics.median(apart for _, apart in rounds),
        "ratio": middle,
        "quartiles": [low, high],
    }


def seconds(
    model: Any, window: torch.Tensor, positions: torch.Tensor | None, device: torch.device
) -> float:
    """Return what one forward and backward pass takes."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    begin = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        _, loss = whole_loss(model, window, positions)
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - begin


def main() -> None:
    """Print every row, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=int, default=128, help="of the model of six layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows = []
    for length in LENGTHS:
        rows.append(compare(length, options.width, device))
        print(rows[-1])
    result = {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": __version__,
            "device": device_name(device),
        },
        "document": DOCUMENT,
        "tokens": TOKENS,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
