"""Find an experiment by its file or its built-in name.

The built-in experiments lie in `simulations/experiments` of a checkout, and in `fedpet/experiments`
of an installed wheel.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import fedpet
from fedpet.config.experiment import Experiment
from fedpet.config.value_checks import did_you_mean
from fedpet.errors import ConfigError

__all__ = ["experiment_file", "experiments_folder", "load_experiment"]


def experiments_folder() -> Path:
    """Return the folder of the built-in experiments."""
    package = Path(fedpet.__file__).parent
    installed = package / "experiments"
    return installed if installed.is_dir() else package.parent / "simulations" / "experiments"


def experiment_file(name: str, beside: Path = Path()) -> Path:
    """Return the path of an experiment.

    Args:
        name: A TOML file, or the name of a built-in experiment.
        beside: The folder that a file's relative path starts at.

    Raises:
        ConfigError: There is no built-in experiment of this name; the message names all.
    """
    if Path(name).suffix:
        return beside / name
    folder = experiments_folder()
    path = folder / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.toml"))
        raise ConfigError(
            f"there is no built-in experiment {name!r}. Known are: {', '.join(known)}. Another is "
            f"named by its .toml file.{did_you_mean(name, known)}"
        )
    return path


def load_experiment(name: str, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment, with `stage.key=value` strings laid over it."""
    return Experiment.from_file(experiment_file(name), overrides)
