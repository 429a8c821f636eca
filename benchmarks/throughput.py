"""Tokens a second: arskit's loop, bare PyTorch loops, the Trainer's and one over Fabric, in turns.

All train copies of one model on the same batches with the same fused AdamW, step by step in turns
within one process, each in a thread of its own, without saving. arskit's has every gate of ARS
besides, its history and its meter. The Trainer of transformers runs twice, without clipping and
clipping as it does unless told otherwise. One bare loop reads each loss, as nanochat's does; the
one over Lightning Fabric clips and keeps a running mean of the loss, as litgpt's does. What counts
is each round's ratio to the bare loop, and of the others' to arskit's. On a CPU the process keeps
the memory that a step frees, as one of arskit's does. On one thread of a CPU the clock is the
process's own time, which neighbours on a shared machine do not stretch; with more threads, or on a
GPU, it is the wall's.

Where a step's time goes is measured apart, with a clock around each part (and on a GPU a wait, so
that these parts do not add up to a step of the timed rounds).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from ending import chosen, run
from fabric_loop import fabric_loop
from loops import (
    alone,
    bare_loop,
    clock_of,
    our_job,
    our_loop,
    timed,
    trainer_loop,
)
from step_parts import breakdown

from ars_kit.heap import keep_freed_memory
from ars_kit.host import Host
from ars_kit.models import build, flops_per_token, weights_of
from ars_kit.plan import RunPlan, plan_run
from ars_kit.resolving import resolve
from ars_kit.store import RunFolder
from ars_kit.tokens import Batches

WITHIN_BARE, WITHIN_TRAINER = 1.03, 1.0
CLIP = 1.0
"""The gradient norm that the Trainer clips at unless it is told otherwise."""
SAME = 0.2
"""Share of the way that two loops' weights may lie apart: rounding, which training amplifies."""
ALIKE = (("bare", "trainer"), ("bare", "bare, each loss read"), ("trainer+clip", "fabric+clip"))
"""Loops that end at the same weights if they do the same work."""
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16 FLOPs a second by what a device's name holds, from the vendor's data sheets."""
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936}
LARGE: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""For a GPU; random weights in these shapes, the second that of Qwen2.5-7B."""
SIZES: dict[str, dict[str, Any]] = {
    "embedded d14": {},
    "20M d14": {
        "family.aspect": 2.8,
        "family.head_dim": 64,
        "data.sequence_length": 128,
        "train.batch_size": 4,
    },
    "1B": {"data.sequence_length": 2048, "train.batch_size": 8, "train.accumulation": 1},
    "7B": {"data.sequence_length": 2048, "train.batch_size": 1},
}


def plan_of(size: str, steps: int, more: Mapping[str, Any], home: Path) -> RunPlan:
    """Return the plan of one member of a size."""
    flags = {"family.members": "d14", "train.steps_per_iteration": 1, **SIZES[size], **more}
    if size in LARGE:
        context = {"max_position_embeddings": flags["data.sequence_length"]}
        (home / "config.json").write_text(json.dumps({**QWEN2, **LARGE[size], **context}))
        flags |= {"family.base": str(home), "family.depth": "same", "family.members": "d1"}
    return plan_run(
        resolve({**flags, "train.iterations": (steps, steps)}, {}, None), Host.installed()
    )


def compare(
    size: str, more: Mapping[str, Any], *, rounds: int, block: int, threads: int
) -> dict[str, Any]:
    """Return what one size came to: each loop's times and ratios, and the parts of a step."""
    steps = (rounds + 2) * block
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        plan = plan_of(size, steps, more, Path(scratch))
        if plan.device == "cpu":
            keep_freed_memory()  # as arskit run does
        member, settings = plan.members[0], plan.settings
        stream = np.random.default_rng(0).integers(0, 1000, 2_000_000, dtype=np.uint16)
        length, batch = settings.data.sequence_length, settings.train.batch_size
        batches = Batches(stream, sequence_length=length, batch_size=batch, seed=0)
        job = our_job(plan, batches, RunFolder(Path(scratch, "run")))
        loops = {
            "bare": alone(bare_loop(plan, batches, steps)),
            "arskit": alone(our_loop(job, stack, compiling=settings.train.compile)),
            "trainer": trainer_loop(plan, batches, steps, Path(scratch)),
            "trainer+clip": trainer_loop(plan, batches, steps, Path(scratch), clip=CLIP),
            "bare, each loss read": alone(bare_loop(plan, batches, steps, log_every=1)),
            "fabric+clip": alone(fabric_loop(plan, batches, steps, clip=CLIP)),
        }
        device = torch.device(plan.device)
        clock = clock_of(plan.device, threads)
        seconds = timed(loops, rounds, block, clock)
        apart = {
            f"{a} and {b}": _apart(plan, loops[a].model, loops[b].model, f"{a} and {b}")
            for a, b in ALIKE
        }
        parts = breakdown(job, (rounds + 1) * block, block)
    tokens = batch * length
    flops = flops_per_token(member.config, length) * tokens
    return {
        "size": size,
        "parameters": member.parameters,
        "tokens_per_step": tokens,
        "steps": rounds * block,
        "device": plan.device,
        "precision": plan.precision,
        "compile": settings.train.compile,
        "clock": clock.__name__,
        "apart": apart,
        "loops": {n: _figures(seconds, n, tokens, flops, device) for n in loops},
        "trainer_over_arskit": _ratio(seconds["trainer"], seconds["arskit"]),
        "clipping_trainer_over_arskit": _ratio(seconds["trainer+clip"], seconds["arskit"]),
        "fabric_over_arskit": _ratio(seconds["fabric+clip"], seconds["arskit"]),
        "parts": parts,
    }


