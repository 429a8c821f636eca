"""The command line as a user meets it: processes, signals, folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Forked
from commands import arskit as arskit_main
from conftest import Cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ars_kit.doctor import _holds
from ars_kit.shapes import embedded_config
from ars_kit.store import RunFolder


def weights_hash(out: Path, members: tuple[str, ...] = ("d2", "d3", "d4")) -> list[str]:
    files = [out / m / "model.safetensors" for m in members]
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def start(cache: Path, *args: str) -> Forked:
    environment = {**os.environ, "ARSKIT_CACHE": str(cache)}
    return Forked(arskit_main, *args, folder=Path.cwd(), environment=environment)


def wait_for(pattern: str, out: Path, process: Forked) -> None:
    for _ in range(1200):
        if list(out.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.05)
    pytest.fail(f"{pattern} never appeared")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, text_folder: Path
) -> tuple[Path, list[str]]:
    """A family trained without interruption, and the options it was trained with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    options = [
        "--members", "d2..d4", "--iterations", "6,4", "--data", str(text_folder),
        "--sequence-length", "32", "--batch-size", "4", "--set", "family.vocab_size=300",
        "--set", "run.save_every=5", "--set", "family.aspect=4",
        "--set", "data.heldout_tokens=512",
    ]  # fmt: skip
    process = start(cache, "run", *options, "--out", str(out), "--json")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["best"] in {"d2", "d3", "d4"}
    return out, options


def test_a_family_is_whole(whole: tuple[Path, list[str]], arskit: Cli) -> None:
    out, _ = whole
    assert {p.name for p in (out / "d4").iterdir()} >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "metrics.json", "history.jsonl", "manifest.json", "README.md",
    }  # fmt: skip
    assert {p.name for p in out.iterdir()} >= {"run.toml", "lineage.json", "report.md"}
    metrics = json.loads((out / "d4" / "metrics.json").read_text())
    plan_fields = {
        "model_id", "parent_model", "training_time", "final_loss", "convergence_iterations",
        "ars_damping_avg", "vram_usage_peak", "timestamp",
    }  # fmt: skip
    assert metrics.keys() >= plan_fields
    assert metrics["parent_model"] == "d3"
    assert metrics["birth"]["birth_logits_difference"] < 1e-4
    assert metrics["birth"]["optimizer_state"] == "carried"
    history = (out / "d4" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(12))
    assert arskit("verify", "--out", str(out)).returncode == 0
    assert json.loads(arskit("status", "--out", str(out), "--json").stdout)[2]["state"] == "done"
    select = arskit("select", "--out", str(out), "--json")
    best = json.loads(select.stdout)["member"]
    judged = json.loads(arskit("evaluate", "best", "--out", str(out), "--json").stdout)
    recorded = json.loads((out / best / "metrics.json").read_text())
    assert judged[0]["heldout_loss"] == pytest.approx(recorded["heldout_loss"], rel=1e-5)


def test_plain_transformers_loads_a_member(whole: tuple[Path, list[str]]) -> None:
    path = str(whole[0] / "d4")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    text = "Straße größer, naïve 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    made = pipeline("text-generation", model=path)(text, max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"].startswith(text)
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()


def test_running_again_changes_nothing(whole: tuple[Path, list[str]], arskit_started: Cli) -> None:
    out, options = whole
    before = weights_hash(out)
    done = arskit_started("run", *options, "--out", str(out))
    assert done.returncode == 0
    assert "it/s]" not in done.stderr, "libraries' progress bars drown ours"
    assert weights_hash(out) == before


def test_another_plan_is_refused_with_the_difference(
    whole: tuple[Path, list[str]], arskit: Cli
) -> None:
    out, options = whole
    done = arskit("run", *options, "--lr", "0.5", "--out", str(out))
    assert done.returncode == 3
    assert "train.lr: 0.012 -> 0.5" in done.stderr


