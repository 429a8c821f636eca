"""EleutherAI's lm-evaluation-harness, through its Python API."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ars_kit.errors import ConfigError, DataError
from ars_kit.spec import Assessment, Evaluand

TASK_FILE = (".yaml", ".yml")
FEWSHOT_SEED = 1234
"""The harness's own."""
DRAWS = 1000
"""Of the bootstrap, for the standard errors that have no formula."""


class Harness:
    """Scores of tasks, as the harness computes them.

    Args:
        tasks: names of the harness's, or YAML files of one's own, with a comma between.
        fewshot: worked examples before each question; None: as the task says.
        limit: questions of each task at most.

    Raises:
        ConfigError: the harness is not installed, or no such task.
        DataError: a task's questions cannot be had.
    """

    def __init__(self, tasks: tuple[str, ...], fewshot: int | None, limit: int | None) -> None:
        try:
            import lm_eval  # noqa: F401, PLC0415 -- an extra
        except ImportError as error:
            raise ConfigError(
                "'lm-eval' needs the harness; type: pip install 'ars-kit[lm-eval]'"
            ) from error
        if not tasks:
            raise ConfigError("'lm-eval' needs a task, such as lm-eval:tasks=arc_easy")
        self.tasks, self.fewshot, self.limit = tasks, fewshot, limit
        self.manager = self._manager()  # now: an unknown task is said before anything is trained

    def __call__(self, member: Evaluand) -> Assessment:
        """Return every metric as ``TASK_METRIC``, its standard error beside it."""
        from lm_eval import evaluate  # noqa: PLC0415 -- an extra, and slow
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 -- likewise

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model = HFLM(
            pretrained=member.model, tokenizer=member.tokenizer, batch_size=member.batch_size
        )
        with contextlib.redirect_stdout(sys.stderr):  # what tasks print is no part of a result
            loaded = self._load()
            results = evaluate(
                model,
                loaded,
                limit=self.limit,
                bootstrap_iters=DRAWS,
                log_samples=False,
            )
        found = {
            key: results[key]
            for key in ("results", "versions", "n-shot", "n-samples", "higher_is_better")
        }
        text = json.dumps(found, indent=1, sort_keys=True, default=str) + "\n"
        figures = dict(_figures(results["results"]))
        return Assessment(figures, {"lm-eval.json": text}, _how(results))

    def _load(self) -> Any:
        """Return the tasks with their questions, as ``lm_eval.simple_evaluate`` sets them up."""
        try:
            loaded = self.manager.load(list(self.tasks))
        except Exception as error:  # of a hub, a file, or a task's own code: they share no class
            line = (str(error).strip().splitlines() or [repr(error)])[0]
            raise DataError(f"'lm-eval': {', '.join(self.tasks)} cannot be had: {line}") from error
        for task in loaded["tasks"].values():
            usual = task.get_config("num_fewshot")
            if usual is None or (self.fewshot is not None and usual != 0):
                task.set_config(key="num_fewshot", value=self.fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded

    def _manager(self) -> Any:
        """Return the harness's index of tasks; its own are read only where one is asked for."""
        files = [task for task in self.tasks if task.endswith(TASK_FILE)]
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise ConfigError(f"'lm-eval': there is no task file {missing[0]}")
        manager = _index(defaults=len(files) < len(self.tasks))
        for task in self.tasks:
            if task not in files and task not in manager.all_tasks:
                raise ConfigError(
                    f"'lm-eval': the harness has no task {task!r}; lm_eval ls tasks names those it "
                    f"has, and a file of your own ends in {TASK_FILE[0]}"
                )
        return manager


@cache
def _index(*, defaults: bool) -> Any:
    """Return the harness's index; reading all of its thousands of tasks takes a while."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 -- an extra

    return TaskManager(include_defaults=defaults)


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Any:
    """Yield ``TASK_METRIC`` for ``metric,filter``; the usual filter is not named."""
    for task, scores in results.items():
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            if chosen and isinstance(value, int | float):
                name = metric if chosen == "none" else f"{metric}_{chosen}"
                yield f"{task}_{name}", float(value)


def _how(results: Mapping[str, Any]) -> dict[str, str]:
    """Return a note for each task and group: what was asked, and how often."""
    import lm_eval  # noqa: PLC0415 -- an extra

    return {
        f"lm-eval:{task}": f"lm-evaluation-harness {lm_eval.__version__}: "
        f"version {results['versions'].get(task)}, {results['n-shot'].get(task)}-shot, "
        f"{_questions(results, task)} questions"
        for task in results["results"]
    }


def _questions(results: Mapping[str, Any], task: str) -> int:
    """Return the questions of a task, or of all tasks of a group."""
    counted = results["n-samples"].get(task)
    if counted is not None:
        return int(counted["effective"])
    return sum(_questions(results, part) for part in results["group_subtasks"].get(task, ()))
