"""Clients that come with their nodes: the same run as a simulation of the same clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Silent

from fedpet.client import Node
from fedpet.codec.frame import Refusal, pack_refusal
from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from fedpet.estimate import estimate
from fedpet.messages import read_request
from fedpet.node_settings import NodeSettings
from fedpet.population import Population, Residents
from fedpet.roster import write_roster
from fedpet.simulations.engine import simulate
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.local_grid import LocalGrid
from fedpet.simulations.resume import check_journal, is_cut_short, read_cut_short
from fedpet.simulations.run_folder import RunFolder, new_run_folder

Handler = Callable[[bytes], bytes]


@pytest.fixture
def deployed(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    """The experiment with its clients on the nodes; the server's folder holds test rows only."""

    def make(**changes: Any) -> Experiment:
        settings = experiment(
            population_partition="nodes",
            **{"population_num_clients": 6, "strategy_node_wait_seconds": 5.0, **changes},
        )
        server = Path(settings.run.out).parent / "server"
        server.mkdir(exist_ok=True)
        shutil.copy(Path(settings.data.source) / "test.jsonl", server)
        return replace(settings, data=replace(settings.data, source=str(server)))

    return make


def node_of(settings: Experiment, rows: Path, clients: list[str], **config: Any) -> Handler:
    """A node whose own file holds the training rows of these clients, in the order of the whole."""
    lines = (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["client"] in clients]
    name = "-".join(clients).replace(" ", "")
    folder = Path(settings.run.out).parent / f"node-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    node_config = {"data": str(folder / "rows.jsonl"), "cache": str(folder / "cache"), **config}
    return Node(NodeSettings.of(settings).on(node_config)).answer


def three_nodes(settings: Experiment, rows: Path) -> dict[int, Handler]:
    homes = {7: ["client 0", "client 4"], 5: ["client 1", "client 2"], 9: ["client 3", "client 5"]}
    return {node: node_of(settings, rows, clients) for node, clients in homes.items()}


def run(experiment: Experiment, grid: LocalGrid) -> dict[str, Any]:
    return federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())


def simulated(experiment: Experiment) -> dict[str, Any]:
    return run(experiment, LocalGrid.of(NodeSettings.of(experiment), 2))


