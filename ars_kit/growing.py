"""Growth of one checkpoint, apart from any run: a Hugging Face directory in, another one out.

Weights pass through a tensor at a time, so a checkpoint needs no more memory than its own size
whatever it is. The source is only read. The result appears whole, once it has been compared with
the source, or not at all.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ars_kit.births import EXACT, ask, exactness
from ars_kit.causality import require_causal
from ars_kit.durable import commit_directory, disk_errors, make_directory
from ars_kit.errors import ConfigError, PluginError
from ars_kit.host import Host
from ars_kit.inherit import inherited_share, objection
from ars_kit.members import member_config
from ars_kit.models import TOKENIZER_FILES, count_parameters, load_base_config
from ars_kit.outcome import FROZEN
from ars_kit.resolving import resolve
from ars_kit.roster import Member, parse_depths, parse_roster
from ars_kit.schema import Choice
from ars_kit.shapes import grown_config
from ars_kit.spec import Birth, InheritanceStrategy, Parent, Seed, like
from ars_kit.stored import fresh_weights, save_weights, stored_weights, streamed_model
from ars_kit.workbench import workbench

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBE = 32
"""Tokens, drawn at random, that source and result are compared on."""

ROUNDING = 8
"""A logit may change by this many units of the weights' precision, against the largest logit: a
wider child's gains are rounded when they are multiplied. In float32, :data:`EXACT` is the bound."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One checkpoint to be grown.

    Attributes:
        source: a directory with config.json and safetensors.
        config: the shape to grow to.
        host: the installed plugins.
        choice: the strategy, and its settings.
        target: the directory to write; must not exist.
        seed: of every new parameter.
    """

    source: Path
    config: PretrainedConfig
    host: Host
    choice: Choice
    target: Path
    seed: int = 0

    @property
    def who(self) -> str:
        """The strategy and the plugin that offers it, for complaints."""
        plugin = self.host.listing("strategies", self.choice.name).plugin
        return f"inheritance strategy {self.choice.name!r} of plugin {plugin}"


def target_config(source: Path, to: str) -> PretrainedConfig:
    """Return the shape that ``--to`` means for a checkpoint.

    Args:
        source: the checkpoint; where it is a member of a run, ``dN`` is what that run's family
            would make of it, and a name of the run's own members is read too.
        to: ``d14`` for as many layers, or a directory whose config.json is the shape.

    Raises:
        ConfigError: it is neither.
    """
    own = load_base_config(str(source))
    if (Path(to) / "config.json").is_file():
        return load_base_config(str(Path(to)))
    frozen = source.resolve().parent / FROZEN
    settings = resolve({}, {}, frozen) if frozen.is_file() else None
    if settings is not None and settings.family.base is None:
        roster = parse_roster(settings.family.members)
        named = [m for m in roster if m.name == to]
        member = named[0] if named else Member(to, _depth(to))
        return member_config(settings, roster, member)
    return grown_config(own, _depth(to))


def _depth(to: str) -> int:
    try:
        (depth,) = parse_depths(to)
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"cannot grow to {to!r}: write d14 for 14 layers, or name a directory whose "
            "config.json has the shape"
        ) from error
    return depth


def grow_checkpoint(growth: Growth) -> dict[str, Any]:
    """Write the grown checkpoint; returns what is known of it, JSON-ready.

    Raises:
        ConfigError: source or target cannot be used, the source is no causal language model, or the
            shape cannot be had.
        PluginError: the strategy promised exactness and is not exact, with both numbers; or it
            failed. Nothing is left behind.
    """
    begin = time.perf_counter()
    source, config, target = growth.source, growth.config, growth.target
    own = load_base_config(str(source))
    strategy: InheritanceStrategy = growth.host.make("strategies", growth.choice)
    with growth.host.blaming("strategies", growth.choice.name, "asked what it supports"):
        reason = objection(strategy, own, config)
    if reason:
        raise ConfigError(f"{source} cannot grow to that shape: {reason}")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} already exists; remove it, or choose another --into")
    weights = stored_weights(source, own)
    require_causal(str(source), streamed_model(own, weights))
    dtype = max((t.dtype for t in weights.like.values()), key=lambda d: d.itemsize)
    birth = Birth(
        name=target.name,
        config=config,
        fresh=fresh_weights(config, seed=growth.seed, dtype=dtype),
        rng=_generator(growth),
    )
    parent = Parent(source.name, own, weights)
    seed = ask(growth.host, growth.choice.name, strategy, parent, birth)
    shapes = {name: like(birth.fresh, name).shape for name in birth.fresh}
    said = f"in what its seed says of {target.name}"
    with growth.host.blaming("strategies", growth.choice.name, said):
        _require_names(growth, seed.weights, birth.fresh)
        share = inherited_share(seed.provenance, shapes)
    facts: dict[str, Any] = {
        "source": str(source),
        "target": str(target),
        "strategy": str(growth.choice),
        "seed": growth.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": [own.num_hidden_layers, config.num_hidden_layers],
        "width": [own.hidden_size, config.hidden_size],
        "parameters": [count_parameters(own), count_parameters(config)],
        "inherited_share": share,
        "preserves": seed.preserves,
        "note": seed.note,
    }

    def files(folder: Path) -> None:
        _write(growth, own, seed, dtype, folder)
        facts.update(_compare(growth, own, weights, seed, dtype, folder))

    _commit(growth, files, facts)
    return {**facts, "seconds": time.perf_counter() - begin}


def _generator(growth: Growth) -> torch.Generator:
    """Return the seed's generator, which takes 64 bits where a seed may be any number."""
    return torch.Generator().manual_seed(growth.seed % 2**63)


