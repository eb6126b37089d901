"""The same run on Ray, whatever the number of workers, reached from this machine alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
from in_process_run import run
from tiny import Silent

from fedpet.config import Experiment
from fedpet.protocol.flower_compat.flower_simulation import ray_on_loopback
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.ray_engine import simulate


class NotesWhoListens(Silent):
    def __init__(self) -> None:
        self.addresses: set[str] = set()
        self.names: set[str] = set()

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:  # type: ignore[override]
        here = psutil.Process()
        for process in [here, *here.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.addresses.add(connection.laddr.ip.removeprefix("::ffff:"))
                        self.names.add(process.name())


@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_two_ray_workers_give_the_bytes_of_one_process_and_listen_on_the_loopback_alone(
    experiment: Callable[..., Experiment],
) -> None:
    noted = NotesWhoListens()
    result, folder = simulate(experiment(run_workers=2), noted)
    assert result["final_values_sha256"] == run(experiment())["final_values_sha256"]
    assert {p.name for p in folder.path.iterdir()} >= {
        "config.toml",
        "rounds.jsonl",
        "result.json",
        "plan.bin",
        "structure.json",
        "checkpoint",
        "model",
    }
    assert {"gcs_server", "raylet"} <= noted.names
    assert noted.addresses == {"127.0.0.1"}


def test_ray_takes_the_loopback_inside_and_what_it_took_before_afterwards() -> None:
    services = pytest.importorskip("ray._private.services")
    before = services.resolve_ip_for_localhost("127.0.0.1")
    with ray_on_loopback():
        assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert services.resolve_ip_for_localhost("127.0.0.1") == before
