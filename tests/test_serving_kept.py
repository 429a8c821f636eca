"""What `arskit serve` keeps of exports from one start to the next, and what it forgets."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from served import Scripted

from ars_kit.errors import ConfigError, ParityError
from ars_kit.lock import exclusive
from ars_kit.spec import Engine, Service
from ars_kit.workbench import LOCK, PREFIX
from ars_kit_serving import derived, kept
from ars_kit_serving.genai import GenaiExporter

MONTH = 31 * 86400


class Fake:
    """An exporter that writes a file, or fails as it is told to."""

    tolerance: float | None = 1e-4

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0

    def export(self, source: Path, target: Path) -> None:
        self.calls += 1
        if self.error:
            raise self.error
        (target / "model.onnx").write_bytes(b"graph")

    def open(self, target: Path, *, context: int, slots: int, threads: int = 0) -> Engine:
        assert (target / "model.onnx").is_file()
        return Scripted([1], 4)


@pytest.fixture
def service(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr("ars_kit_serving.export._compared", lambda *_: {})
    said: list[str] = []
    return Service("tiny", checkpoint, "d" * 64, tmp_path / "cache", None, 3, said.append)


def said(service: Service) -> list[str]:
    lines: list[str] = service.say.__self__  # type: ignore[attr-defined] # a list's append
    return lines


@pytest.mark.parametrize("error", [ConfigError("no such heads"), ParityError("differs by 3")])
def test_an_export_that_failed_is_not_tried_at_every_start(
    service: Service, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Fake(error)
    with pytest.raises(ConfigError, match=str(error)):
        derived.derived_engine(service, exporter, "fake")
    with pytest.raises(ConfigError, match=r"to try again, remove .*failed\.json") as again:
        derived.derived_engine(service, exporter, "fake")
    assert str(error) in str(again.value)
    assert exporter.calls == 1
    real = kept.version
    monkeypatch.setattr(kept, "version", lambda name: "9.9" if name == "torch" else real(name))
    for _ in range(2):  # another torch might manage: once more, and once only
        with pytest.raises(ConfigError):
            derived.derived_engine(service, exporter, "fake")
    assert exporter.calls == 2


@pytest.mark.parametrize("package", ["onnx", "onnxruntime-genai", "torch", "transformers"])
def test_an_export_that_other_versions_made_is_made_anew(
    service: Service, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, real = Fake(), kept.version
    for installed in (real(package), "9.9", "9.9"):
        monkeypatch.setattr(kept, "version", lambda n, v=installed: v if n == package else real(n))
        derived.derived_engine(service, exporter, "fake")
    assert exporter.calls == 2


def test_another_checkpoint_and_another_form_are_tried(service: Service) -> None:
    exporter = Fake(ConfigError("no"))
    for form in ("fake", "fake", "other"):
        with pytest.raises(ConfigError):
            derived.derived_engine(service, exporter, form)
    assert exporter.calls == 2


def test_a_note_that_cannot_be_read_is_no_reason(service: Service) -> None:
    note = kept.Failures(kept.path_of(service, "fake"))
    note.remember("it would not")
    note.file.write_text("{")
    derived.derived_engine(service, Fake(), "fake")
    assert said(service)[0] == "tiny: exporting to fake; this is done once"


def test_what_was_killed_is_tried_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        returncode = -9

    monkeypatch.setattr("ars_kit_serving.genai.HEAD", 1)
    monkeypatch.setattr("ars_kit_serving.genai.subprocess.run", lambda *_, **__: Killed())
    for _ in range(2):
        with pytest.raises(ConfigError, match="killed by signal 9") as found:
            derived.derived_engine(service, GenaiExporter(), "genai")
        assert "remove" not in str(found.value)


@pytest.mark.parametrize("said", [
    "Traceback:\nMemoryError",
    "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
    "OSError: [Errno 28] No space left on device\nDuring handling of it:\nRuntimeError: no model",
])  # fmt: skip
def test_a_builder_that_ran_short_is_tried_again(
    service: Service, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short:
        returncode, stderr = 1, said

    monkeypatch.setattr("ars_kit_serving.genai.HEAD", 1)
    monkeypatch.setattr("ars_kit_serving.genai.subprocess.run", lambda *_, **__: Short())
    for _ in range(2):
        with pytest.raises(ConfigError, match="was short of memory or disk") as found:
            derived.derived_engine(service, GenaiExporter(), "genai")
        assert len(str(found.value).splitlines()) == 1
        assert "remove" not in str(found.value)


@pytest.mark.parametrize("cause", [MemoryError(), OSError(28, "No space left on device")])
def test_an_export_that_ran_short_is_tried_again(service: Service, cause: Exception) -> None:
    error = ConfigError("torch cannot export it")
    error.__cause__ = RuntimeError("it failed")
    error.__cause__.__cause__ = cause
    exporter = Fake(error)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"torch cannot export it$"):
            derived.derived_engine(service, exporter, "fake")
    assert exporter.calls == 2


def test_a_lack_of_memory_is_one_line(service: Service) -> None:
    exporter = Fake(MemoryError())
    for _ in range(2):
        with pytest.raises(kept.TransientError, match="too little memory to export to fake"):
            derived.derived_engine(service, exporter, "fake")
    assert exporter.calls == 2


def test_exports_that_nobody_served_for_a_month_are_removed(service: Service) -> None:
    def age(path: Path) -> None:
        os.utime(path, (time.time() - MONTH,) * 2)

    for form in ("old", "used", "young"):
        derived.derived_engine(service, Fake(), form)
    kept.Failures(kept.path_of(service, "bad")).remember("no")
    (service.cache / "theirs").mkdir()  # nothing of ours
    for entry in service.cache.iterdir():
        if "young" not in entry.name:
            age(entry)
    said(service).clear()
    derived.derived_engine(service, Fake(), "used")
    left = {entry.name for entry in service.cache.iterdir()}
    assert left == {kept.path_of(service, f).name for f in ("used", "young")} | {"theirs"}
    (line,) = said(service)
    assert line.startswith("removed 1 export (")
    assert line.endswith("not served for 30 days")


def test_what_the_killed_left_of_an_export_is_removed(service: Service) -> None:
    derived.derived_engine(service, Fake(), "fake")
    left, working = (service.cache / f"{PREFIX}{name}" for name in ("left", "working"))
    for folder in (left, working):
        (folder / "deep").mkdir(parents=True)
        (folder / LOCK).write_text('{"pid": 1}')
    with exclusive(working / LOCK, what=working):
        derived.derived_engine(service, Fake(), "fake")
    assert not left.exists()
    assert (working / "deep").is_dir()


def test_two_servers_that_export_at_once_both_serve(service: Service) -> None:
    class Slower(Fake):
        def export(self, source: Path, target: Path) -> None:
            super().export(source, target)
            derived.derived_engine(service, Fake(), "fake")  # the other one is done first

    derived.derived_engine(service, Slower(), "fake")
    assert {entry.name for entry in service.cache.iterdir()} == {kept.path_of(service, "fake").name}


def test_two_servers_that_clear_at_once_both_serve(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("damaged", "old"):
        derived.derived_engine(service, Fake(), form)
    os.utime(kept.path_of(service, "old"), (time.time() - MONTH,) * 2)
    (kept.path_of(service, "damaged") / "model.onnx").write_bytes(b"grape")
    real = shutil.rmtree

    def slower(path: Path, *, scratch: Path) -> None:
        real(path)  # the other one, between our look and our hand
        path.rename(scratch / "tmp-mine")

    for module in (kept, derived):
        monkeypatch.setattr(module, "discard", slower)
    derived.derived_engine(service, Fake(), "damaged")
    left = {entry.name for entry in service.cache.iterdir()}
    assert left == {kept.path_of(service, "damaged").name}
    assert not [line for line in said(service) if line.startswith("removed")]


def test_a_cache_that_is_only_read_serves(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived.derived_engine(service, Fake(), "fake")

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    derived.derived_engine(service, Fake(), "fake")


def test_a_note_names_the_versions_it_is_true_of(service: Service) -> None:
    failures = kept.Failures(kept.path_of(service, "fake"))
    failures.remember("no")
    versions = json.loads(failures.file.read_text())["versions"]
    assert set(versions) == {
        "ars-kit", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxscript", "torch",
        "transformers",
    }  # fmt: skip
