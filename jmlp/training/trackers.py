"""Runs in Weights & Biases and MLflow: `train.callbacks: [wandb, mlflow]`.

Each is told the config, the numbers of metrics.jsonl at their steps, and the summary. Where
to is said as for any other program: `WANDB_PROJECT`, `WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, ... A run that is continued goes on in the
tracker's run, whose name `trackers.json` of the run directory keeps. Inside a tracker's run of
the caller's own (`with mlflow.start_run()`), that one is used, and left open.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jmlp.config import flatten
from jmlp.errors import ConfigError
from jmlp.training.callbacks import Callback, Metrics, RunView
from jmlp.training.events import events_of, numbers_of
from jmlp.training.files import to_json, write_atomically
from jmlp.types import Summary

if TYPE_CHECKING:
    import wandb
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_LONGEST = 6000  # characters of a parameter, by MLflow's own limit
_BATCH = 100  # parameters or tags a call, by the same


def numbers_at(view: RunView, metrics: Metrics) -> dict[str, float]:
    """What is logged of an evaluation: `epoch`, `train/loss`, `val/accuracy`, ..."""
    numbers: dict[str, float] = {"epoch": view.epoch}
    for event in events_of(view, metrics):
        for name, value in numbers_of(event).items():
            if name not in ("step", "epoch", "seconds") and value is not None:
                numbers[f"{event['split']}/{name}"] = float(value)
    return numbers


def flat_summary(summary: Summary) -> Iterator[tuple[str, float | str]]:
    """The numbers and words of a summary: `params`, `fingerprint`, `best/step`, ...

    Metrics of what the run ends with are `final/test/accuracy`: `val/accuracy` is that of a step.
    """
    for key, value in summary.items():
        start = f"final/{key}/" if key in ("train", "val", "test") else f"{key}/"
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, one in inner if key != "eval" else ():
            if isinstance(one, bool | int | float | str):
                yield (start + name).rstrip("/"), one


def kept_id(run_dir: Path | None, tracker: str) -> str | None:
    """The tracker's own name of this run, if the run has one there."""
    if run_dir is None:
        return None
    try:
        identity = json.loads((run_dir / "trackers.json").read_text())[tracker]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return identity if isinstance(identity, str) else None


def keep_id(run_dir: Path | None, tracker: str, name: str) -> None:
    """Remembers the tracker's own name of this run."""
    if run_dir is None:
        return
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, RecursionError):
        saved = json.loads((run_dir / "trackers.json").read_text())
        known = saved if isinstance(saved, dict) else {}
    write_atomically(run_dir / "trackers.json", to_json({**known, tracker: name}) + "\n")


def _missing(tracker: str) -> ConfigError:
    return ConfigError(
        f"train.callbacks: {tracker} is not installed: pip install 'jmlp[{tracker}]'"
    )