def _apart(plan: RunPlan, one: Any, other: Any, names: str) -> float:
    """Return how far apart two loops' weights are, as a share of how far one has moved.

    Raises:
        SystemExit: so far that they cannot have done the same work.
    """
    first = weights_of(build(plan.members[0].config, seed=0))
    mine, theirs = weights_of(one), weights_of(other)
    moved = sum(float((mine[n].cpu() - w).square().sum()) for n, w in first.items())
    apart = sum(float((mine[n] - theirs[n]).square().sum()) for n in first)
    share = (apart / moved) ** 0.5
    if share > SAME:
        raise SystemExit(f"{names} did not do the same work: {share:.1%} apart")
    return share


def _ratio(times: list[float], others: list[float]) -> dict[str, float]:
    pairs = [a / b for a, b in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"ratio": middle, "q1": low, "q3": high}


def _figures(
    seconds: Mapping[str, list[float]], name: str, tokens: int, flops: float, device: torch.device
) -> dict[str, Any]:
    middle = statistics.median(seconds[name])
    peak = _peak(device)
    return {
        **_ratio(seconds[name], seconds["bare"]),
        "ms": 1e3 * middle,
        "tokens_per_second": tokens / middle,
        "mfu": None if peak is None else flops / middle / peak,
    }


def _peak(device: torch.device) -> float | None:
    """Return a device's peak in dense bfloat16, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAKS.items() if key in name), None)


def bars(sizes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return whether arskit keeps up with the others, by the median of each size."""
    found = []
    for s in sizes:
        bare, plain = s["loops"]["arskit"], s["trainer_over_arskit"]
        clipping, fabric = s["clipping_trainer_over_arskit"], s["fabric_over_arskit"]
        at = f"{s['size']} on {s['device']}"
        for claim, met, r in (
            ("within 3 % of the bare loop", bare["ratio"] <= WITHIN_BARE, bare),
            ("as fast as the Trainer as it comes", clipping["ratio"] >= WITHIN_TRAINER, clipping),
            ("as fast as it without clipping", plain["ratio"] >= WITHIN_TRAINER, plain),
            ("as fast as a loop over Fabric", fabric["ratio"] >= WITHIN_TRAINER, fabric),
        ):
            figures = f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
            found.append({"claim": f"{at}: {claim}", "met": met, "figures": figures})
    return found


def main() -> None:
    """Measure the sizes and print what they came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=10, help="steps of each loop in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", default="embedded d14,20M d14", help="names, commas between")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here; sizes there stay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    more = {
        "train.device": options.device,
        "train.precision": options.precision,
        "train.compile": options.compile,
    }
    found = []
    for size in chosen("size", options.sizes, SIZES):
        found.append(
            compare(size, more, rounds=options.rounds, block=options.block, threads=options.threads)
        )
        for name, r in found[-1]["loops"].items():
            print(f"{size}, {name}: {r['tokens_per_second']:,.0f} tokens/s, {r['ratio']:.3f}")
        print({part: f"{share:.1%}" for part, share in found[-1]["parts"].items()}, flush=True)
    for bar in bars(found):
        print(f"{'met' if bar['met'] else 'NOT met'}: {bar['claim']}: {bar['figures']}")
    if options.json:
        kept = json.loads(options.json.read_text())["sizes"] if options.json.exists() else []
        kept = [s for s in kept if s["size"] not in {f["size"] for f in found}]
        report = {
            "environment": {
                "machine": platform.machine(),
                "threads": options.threads,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
            "sizes": [*kept, *found],
            "bars": bars([*kept, *found]),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
