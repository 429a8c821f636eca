"""Reports: what they say, that it is what was measured, and that a browser can show them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ars_kit import charts
from ars_kit.cli import cli
from ars_kit.errors import ConfigError
from ars_kit.lineage import lineage_text, read_lineage
from ars_kit.page import Code, Page, Points, Sample, Section, Table, Text, as_html, as_markdown
from ars_kit.records import read_run
from ars_kit.reporting import build, write_report

SECTIONS = [
    "Checklist", "The family", "Loss against FLOPs", "Quality", "Damping", "Controls", "Cost",
    "Lineage", "Samples", "How this was measured", "How to reproduce",
]  # fmt: skip
EVIL = "<script>alert('x')</script> | `a` **b** [c](d) \x00 \ud800 &amp; </pre>"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


class Reader(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(controlled: Path) -> str:
    return (controlled / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(controlled: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(controlled, out)
    return out


def test_a_run_ends_with_both_forms_of_its_report(controlled: Path) -> None:
    text = (controlled / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    for control in ("scratch", "no-growth", "one-long-run", "no-ars"):
        assert (controlled / "controls" / control / "report.html").is_file()
    summary = text.splitlines()[2]
    assert re.fullmatch(
        r"Of 3 members d\d is best on held-out text: \d\.\d{4} bits per byte "
        r"\(95 % interval over documents \d\.\d{4} to \d\.\d{4}\)\. "
        r"(It reached|The family did not reach) the held-out loss of d2 of control no-growth.*\. "
        r"That was measured with one seed \(0\), so there is no interval, and it may be chance\.",
        summary,
    )


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    loading = {"script", "link", "img", "iframe", "object", "embed", "source", "video", "audio"}
    assert not loading & {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert re.findall(r"url\((?!#)[^)]*\)", page) == []


def test_the_page_is_well_formed_and_accessible(page: str) -> None:
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len({*ids}) == len(ids)
    used = re.findall(r'(?:href="|url\()#([^")]+)', page)
    used += " ".join(str(a["aria-labelledby"]) for a in reader.named("svg")).split()
    assert {*used} <= {*ids}
    assert [a["lang"] for a in reader.named("html")] == ["en"]
    assert {"viewport", "color-scheme"} <= {a.get("name") for a in reader.named("meta")}
    plots = reader.named("svg")
    assert len(plots) == len(reader.named("figcaption")) == 4
    assert all(a["role"] == "img" for a in plots)
    told = re.findall(r'<svg role="img"[^>]*><title[^>]*>([^<]+)</title><desc[^>]*>([^<]+)<', page)
    assert [title for title, _ in told] == ["Held-out loss", "Quality", "Damping", "Cost"]
    assert all(re.search(r"\d", alt) for _, alt in told)
    assert len(reader.named("table")) == len(reader.named("caption"))
    assert all(a.get("scope") in {"col", "row"} for a in reader.named("th"))


def test_plots_take_the_pages_colours(page: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg.replace("xlink:href", "href"))
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "currentColor" in svg
    style = page.partition("<style>")[2].partition("</style>")[0]
    for name in {*re.findall(r"var\((--\w+)\)", page)}:
        assert len(re.findall(rf"{name}: #", style)) == 3, f"{name} on light, dark and printed"


def test_the_figures_are_those_of_the_metrics(controlled: Path, page: str) -> None:
    for member in read_run(controlled).members:
        metrics = json.loads((controlled / member.name / "metrics.json").read_text())
        cells = (
            f"<td>{metrics['parameters']:,}</td>", f"<td>{metrics['final_loss']:.4f}</td>",
            f"<td>{metrics['bits_per_byte']:.4f}</td>", f"<td>{metrics['total_flops']:.3g}</td>",
        )  # fmt: skip
        assert all(cell in page for cell in cells)
        assert str(member.manifest)[:12] in page
    assert metrics["data_hash"] in page
    assert "arskit run --config run.toml --out again" in page


def test_what_an_evaluator_adds_is_shown_with_its_interval(copy: Path) -> None:
    run = read_run(copy)
    for member in run.members:
        dict.update(member.metrics, bits_per_byte_low=1.0, bits_per_byte_high=3.0, bleu=12.345)  # type: ignore[arg-type]
    text = as_markdown(build(run))
    assert "(1.0000 to 3.0000)" in text
    assert "| BLEU |" in text
    assert "12.35" in text or "12.34" in text
    assert "95 % interval over documents 1.0000 to 3.0000" in text
    assert "chrF" not in text  # nobody measured it


def test_text_of_users_is_shown_and_never_obeyed() -> None:
    page = Page(
        EVIL,
        [EVIL],
        [
            Section(EVIL, [
                Text(EVIL), Points([EVIL]), Code(EVIL), Table(EVIL, [EVIL], [[EVIL]]),
                Sample(EVIL, [(EVIL, EVIL + "\n````\n")]),
            ])
        ],
    )  # fmt: skip
    reader = Reader(as_html(page))
    assert reader.open == []
    assert not reader.named("script")
    assert sum("alert('x')" in text for text in reader.text) >= 9
    as_html(page).encode("utf-8")  # no lone surrogate is left
    markdown = as_markdown(page)
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<script", outside)
    assert not re.search(r"(?<!\\)\[c\]", outside)
    assert re.search(r"^`````text$", markdown, re.MULTILINE)
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "alert" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [2, 2]


def test_samples_stand_side_by_side(copy: Path) -> None:
    for name, text in (("d2", "eins <b>"), ("d3", "zwei")):
        folder = copy / name / "quality"
        folder.mkdir(exist_ok=True)
        told = [{"prompt": "Erkläre AGI Framework", "text": text}]
        (folder / "samples.json").write_text(json.dumps(told), encoding="utf-8")
    page = as_html(build(read_run(copy)))
    assert page.count("Erkläre AGI Framework") == 1
    assert "eins &lt;b&gt;" in page
    assert "zwei" in page


def test_a_half_finished_family_is_told_as_far_as_it_goes(copy: Path) -> None:
    shutil.rmtree(copy / "d4")
    (copy / "lineage.json").write_text(lineage_text(read_lineage(copy)[:2]), encoding="utf-8")
    done = invoke("report", "--out", str(copy))
    assert done.exit_code == 0, done.output
    text = (copy / "report.md").read_text(encoding="utf-8")
    assert "2 of 3 finished" in text
    assert "Not finished: d4." in text
    assert re.search(r"^\| d4 \| - \| waiting \| - ", text, re.MULTILINE)
    rows = json.loads(invoke("status", "--out", str(copy), "--json").output)
    assert [row["state"] for row in rows[:3]] == ["done", "done", "waiting"]


def test_a_run_that_has_just_begun_has_a_report(copy: Path) -> None:
    for name in ("d2", "d3", "d4", "controls"):
        shutil.rmtree(copy / name)
    for name in ("lineage.json", "best.json"):
        (copy / name).unlink()
    write_report(copy)
    text = (copy / "report.md").read_text(encoding="utf-8")
    assert "0 of 3 members are finished" in text
    assert "No step was recorded yet." in text
    assert "The controls that were asked for have not begun" in text
    assert "control scratch has not begun" in text
    Reader((copy / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", ["report", "lineage", "status"])
def test_a_folder_without_a_run_is_said(tmp_path: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        CliRunner().invoke(cli, [command, "--out", str(tmp_path)], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_comparing_what_is_no_run_or_the_same_twice_is_refused(
    controlled: Path, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for words, message in (
        ([str(tmp_path)], "no run in"),
        ([str(tmp_path / "loop")], "no run in"),
        ([str(controlled), str(controlled)], "named twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(cli, ["compare", *words], catch_exceptions=False)
    done = invoke("compare", str(controlled), "--metric", "bits_per_bite")
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'bits_per_byte'" in str(done.exception)


def damage_history(out: Path) -> None:
    (out / "d3" / "history.jsonl").unlink()


def tear_history(out: Path) -> None:
    path = out / "d3" / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


def damage_curve(out: Path) -> None:
    path = out / "d3" / "heldout.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"step": 1,', '"step": 7,'))


def damage_metrics(out: Path) -> None:
    path = out / "d3" / "metrics.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0", "1"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_history, "history.jsonl is missing; what follows from it is left out"),
        (tear_history, "history.jsonl is not what was committed"),
        (damage_curve, "heldout.jsonl is not what was committed"),
        (damage_metrics, "metrics.json is not what was committed"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_left_out(
    copy: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(copy)
    done = invoke("report", "--out", str(copy))
    assert done.exit_code == 0, done.output
    text = (copy / "report.md").read_text(encoding="utf-8")
    assert said in text
    (line,) = [line for line in done.stderr.splitlines() if said in line]
    assert "d3" in line
    row = next(line for line in text.splitlines() if line.startswith("| d3 | "))
    assert (row.count("| - ") > 5) == (damage is damage_metrics)
    assert "from d2, 0% inherited" not in text
    assert invoke("compare", str(copy)).exit_code == 0


@pytest.mark.parametrize("garbled", ['{"step": 0,', '{"step": 0}'])
def test_a_line_that_is_garbled_while_a_member_trains_is_named_with_the_member(
    copy: Path, garbled: str
) -> None:
    home = copy / ".arskit" / "state" / "d4"
    home.mkdir(parents=True)
    _, *rest = (copy / "d4" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    (home / "history.jsonl").write_text("\n".join([garbled, *rest, ""]), encoding="utf-8")
    shutil.rmtree(copy / "d4")
    (copy / "lineage.json").write_text(lineage_text(read_lineage(copy)[:2]), encoding="utf-8")
    done = invoke("report", "--out", str(copy))
    assert done.exit_code == 0, done.output
    for said in (done.stderr, (copy / "report.md").read_text(encoding="utf-8")):
        assert re.search(r"d4: .*history.jsonl, line 1 is damaged .*left out", said)
    assert "no-growth: " not in done.stderr


def test_the_commands_print_what_the_folder_says(controlled: Path) -> None:
    done = invoke("compare", str(controlled), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [s["planned_cost"] for s in found["scenarios"]] == pytest.approx([7.92, 4.40, 4.40])
    assert all(s["measured_cost"] > 0 for s in found["scenarios"])
    table = invoke("compare", str(controlled)).output
    assert "as planned" in table.lower()
    assert "One seed of family" in table
    tree = invoke("lineage", "--out", str(controlled)).output
    assert re.search(r"^d2  [0-9a-f]{12}  from fresh weights\n└ d3  [0-9a-f]{12}  from d2", tree)
    facts = json.loads(invoke("lineage", "--out", str(controlled), "--json").output)
    assert set(facts["controls"]) == {"scratch", "no-growth", "one-long-run", "no-ars"}
    shown = invoke("status", "--out", str(controlled)).output
    assert re.search(r"^scratch/d2 +done", shown, re.MULTILINE)


def test_a_logarithmic_axis_is_labelled_in_plain_numbers() -> None:
    line = charts.Line("gate", [0, 1, 2], [0.5, 1, 30], "c1")
    plot = charts.lines("Damping", "damping", [line], x="step", y="factor", log=True)
    assert "mathdefault" not in plot
    assert re.search(r">\s*10\s*</text>", plot)


def test_a_single_step_leaves_room_for_its_members_name() -> None:
    line = charts.Line("damping", [0], [1.0], "c0")
    plot = charts.lines("Damping", "damping", [line], x="step", y="factor", labels=[(0.5, "d2")])
    assert "d2" in plot  # and matplotlib did not warn, which would fail here


def test_a_plot_is_the_same_each_time_and_escapes_its_words() -> None:
    def draw() -> str:
        line = charts.Line("a & <b>", [0, 1], [1, 2], "m0")
        other = charts.Line("c", [0, 1], [2, 1], "c1", 1)
        return charts.lines("A & B", 'says "<x>"', [line, other], x="x < y", y="y")

    first = draw()
    assert first == draw()
    ET.fromstring(first.replace("xlink:href", "href"))
    assert "var(--m0)" in first
    assert "var(--c1)" in first
    assert "<title" in first


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: layout was not looked at")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_lays_it_out_without_sideways_scrolling(
    page: str, tmp_path: Path, width: int
) -> None:
    """The page is asked for its own width; anything wider than the window would have to scroll."""
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth, window.innerWidth,"
        "document.querySelectorAll('svg text').length].join(' ')</script></body>"
    )
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    needed, there, letters = map(int, found.groups())
    assert needed <= there
    assert letters > 20
