"""Log a run to an experiment tracker: TensorBoard, Weights & Biases, MLflow, trackio.

Each is a callback, named in `callbacks=["tensorboard"]` or `run.callbacks`, or made with settings
of its own. By name all of them keep their files on this machine, in the run folder; a variable of
the tracker's own, named at its class, sends them elsewhere. Metrics, loss, bytes and seconds are
logged by round, under the names of `rounds.jsonl`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpet.errors import ConfigError
from fedpet.protocol.ledger import EVALUATION, SEARCH, Ledger, RoundRecord
from fedpet.run.callbacks import Callback, Callbacks, Evaluation, RunStart

if TYPE_CHECKING:
    from fedpet.config import Experiment

__all__ = [
    "TRACKERS",
    "MlflowCallback",
    "TensorBoardCallback",
    "TrackioCallback",
    "WandbCallback",
    "callbacks_of",
]


class Tracker(Callback):
    """Turn events into numbers by step; a subclass opens, logs and closes.

    Attributes:
        package: To be imported.
        install: What pip calls it.
    """

    package: str
    install: str

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module(self.package)
        except ModuleNotFoundError:
            name = type(self).__name__
            raise ConfigError(
                f"{name} needs the package {self.install!r}, which is not installed: run "
                f"`pip install {self.install}`, or leave it out of run.callbacks."
            ) from None

    def open(self, run: RunStart, name: str, settings: Mapping[str, str]) -> None:
        """Begin, or take up what a run that was cut short had logged.

        Args:
            run: Which.
            name: Of the run.
            settings: Of the experiment, flat, as text.
        """
        raise NotImplementedError

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""
        raise NotImplementedError

    def close(self, summary: Mapping[str, float]) -> None:
        """Log the numbers of the whole run, and end."""
        raise NotImplementedError

    def on_run_start(self, run: RunStart) -> None:
        self.open(run, run.folder.name, _flat(run.experiment))

    def on_evaluate(self, evaluation: Evaluation) -> None:
        values = {f"evaluation/{name}": value for name, value in evaluation.metrics.items()}
        self.log(values, evaluation.round)

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        if record.round == 0:
            return
        if record.kind == EVALUATION:
            self.log(_on_clients(record), record.round)
            return
        group = "search" if record.kind == SEARCH else "train"
        values: dict[str, float] = {} if record.loss is None else {f"{group}/loss": record.loss}
        values |= {
            f"{group}/replies": record.replies,
            f"{group}/refused": len(record.refused),
            "bytes/uplink": record.uplink_bytes,
            "bytes/downlink": record.downlink_bytes,
            "bytes/total": ledger.total_bytes,
            "seconds/round": record.round_seconds,
            "seconds/training": record.train_seconds,
        }
        self.log(values | _on_clients(record), record.round)

    def on_run_end(self, result: Mapping[str, Any], folder: Path) -> None:
        quality, books = result["quality"], result["communication"]
        self.close(
            {
                f"final/{quality['metric']}": quality["final"],
                "final/total_bytes": books["total_bytes"],
                "final/ratio_to_dense": books["ratio_to_dense"],
                "final/seconds": result["time"]["total_seconds"],
            }
        )


def _on_clients(record: RoundRecord) -> dict[str, float]:
    """Return what clients measured on their own rows: means and the worst tenth."""
    figures = ("row_mean", "mean", "worst_decile")
    return {
        f"clients/{name}/{figure}": spread[figure]
        for name, spread in record.on_clients.items()
        for figure in figures
        if figure in spread
    }


class TensorBoardCallback(Tracker):
    """Write TensorBoard's event files.

    Args:
        log_dir: "" takes `tensorboard` in the run folder: `tensorboard --logdir runs`.
    """

    package, install = "torch.utils.tensorboard", "tensorboard"

    def __init__(self, log_dir: str | Path = "") -> None:
        super().__init__()
        self._log_dir = log_dir

    def open(self, run: RunStart, name: str, settings: Mapping[str, str]) -> None:
        self._writer = self._library.SummaryWriter(self._log_dir or run.folder / "tensorboard")
        lines = [f"    {key} = {value}" for key, value in settings.items()]
        self._writer.add_text("settings", "\n".join(lines))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, summary: Mapping[str, float]) -> None:
        for name, value in summary.items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close()


class WandbCallback(Tracker):
    """Log to Weights & Biases.

    Args:
        project: Of the run.
        mode: "online" or "offline"; "" takes WANDB_MODE, else "offline": `wandb sync` sends the
            files in the run folder's `wandb` later.
        options: Others of `wandb.init`.
    """

    package, install = "wandb", "wandb"

    def __init__(self, project: str = "fedpet", *, mode: str = "", **options: Any) -> None:
        super().__init__()
        self._project, self._options = project, options
        self._mode = mode or os.environ.get("WANDB_MODE") or "offline"

    def open(self, run: RunStart, name: str, settings: Mapping[str, str]) -> None:
        self._run = self._library.init(
            **{
                "project": self._project,
                "name": name,
                "mode": self._mode,
                "dir": str(run.folder),
                "config": dict(settings),
                "reinit": "create_new",
                **self._options,
            }
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "round": step})

    def close(self, summary: Mapping[str, float]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class MlflowCallback(Tracker):
    """Log to MLflow.

    Args:
        experiment: MLflow's, by name.
        tracking_uri: "" takes MLFLOW_TRACKING_URI, else a file in the run folder:
            `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`.
    """

    package, install = "mlflow", "mlflow"

    def __init__(self, experiment: str = "fedpet", *, tracking_uri: str = "") -> None:
        super().__init__()
        self._experiment = experiment
        self._uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")

    def open(self, run: RunStart, name: str, settings: Mapping[str, str]) -> None:
        # A client of its own: mlflow.start_run would be the whole process's.
        uri = self._uri or f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"
        self._client = self._library.MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(self._experiment)
        number = known.experiment_id if known else self._client.create_experiment(self._experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, float(value), step=step)

    def close(self, summary: Mapping[str, float]) -> None:
        self.log(summary, 0)
        self._client.set_terminated(self._run)


class TrackioCallback(Tracker):
    """Log to trackio, in its own folder on this machine (TRACKIO_DIR): `trackio show`.

    Args:
        project: Of the run.
        options: Others of `trackio.init`; space_id="USER/SPACE" sends it to a Space.
    """

    package, install = "trackio", "trackio"

    def __init__(self, project: str = "fedpet", **options: Any) -> None:
        super().__init__()
        self._project, self._options = project, options

    def open(self, run: RunStart, name: str, settings: Mapping[str, str]) -> None:
        self._run = self._library.init(
            **{
                "project": self._project,
                "name": name,
                "config": dict(settings),
                "embed": False,
                **self._options,
            }
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, summary: Mapping[str, float]) -> None:
        self._run.log(dict(summary))
        self._run.finish()


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoardCallback,
    "wandb": WandbCallback,
    "mlflow": MlflowCallback,
    "trackio": TrackioCallback,
}


def callbacks_of(callbacks: Iterable[Callback | str]) -> Callbacks:
    """Make one callback of objects, and of names of shipped ones ("tensorboard").

    Raises:
        ConfigError: An unknown name, one whose package is not installed, or no callback at all.
    """
    return Callbacks(_callback(each) for each in callbacks)


def _callback(given: Callback | str) -> Callback:
    if isinstance(given, Callback):
        return given
    if not isinstance(given, str) or given not in TRACKERS:
        raise ConfigError(
            "callbacks must be objects of a subclass of fedpet.Callback, or names, of "
            f"{', '.join(TRACKERS)}, got {given!r}."
        )
    return TRACKERS[given]()


def _flat(experiment: Experiment) -> dict[str, str]:
    """Return the settings as "stage.key" -> text."""
    return {
        f"{stage}.{key}": str(value)
        for stage, table in experiment.to_tables().items()
        for key, value in table.items()
    }