def test_resuming_refuses_another_setting_and_takes_what_changes_no_weight(
    whole: tuple[Path, list[str]], arskit: Cli
) -> None:
    folder = ["--out", str(whole[0]), "--resume"]
    done = arskit("run", *folder, "--lr", "0.5")
    assert done.returncode == 3
    assert "train.lr: 0.012 -> 0.5" in done.stderr
    assert "drop --config" in arskit("run", *folder, "--config", "x.toml").stderr
    done = arskit("run", *folder, "--price-per-hour", "1000", ARSKIT_TRAIN_LR="0.5")
    assert done.returncode == 0, done.stderr
    assert "at 1000.0 $ per hour" in done.stderr


def test_a_plan_that_came_to_nothing_binds_nobody(
    tiny: list[str], arskit: Cli, tmp_path: Path
) -> None:
    one = [*tiny, "--members", "d2", "--optimizer", "sgd"]
    bad = ["--lr", "1e30", "--set", "train.lr_vectors=1e30", "--set", "train.max_skipped=3"]
    assert arskit("run", *one, *bad).returncode == 6
    assert (tmp_path / "checkpoints" / "run.toml").exists()
    done = arskit("run", *one, "--json")
    assert done.returncode == 0, done.stderr
    history = (tmp_path / "checkpoints" / "d2" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(18))


