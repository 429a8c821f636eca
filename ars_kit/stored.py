"""A Hugging Face directory's weights, read and written a tensor at a time: memory stays small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ars_kit.errors import ConfigError
from ars_kit.models import meta_model, weights_of
from ars_kit.spec import LazyWeights

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 256 << 20
"""Size from which on a written file is closed and the next one begun."""


def stored_weights(path: Path, config: PretrainedConfig) -> LazyWeights:
    """Open a directory's safetensors; a tied head stands once, as the embedding.

    Tensors are mapped from the file privately: reading one reads no other, and changing one changes
    no file.

    Raises:
        ConfigError: it holds none, or they are damaged or not all that the configuration needs.
    """
    places = _places(path)
    expected = weights_of(meta_model(config))
    lacking = sorted(expected.keys() - places.keys())
    if lacking:
        raise ConfigError(f"the weights in {path} lack {lacking[0]} ({len(lacking)} in all)")

    def read(name: str) -> Tensor:
        # A file that stays open stays mapped, and what was read of it counts as memory.
        found: Tensor = _open(path / places[name]).get_tensor(name)
        return found

    like = {}
    for name, wanted in expected.items():
        found = read(name)
        if found.shape != wanted.shape:
            raise ConfigError(
                f"{name} in {path} has shape {tuple(found.shape)}, where its configuration says "
                f"{tuple(wanted.shape)}"
            )
        like[name] = torch.empty_like(found, device="meta")
    return LazyWeights(like, read)


def _places(path: Path) -> dict[str, str]:
    """Return the file that each tensor lies in."""
    index = path / INDEX
    try:
        if index.is_file():
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return places
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is damaged: {error!r}") from error
    if not (path / WEIGHTS).is_file():
        raise ConfigError(f"{path} holds no {WEIGHTS}; weights in other formats are not read")
    return dict.fromkeys(_open(path / WEIGHTS).keys(), WEIGHTS)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights {path}: {error}") from error


def fresh_weights(config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> LazyWeights:
    """Return a fresh initialisation of which each module is made when it is asked for.

    Each module draws from a generator of its own, so that the order of asking does not matter.
    """
    model = meta_model(config)
    model.to(dtype)  # type: ignore[arg-type]
    firsts: dict[str, int] = {}
    for number, name in enumerate(weights_of(model)):
        firsts.setdefault(name.rpartition(".")[0], number)

    def read(name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        before = dict(module.named_parameters(recurse=False))
        for key, parameter in before.items():
            empty = torch.empty(parameter.shape, dtype=dtype)
            module.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            # Its tensors are drawn together, so all of them by the number of the first.
            torch.default_generator.manual_seed((seed * 1_000_003 + firsts[owner]) % 2**63)
            model._init_weights(module)  # noqa: SLF001 -- transformers' way to initialise a module
        made: Tensor = module.get_parameter(own).detach()
        for key, parameter in before.items():
            module.register_parameter(key, parameter)
        return made

    return LazyWeights(dict(weights_of(model)), read)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as Hugging Face does, in files of about ``SHARD_BYTES``, with an index.

    No more than one file's tensors are in memory at a time.
    """
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(weights), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(t.nbytes for t in shard.values())
    if len(set(places.values())) == 1:
        (path / file).rename(path / WEIGHTS)
        return
    body = {"metadata": {"total_size": total}, "weight_map": places}
    (path / INDEX).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name in weights:
        shard[name] = weights[name].contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


class _Tied(Mapping[str, Tensor]):
    """Weights in which a tied head is found under its own name too."""

    def __init__(self, weights: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self.weights, self.aliases = weights, aliases

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.weights, *self.aliases])

    def __len__(self) -> int:
        return len(self.weights) + len(self.aliases)


def streamed_model(config: PretrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a model in eval mode that computes in float32, with one module in memory at a time.

    Whatever precision the weights are kept in, they are widened when they are used, so that two
    models can be compared without the rounding of bfloat16 arithmetic.
    """
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    tied = meta_model(config)  # where nothing was made empty, nothing was torn apart
    names = {id(p): n for n, p in tied.named_parameters()}
    every = tied.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(p)] for name, p in every if names[id(p)] != name}
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=_Tied(weights, aliases),
    )
    return model
