"""accelerate's trackers as trackers of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

from accelerate import tracking

from ars_kit.errors import ConfigError
from ars_kit.spec import TrackedRun


class Accelerated(ABC):
    """One of accelerate's trackers: made for the run, then told.

    Attributes:
        package: that it needs.
        extra: of this distribution that brings the package.
    """

    package: ClassVar[str]
    extra: ClassVar[str]

    def __init__(self) -> None:
        if find_spec(self.package) is None:
            raise ConfigError(
                f"this tracker needs {self.package}: pip install 'ars-kit[{self.extra}]'"
            )
        self._tracker: Any = None

    @abstractmethod
    def tracker(self, run: TrackedRun) -> tracking.GeneralTracker:
        """Return accelerate's tracker, not started."""

    def start(self, run: TrackedRun) -> None:
        """Begin, and hand over the settings."""
        self._tracker = self.tracker(run)
        self._tracker.start()
        self._tracker.store_init_configuration(dict(run.settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand on figures."""
        self._tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """End."""
        self._tracker.finish()


class TensorBoard(Accelerated):
    """Event files; steps that a killed run told and this one tells again are shown once."""

    package = extra = "tensorboard"

    def tracker(self, run: TrackedRun) -> tracking.GeneralTracker:
        """Return it, writing to the run's folder."""
        again = {"purge_step": run.first_step} if run.first_step else {}
        return tracking.TensorBoardTracker(run.name, run.folder, **again)


class WeightsAndBiases(Accelerated):
    """A run of Weights & Biases."""

    package = extra = "wandb"

    def __init__(self, project: str, mode: str, entity: str | None) -> None:
        super().__init__()
        self.project, self.mode, self.entity = project, mode, entity

    def tracker(self, run: TrackedRun) -> tracking.GeneralTracker:
        """Return it; its mode is said outright, whatever the environment says."""
        return tracking.WandBTracker(
            self.project, name=run.name, dir=str(run.folder), mode=self.mode, entity=self.entity
        )


class MLflow(Accelerated):
    """A run of MLflow."""

    package = extra = "mlflow"

    def __init__(self, experiment: str, uri: str | None) -> None:
        super().__init__()
        self.experiment, self.uri = experiment, uri

    def tracker(self, run: TrackedRun) -> tracking.GeneralTracker:
        """Return it; where it writes is said outright, whatever the environment says."""
        import mlflow  # noqa: PLC0415 -- only when chosen

        home = run.folder.resolve()
        mlflow.set_tracking_uri(self.uri or f"sqlite:///{home}/mlflow.db")
        artifacts = None if self.uri else (home / "artifacts").as_uri()
        return tracking.MLflowTracker(self.experiment, logging_dir=artifacts, run_name=run.name)


class Trackio(Accelerated):
    """A run of Trackio."""

    package = extra = "trackio"

    def __init__(self, project: str, space: str | None) -> None:
        super().__init__()
        self.project, self.space = project, space

    def tracker(self, run: TrackedRun) -> tracking.GeneralTracker:
        """Return it; local unless a space was named."""
        return tracking.TrackioTracker(self.project, name=run.name, space_id=self.space)