class WeightsAndBiases(Callback):
    """A run of Weights & Biases; its files are in wandb/ of the run directory.

    Args:
      project: None: `$WANDB_PROJECT`, else jmlp.
    """

    name = "wandb"
    optional = True

    def __init__(self, project: str | None = None) -> None:
        self._project = project
        self._run: wandb.Run | None = None
        self._own = True

    def on_start(self, view: RunView) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing(self.name) from None
        config = view.config.model_dump(mode="json")
        if wandb.run is not None:
            self._run, self._own = wandb.run, False
            wandb.run.config.update(config, allow_val_change=True)
            return
        name = kept_id(view.run_dir, self.name)
        mode = os.environ.get("WANDB_MODE", "")
        run = wandb.init(
            project=self._project or os.environ.get("WANDB_PROJECT") or "jmlp",
            id=name or secrets.token_hex(4),
            name=view.run_dir.name if view.run_dir else None,
            dir=view.run_dir,
            config=config,
            # Offline runs of one id are one run once they are synced; they cannot ask for it.
            resume="allow" if name and mode not in ("offline", "disabled") else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run = run
        keep_id(view.run_dir, self.name, run.id)
        if run.resumed:
            run.config.update(config, allow_val_change=True)

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        if self._run is not None:
            self._run.log(numbers_at(view, metrics), step=view.step)

    def on_end(self, view: RunView, summary: Summary) -> None:
        if self._run is None:
            return
        if not summary["interrupted"]:
            self._run.summary.update(dict(flat_summary(summary)))
        self._finish(0)

    def close(self) -> None:
        self._finish(1)

    def _finish(self, code: int) -> None:
        run, self._run = self._run, None
        if run is not None and self._own:
            import wandb

            run.finish(exit_code=code)
            wandb.teardown()  # or its service runs until this process ends


class MLflow(Callback):
    """A run of MLflow: by `$MLFLOW_TRACKING_URI`, else in mlflow/ of the run directory.

    Parameters are the config's keys. MLflow never changes one: where a continued run has
    another value, the tag `continued.KEY` says so.

    Args:
      experiment: None: `$MLFLOW_EXPERIMENT_NAME`, else jmlp.
    """

    name = "mlflow"
    optional = True

    def __init__(self, experiment: str | None = None) -> None:
        self._experiment = experiment
        self._client: MlflowClient | None = None
        self._id = ""
        self._own = True

    def on_start(self, view: RunView) -> None:
        try:
            import mlflow
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing(self.name) from None
        active = mlflow.active_run()
        local = None
        if active is None and not mlflow.is_tracking_uri_set() and view.run_dir is not None:
            local = view.run_dir.absolute() / "mlflow"
            local.mkdir(exist_ok=True)
        client = MlflowClient(f"sqlite:///{local}/mlflow.db" if local else None)
        if active is not None:
            self._own, run = False, client.get_run(active.info.run_id)
        else:
            run = self._open(client, view, local)
        self._client, self._id = client, run.info.run_id
        keep_id(view.run_dir, self.name, self._id)
        self._params(run, flatten(view.config))

    def _open(self, client: MlflowClient, view: RunView, local: Path | None) -> Run:
        from mlflow.exceptions import MlflowException

        name = kept_id(view.run_dir, self.name)
        if name:
            with suppress(MlflowException):  # of another server: a new run there
                run = client.get_run(name)
                client.update_run(name, status="RUNNING")
                return run
        called = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "jmlp"
        there = client.get_experiment_by_name(called)
        place = (local / "artifacts").as_uri() if local else None
        number = there.experiment_id if there else client.create_experiment(called, place)
        return client.create_run(number, run_name=view.run_dir.name if view.run_dir else None)

    def _params(self, run: Run, config: Mapping[str, object]) -> None:
        from mlflow.entities import Param, RunTag

        assert self._client is not None
        values = {_plain(key): str(value)[:_LONGEST] for key, value in config.items()}
        known = run.data.params
        params = [Param(key, value) for key, value in values.items() if key not in known]
        tags = [
            RunTag(f"continued.{key}", value)
            for key, value in values.items()
            if known.get(key, value) != value
        ]
        for start in range(0, max(len(params), len(tags)), _BATCH):
            part = slice(start, start + _BATCH)
            self._client.log_batch(self._id, params=params[part], tags=tags[part])

    def _log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        assert self._client is not None
        now = int(time.time() * 1000)
        metrics = [Metric(_plain(key), value, now, step) for key, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
        if self._client is not None:
            self._log(view.step, numbers_at(view, metrics))

    def on_end(self, view: RunView, summary: Summary) -> None:
        if self._client is None:
            return
        if not summary["interrupted"]:
            flat = dict(flat_summary(summary))
            words = {key: value for key, value in flat.items() if isinstance(value, str)}
            numbers = {key: float(flat[key]) for key in flat.keys() - words.keys()}
            self._log(view.step, numbers)
            for key, value in words.items():
                self._client.set_tag(self._id, _plain(key), value)
            self._client.log_dict(self._id, json.loads(to_json(summary)), "summary.json")
        self._finish("KILLED" if summary["interrupted"] else "FINISHED")

    def close(self) -> None:
        self._finish("FAILED")

    def _finish(self, status: str) -> None:
        client, self._client = self._client, None
        if client is not None and self._own:
            client.set_terminated(self._id, status)


def _plain(name: str) -> str:
    """A name of the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)
