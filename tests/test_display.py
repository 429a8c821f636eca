"""What a person sees while a family trains, on terminals of several sizes and on none."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ars_kit.display import HEADINGS, Display, fitted

LONG = "a/very/long/path/to/a/pretrained/model/with-a-long-name-instruct-2026"


def family(members: int, base: str | None = None, steps: int = 1200) -> Any:
    names = [f"d{10 + i}" for i in range(members)]
    made = [
        SimpleNamespace(name=n, parent=p, steps=steps, tokens=steps * 1000, seconds=60.0)
        for n, p in zip(names, [base, *names], strict=False)
    ]
    return SimpleNamespace(
        members=made, settings=SimpleNamespace(run=SimpleNamespace(price_per_hour=0.44))
    )


def screen(width: int, height: int = 40, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, **options)


def step(display: Display, member: str, done: int) -> None:
    meter: Any = SimpleNamespace(tokens=done * 1000, elapsed=lambda: done * 12.3)
    row = {"loss": 13.4567, "gradient": 1.0, "step_size": 0.875, "skipped": False}
    left_out = {**row, "step_size": 0.0, "skipped": True}  # damps nothing
    display.steps(member, done, [left_out, row], meter)


def shown(display: Display) -> str:
    with display.console.capture() as capture:
        display.console.print(display._table())
    return capture.get()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("base", [None, LONG])
def test_everything_fits_on_a_terminal(width: int, base: str | None) -> None:
    display = Display(family(9, base), screen(width, color_system=None))
    step(display, "d10", 1200)
    step(display, "d11", 280)
    heading, *rows = shown(display).splitlines()
    assert heading.split() == [word for h in HEADINGS for word in h.split()]
    assert len(rows) == 10
    assert all(len(line) <= width and "…" not in line for line in (heading, *rows))
    first, second = rows[0].split(), rows[1].split()
    assert first[:4] == ["d10", "base" if base else "-", "1200/1200", "13.457"]
    assert second[:7] == ["d11", "d10", "280/1200", "13.457", "-", "0.875", "81"]
    assert rows[-1].split()[:2] == ["family", "1480/10800"]


def test_a_narrow_terminal_goes_without_columns_and_never_cuts_a_figure() -> None:
    display = Display(family(3), screen(44, color_system=None))
    step(display, "d10", 900)
    text = shown(display)
    assert "…" not in text
    assert "13.457" in text
    assert "parent" not in text


def test_a_tall_family_shows_the_member_in_training() -> None:
    display = Display(family(40), screen(80, height=20, color_system=None))
    for name in [m.name for m in display.plan.members][:25]:
        step(display, name, 1200)
    step(display, "d35", 7)
    lines = shown(display).splitlines()
    assert len(lines) < 20
    assert any(line.startswith("d35 ") and "7/1200" in line for line in lines)
    assert sum(line.startswith("...") for line in lines) == 2
    assert lines[-1].startswith("family")


def test_steps_that_were_undone_are_not_left_behind() -> None:
    """They have cost tokens, and are to be done again."""
    display = Display(family(1, steps=100), screen(140, color_system=None))
    meter: Any = SimpleNamespace(tokens=150_000, elapsed=lambda: 75.0)
    row = {"loss": 1.0, "gradient": 1.0, "step_size": 1.0, "skipped": False}
    display.steps("d10", 60, [row], meter)
    assert display.rows["d10"][7] == "20 s"  # 40 steps of 1000 tokens at 2000 a second


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    console = screen(80, _environ={"TERM": "dumb"})
    display = Display(family(2), console)
    with display.showing():
        step(display, "d10", 600)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("d10: step 600/1200, loss 13.457, damping 0.875, 81 tokens/s, ")
    assert "member" not in text


def test_somebody_who_reads_a_pipe_gets_whole_lines() -> None:
    console = Console(file=io.StringIO(), width=40)
    Display(family(2, LONG), console).born(
        "d10", {"parent": LONG, "birth_logits_difference": 0.0, "inherited_share": 1.0}
    )
    assert len(console.file.getvalue().splitlines()) == 1  # type: ignore[attr-defined]


def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    made = fitted(screen(80), ["a", "b", "c"], [["1", "2", "3"]], [])
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        console = screen(80, _environ={"TERM": "xterm-256color", **environ})
        console.print(made, style="red")
        assert ("\x1b[31m" in console.file.getvalue()) == coloured  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("skipped", "told"),
    [
        (0, ""),
        (6, ""),
        (7, "d10: 7 of its 12 steps were skipped, so it is hardly trained\n"),
        (12, "d10: 12 of its 12 steps were skipped, so it is not trained\n"),
    ],
)
def test_a_member_of_skipped_steps_is_not_finished_without_a_word(skipped: int, told: str) -> None:
    console = Console(file=io.StringIO(), width=80)
    metrics = {
        "model_id": "d10", "parent_model": None, "training_time": 1.0, "steps": 12,
        "final_loss": None, "cost": 0.0, "ars_damping_avg": None, "tokens_per_second": 1.0,
        "skipped_steps": skipped,
    }  # fmt: skip
    Display(family(2), console).finished(metrics)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(told + "d10: done")