def test_what_the_optimizer_refuses_is_said_before_anything_starts(
    tiny: list[str], arskit: Cli, tmp_path: Path
) -> None:
    done = arskit("run", *tiny, "--base-optimizer", "adamw:beta1=2")
    assert done.returncode == 3
    assert done.stderr == "arskit: 'adamw': Invalid beta parameter at index 0: 2.0\n"
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_is_asked_for_what_is_still_to_come(
    whole: tuple[Path, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run needs no room: running it again on a full disk changes nothing."""
    from ars_kit.cli import main

    out, options = whole
    monkeypatch.setenv("ARSKIT_CACHE", str(cache))
    monkeypatch.setattr("ars_kit.store.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(sys, "argv", ["arskit", "run", *options, "--out", str(out)])
    main()
    monkeypatch.setattr(sys, "argv", ["arskit", "run", *options, "--out", str(out / "other")])
    with pytest.raises(SystemExit, match="1"):
        main()


def test_a_killed_run_ends_bitwise_where_it_would_have(
    whole: tuple[Path, list[str]], cache: Path, tmp_path: Path
) -> None:
    """SIGKILL at four moments; the last run ends with the uninterrupted run's weights."""
    out, options = whole
    mine = tmp_path / "run"
    command = ["run", *options, "--out", str(mine)]
    moments = (
        ".arskit/state/d2/step-*5", "d2/manifest.json", ".arskit/state/d3/step-*5",
        "d3/manifest.json",
    )  # fmt: skip
    for moment in moments:
        process = start(cache, *command)
        wait_for(moment, mine, process)
        process.kill()
        process.communicate()
    process = start(cache, *command)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert weights_hash(mine) == weights_hash(out)
    for name in ("d2", "d3", "d4"):
        rows = [
            [json.loads(line) for line in (o / name / "history.jsonl").read_text().splitlines()]
            for o in (out, mine)
        ]
        assert rows[0] == rows[1], "the history has every step, those before a kill too"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(
    whole: tuple[Path, list[str]], cache: Path, tmp_path: Path, number: int, code: int
) -> None:
    _, options = whole
    mine = tmp_path / "run"
    longer = [*options, "--iterations", "4000,4", "--members", "d2"]
    process = start(cache, "run", *longer, "--out", str(mine))
    wait_for(".arskit/state/d2/step-*", mine, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "state saved" in stderr
    assert "Traceback" not in stderr
    assert list(mine.glob(".arskit/state/d2/step-*"))
    file = mine / "run.toml"  # the state would go on under settings that it was not trained under
    file.write_text(file.read_text().replace("weight_decay = 0.1", "weight_decay = 0.2"))
    process = start(cache, "run", "--resume", "--out", str(mine))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert "was edited since the run began: train.weight_decay: 0.1 -> 0.2. Put that" in stderr


def test_a_flipped_byte_in_an_ancestor_is_named(
    whole: tuple[Path, list[str]], arskit: Cli, tmp_path: Path
) -> None:
    mine = tmp_path / "run"
    shutil.copytree(whole[0], mine)
    file = mine / "d2" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    done = arskit("verify", "--out", str(mine))
    assert done.returncode == 5
    assert "d2: model.safetensors is not what was committed" in done.stdout
    assert arskit("evaluate", "d2", "--out", str(mine)).returncode == 5


def test_damaged_records_are_named_and_never_shown(
    whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    from ars_kit.choosing import select
    from ars_kit.errors import IntegrityError
    from ars_kit.outcome import status as read_status
    from ars_kit.rules import Rule

    mine = tmp_path / "run"
    shutil.copytree(whole[0], mine)
    metrics = mine / "d3" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"skipped_steps": 0', '"skipped_steps": 1'))
    for reads in (lambda: read_status(mine), lambda: select(mine, Rule(), tmp_path)):
        with pytest.raises(IntegrityError, match=r"d3: metrics\.json is not what was committed"):
            reads()
    metrics.unlink()
    with pytest.raises(IntegrityError, match=r"d3: metrics\.json is missing"):
        read_status(mine)


def test_a_damaged_record_of_the_text_is_named(
    whole: tuple[Path, list[str]], arskit: Cli, tmp_path: Path
) -> None:
    mine = tmp_path / "run"
    shutil.copytree(whole[0], mine)
    (mine / ".arskit" / "data.json").write_text("{")
    done = arskit("run", "--resume", "--out", str(mine))
    assert done.returncode == 5
    assert "data.json is damaged" in done.stderr


def test_scratch_inherits_nothing(tiny: list[str], arskit: Cli) -> None:
    done = arskit("run", *tiny, "--strategy", "scratch", "--optimizer", "adamw", "--json")
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["members"]
    assert [m["parent_model"] for m in members] == [None, None, None]
    assert len({m["steps"] for m in members}) == 1
    assert set(members[0]["gates"]) == {"guard"}


@pytest.mark.parametrize("base", ["sgd", "adafactor", "muon"])
def test_ars_wraps_every_base(tiny: list[str], arskit: Cli, base: str) -> None:
    done = arskit("run", *tiny, "--members", "d2,d3", "--base-optimizer", base, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["members"][1]["base_optimizer"] == base


@pytest.mark.parametrize("depth", ["same", "grow"])
def test_a_local_base_is_inherited(
    tiny: list[str], arskit: Cli, whole: tuple[Path, list[str]], depth: str, tmp_path: Path
) -> None:
    base, before = whole[0] / "d3", weights_hash(whole[0])
    done = arskit("run", *tiny, "--base", str(base), "--depth", depth, "--json")
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["members"]
    assert members[0]["parent_model"] == str(base)
    assert members[0]["birth"]["birth_logits_difference"] == 0
    layers = [
        json.loads((tmp_path / "checkpoints" / m["model_id"] / "config.json").read_text())
        for m in members
    ]
    grown = 0 if depth == "same" else 1
    assert [c["num_hidden_layers"] for c in layers] == [3, 3 + grown, 3 + 2 * grown]
    assert weights_hash(whole[0]) == before, "the base itself was touched"


def test_a_diverged_run_commits_no_member(tiny: list[str], arskit: Cli, tmp_path: Path) -> None:
    options = ["--optimizer", "sgd", "--lr", "1e30", "--set", "train.lr_vectors=1e30",
               "--set", "train.max_skipped=3", "--set", "run.log_every=1",
               "--set", "train.warmup_steps=0"]  # fmt: skip
    done = arskit("run", *tiny, *options)
    assert done.returncode == 6, done.stderr
    assert "diverged" in done.stderr
    assert not (tmp_path / "checkpoints" / "d2").exists()


def test_a_diverged_run_without_a_guard_keeps_its_last_finite_state(
    tiny: list[str], arskit: Cli, tmp_path: Path
) -> None:
    options = ["--optimizer", "sgd", "--lr", "1e9", "--set", "train.lr_vectors=1e9", "--no-gate",
               "guard", "--set", "run.save_every=1", "--set", "run.log_every=10"]  # fmt: skip
    done = arskit("run", *tiny, *options)
    assert done.returncode == 6, done.stderr
    assert "holds values that are not finite" in done.stderr
    states = list((tmp_path / "checkpoints" / ".arskit" / "state" / "d2").glob("step-*"))
    for state in states:
        weights = load_file(state / "state.safetensors")
        assert all(w.isfinite().all() for k, w in weights.items() if k.startswith("/weights"))
    assert len(states) == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "nowhere"], 3, "no such file or folder: nowhere"),
        (["--data", "hf:no/such"], 3, "hf:no/such"),
        (["--data", "kaggle:no/such"], 3, "kaggle"),
        (["--base", "./nowhere"], 3, "does not exist"),
        (["--optimizer", "adamv"], 4, "no optimizer named 'adamv' (did you mean 'adamw'?)"),
        (["--strategy", "progresive"], 4, "did you mean 'progressive'"),
        (["--gate", "surprize"], 4, "did you mean 'surprise'"),
        (["--gate", "clip:limt=1"], 3, "'clip' has no setting 'limt'"),
        (["--no-gate", "clip"], 3, "no damping gate 'clip' to leave out"),
        (["--set", "train.lr"], 3, "section.key=value"),
        (["--device", "cuda"], 3, "device 'cuda' is not available"),
        (["--config", "nowhere.toml"], 3, "cannot read settings file"),
        (["--batch-size", "100000"], 3, "too little text"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_bad_input_gets_one_line(
    tiny: list[str], arskit: Cli, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    if torch.cuda.is_available() and "cuda" in options:
        options, message = ["--device", "mps"], "device 'mps' is not available"
    done = arskit("run", *tiny, *options)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "checkpoints").glob("d*"))


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--json"],
        ["config", "show", "--json"],
        ["plugins", "list", "--json"],
        ["doctor", "--json"],
        ["plugins", "show", "ars", "--json"],
        ["plugins", "new", "gate", "mine", "--json"],
        ["plugins", "check", "guard", "--json"],
    ],
)
def test_results_are_json_on_request(command: list[str], tiny: list[str], arskit: Cli) -> None:
    extra = tiny if command[0] in {"plan", "config"} else []
    done = arskit(*command, *extra)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_settings_are_shown_as_they_are_typed_and_as_json_has_them(
    whole: tuple[Path, list[str]], arskit: Cli
) -> None:
    out = ["--out", str(whole[0])]
    shown = arskit("config", "show", *out, "--gate", "clip:limit=2").stdout
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert rows["train.iterations"] == ["file", "6,4"]
    assert rows["train.tokens"] == ["file", "none"]
    assert rows["optimizer.gates"] == ["flag", "clip:limit=2"]
    values = json.loads(arskit("config", "show", *out, "--json").stdout)
    assert values["train.iterations"] == {"value": [6, 4], "origin": "file"}
    assert values["family.base"] == {"value": None, "origin": "file"}
    assert values["run.evaluators"]["value"] == ["perplexity"]


def test_text_and_folders_have_any_name_that_is_utf8(
    tiny: list[str], arskit: Cli, tmp_path: Path, text_folder: Path
) -> None:
    texts = tmp_path / "Texte für Größe"
    texts.mkdir()
    (texts / "Fäust.txt").write_text((text_folder / "000.txt").read_text("utf-8"), "utf-8")
    one = [*tiny, "--members", "d2", "--data", texts.name]
    done = arskit("run", *one, "--out", "Läufe/日本")
    assert done.returncode == 0, done.stderr
    assert arskit("verify", "--out", "Läufe/日本").returncode == 0
    done = arskit("run", *one, "--out", os.fsdecode(b"Gr\xf6sse"))
    assert done.returncode == 3
    assert "is no path in UTF-8" in done.stderr


def test_a_run_without_members_yet_is_verified(arskit: Cli, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".arskit").mkdir(parents=True)
    done = arskit("verify")
    assert (done.returncode, done.stdout) == (0, "no member is committed in checkpoints yet\n")
    assert json.loads(arskit("verify", "--json").stdout) == {"members": [], "problems": []}
    assert arskit("verify", "--out", "nowhere").returncode == 3


def test_a_terminal_without_greek_is_no_error(arskit_started: Cli) -> None:
    done = arskit_started("plugins", "list", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Entropy Guard, ?" in done.stdout


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run", "--strategy", "s"], {"scratch", "soup", "stack"}),
        (["run", "--optimizer", "ars"], {"ars", "ars-plan", "ars-paper"}),
        (["plan", "--schedule", ""], {"wsd", "cosine", "constant"}),
        (["plugins", "show", "gua"], {"guard"}),
        (["evaluate", "--out", "OUT", ""], {"d2", "d3", "d4", "best"}),
    ],
)
def test_the_shell_completes_names(
    words: list[str], wanted: set[str], whole: tuple[Path, list[str]], arskit: Cli
) -> None:
    typed = [str(whole[0]) if word == "OUT" else word for word in ["arskit", *words]]
    done = arskit(
        _ARSKIT_COMPLETE="bash_complete",
        COMP_WORDS="\n".join(typed),
        COMP_CWORD=str(len(typed) - 1),
    )
    assert {line.removeprefix("plain,") for line in done.stdout.splitlines()} == wanted


