"""A run's settings: typed sections with their defaults, and the file they are frozen in.

:mod:`ars_kit.resolving` makes them of what a user says.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_type_hints

from ars_kit.lora import WHOLE
from ars_kit.schema import Choice

Origin = Literal["default", "file", "environment", "flag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySettings:
    """Who is in the family and how a member follows another."""

    members: str = "d10..d18"
    """Members from small to large: a range ``d10..d18``, a list ``d10,d12``, or a ``.toml`` file of
    shapes."""
    strategy: Choice = Choice("progressive")
    """Inheritance strategy."""
    base: str | None = None
    """Pretrained model to start from: a directory or a hub id; none trains from random weights."""
    architecture: str = "qwen2"
    """Without a base: qwen2, llama or qwen3."""
    depth: Literal["miniseries", "depth", "same", "grow"] = "miniseries"
    """Without a base: miniseries (depth and width grow) or depth (width stays). With one: same
    shape, or grow (deeper)."""
    aspect: float = 1.6
    """Miniseries: width is head_dim times ceil(aspect x depth / 8)."""
    head_dim: int = 8
    """Without a base: dimensions of an attention head."""
    init: float = 0.5
    """Without a base: standard deviation of fresh matrices, times the root of the width."""
    width: int = 32
    """With depth alone growing, and no base: the width of every member."""
    vocab_size: int = 1024
    """Without a base: entries of the byte-level BPE tokenizer that is trained."""
    seed: int = 0
    """Seeds initial weights, data order and every random draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where text comes from and how it is cut."""

    source: str = "stdlib"
    """A path, ``hf:owner/name``, ``kaggle:owner/name``, or a source NAME:key=value."""
    heldout_fraction: float = 0.1
    """Share of the text that is never trained on."""
    sequence_length: int = 128
    """Tokens of context."""
    document_mask: bool = False
    """Keep the documents of a sequence apart: no attention between them, positions restart."""
    heldout_tokens: int | None = 131072
    """Held-out tokens judged after each member; none judges all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How long and how fast each member trains."""

    iterations: tuple[int, int] = (100, 50)
    """Iterations of the first member and of each later one (all the first, where none inherits)."""
    steps_per_iteration: int = 3
    """Optimizer steps an iteration stands for."""
    tokens: int | None = None
    """Tokens per member; overrides iterations."""
    batch_size: int = 16
    """Sequences per optimizer step over all devices."""
    accumulation: int = 1
    """Micro-batches an optimizer step is split into."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; weights and moments stay fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    compile: bool = False
    """Compile the decoder layers with torch.compile, once for each shape of them in the family."""
    memory: Literal["auto", "full", "lean", "tiny"] = "auto"
    """Recipe for the device's memory; auto takes the first of full, lean, tiny that fits."""
    trainable: Choice = WHOLE
    """Of what is inherited: all trains, or adapters, lora:r=16 (r, alpha, dropout, targets)."""
    lr: float = 12e-3
    """Peak learning rate (of hidden matrices at width lr_width, where that is set)."""
    lr_width: int | None = 32
    """Reference width: hidden matrices train at lr x lr_width / width; none scales nothing."""
    lr_vectors: float = 12e-3
    """Peak learning rate of embeddings, norms and biases; used only where lr_width is set."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Learning rate over a member's steps: warm-up + stable + decay, warm-up + cosine, constant."""
    warmup_steps: int = 20
    """Linear warm-up of a member that starts fresh (an heir re-warms as its strategy says)."""
    decay_fraction: float = 0.3
    """Share of the steps in which wsd decays to zero."""
    max_skipped: int = 100
    """Skipped steps in a row after which the run stops (exit 6)."""
    on_instability: Literal["ignore", "stop", "rollback"] = "ignore"
    """After long instability: go on, stop (exit 6), or go back and leave its batches out."""
    instability_limit: float = 6.0
    """Sigmas above its best at which the median of the last 32 losses counts as unstable."""
    instability_steps: int = 64
    """Steps that this must last."""
    max_rollbacks: int = 3
    """Times a member goes back before the run stops (exit 6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """What turns gradients into steps."""

    name: Choice = Choice("ars")
    """An optimizer wrapper (ars) or a base optimizer (adamw)."""
    base: Choice = Choice("adamw")
    """The optimizer a wrapper is put around."""
    gates: tuple[Choice, ...] = ()
    """Damping gates to add."""
    without: tuple[str, ...] = ()
    """Damping gates to leave out, by name."""
    entropy_threshold: tuple[float, float] = (0.5, 0.4)
    """Of the first and the last member, linear in between; for wrappers that have this setting."""
    surprise_damping: tuple[float, float] = (0.1, 0.15)
    """Of the first and the last member, linear in between; for wrappers that have this setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What changes nothing in the trained weights."""

    evaluators: tuple[Choice, ...] = (Choice("perplexity"),)
    """Judges of each finished member; perplexity judges in any case."""
    price_per_hour: float = 0.44
    """Price of the machine in dollars per hour."""
    save_every: int = 100
    """Optimizer steps between training states."""
    log_every: int = 10
    """Optimizer steps between readings of the losses from the device."""
    trackers: tuple[Choice, ...] = ()
    """Trackers to tell of the training, beside history.jsonl."""
    heldout_every: int | None = None
    """Optimizer steps between points of the held-out curve; none draws no curve, unless controls
    are trained."""
    controls: tuple[str, ...] = ()
    """Controls trained after the family: scratch, no-growth, one-long-run, no-ars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a run.

    Attributes:
        origins: the layer each ``section.key`` came from.
    """

    family: FamilySettings = field(default_factory=FamilySettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return every value by ``section.key``, in order."""
        return {
            f"{name}.{f.name}": getattr(getattr(self, name), f.name)
            for name, section in SECTIONS.items()
            for f in dataclasses.fields(section)
        }


