"""The built-in trackers, as offers: thin adapters over accelerate's, and nothing leaves the machine
unless a setting says so.
"""  # noqa: D205 -- one sentence

from __future__ import annotations

from typing import Literal

from ars_kit.spec import Offer, Tracker, hookimpl


def tensorboard() -> Tracker:
    """Event files in the run folder; look at them with ``tensorboard --logdir``."""
    from ars_kit_plugins.tracking import TensorBoard  # noqa: PLC0415 -- only when chosen

    return TensorBoard()


def wandb(
    *,
    project: str = "arskit",
    mode: Literal["offline", "online"] = "offline",
    entity: str | None = None,
) -> Tracker:
    """Weights & Biases; offline until told otherwise (``wandb sync`` sends a run later).

    Args:
        project: under which runs are gathered.
        mode: offline keeps the run in the run folder; online sends it to the service.
        entity: user or team, where online.
    """
    from ars_kit_plugins.tracking import WeightsAndBiases  # noqa: PLC0415 -- only when chosen

    return WeightsAndBiases(project, mode, entity)


def mlflow(*, experiment: str = "arskit", uri: str | None = None) -> Tracker:
    """MLflow; without a uri in a database in the run folder.

    Args:
        experiment: under which runs are gathered.
        uri: of a tracking server, or of another local store.
    """
    from ars_kit_plugins.tracking import MLflow  # noqa: PLC0415 -- only when chosen

    return MLflow(experiment, uri)


def trackio(*, project: str = "arskit", space: str | None = None) -> Tracker:
    """Trackio; without a space in its own cache on this machine (``trackio show``).

    Args:
        project: under which runs are gathered.
        space: a Hugging Face space, owner/name, to send the run to.
    """
    from ars_kit_plugins.tracking import Trackio  # noqa: PLC0415 -- only when chosen

    return Trackio(project, space)


@hookimpl
def arskit_trackers() -> list[Offer[Tracker]]:
    """Offer the built-in trackers."""
    return [
        Offer("tensorboard", "event files in the run folder (extra: tensorboard)", tensorboard),
        Offer("wandb", "Weights & Biases, offline by default (extra: wandb)", wandb),
        Offer("mlflow", "MLflow, in the run folder by default (extra: mlflow)", mlflow),
        Offer("trackio", "Trackio, on this machine by default (extra: trackio)", trackio),
    ]
