"""A strategy is an object, a name or keys: the same run; a class of one's own is resumed too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import pytest

import fedpet
from fedpet.config import Experiment
from fedpet.errors import ConfigError

HERE: dict[str, Any] = {"backend": "in-process", "progress": False}
Make = Callable[..., Experiment]


def sha(run: fedpet.Run) -> str:
    return str(run.result["final_values_sha256"])


def test_an_object_a_name_with_keys_and_an_experiment_s_table_are_one_strategy(
    experiment: Make,
) -> None:
    keys = {"server_learning_rate": 0.02, "clients_per_round": 4}
    table = {f"strategy_{name}": value for name, value in keys.items()}
    by_table = fedpet.simulate(experiment(strategy_name="fedadam", **table), num_rounds=2, **HERE)
    adam = fedpet.strategies.FedAdam(**keys)  # type: ignore[arg-type]
    by_object = fedpet.simulate(experiment(), strategy=adam, num_rounds=2, **HERE)
    by_keys = fedpet.simulate(
        experiment(), strategy={"name": "fedadam", **keys}, num_rounds=2, **HERE
    )
    assert sha(by_object) == sha(by_table) == sha(by_keys)
    configs = [run.folder.joinpath("config.toml").read_text() for run in (by_object, by_table)]
    assert len({text.partition("[strategy]")[2] for text in configs}) == 1
    assert sha(fedpet.simulate(experiment(), strategy="fedavg", num_rounds=2, **HERE)) != sha(
        by_object
    )


def test_a_run_by_a_wrapped_class_is_resumed_with_it(experiment: Make, tmp_path: Path) -> None:
    class Slow(flower.FedAvgM):
        """Flower's, by inheritance."""

    class Stop(fedpet.Callback):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            if record.round == 1:
                raise ZeroDivisionError

    slow = fedpet.strategies.wrap(Slow, server_learning_rate=0.5, clients_per_round=4, num_rounds=2)
    whole = fedpet.simulate(experiment(), strategy=slow, **HERE)
    settings = experiment()
    with pytest.raises(ZeroDivisionError):
        fedpet.simulate(settings, strategy=slow, callbacks=[Stop()], **HERE)
    with pytest.raises(ConfigError, match="slow"):
        fedpet.resume(settings.run.out, **HERE)
    assert sha(fedpet.resume(settings.run.out, strategy=slow, **HERE)) == sha(whole)


def test_what_is_no_strategy_is_refused(experiment: Make) -> None:
    with pytest.raises(ConfigError, match="strategy must be a dict"):
        fedpet.simulate(experiment(), strategy=flower.FedAvg(), **HERE)
    with pytest.raises(ConfigError, match="fedavgm"):
        fedpet.simulate(experiment(), strategy="fedavrg", **HERE)
