"""Write the generated blocks of the pages: ``python docs/generate.py``, or ``--check`` to compare.

A block begins with ``<!-- generated: KIND ARGUMENT -->`` and ends with ``<!-- end -->``. What
stands between the two comes from the code, and a test fails while it does not.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from measured import evaluation, export, inheritance, memory, serving, speed, stability, tables

from ars_kit import errors, spec
from ars_kit.cli import cli
from ars_kit.resolving import ADAPTED, PRETRAINED
from ars_kit.roster import parse_depths
from ars_kit.schema import _argument_docs, describe
from ars_kit.settings import SECTIONS, Settings, field_docs, keys, spelled
from ars_kit_serving import relaying

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: ([\w-]+)(?: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 80
"""Columns of a help text, whoever generates it."""

USAGE = "The command line cannot be read: no such command or option. Nothing was done."
OUTCOMES = ((0, "-", "Everything asked for is done."), (2, "-", USAGE))
"""Exit codes that no error of ars-kit carries."""


def pages() -> list[Path]:
    """Return every page, examples apart."""
    return sorted([*DOCS.glob("*.md"), *DOCS.glob("commands/*.md")])


def refreshed(text: str) -> str:
    """Return a page with each of its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        begin, kind, argument, end = match.groups()
        return f"{begin}{MAKERS[kind](argument or '')}\n{end}"

    return BLOCK.sub(block, text)


def commands(
    command: click.Command = cli, context: click.Context | None = None
) -> Iterator[tuple[str, click.Context]]:
    """Yield every command's name (``plugins new``) and a context to ask for its help."""
    if context is None:
        context = click.Context(
            cli, info_name="arskit", terminal_width=WIDTH, **cli.context_settings
        )
    if not isinstance(command, click.Group):
        yield context.command_path.removeprefix("arskit "), context
        return
    for name, below in command.commands.items():
        inner = click.Context(below, info_name=name, parent=context, terminal_width=WIDTH)
        yield from commands(below, inner)


def page_of(command: str) -> Path:
    """Return the page that documents a command."""
    return DOCS / "commands" / f"{command.replace(' ', '-')}.md"


def help_of(command: str) -> str:
    """Return what ``arskit COMMAND --help`` prints."""
    context = dict(commands())[command]
    return f"```text\n{context.command.get_help(context)}\n```"


def exit_codes(_: str) -> str:
    """Return the table of exit codes: ours by error, and those that no error carries."""
    rows = [
        (kind.exit_code, f"`{kind.__name__}`", _meaning(kind))
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.ArsKitError)
    ]
    table = sorted([*OUTCOMES, *rows])
    return _table(["code", "error", "meaning"], [[str(c), name, text] for c, name, text in table])


def settings(_: str) -> str:
    """Return a table for each section of the settings."""
    parts = []
    annotations = keys()
    for name, section in SECTIONS.items():
        docs = field_docs(section)
        rows = [
            [
                f"`{f.name}`",
                describe(annotations[f"{name}.{f.name}"]),
                _default(name, f),
                docs[f.name],
            ]
            for f in dataclasses.fields(section)
        ]
        table = _table(["setting", "type", "default", "meaning"], rows)
        parts.append(f"### `[{name}]`\n\n{inspect.getdoc(section)}\n\n{table}")
    return "\n\n".join(parts)


def shapes(_: str) -> str:
    """Return the table of the embedded family's shapes under the default settings."""
    from ars_kit.models import count_parameters  # noqa: PLC0415 -- slow
    from ars_kit.shapes import embedded_config  # noqa: PLC0415 -- slow

    default = Settings()
    family, rows = default.family, []
    for depth in parse_depths(family.members):
        config = embedded_config(
            depth,
            vocab_size=family.vocab_size,
            context=default.data.sequence_length,
            aspect=family.aspect,
            head_dim=family.head_dim,
        )
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        figures = [f"{n:,}" for n in (depth, *sizes, count_parameters(config))]
        rows.append([f"d{depth}", *figures])
    return _table(["member", "layers", "width", "heads", "MLP width", "parameters"], rows)