def lines_of(settings: Experiment) -> list[dict[str, Any]]:
    text = (Path(settings.run.out) / "rounds.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# -- law 6: what is simulated is what is deployed ---------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "eden-4"])
def test_nodes_with_their_own_files_end_with_the_simulation_s_values(
    experiment: Any, deployed: Any, files: tuple[Path, Path], codec: str
) -> None:
    settings = deployed(codec_up=codec)
    result = run(settings, LocalGrid(three_nodes(settings, files[1])))
    expected = simulated(experiment(codec_up=codec))
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["run"]["plan_digest"] == expected["run"]["plan_digest"]
    assert result["quality"] == expected["quality"]
    assert result["data"] == expected["data"]


def test_one_client_a_node_under_the_name_its_config_gives_ends_the_same(
    experiment: Any, deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed()
    nodes = {
        50 - number: node_of(settings, files[1], [name], client=name)
        for number, name in enumerate(f"client {n}" for n in range(6))
    }
    result = run(settings, LocalGrid(nodes))
    expected = simulated(experiment())["final_values_sha256"]
    assert result["final_values_sha256"] == expected


def test_the_roll_call_is_counted_as_the_plan_s_and_goes_to_each_node_once(
    deployed: Any, experiment: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=6)
    nodes = {n: node_of(settings, files[1], [f"client {n}"]) for n in range(1, 6)}
    nodes[6] = node_of(settings, files[1], ["client 0"])
    result = run(settings, LocalGrid(nodes))["communication"]
    lines = lines_of(settings)
    assert [line["newcomers"] for line in lines] == [0, 6, 0, 0]
    assert [line["messages"] for line in lines] == [0, 24, 12, 12]
    assert [line["plan_bytes"] > 0 for line in lines] == [False, True, False, False]
    # With one client a node what devices send alone is what went over the wire.
    assert result["total_bytes"] == pytest.approx(result["wire_bytes"], rel=0.02)
    # The plan goes with the question, so training messages weigh what they do in a simulation.
    plain = simulated(experiment(strategy_clients_per_round=6))["communication"]
    assert result["uplink_bytes"] == plain["uplink_bytes"]
    assert result["downlink_bytes"] == plain["downlink_bytes"]
    told = estimate(settings, num_clients=6).communication["plan_bytes"]
    assert told == pytest.approx(result["plan_bytes"], rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [{}, {"codec_up": "topk-0.3+eden-4", "codec_error_feedback": True, "codec_down": "int8"}],
    ids=["plain", "with memory"],
)
def test_a_deployed_run_that_was_cut_short_goes_on_with_nodes_that_come_anew(
    deployed: Any, files: tuple[Path, Path], changes: dict[str, Any]
) -> None:
    class StopsInRound2(LocalGrid):
        rounds = 0

        def pull_messages(self, message_ids: Any) -> Any:
            replies = list(super().pull_messages(message_ids))
            self.rounds += any(reply.metadata.message_type == "train" for reply in replies)
            if self.rounds == 2:
                raise KeyboardInterrupt
            return replies

    whole = deployed(**changes)
    expected = run(whole, LocalGrid(three_nodes(whole, files[1])))
    settings = deployed(**changes)
    nodes = three_nodes(settings, files[1])
    with pytest.raises(KeyboardInterrupt):
        run(settings, StopsInRound2(nodes))
    folder = Path(settings.run.out)
    assert is_cut_short(folder)
    prepared = prepare(read_cut_short(folder), Silent())
    journal = check_journal(folder, prepared)
    result = federate(LocalGrid(nodes), prepared, RunFolder(folder), Silent(), journal)
    assert not is_cut_short(folder)
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["communication"]["plan_bytes"] == expected["communication"]["plan_bytes"]
    assert result["data"] == expected["data"]


# -- nodes come and go ------------------------------------------------------------------------


class Changing(LocalGrid):
    """Nodes by the number of train messages sent so far."""

    def __init__(self, handlers: dict[int, Handler], there: Callable[[int], set[int]]) -> None:
        super().__init__(handlers)
        self.trained = 0
        self._there = there

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node in self._there(self.trained)]

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        self.trained += sum(m.metadata.message_type == "train" for m in messages)
        return super().push_messages(messages)


def test_a_latecomer_s_clients_are_drawn_once_it_is_there(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(
        strategy_clients_per_round=6, strategy_num_rounds=4, population_num_clients=4
    )
    nodes = three_nodes(settings, files[1])
    grid = Changing(nodes, lambda trained: {7, 5} if trained < 2 else {7, 5, 9})
    result = run(settings, grid)
    assert result["refused"] == []
    assert [line["clients"] for line in lines_of(settings)] == [0, 4, 6, 6, 6]
    assert result["data"]["clients"] == 6


def test_a_node_that_left_is_not_drawn_from_and_is_asked_anew_when_it_is_back(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=6, strategy_num_rounds=3)
    asked: list[int] = []
    nodes = three_nodes(settings, files[1])
    honest = nodes[9]

    def counted(payload: bytes) -> bytes:
        asked.append(len(read_request(payload).clients))
        return honest(payload)

    nodes[9] = counted
    grid = Changing(nodes, lambda trained: {5, 7} if trained == 3 else {5, 7, 9})
    result = run(settings, grid)
    assert result["refused"] == []
    assert [line["clients"] for line in lines_of(settings)] == [0, 6, 4, 6]
    assert asked == [0, 2, 0, 2]


def test_a_run_goes_on_with_those_who_came_when_the_wait_is_over(
    deployed: Any, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.1, strategy_clients_per_round=6)
    nodes = {5: three_nodes(settings, files[1])[5]}
    assert run(settings, LocalGrid(nodes))["data"]["clients"] == 2
    assert "2 of 6 clients came within 0.1 seconds" in caplog.text


# -- hostile or mistaken nodes ------------------------------------------------------------------


def lying(honest: Handler, roster: Callable[[], bytes]) -> Handler:
    """A node that answers the roll call with something else."""

    def answer(payload: bytes) -> bytes:
        return honest(payload) if read_request(payload).clients else roster()

    return answer


def _raises() -> bytes:
    raise MemoryError("no room")


LIES: dict[str, Callable[[], bytes]] = {
    "neither a roster|opens with": lambda: b"\x80\x04nonsense" * 30,
    "control characters": lambda: write_roster({"xy": 1}).replace(b"y", b"\n"),
    "no room": _raises,
    "I will not": lambda: pack_refusal(Refusal(bytes(16), 0, 0, "I will not.")),
}


@pytest.mark.parametrize("words", LIES)
def test_a_node_that_gives_no_roster_takes_no_part_and_the_others_go_on(
    deployed: Any, files: tuple[Path, Path], words: str
) -> None:
    settings = deployed(population_num_clients=4)
    nodes = three_nodes(settings, files[1])
    nodes[9] = lying(nodes[9], LIES[words])
    result = run(settings, LocalGrid(nodes))
    assert result["data"]["clients"] == 4
    assert {refused["who"] for refused in result["refused"]} == {"node 9"}
    assert any(
        word in refused["reason"] for word in words.split("|") for refused in result["refused"]
    )
    # One that errs may have had a bad moment; one that refuses would say the same again.
    assert len(result["refused"]) == (3 if words == "no room" else 1)


def test_a_node_cannot_take_another_s_clients(
    deployed: Any, files: tuple[Path, Path], experiment: Any
) -> None:
    settings = deployed()
    nodes = three_nodes(settings, files[1])
    nodes[8] = lying(nodes[9], lambda: write_roster({"client 1": 10**6, "client 2": 10**6}))
    result = run(settings, LocalGrid(nodes))
    reasons = [refused["reason"] for refused in result["refused"]]
    assert len(reasons) == 2
    assert all("which lives on node 5" in reason for reason in reasons)
    assert result["final_values_sha256"] == simulated(experiment())["final_values_sha256"]


def test_a_run_whose_nodes_all_refuse_ends_with_the_reason(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.2)
    missing = NodeSettings.of(settings).on({"data": "nowhere.jsonl"})
    with pytest.raises(RunError, match=r"none of 1 nodes .* no file or folder 'nowhere.jsonl'"):
        run(settings, LocalGrid({3: Node(missing).answer}))


def test_a_label_that_the_plan_does_not_know_is_found_at_the_roll_call(
    deployed: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = deployed(population_num_clients=4)
    nodes = three_nodes(settings, files[1])
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a film", "label": 7, "client": "x"}\n' * 4, encoding="utf-8")
    nodes[9] = Node(NodeSettings.of(settings).on({"data": str(strange)})).answer
    [refused] = run(settings, LocalGrid(nodes))["refused"]
    assert refused["who"] == "node 9"
    assert "7" in refused["reason"]


def test_a_node_without_rows_of_its_own_says_how_to_give_it_some(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.2)
    with pytest.raises(RunError, match="--node-config"):
        run(settings, LocalGrid({3: Node(NodeSettings.of(settings)).answer}))


def test_a_simulation_cannot_have_its_clients_on_nodes(deployed: Any) -> None:
    with pytest.raises(ConfigError, match="fedpet deploy"):
        simulate(deployed(), Silent())


# -- a node's own config ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({"dta": "x"}, "unknown key .*'dta'.* Known are: .*client-column"),
        ({"data": 3}, "data .* must be a str"),
        ({"data": ""}, "data .* must be a str"),
        ({"data": "x", "threads": -1}, "at least 1, got -1"),
        ({"data": "x", "threads": True}, "must be a int"),
        ({"data": "x", "client": "a", "client-column": "b"}, "both a client and a client-column"),
        ({"client": "a"}, "no data: give the file"),
    ],
)
def test_a_node_config_that_cannot_be_is_refused(
    experiment: Any, node_config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        NodeSettings.of(experiment()).on(node_config)


def test_a_simulated_node_s_config_changes_nothing(experiment: Any) -> None:
    settings = NodeSettings.of(experiment())
    assert settings.on({"partition-id": 0, "num-partitions": 2}) == settings


def test_a_node_s_own_places_stand_above_the_experiment_s(experiment: Any) -> None:
    settings = NodeSettings.of(experiment()).on(
        {
            "data": "mine",
            "client": "device-7",
            "split": "day",
            "text-columns": "a, b",
            "label-column": "y",
            "backbone": "/opt/model",
            "cache": "/var/cache",
            "threads": 3,
        }
    )
    assert (settings.data.source, settings.data.train_split) == ("mine", "day")
    assert (settings.data.text_columns, settings.data.label_column) == (("a", "b"), "y")
    assert (settings.backbone.model, settings.cache) == ("/opt/model", Path("/var/cache"))
    assert (settings.profile.client, settings.profile.threads) == ("device-7", 3)


# -- the population ------------------------------------------------------------------------------


def test_residents_are_drawn_as_a_simulation_draws_them_whatever_nodes_they_live_on() -> None:
    rows = {f"client {n}": n + 1 for n in range(9)}
    residents = Residents()
    names = list(reversed(rows))
    for node in range(4):
        assert residents.arrive(100 + node, {name: rows[name] for name in names[node::4]}) == {}
    for server_round in range(1, 20):
        drawn = residents.sample(server_round, 4, seed=3)
        assert drawn == Population(rows, {}).sample(server_round, 4, seed=3)
        cohorts = residents.cohorts(drawn, residents.there)
        assert sorted(name for names in cohorts.values() for name in names) == drawn


def test_a_client_moves_only_when_its_node_has_left() -> None:
    residents = Residents()
    residents.arrive(1, {"a": 5})
    assert "lives on node 1" in residents.arrive(2, {"a": 5})["a"]
    residents.leave(1)
    assert residents.present == {}
    assert residents.arrive(2, {"a": 7}) == {}
    assert (residents.homes, residents.present) == ({"a": 2}, {"a": 7})


def test_a_node_that_comes_back_has_the_clients_that_it_brings_then() -> None:
    residents = Residents()
    residents.arrive(1, {"a": 5, "b": 6})
    residents.leave(1)
    assert residents.arrive(1, {"a": 5}) == {}
    assert residents.present == {"a": 5}
    assert residents.arrive(2, {"b": 6}) == {}


def test_a_device_that_was_started_anew_has_its_clients_again_once_the_old_node_is_gone(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    """To a server that lets every node in, a device is another node after each start."""
    settings = deployed(
        strategy_clients_per_round=6, strategy_num_rounds=4, population_num_clients=6
    )
    nodes = three_nodes(settings, files[1])
    nodes[12] = nodes[9]

    def there(trained: int) -> set[int]:
        if trained < 3:
            return {5, 7, 9}
        return {5, 7, 9, 12} if trained < 6 else {5, 7, 12}

    result = run(settings, Changing(nodes, there))
    assert [refused["who"] for refused in result["refused"]] == ["node 12", "node 12"]
    assert [line["replies"] for line in lines_of(settings)] == [0, 6, 6, 6, 6]


def test_a_node_s_words_are_one_printable_line_of_bounded_length(
    deployed: Any, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(population_num_clients=4, strategy_num_rounds=1)

    def loud() -> bytes:
        raise MemoryError("\x1b[2J\nround 1: all is well" + "x" * 10**6)

    nodes = three_nodes(settings, files[1])
    nodes[9] = lying(nodes[9], loud)
    result = run(settings, LocalGrid(nodes))
    told = [refused["reason"] for refused in result["refused"]] + caplog.messages
    assert any("all is well" in line for line in told)
    assert all("\x1b" not in line and "\n" not in line and len(line) < 1000 for line in told)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
