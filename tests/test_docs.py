"""What the documentation says is what the code does."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from commands import call_forked

from ars_kit import errors
from ars_kit.cli import cli
from ars_kit.cli.options import settings_from
from ars_kit.damping import DampedOptimizer
from ars_kit.host import Host, Plugin
from ars_kit.kinds import KINDS
from ars_kit.optim import check_optimizer
from ars_kit.scaffold import package_files, write_package
from ars_kit.schema import Choice
from ars_kit.spec import Hooks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLE = DOCS / "examples" / "arskit-halve-early"
PACKAGES = {"gate": EXAMPLE, "strategy": DOCS / "examples" / "arskit-on-top"}
"""By kind, the package that ``arskit plugins new`` begins."""
SKIPPED = {".venv", ".git", "build", "dist", ".hypothesis", ".pytest_cache", "checkpoints"}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate: Any = load(DOCS / "generate.py")


# --- generated blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("page", generate.pages(), ids=lambda p: p.name)
def test_no_generated_block_is_stale(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.refreshed(text) == text, "stale; type: make docs"


def test_a_stale_block_is_noticed() -> None:
    page = (DOCS / "commands" / "plan.md").read_text(encoding="utf-8")
    assert generate.refreshed(page.replace("--seed", "--seeed")) == page


def test_every_command_has_its_page_and_every_page_its_command() -> None:
    pages = {generate.page_of(name): name for name, _ in generate.commands()}
    assert set(pages) == set((DOCS / "commands").glob("*.md"))
    for page, name in pages.items():
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# arskit {name}\n")
        assert f"<!-- generated: help {name} -->\n```text\nUsage: arskit {name} [OPTIONS]" in text


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (DOCS / "plugins.md").read_text(encoding="utf-8")
    for name, hook in vars(Hooks).items():
        if name.startswith("arskit_"):
            answer = inspect.signature(hook).return_annotation
            assert f"### `{name}() -> {answer}`" in page


def test_every_exit_code_is_documented() -> None:
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    kinds = [k for k in vars(errors).values() if inspect.isclass(k)]
    raised = {k.__name__: k.exit_code for k in kinds if issubclass(k, errors.ArsKitError)}
    table = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    assert {name: int(code) for code, name in table} == raised


# --- links -----------------------------------------------------------------------------------


def markdown() -> list[Path]:
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name not in SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".md")]
    return sorted(found)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", markdown(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n[a](#a) [b](#b) [c](gone.md) [d](page.md#a) [e](https://x.y/#z)\n")
    assert dead_links(page) == ["#b", "gone.md"]


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in generate.pages():
        assert page.name == "README.md" or f"]({page.relative_to(DOCS).as_posix()}):" in index


# --- examples of commands --------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A command of a page, what it prints, and how it ends."""

    page: str
    arguments: list[str]
    output: str
    exit_code: int
    runnable: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.arguments)}"


