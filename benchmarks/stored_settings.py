"""Read settings that result files hold, by the names that fields have today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedpet.config import Experiment
from fedpet.config.renamed import with_new_names

__all__ = ["stored_experiment", "with_new_fields"]


def stored_experiment(tables: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a stored cell; a key that it lacks has the default of its time.

    Cells name their structures below the checkout, where benchmarks once lay in another folder.

    Raises:
        ConfigError: The settings do not read any more.
    """
    named = with_new_names(tables)
    codec = {"uplink": "float32", "downlink": "float32", "downlink-mode": "delta"}
    experiment = Experiment.from_tables({**named, "codec": codec | named.get("codec", {})})
    file = experiment.structure.file.removeprefix("simulations/")
    return replace(experiment, structure=replace(experiment.structure, file=file))


def with_new_fields(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of stored stages under their present names."""
    return {
        stage: {key.replace("-", "_"): value for key, value in fields.items()}
        if isinstance(fields, dict)
        else fields
        for stage, fields in with_new_names(stages).items()
    }
