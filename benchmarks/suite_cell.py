"""Run one cell of the suite in this process: a method on a data set, or the probe.

The data sets' folder is no part of a cell's settings: the same cell is read wherever they lie.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cell import Result
from benchmarks.experiment_grid import ExperimentCell
from benchmarks.mpnet_base import MPNET, locate_mpnet
from benchmarks.one_process import FAILED, FEDPET, DivergedError, diverged, run_here
from benchmarks.probe import PROBE, run_probe
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.report.number_format import show_metric
from fedpet.utils.formatting import format_bytes

__all__ = ["FAILED", "SuiteCell"]

BUNDLED, PACKAGE = "bundled", "package:"  # rows that lie in no folder
_NOT_READ = ("structure", "search")  # by others than fedpet
_READ_BY_PROBE = ("run", "backbone", "data", "clients")


@dataclass(frozen=True)
class SuiteCell(ExperimentCell):
    """Run one method of the suite.

    Attributes:
        folder: Of the data sets; an experiment's source is a name in it.
        also: Further splits that the start and the end are evaluated on.
    """

    folder: Path | None = None
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """DATA SET/PHASE/NAME."""
        return "/".join((*self.path.parts[-3:-1], self.path.stem))

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the tables of the experiment that decide the outcome; every method is coded."""
        tables = replace(self, runs=FEDPET).fedpet_settings()
        if self.runs == PROBE:
            return {stage: tables[stage] for stage in _READ_BY_PROBE}
        if self.runs != FEDPET:
            for stage in _NOT_READ:
                del tables[stage]
        return tables

    def fedpet_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings as of a run of fedpet."""
        return super().settings()

    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in defaults."""
        tables = super().complete_settings(stored)
        del tables["run"]["name"]
        return tables

    def located(self) -> Experiment:
        """Return the experiment with its files where they lie here.

        Raises:
            ConfigError: The data set's folder is not given, or not there.
            AbsentDataError: The packages of MPNet-base are not installed.
        """
        experiment, source = self.experiment, self.experiment.data.source
        if source != BUNDLED and not source.startswith(PACKAGE):
            if self.folder is None or not (self.folder / source).is_dir():
                raise ConfigError(
                    f"{self.name} reads the data set {source!r}: name the folder that holds it "
                    f"with --data, got {str(self.folder)!r}."
                )
            data = replace(experiment.data, source=str((self.folder / source).resolve()))
            experiment = replace(experiment, data=data)
        if experiment.backbone.model == MPNET:
            backbone = replace(experiment.backbone, model=str(locate_mpnet()))
            experiment = replace(experiment, backbone=backbone)
        if self.needs is not None:
            structure = replace(experiment.structure, file=str(self.needs.resolve()))
            experiment = replace(experiment, structure=structure)
        return experiment

    def run(self) -> Result:
        """Run it. Rates at which training diverges everywhere are a result too."""
        logging.getLogger("flwr").setLevel(logging.WARNING)  # quiet rounds
        experiment = self.located()
        if self.runs == PROBE:
            return run_probe(experiment)
        try:
            result = run_here(experiment, self.runs, self.also)
        except DivergedError as error:
            return diverged(self.method, self.seed, error)
        return {**result, "run": {**result["run"], "method": self.method}}

    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return values, metric and bytes; of a run that learned nothing its status."""
        if result["run"]["status"] == FAILED:
            return {"status": FAILED}
        sent = result.get("communication", {"total_bytes": 0})["total_bytes"]
        return {
            "final_values_sha256": result["final_values_sha256"],
            "metric": result["quality"]["final"],
            "total_bytes": sent,
        }

    def show(self, result: Result) -> str:
        """Describe metric, bytes and processor time."""
        score, spent = self.score(result), result["time"]["processor_seconds"]
        if score is None:
            return f"{result['run']['status']}, {spent:.0f} core-seconds"
        sent = result.get("communication", {"total_bytes": 0})["total_bytes"]
        what = f"{result['quality']['metric']} {show_metric(score)}"
        return f"{what}, {format_bytes(sent)}, {spent:.0f} core-seconds"