def fields(name: str) -> str:
    """Return a table of the fields of a value of ``ars_kit.spec``, from its docstring."""
    kind = getattr(spec, name)
    docs = _argument_docs((inspect.getdoc(kind) or "").replace("Attributes:", "Args:"))
    rows = [
        [f"`{field}`", f"`{_spelled(annotation)}`", _plain(docs[field])]
        for field, annotation in kind.__annotations__.items()
    ]
    return _table(["field", "type", "meaning"], rows)


def methods(name: str) -> str:
    """Return the methods of a protocol that plugins keep: signature and first paragraph."""
    lines = []
    for method, function in vars(getattr(spec, name, None) or getattr(relaying, name)).items():
        if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_")):
            signature = str(inspect.signature(function)).replace("'", "")
            text = (inspect.getdoc(function) or "").partition("\nRaises:")[0]
            lines.append(f"- `{method}{signature}`: {_plain(text)}")
    return "\n".join(lines)


def index(_: str) -> str:
    """Return a line for each page: its title and its first sentence."""
    lines = []
    for page in pages():
        if page.name == "README.md":
            continue
        title, _, rest = page.read_text(encoding="utf-8").partition("\n")
        sentence = re.split(r"(?<=\.)\s", rest.strip(), maxsplit=1)[0]
        path = page.relative_to(DOCS).as_posix()
        lines.append(f"- [{title.removeprefix('# ')}]({path}): {' '.join(sentence.split())}")
    return "\n".join(lines)


def _meaning(kind: type[errors.ArsKitError]) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return re.sub(r" Exit code .*", "", text)


def _default(section: str, field: dataclasses.Field[Any]) -> str:
    shown = f"`{spelled(field.default) or '(empty)'}`"
    key = f"{section}.{field.name}"
    if key in PRETRAINED:
        shown += f"; with a base `{spelled(PRETRAINED[key])}`"
    return f"{shown}, its adapters `{spelled(ADAPTED[key])}`" if key in ADAPTED else shown


def _table(headings: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [headings, ["---"] * len(headings), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spelled(annotation: Any) -> str:
    """Return an annotation as its source has it; a named tuple keeps it as a ``ForwardRef``."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def _plain(text: str) -> str:
    """Turn a docstring's reStructuredText into Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`")


MAKERS: dict[str, Callable[[str], str]] = {
    "help": help_of,
    "exit-codes": exit_codes,
    "settings": settings,
    "shapes": shapes,
    "fields": fields,
    "methods": methods,
    "index": index,
    "stability-conditions": stability.conditions,
    "stability-verdicts": stability.verdicts,
    "stability-bars": tables.bars,
    "stability-gates": stability.gates,
    "stability-named": stability.named,
    "stability-level": stability.level,
    "stability-scores": stability.scores,
    "detector": stability.detector,
    "memory-fits": memory.fits,
    "memory-measured": memory.measured,
    "packing": speed.packing,
    "kept-memory": speed.kept_memory,
    "evaluation-speed": evaluation.speed,
    "evaluation-prompt": evaluation.prompt,
    "inheritance-conditions": inheritance.conditions,
    "inheritance-arms": inheritance.arms,
    "inheritance-bars": tables.bars,
    "serving-conditions": serving.conditions,
    "serving-speed": serving.speed,
    "serving-proxy": serving.proxy,
    "serving-bars": tables.bars,
    "export-conditions": export.conditions,
    "export-formats": export.formats,
    "throughput": speed.throughput,
    "throughput-bars": tables.bars,
    "step-parts": speed.step_parts,
    "overhead": speed.overhead,
    "costs": speed.costs,
    "worse-than-linear": speed.worse_than_linear,
}


def main() -> None:
    """Write what is stale, or name it and fail."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = refreshed(text)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        sys.stdout.write(f"{page.relative_to(DOCS)} {'is stale' if check else 'written'}\n")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
