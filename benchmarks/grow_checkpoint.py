"""How long `arskit grow` takes on a checkpoint of a billion parameters, and how much memory.

Random weights of the shape of Llama 3.2 1B, or of Qwen2 1.5B, are written and grown, one layer
deeper, or wider too, each in a process of its own. Reported are wall time and the largest resident
set of the process, against the size of the checkpoint; the bar is 60 s and 1.5 times its size.
Writing the source is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ending import run
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from ars_kit.measure import peak_rss
from ars_kit.models import count_parameters
from ars_kit.shapes import grown_config
from ars_kit.stored import fresh_weights, save_weights

SECONDS, TIMES_SIZE = 60.0, 1.5
SHAPES: dict[str, PretrainedConfig] = {
    "llama-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "qwen2-1.5b": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_source(config: PretrainedConfig, dtype: torch.dtype, path: Path) -> int:
    """Write a checkpoint of random weights; returns its size in bytes."""
    path.mkdir()
    save_weights(fresh_weights(config, seed=0, dtype=dtype), path)
    config.dtype = dtype
    config.save_pretrained(path)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def targets(config: PretrainedConfig, folder: Path) -> dict[str, str]:
    """Return what ``--to`` says for one layer more, and for one layer and two head groups more."""
    layers = config.num_hidden_layers + 1
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    ratio = config.num_attention_heads // config.num_key_value_heads
    groups = config.num_key_value_heads + 2
    wider = grown_config(
        config,
        layers,
        {
            "hidden_size": groups * ratio * head,
            "num_attention_heads": groups * ratio,
            "num_key_value_heads": groups,
            "intermediate_size": config.intermediate_size * 9 // 8,
        },
    )
    wider.save_pretrained(folder / "wider")
    return {"deeper": f"d{layers}", "deeper and wider": str(folder / "wider")}


def measured(source: Path, to: str, into: Path) -> dict[str, Any]:
    """Grow in a process of its own."""
    code = (
        "import json, sys\n"
        "from ars_kit.cli import cli\n"
        "from ars_kit.measure import peak_rss\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        "print(peak_rss())\n"
    )
    command = [sys.executable, "-c", code, "grow", str(source), "--to", to, "--into", str(into)]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)  # noqa: S603 -- this interpreter
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    text, _, peak = done.stdout.strip().rpartition("\n")
    facts: dict[str, Any] = json.loads(text)
    return {**facts, "process_seconds": seconds, "peak_rss": int(peak)}


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints meanwhile")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args()
    config = SHAPES[given.shape]
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        size = write_source(config, DTYPES[given.dtype], folder / "source")
        for what, to in targets(config, folder).items():
            facts = measured(folder / "source", to, folder / "grown")
            for file in (folder / "grown").iterdir():
                file.unlink()
            (folder / "grown").rmdir()
            times = facts["peak_rss"] / size
            row = {
                "growth": what,
                "seconds": facts["process_seconds"],
                "peak_rss": facts["peak_rss"],
                "times_size": times,
                "logits_difference": facts["logits_difference"],
                "largest_logit": facts["largest_logit"],
                "parameters": facts["parameters"],
                "met": facts["process_seconds"] < SECONDS and times < TIMES_SIZE,
            }
            rows.append(row)
            print(
                f"{given.shape} {given.dtype} {what}: {row['seconds']:.1f} s, peak memory "
                f"{facts['peak_rss'] / 1e9:.2f} GB = {times:.2f} x {size / 1e9:.2f} GB, largest "
                f"change of a logit {facts['logits_difference']:.2g}"
            )
    if given.json:
        body = {
            "shape": given.shape,
            "dtype": given.dtype,
            "parameters": count_parameters(config),
            "bytes": size,
            "bars": {"seconds": SECONDS, "times_size": TIMES_SIZE},
            "growths": rows,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "own_peak_rss": peak_rss(),
        }
        given.json.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
