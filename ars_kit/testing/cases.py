"""What a strategy is tried on: small models, pairs of their shapes, windows of tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ars_kit.models import build
from ars_kit.shapes import ARCHITECTURES, embedded_config
from ars_kit.testing.rules import ConformanceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY, CONTEXT = 60, 16
EPS_TIMES_WIDTH = 3e-2
"""A large epsilon: were it handled wrongly, no tolerance would hide it."""

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Root:
    """A parent's sizes.

    Attributes:
        heads: KV heads.
        ratio: query heads that read each.
    """

    tied: bool
    layers: int
    width: int
    inner: int
    heads: int
    ratio: int
    head: int = 8

    def config(self, architecture: str) -> PretrainedConfig:
        """Return its configuration."""
        sizes = {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads * self.ratio,
            "num_key_value_heads": self.heads,
            "head_dim": self.head,
        }
        config = embedded_config(
            self.layers,
            vocab_size=VOCABULARY,
            context=CONTEXT,
            architecture=architecture,
            sizes=sizes,
        )
        config.rms_norm_eps = EPS_TIMES_WIDTH / self.width
        config.tie_word_embeddings = self.tied
        return config


EMBEDDED = Root(tied=True, layers=2, width=32, inner=96, heads=4, ratio=1)
GROUPED = Root(tied=False, layers=2, width=24, inner=37, heads=2, ratio=2)
ODD = Root(tied=True, layers=1, width=21, inner=13, heads=1, ratio=3)
NARROW = Root(tied=False, layers=3, width=36, inner=50, heads=1, ratio=4)

CHANGES: Mapping[str, Sizes] = {
    "of the same shape": {},
    "with more layers": {"layers": 2},
    "with a wider residual stream": {"width": 16},
    "with a wider MLP": {"inner": 7},
    "with more KV heads": {"heads": 1},
    "with more query heads a KV head": {"ratio": 1},
    "with longer heads": {"head": 8},
    "with more of everything": {"layers": 3, "width": 27, "inner": 31, "heads": 1, "ratio": 1},
}
"""What is added to a parent's sizes."""
SHRUNK = "with less of everything"

SELECTED: tuple[tuple[Root, tuple[str, ...]], ...] = (
    (EMBEDDED, ("of the same shape", "with more layers", "with more of everything", SHRUNK)),
    (GROUPED, tuple(what for what in CHANGES if "everything" not in what)),
    (ODD, ("with more layers", "with more of everything")),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A parent and the shape of a child."""

    what: str
    parent: PretrainedConfig
    child: PretrainedConfig

    def broken(self, rule: str, found: str) -> ConformanceError:
        """Return the complaint about a rule that is broken here."""
        return ConformanceError(f"{rule}; {self.what}, {found}")


def cases(*, thorough: bool = False) -> Iterator[Case]:
    """Yield pairs of shapes: Qwen2, Llama and Qwen3, tied and untied, odd sizes, GQA.

    Args:
        thorough: every change to every parent, not the chosen ones.
    """
    every = tuple((root, (*CHANGES, SHRUNK)) for root in (EMBEDDED, GROUPED, ODD, NARROW))
    for architecture in ARCHITECTURES:
        for root, changes in every if thorough else SELECTED:
            for what in changes:
                yield _case(architecture, root, what)


def _case(architecture: str, root: Root, what: str) -> Case:
    change = CHANGES["with more of everything" if what == SHRUNK else what]
    sizes: dict[str, Any] = {key: getattr(root, key) + more for key, more in change.items()}
    grown = replace(root, **sizes)
    queries = grown.heads * grown.ratio
    # Llama wants a width that its query heads divide.
    grown = replace(grown, width=-(-grown.width // queries) * queries)
    pair = [root.config(architecture), grown.config(architecture)]
    tied = "tied" if root.tied else "untied"
    heads = f"{root.heads}x{root.ratio} heads of {root.head}"
    where = f"of a {tied} {architecture} ({root.layers} layers of {root.width}, {heads})"
    parent, child = reversed(pair) if what == SHRUNK else pair
    return Case(f"{where}, a child {what}", parent, child)


def fresh_of(config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a freshly initialised model in eval mode; the same one to all who ask."""
    return _model(_Key(config), seed, dtype, 0.0)


def model_of(config: PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return one each of whose parameters is away from its initial value; likewise shared."""
    return _model(_Key(config), seed, dtype, 0.1)


class _Key:
    """A configuration by its content."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.text = config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.text == self.text


@lru_cache(maxsize=256)
def _model(key: _Key, seed: int, dtype: torch.dtype, noise: float) -> Any:
    model = build(copy.deepcopy(key.config), seed=seed, dtype=dtype).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=draw, dtype=dtype))
    return model


def windows_of(n: int, seed: int) -> Tensor:
    """Return token ids, int64, shape (n, context + 1)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (n, CONTEXT + 1), generator=draw)