def _commit(growth: Growth, files: Any, facts: Mapping[str, Any]) -> None:
    """Let the directory appear, whole; whatever fails, nothing is left of it."""
    parent = growth.target.absolute().parent
    with contextlib.ExitStack() as work:
        try:
            with disk_errors(growth.target):
                make_directory(parent)
                scratch = work.enter_context(workbench(parent))
        except OSError as error:
            raise ConfigError(
                f"cannot write {growth.target}: {error.strerror}; choose another --into"
            ) from error
        commit_directory(parent / growth.target.name, files, facts, scratch=scratch)


def _require_names(
    growth: Growth, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    wrong = sorted(found.keys() ^ wanted.keys())
    if not wrong:
        wrong = [n for n in wanted if like(found, n).shape != like(wanted, n).shape]
    if wrong:
        raise PluginError(f"{growth.who} made weights that do not fit: {wrong[0]}")


def _write(
    growth: Growth, own: PretrainedConfig, seed: Seed, dtype: torch.dtype, folder: Path
) -> None:
    save_weights(seed.weights, folder)
    config = growth.config
    config.architectures = own.architectures
    config.dtype = dtype
    config.save_pretrained(folder)
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for file in sorted(growth.source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _compare(
    growth: Growth,
    own: PretrainedConfig,
    weights: Mapping[str, Tensor],
    seed: Seed,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, Any]:
    """Compare what was written with the source, in float32 arithmetic, one module at a time."""
    size = min(own.vocab_size, growth.config.vocab_size)
    draw = _generator(growth)
    tokens = torch.randint(size, (1, PROBE), generator=draw)
    with torch.no_grad():
        before = streamed_model(own, weights)(input_ids=tokens, use_cache=False).logits[..., :size]
        written = stored_weights(folder, growth.config)
        child = streamed_model(growth.config, written)
        after = child(input_ids=tokens, use_cache=False).logits[..., :size]
    change, scale = float((after - before).abs().max()), float(before.abs().max())
    relative = EXACT if dtype == torch.float32 else ROUNDING * torch.finfo(dtype).eps
    bound = relative * max(1.0, scale)
    if seed.preserves == "exact" and not change <= bound:
        raise exactness(growth.who, growth.target.name, growth.source.name, change, bound)
    return {"logits_difference": change, "largest_logit": scale, "allowed": bound}