def test_doctor_says_what_there_is_and_where_the_run_will_lie(arskit: Cli, tmp_path: Path) -> None:
    found = json.loads(arskit("doctor", "--json", "--out", "new/run").stdout)
    assert found["backends"]["several processes"]
    assert found["run folder"]["path"] == str(tmp_path / "new" / "run")
    assert found["run folder"]["holds"] == "nothing yet; it will be made"
    assert not (tmp_path / "new").exists()
    assert found["plugins"][f"gates (ars-kit {found['packages']['ars-kit']})"] == "loaded"


@pytest.mark.parametrize("name", ["file", "file/run", "loop"])
def test_doctor_says_where_no_run_can_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    found = _holds(RunFolder(tmp_path / name))
    assert found.endswith("nothing can be written there: choose another --out")


def test_plugins_show_explains_each_setting(arskit: Cli) -> None:
    done = arskit("plugins", "show", "ars")
    assert "entropy_threshold (a number, default 0.5)" in done.stdout
    assert "leaves it out" in done.stdout


def test_the_second_run_in_a_folder_is_refused(
    whole: tuple[Path, list[str]], cache: Path, tmp_path: Path, arskit: Cli
) -> None:
    _, options = whole
    mine = tmp_path / "run"
    longer = [*options, "--iterations", "4000,4", "--members", "d2", "--out", str(mine)]
    process = start(cache, "run", *longer)
    wait_for(".arskit/state/d2/step-*", mine, process)
    done = arskit("run", *longer)
    process.kill()
    process.communicate()
    assert done.returncode == 3
    assert "tokenizing" not in done.stderr, "refused before any text is looked at"
    assert f"in use by another run: process {process.pid}" in done.stderr


