"""The meter: what a member cost. Every definition stands in docs/metrics.md."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ars_kit.models import build

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(slots=True)
class Meter:
    """Time, tokens and memory of one member's training, carried across interruptions.

    Attributes:
        seconds: training time of this and all earlier sittings, without evaluation and saving.
        tokens: trained on, over all ranks.
        loss_flops: of the strategy's own loss and its teacher, over all ranks.
    """

    seconds: float = 0.0
    tokens: int = 0
    peak_rss: int = 0
    peak_vram: int | None = None
    loss_flops: float = 0.0
    _since: float | None = None

    def start(self, device: torch.device) -> None:
        """Begin or go on counting; the first call of a process resets the device's peak."""
        if self._since is None and device.type == "cuda" and self.peak_vram is None:
            torch.cuda.reset_peak_memory_stats(device)
        self._since = time.perf_counter()

    def pause(self, device: torch.device) -> None:
        """Stop counting once the device has finished what was asked of it."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak = int(torch.cuda.max_memory_allocated(device))
            self.peak_vram = max(self.peak_vram or 0, peak)
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
        self.peak_rss = max(self.peak_rss, peak_rss())

    def elapsed(self) -> float:
        """Return the training time up to this moment, in seconds."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.seconds + running

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed member goes on from."""
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "peak_rss": self.peak_rss,
            "peak_vram": self.peak_vram,
            "loss_flops": self.loss_flops,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.seconds, self.tokens = state["seconds"], state["tokens"]
        self.peak_rss, self.peak_vram = state["peak_rss"], state["peak_vram"]
        self.loss_flops = state.get("loss_flops", 0.0)


def peak_rss() -> int:
    """Return the largest resident set this process has had, in bytes."""
    try:
        import resource  # noqa: PLC0415 -- not on Windows
    except ImportError:
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if psutil.MACOS else 1024))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the device computes, and how that was found out."""

    flops_per_second: float
    source: str


def probe_device(device: torch.device) -> Speed:
    """Time a few matrix products: an upper bound on the speed of training.

    Takes about a tenth of a second; used where a member is too large to try.
    """
    n = 1024 if device.type == "cpu" else 4096
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        b = a @ a
        b[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    return Speed(2 * n**3 / min(seconds), f"{n}x{n} matrix products on {device}; it will be slower")


def probe_training(
    config: PretrainedConfig, *, sequence_length: int, micro_batch: int, device: torch.device
) -> float:
    """Return the seconds that forward and backward of one micro-batch take, best of three."""
    model = build(config, seed=0)
    model.to(device)  # type: ignore[arg-type]
    shape = (micro_batch, sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
