"""The lineage as a person reads it, and what every figure in it is traced back by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ars_kit.records import MemberRecord, RunRecord

TRACED = (
    "data_hash", "tokenizer_hash", "config_hash", "source_hash", "seed", "strategy", "optimizer",
    "base_optimizer", "device", "versions", "timestamp",
)  # fmt: skip
"""Fields of metrics.json that say what a figure was made from."""
SHORT = 12


def lineage_facts(run: RunRecord) -> dict[str, Any]:
    """Return every member, its parent, its hashes, what its figures come from; JSON-ready."""
    return {
        "run": str(run.path),
        "members": [_facts(m) for m in run.members],
        "controls": {c.label: [_facts(m) for m in c.members] for c in run.controls},
        "problems": list(run.problems),
    }


def drawn(run: RunRecord) -> str:
    """Return the lineage as a tree, a line a member."""
    names = {m.name for m in run.members}
    roots = [m for m in run.members if m.parent is None or m.parent not in names]
    return "\n".join(line for root in roots for line in _branch(root, run.members, "", ""))


def _branch(
    member: MemberRecord, members: Sequence[MemberRecord], lead: str, below: str
) -> Iterator[str]:
    yield f"{lead}{member.name}  {_told(member)}"
    heirs = [m for m in members if m.parent == member.name]
    for heir in heirs:
        last = heir is heirs[-1]
        # A single heir stands right below: a long chain must not run off the page.
        if len(heirs) == 1:
            yield from _branch(heir, members, f"{below}└ ", below)
        else:
            lead, more = ("└── ", "    ") if last else ("├── ", "│   ")
            yield from _branch(heir, members, below + lead, below + more)


def _told(member: MemberRecord) -> str:
    if member.state != "done":
        return member.state if member.state == "waiting" else f"training, {member.steps} steps"
    born = member.metrics.get("birth", {})
    if not member.metrics:  # they are damaged, which is said elsewhere
        origin = "-" if member.parent is None else f"from {member.parent}"
    elif "sources" in born:
        origin = f"made of {', '.join(born['sources'])}"
    elif member.parent is None:
        origin = "from fresh weights"
    else:
        origin = f"from {member.parent}, {born.get('inherited_share', 0.0):.0%} inherited"
    if born.get("note"):
        origin += f", {born['note']}"
    mine, theirs = _short(member.manifest), _short(member.parent_manifest)
    return f"{mine}  {origin}" + (f" ({theirs})" if member.parent_manifest else "")


def _facts(member: MemberRecord) -> dict[str, Any]:
    return {
        "member": member.name,
        "state": member.state,
        "parent": member.parent,
        "manifest": member.manifest,
        "parent_manifest": member.parent_manifest,
        **{key: member.metrics.get(key) for key in TRACED},
        "birth": member.metrics.get("birth"),
    }


def _short(digest: str | None) -> str:
    return digest[:SHORT] if digest else "-" * SHORT