def test_two_processes_train_as_one(
    whole: tuple[Path, list[str]], cache: Path, tmp_path: Path
) -> None:
    """torchrun with gloo on the CPU: the same losses as one process, to rounding."""
    out, options = whole
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mine = tmp_path / "run"
    env = {**os.environ, "ARSKIT_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         f"--master_port={port}", "-m", "ars_kit", "run", *options, "--out", str(mine),
         "--device", "cpu"],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("d2", "d3", "d4"):
        one, two = (
            [
                json.loads(line)["loss"]
                for line in (o / name / "history.jsonl").read_text().splitlines()
            ]
            for o in (out, mine)
        )
        assert two == pytest.approx(one, abs=2e-3)
    assert json.loads((mine / "d4" / "metrics.json").read_text())["processes"] == 2


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    from ars_kit.errors import ConfigError
    from ars_kit.ranks import require_equal_parts
    from ars_kit.resolving import resolve

    settings = resolve({"train.batch_size": 6, "train.accumulation": 2}, {})
    require_equal_parts(settings, 3)
    with pytest.raises(ConfigError, match="6 cannot be split into 2 micro-batches on each of 2"):
        require_equal_parts(settings, 2)


def test_the_embedded_family_grows_in_both_directions() -> None:
    shapes: Any = [embedded_config(d, vocab_size=300, context=32) for d in range(10, 19)]
    assert [c.hidden_size for c in shapes] == [16, 24, 24, 24, 24, 24, 32, 32, 32]
