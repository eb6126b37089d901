"""A baseline's rounds in this process, without Ray."""

from __future__ import annotations

from typing import Any

from flwr.app import Message
from tiny import Silent

from benchmarks import baselines
from fedpet.config import Experiment
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder


class BaselineGrid(LocalGrid):
    """Nodes in this process that answer as a baseline's ClientApp does, the last message first."""

    def __init__(self, method: str, settings: Experiment, nodes: int = 2) -> None:
        super().__init__({number: lambda payload: payload for number in range(1, nodes + 1)})
        self.asked: list[tuple[int, str]] = []
        self._method, self._settings = method, settings

    def _answer(self, message: Message) -> Message:
        told = message.content.config_records["config"]
        self.asked.append((int(told["server-round"]), str(told["client"])))
        return baselines.reply(message, self._method, self._settings)

    def pull_messages(self, message_ids: Any) -> Any:
        return list(super().pull_messages(message_ids))[::-1]


def run(method: str, settings: Experiment, grid: LocalGrid | None = None) -> dict[str, Any]:
    grid = grid or BaselineGrid(method, settings)
    prepared = baselines.prepare_baseline(method, settings, Silent())
    return baselines.federate_baseline(grid, prepared, new_run_folder(settings), Silent())