FENCE = re.compile(r"^```(?:console|sh)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(page: Path) -> Iterator[Example]:
    name = page.relative_to(ROOT).as_posix()
    text = page.read_text(encoding="utf-8")
    for flags, lines in FENCE.findall(text):
        for block in re.split(r"^\$ ", lines, flags=re.MULTILINE)[1:]:
            command, _, output = block.partition("\n")
            code = re.search(r"# exit (\d+)", command)
            words = shlex.split(command, comments=True)
            assert words[0] == "arskit", f"{name}: $ {command}"
            runnable = flags.strip() == "runnable"
            yield Example(name, words[1:], output, int(code.group(1)) if code else 0, runnable)
    for command in re.findall(r"^    (?:\$ )?arskit (.+)$", text, re.MULTILINE):
        words = shlex.split(command.partition("|")[0], comments=True)
        yield Example(name, words, "", 0, runnable=False)


PAGES = [*generate.pages(), ROOT / "README.md", *(p / "README.md" for p in PACKAGES.values())]
EXAMPLES = [example for page in PAGES for example in examples(page)]


@pytest.fixture(scope="module")
def host() -> Host:
    """The installed plugins, and the examples'."""
    host = Host.installed()
    for package in PACKAGES.values():
        (module,) = (package / "src").glob("*.py")
        name = package.name.removeprefix("arskit-")
        host.register(load(module), Plugin(name, package.name, "0.1.0"))
    assert not host.quarantined
    return host


def parsed(arguments: list[str]) -> click.Context:
    """Let click read a command line without running the command."""
    command: click.Command = cli
    context = None
    name, rest = "arskit", arguments
    while True:
        context = command.make_context(name, list(rest), parent=context)
        if not isinstance(command, click.Group):
            return context
        given = [*context._protected_args, *context.args]
        found, below, rest = command.resolve_command(context, given)
        assert found is not None
        assert below is not None
        name, command = found, below


@pytest.fixture(scope="module")
def with_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of shapes of the page on families."""
    folder = tmp_path_factory.mktemp("shapes")
    (text,) = re.findall(
        r"^```toml\n(\[\[member\]\].*?)^```$",
        (DOCS / "families.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    (folder / "shapes.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_example_parses(
    example: Example, host: Host, with_shapes: Path, monkeypatch: Any
) -> None:
    """Commands, options, settings, and the names of optimizers and gates are those there are."""
    for variable in [v for v in os.environ if v.startswith("ARSKIT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(with_shapes)
    if {"--version", "--help"} & set(example.arguments):
        return
    context = parsed(example.arguments)
    if "assignments" not in context.params or example.exit_code:
        return
    settings = settings_from({**context.params, "file": None})
    check_optimizer(host, settings.optimizer)
    host.check("strategies", settings.family.strategy)
    for evaluator in settings.run.evaluators:
        host.check("evaluators", evaluator)


def test_there_are_examples_of_every_command() -> None:
    named = {" ".join(e.arguments[:n]) for e in EXAMPLES for n in (1, 2)}
    assert {name for name, _ in generate.commands()} <= named


def test_an_unknown_option_or_command_is_noticed() -> None:
    for words in (["run", "--lrr", "1"], ["rum"], ["plugins", "lisst"], ["completion", "tcsh"]):
        with pytest.raises(click.UsageError):
            parsed(words)


def pattern_of(output: str) -> str:
    """Return a pattern of a page's output: any number for a number, anything for three dots."""
    words = [re.escape(NUMBER.sub("0", word)) for word in output.split()]
    return r" ?".join(words).replace(re.escape("..."), ".*")


def normalised(output: str) -> str:
    return " ".join(NUMBER.sub("0", word) for word in output.split())


NUMBER = re.compile(r"\d[\d.,:e+-]*\d|\d")
ON_THE_WAY = re.compile(r"^\w+: step \d+/\d+, .*\n", re.MULTILINE)
"""What a run says every few seconds: a slow machine sees it, a quick one does not."""


def execute(example: Example, folder: Path, cache: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARSKIT_")}
    done = call_forked(
        example.arguments,
        folder=folder,
        environment={**environment, "ARSKIT_CACHE": str(cache), "COLUMNS": "200"},
        together=True,
    )
    assert done.returncode == example.exit_code, f"{example}\n{done.stdout}"
    if example.output:
        shown = ON_THE_WAY.sub("", done.stdout)
        assert re.fullmatch(pattern_of(example.output), normalised(shown)), done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_folder: Path) -> Path:
    """A folder in which the page on ``arskit run`` was followed, word for word."""
    folder = tmp_path_factory.mktemp("docs") / "here"
    folder.mkdir()
    shutil.copytree(text_folder, folder / "texts")
    for example in examples(DOCS / "commands" / "run.md"):
        if example.runnable:
            execute(example, folder, cache)
    assert (folder / "toy" / "d4" / "model.safetensors").is_file()
    return folder


RUNNABLE = [e for e in EXAMPLES if e.runnable and e.page != "docs/commands/run.md"]


@pytest.mark.parametrize("example", RUNNABLE, ids=str)
def test_runnable_examples_do_what_the_page_says(
    example: Example, trained: Path, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "here")
    execute(example, tmp_path / "here", cache)


@pytest.mark.parametrize(
    ("page", "printed", "same"),
    [
        ("d4: done, loss 3.677\n", "d4: done, loss 4.1\n", True),
        ("a   b\n...\nz\n", "a b\nc\nz\n", True),
        ("d4: done\n", "d4: diverged\n", False),
        ("a\nz\n", "a\nb\nz\n", False),
    ],
)
def test_outputs_are_compared_apart_from_numbers(page: str, printed: str, same: bool) -> None:
    assert bool(re.fullmatch(pattern_of(page), normalised(printed))) == same


# --- examples of Python ----------------------------------------------------------------------

SNIPPET = re.compile(
    r"^```python runnable\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
DRIVER = """
import json, os, sys
first, *rest = json.load(open(sys.argv[1]))
for number, code in enumerate(rest):
    if "init_process_group" in code:  # as torchrun would have it
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = sys.argv[2]
    print(f"<<{number}>>", flush=True)
    exec(compile(first + code, f"<block {number + 2} of the page>", "exec"), {"__name__": "page"})
"""
SCRIPTED = [page for page in generate.pages() if SNIPPET.search(page.read_text(encoding="utf-8"))]


def run_snippets(codes: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run each block behind the first, in a fresh namespace."""
    (folder / "codes.json").write_text(json.dumps(codes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, "codes.json", str(port)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("page", SCRIPTED, ids=lambda p: p.name)
def test_python_on_a_page_does_what_the_page_says(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = SNIPPET.findall(text)
    assert len(found) == len(re.findall(r"^```python", text, re.MULTILINE)), "some are not run"
    done = run_snippets([code for code, _ in found], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = re.split(r"<<\d+>>\n", done.stdout)[1:]
    assert len(printed) == len(found) - 1
    for (code, wanted), output in zip(found[1:], printed, strict=True):
        if wanted:
            assert re.fullmatch(pattern_of(wanted), normalised(output)), f"{code}\n{output}"


def test_python_that_fails_is_noticed(tmp_path: Path) -> None:
    assert SCRIPTED
    done = run_snippets(["a = 1\n", "print(a)\n", "a += 1\nprint(a)\nassert a == 3\n"], tmp_path)
    assert done.returncode == 1
    assert done.stdout == "<<0>>\n1\n<<1>>\n2\n"
    assert 'File "<block 3 of the page>", line 4' in done.stderr


# --- the example package ---------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, str]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in found}


@pytest.mark.parametrize("kind", PACKAGES)
def test_the_examples_are_what_the_command_writes(tmp_path: Path, kind: str) -> None:
    example = PACKAGES[kind]
    written = write_package(kind, example.name.removeprefix("arskit-"), tmp_path)
    assert written == tmp_path / example.name
    assert files_of(written) == files_of(example)
    assert list(tmp_path.iterdir()) == [written]


def test_the_readmes_gate_is_the_examples_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code == (EXAMPLE / "src" / "arskit_halve_early.py").read_text(encoding="utf-8")


def test_the_examples_gate_works(host: Host) -> None:
    gate = host.make("gates", Choice("halve-early", {"steps": "1"}))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = DampedOptimizer(torch.optim.SGD([weight], lr=0.1), {"halve-early": gate})
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step(loss=torch.ones(()))
    assert weight.item() == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("gate", "Halve", "lower-case letters"),
        ("gate", "2-fast", "the first a letter"),
        ("gate", "a--b", "joined by dashes"),
        ("gate", "../up", "lower-case letters"),
        ("gate", "none", "the class None exists"),
        ("gate", "damping-gate", "the class DampingGate exists"),
        ("strategy", "inheritance-strategy", "the class InheritanceStrategy exists"),
        ("gat", "halve", r"did you mean .gate.\?\)\. There are: gate, strategy"),
    ],
)
def test_a_bad_name_writes_nothing(tmp_path: Path, kind: str, name: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        write_package(kind, name, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_stays_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "arskit-halve-early" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(errors.ConfigError, match="already exists"):
        write_package("gate", "halve-early", tmp_path)
    assert files_of(tmp_path) == {"arskit-halve-early/mine.txt": "mine"}


@pytest.mark.parametrize("kind", PACKAGES)
def test_any_names_package_compiles(kind: str) -> None:
    for name in ("a", "x2", "clip-by-the-moving-average-of-norms"):
        files = package_files(kind, name)
        for path, text in files.items():
            if path.endswith(".py"):
                compile(text, path, "exec")
            assert "$" not in text


def test_every_kind_has_an_example() -> None:
    assert PACKAGES.keys() == KINDS.keys()


def test_plugins_new_refuses_a_name_that_is_taken(arskit: Any, tmp_path: Path) -> None:
    for kind, name, shelf in (("gate", "clip", "gates"), ("strategy", "stack", "strategies")):
        done = arskit("plugins", "new", kind, name)
        assert done.returncode == 3
        assert f"'{name}' is offered by plugin '{shelf}' (ars-kit" in done.stderr
    assert list(tmp_path.iterdir()) == []
