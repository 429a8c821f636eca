"""How fast a model reads and writes."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ars_kit.errors import ConfigError
from ars_kit.spec import Assessment, Evaluand
from ars_kit_plugins.continuation import lengths
from ars_kit_plugins.judging import last

BATCHES: Mapping[int, str] = {1: "", 8: "_batch_8"}
"""Sequences at once, and how the figures' names end."""
WARM = 2
"""Rounds that nobody counts."""


class Speed:
    """Tokens per second of prefill and decoding, and the time to the first token.

    The prompt goes through the model once and fills its cache (prefill); the first token is then
    chosen greedily, and each further one takes a pass over one token (decoding).

    Args:
        prompt: tokens of a prompt.
        length: tokens decoded after the first.
        repeats: rounds that are counted.

    Raises:
        ConfigError: one of them is less than 1, or the model cannot read as many.
    """

    def __init__(self, prompt: int | None, length: int | None, repeats: int) -> None:
        for name, value in (("prompt", prompt), ("length", length), ("repeats", repeats)):
            if value is not None and value < 1:
                raise ConfigError(f"'speed': {name}={value} must be at least 1")
        self.prompt, self.length, self.repeats = prompt, length, repeats

    def __call__(self, member: Evaluand) -> Assessment:
        """Return the median of each figure, and its interquartile range as ``..._spread``."""
        prompt, length = lengths(member, "speed", self.prompt, self.length)
        figures: dict[str, float | None] = {}
        rounds = WARM + self.repeats
        for place, (batch, suffix) in enumerate(BATCHES.items()):
            taken = []
            for done in range(rounds):
                taken.append(_round(member, batch, prompt, length))
                member.progress((place * rounds + done + 1) / (len(BATCHES) * rounds))
            prefill, decode = np.array(taken[WARM:]).T
            for name, values in (
                ("prefill_tokens_per_second", batch * prompt / prefill),
                ("decode_tokens_per_second", batch * length / decode),
                ("time_to_first_token", prefill),
            ):
                quarter, median, three = np.percentile(values, [25, 50, 75])
                figures[f"{name}{suffix}"] = float(median)
                figures[f"{name}{suffix}_spread"] = float(three - quarter)
        device = member.model.device
        where = device.type if device.type != "cpu" else f"cpu ({platform.machine()})"
        how = (
            f"prompt {prompt}, {length} tokens decoded, batch 1 and 8; median and interquartile "
            f"range of {self.repeats} rounds after {WARM} warm ones; {where}, "
            f"{str(member.model.dtype).removeprefix('torch.')}, threads: {torch.get_num_threads()}"
        )
        return Assessment(figures, notes={"speed": how})


def _round(member: Evaluand, batch: int, prompt: int, length: int) -> tuple[float, float]:
    """Return the seconds to the first token, and those of the ``length`` tokens after it."""
    model, wait = member.model, _waiter(member.model.device)
    ids = torch.arange(batch * prompt, device=model.device).view(batch, prompt)
    ids %= model.config.vocab_size  # which tokens they are makes no difference
    with torch.inference_mode():
        wait()
        begin = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **last(model, 1))
        token = out.logits[:, -1:].argmax(-1)
        wait()
        first = time.perf_counter()
        for _ in range(length):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        wait()
    return first - begin, time.perf_counter() - first


def _waiter(device: torch.device) -> Callable[[], None]:
    """Return what waits until the device has done all it was asked for."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