SECTIONS: Mapping[str, type[Any]] = {
    "family": FamilySettings,
    "data": DataSettings,
    "train": TrainSettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
}

CONTROLS = ("scratch", "no-growth", "one-long-run", "no-ars")
"""The controls there are; :mod:`ars_kit.controls` says what each is."""

# Changing these leaves the trained weights as they are, so a run may go on under other values.
NEUTRAL = frozenset(f"run.{f.name}" for f in dataclasses.fields(RunSettings))

# What to do about trouble may be decided when it is there.
REMEDIES = frozenset(
    {
        "train.on_instability",
        "train.instability_limit",
        "train.instability_steps",
        "train.max_rollbacks",
    }
)


def keys() -> dict[str, Any]:
    """Return every ``section.key`` with its annotation."""
    return {
        f"{name}.{key}": annotation
        for name, section in SECTIONS.items()
        for key, annotation in get_type_hints(section).items()
    }


def to_toml(settings: Settings, *, comments: bool = True) -> str:
    """Write settings as a ``run.toml`` that is read back to the same values."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
        docs = field_docs(section)  # type: ignore[arg-type]  # a class has a hash
        for f in dataclasses.fields(section):
            if comments and docs.get(f.name):
                lines.append(f"# {docs[f.name]}")
            lines.append(f"{f.name} = {_toml(getattr(getattr(settings, name), f.name))}")
    return "\n".join(lines) + "\n"


def spelled(value: Any) -> str:
    """Return a value as the command line reads it: ``100,50``, ``none``, ``clip:limit=0.5``."""
    if isinstance(value, tuple):
        return ",".join(map(spelled, value))
    return "none" if value is None else str(value)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers, lists, null; a choice as it is spelled."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def differences(
    old: Settings, new: Settings, *, free: frozenset[str] = NEUTRAL | REMEDIES
) -> list[str]:
    """Name what changed between two runs' settings, apart from what is ``free`` to change."""
    before, after = old.flat(), new.flat()
    if "rollback" in (old.train.on_instability, new.train.on_instability):
        free -= {"run.save_every"}  # where there are states decides where to go back to
    if str(after["family.base"]).startswith(f"{before['family.base']}@"):
        free |= {"family.base"}  # a run that kept no commit of the hub's now has one
    return [
        f"{key}: {_toml(before[key])} -> {_toml(after[key])}"
        for key in before
        if key not in free and before[key] != after[key]
    ]


@cache
def field_docs(section: type[Any]) -> Mapping[str, str]:
    """Return the docstring under each field of a section."""
    body = ast.parse(inspect.getsource(section)).body[0]
    docs: dict[str, str] = {}
    if isinstance(body, ast.ClassDef):
        for node, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # JSON lets a DEL stand as it is, which TOML does not read.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
