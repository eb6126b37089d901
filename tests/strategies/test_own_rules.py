"""Rules of the user's own: registered by name, given as an object, or a Flower class wrapped."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fake_training
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from fake_training import CLIENTS, NUM_VALUES, ROWS, ShuffledGrid, make_plan, update_of
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from in_process_run import run as run_in_process
from tiny import make_backbone, make_experiment, make_rows

import fedpet
from fedpet.config import Experiment, StrategyConfig, TrainingConfig
from fedpet.config.ranges import FromZero
from fedpet.config.strategy_registry import default_parameters, registered_rules
from fedpet.errors import ConfigError
from fedpet.export.saved_run import SavedRun
from fedpet.pet.tiers import Tier
from fedpet.protocol.ledger import Ledger
from fedpet.server.aggregation import from_arrays, to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.rounds import SparseStrategy
from fedpet.strategies import FedAdam, FedProx, Krum, Strategy, register, wrap

START = np.linspace(-0.2, 0.2, NUM_VALUES).astype(np.float32)
OBJECTS: list[tuple[dict[str, Any], type[Strategy]]] = [
    ({"name": name, **fake_training.PARAMETERS[name]}, rule)  # type: ignore[misc]
    for name, rule in registered_rules().items()
    if name in fake_training.PARAMETERS
]


# A toy rule, all of it: a step of a size that the user sets, towards the sign of the mean update.


class FlowersSign(flower.FedAvg):
    """Sign descent, as somebody would write it for Flower."""

    def __init__(self, *, step: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step = step

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        self.before = from_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, None
        sign = np.sign(from_arrays(arrays) - self.before)
        return to_arrays(self.before + self.step * sign), metrics


@register("toysign")
class ToySign(Strategy):
    """The same as a rule of an experiment."""

    step_size: FromZero = 0.001
    has_server_optimizer = True

    def flower_strategy(self, training: TrainingConfig) -> flower.Strategy:
        return FlowersSign(step=self.step_size)


class Recording(flower.FedAvg):
    """Note what is aggregated, and cut values off as a user's own defence might."""

    def __init__(self, *, limit: float = np.inf, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit
        self.seen: list[list[np.ndarray]] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            values = from_arrays(reply.content.array_records["arrays"])
            limited = np.clip(values, -self.limit, self.limit)
            reply.content["arrays"] = to_arrays(limited)
        self.seen.append([from_arrays(r.content.array_records["arrays"]) for r in replies])
        return super().aggregate_train(server_round, replies)


def bind(strategy: Strategy) -> SparseStrategy:
    plan = make_plan()
    return strategy.bind(
        plan=plan,
        tiers=[Tier(0.0, 1.0, slice(None), plan.num_values, [(0, plan.num_values)])],
        population=ClientPool(ROWS, homes={}),
        ledger=Ledger(),
    )


def rounds_of(bound: SparseStrategy, rounds: int = 2) -> np.ndarray:
    result = bound.start(ShuffledGrid(3), to_arrays(START), num_rounds=rounds)
    return from_arrays(result.arrays) if result.arrays else START


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own-rules")
    backbone, rows = make_backbone(folder / "backbone"), make_rows(folder / "rows")

    def make(name: str, **changes: Any) -> Experiment:
        return make_experiment(backbone, rows, folder / name, strategy_num_rounds=2, **changes)

    return make


# -- plain keywords --------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "rule"), OBJECTS, ids=lambda value: str(value)[:20])
def test_a_strategy_of_plain_keywords_gives_the_bits_of_its_table(
    table: dict[str, Any], rule: type[Strategy]
) -> None:
    own = {key: value for key, value in table.items() if key != "name"}
    strategy = rule(clients_per_round=len(CLIENTS), **own)
    training = {} if table["name"] == "fedavg" else {"proximal-mu": 0.5}
    tables = {"strategy": {**table, "clients-per-round": len(CLIENTS)}, "training": training}
    by_table = Experiment.from_tables(tables)
    assert by_table == dataclasses.replace(by_table, strategy=strategy)
    assert (
        rounds_of(bind(strategy)).tobytes()
        == rounds_of(fake_training.make_strategy(table["name"])).tobytes()
    )


def test_the_strategies_are_there_after_importing_fedpet_alone() -> None:
    code = "import fedpet, sys; fedpet.strategies.FedAvg(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"  # a strategy is settings until it is bound


def test_every_flower_rule_of_the_settings_is_a_public_class() -> None:
    public = {getattr(fedpet.strategies, name) for name in fedpet.strategies.__all__}
    shipped = {rule for rule in registered_rules().values() if "strategies" in rule.__module__}
    assert shipped <= public
    assert len(shipped) == 12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FedAdam(tau=0), r"strategy\.tau must be at least 1e-12"),
        (lambda: FedAdam(clients_per_round=0), r"strategy\.clients-per-round must be at least 1"),
        (lambda: Krum(num_malicious=9), "need 21 usable replies.*clients-per-round is 20"),
        (lambda: Krum(num_malicious=2.5), r"strategy\.num-malicious must be a whole number"),  # type: ignore[arg-type]
        (lambda: Krum(name="fedavg"), "Krum is the strategy 'krum', got the name 'fedavg'"),
        (lambda: wrap(flower.FedAvg, quorum=2), r"strategy\.quorum must be in \[0, 1\]"),
        (lambda: ToySign(step_size=-1), r"strategy\.step-size must be at least 0"),
    ],
)
def test_a_bad_keyword_is_refused_at_construction_in_the_table_s_sentence(
    make: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_the_proximal_term_of_a_fedprox_object_is_the_clients() -> None:
    experiment = Experiment(strategy=FedProx(proximal_mu=0.25))
    by_table = {"strategy": {"name": "fedprox"}, "training": {"proximal-mu": 0.25}}
    assert experiment == Experiment.from_tables(by_table)
    with pytest.raises(ConfigError, match="give it once"):
        Experiment(strategy=FedProx(proximal_mu=0.25), training=TrainingConfig(proximal_mu=0.5))


def test_the_server_s_own_rates_are_flower_s_defaults() -> None:
    for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        made = StrategyConfig(name=name).flower_strategy(TrainingConfig())
        default = type(made)()
        for attribute in ("server_learning_rate", "eta"):
            assert getattr(made, attribute, None) == getattr(default, attribute, None), name


# -- a rule of one's own ---------------------------------------------------------------------


def test_a_toy_rule_of_one_file_trains_by_its_name_and_as_an_object(experiment: Any) -> None:
    by_name = run_in_process(
        experiment("name", strategy_name="toysign", **{"strategy_step-size": 0.01})
    )
    tables = experiment("object")
    strategy = ToySign(step_size=0.01, num_rounds=2, clients_per_round=4)
    by_object = run_in_process(dataclasses.replace(tables, strategy=strategy))
    plain = run_in_process(experiment("plain"))
    assert by_name["final_values_sha256"] == by_object["final_values_sha256"]
    assert by_name["final_values_sha256"] != plain["final_values_sha256"]


def test_an_experiment_with_a_registered_rule_survives_its_tables_and_its_file(
    tmp_path: Path,
) -> None:
    experiment = Experiment(strategy=ToySign(step_size=0.5))
    assert experiment.to_tables()["strategy"]["step-size"] == 0.5
    assert Experiment.from_tables(experiment.to_tables()) == experiment
    assert Experiment.from_run_config(experiment.to_run_config()) == experiment
    (tmp_path / "toy.toml").write_text('[strategy]\nname = "toysign"\n')
    read = Experiment.from_file(tmp_path / "toy.toml", ["strategy.step-size=0.5"])
    assert read == dataclasses.replace(
        experiment, run=dataclasses.replace(experiment.run, name="toy")
    )
    assert read.located().strategy == experiment.strategy


def test_a_registered_rule_adds_no_key_to_other_experiments() -> None:
    assert "step_size" not in default_parameters()
    assert "step-size" not in Experiment().to_tables()["strategy"]
    with pytest.raises(ConfigError, match=r"'fedavg' takes no step-size, got 0\.5: it belongs to "):
        Experiment.from_tables({"strategy": {"step-size": 0.5}})


def test_a_rule_whose_number_states_no_range_is_not_registered() -> None:
    with pytest.raises(ValueError, match=r"Loose\.rate is a number and states no range"):

        @register("loose")
        class Loose(Strategy):
            rate: float = 0.5

    assert "loose" not in registered_rules()


def test_a_name_that_another_rule_has_is_not_registered() -> None:
    with pytest.raises(ValueError, match=r"'krum' is that of fedpet\.strategies\.robust\.Krum"):

        @register("krum")
        class Other(Strategy):
            pass


def test_a_registered_rule_is_estimated_by_its_own_server(experiment: Any) -> None:
    from fedpet.estimate.payload_simulation import server_step
    from fedpet.server.rounds import make_rule

    rule = make_rule(ToySign(step_size=0.5), TrainingConfig())
    step = server_step(rule, START, np.full_like(START, 1e-3), 1)
    np.testing.assert_allclose(step, 0.5, atol=1e-6)


# -- a Flower class of one's own -------------------------------------------------------------


def flowers_own(strategy: flower.FedAvg, rounds: int = 2) -> np.ndarray:
    """The class alone, on the same replies as dense arrays, one a client, over the rounds."""
    from flwr.app import RecordDict

    fake_training.LocalGrid({})  # names the run that messages are of
    strategy.fraction_train = 0.0
    arrays = to_arrays(START)
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    for server_round in range(1, rounds + 1):
        strategy.configure_train(server_round, arrays, ConfigRecord(), None)  # type: ignore[arg-type]
        values, replies = from_arrays(arrays), []
        for client in CLIENTS:
            update, loss = update_of(client, server_round, values)
            metrics = MetricRecord({"num-examples": ROWS[client], "train-loss": loss})
            content = RecordDict({"arrays": to_arrays(values + update), "metrics": metrics})
            replies.append(Message(content, reply_to=request))
        averaged, _ = strategy.aggregate_train(server_round, replies)
        assert averaged is not None
        arrays = averaged
    return from_arrays(arrays)


@pytest.mark.parametrize("limit", [np.inf, 0.1])
def test_a_wrapped_class_that_compares_gives_what_it_gives_alone(limit: float) -> None:
    strategy = wrap(
        Recording, compares_replies=True, clients_per_round=len(CLIENTS), quorum=1.0, limit=limit
    )
    bound = bind(strategy)
    np.testing.assert_allclose(
        rounds_of(bound), flowers_own(Recording(limit=limit)), rtol=0, atol=1e-6
    )
    assert isinstance(bound.rule, Recording)
    assert [len(seen) for seen in bound.rule.seen] == [len(CLIENTS)] * 2
    assert [record.replies for record in bound.ledger.rounds] == [len(CLIENTS)] * 2


def test_a_wrapped_class_that_averages_is_shown_the_mean_alone() -> None:
    bound = bind(wrap(Recording, clients_per_round=len(CLIENTS)))
    np.testing.assert_allclose(rounds_of(bound), flowers_own(Recording()), rtol=0, atol=1e-6)
    assert isinstance(bound.rule, Recording)
    assert [len(seen) for seen in bound.rule.seen] == [1, 1]


def test_a_wrapped_optimiser_of_one_s_own_is_saved_and_restored() -> None:
    class Patient(flower.FedAdam):
        """Flower's, by inheritance."""

    class Counting(flower.FedAvg):
        """With a state of its own."""

        rounds = 0

        def aggregate_train(self, *args: Any) -> Any:
            self.rounds += 1
            return super().aggregate_train(*args)

        def state(self) -> dict[str, np.ndarray]:
            return {"rounds": np.array([self.rounds])}

        def load_state(self, state: dict[str, np.ndarray]) -> None:
            self.rounds = int(state["rounds"][0])

    strategy = wrap(Patient, eta=0.02, clients_per_round=len(CLIENTS))
    whole, first, second = bind(strategy), bind(strategy), bind(strategy)
    values = rounds_of(first, 1)
    second.rounds_done = 1
    second.load_state(first.state())
    result = second.start(ShuffledGrid(3), to_arrays(values), num_rounds=1)
    assert result.arrays is not None
    assert from_arrays(result.arrays).tobytes() == rounds_of(whole).tobytes()
    counting, other = bind(wrap(Counting)), bind(wrap(Counting))
    rounds_of(counting)
    other.load_state(counting.state())
    assert isinstance(other.rule, Counting)
    assert other.rule.rounds == 2


def test_a_wrapped_class_runs_in_a_whole_run_and_stands_in_its_folder(experiment: Any) -> None:
    plain = experiment("wrapped-plain")
    strategy = wrap(Recording, num_rounds=2, clients_per_round=4, weighted_by_key="num-examples")
    wrapped = dataclasses.replace(experiment("wrapped"), strategy=strategy)
    assert wrapped.located().strategy == strategy
    summary = run_in_process(wrapped)
    assert summary["final_values_sha256"] == run_in_process(plain)["final_values_sha256"]
    text = (Path(wrapped.run.out) / "config.toml").read_text(encoding="utf-8")
    assert 'name = "recording"' in text
    pet = SavedRun(Path(wrapped.run.out)).load()  # where the class is not at hand
    assert pet.num_values == summary["model"]["communicated_values"]
    with pytest.raises(ConfigError, match=r"strategy\.name must be one of fedavg, .*'recording'"):
        Experiment.from_file(Path(wrapped.run.out) / "config.toml")


def test_simulate_takes_strategies_of_every_kind(experiment: Any) -> None:
    quick: dict[str, Any] = {"backend": "in-process", "progress": False}

    def final(model: Experiment, **given: Any) -> Any:
        return fedpet.simulate(model, **quick, **given).result["final_values_sha256"]

    keywords: dict[str, Any] = {"num_rounds": 2, "clients_per_round": 4}
    mu = {"training": {"proximal_mu": 0.5}}
    by_table = final(experiment("s1", strategy_name="fedprox", training_proximal_mu=0.5))
    assert by_table == final(experiment("s2"), strategy=FedProx(**keywords), **mu)
    assert by_table == final(experiment("s3"), strategy=FedProx(proximal_mu=0.5, **keywords))
    held = dataclasses.replace(experiment("s4"), strategy=wrap(Recording, **keywords))
    assert final(held) == final(experiment("s5"))


def test_a_wrapped_class_with_arguments_that_it_does_not_take_is_refused_before_the_run() -> None:
    with pytest.raises(TypeError, match="no_such"):
        wrap(Recording, no_such=1)


def test_a_wrapped_class_never_sees_a_client_that_is_refused() -> None:
    from test_strategies import with_infinity

    bound = bind(wrap(Recording, compares_replies=True, clients_per_round=len(CLIENTS)))
    grid = ShuffledGrid(2, change=with_infinity(CLIENTS[3]))
    bound.start(grid, to_arrays(START), num_rounds=1)
    assert isinstance(bound.rule, Recording)
    assert [len(seen) for seen in bound.rule.seen] == [len(CLIENTS) - 1]
    assert [refused["who"] for refused in bound.ledger.current.refused] == [CLIENTS[3]]


def test_a_wrapped_class_that_averages_nothing_leaves_the_values() -> None:
    class Nothing(flower.FedAvg):
        def aggregate_train(self, *args: Any) -> Any:
            return None, None

    bound = bind(wrap(Nothing, clients_per_round=len(CLIENTS)))
    assert rounds_of(bound).tobytes() == START.tobytes()
    assert not bound.ledger.current.aggregated


def test_flower_s_own_names_are_the_arguments_of_a_wrapped_class() -> None:
    strategy = wrap(flower.FedAdam, eta=0.5, tau=0.1, clients_per_round=11)
    rule = strategy.flower_strategy(TrainingConfig())
    assert (rule.eta, rule.tau) == (0.5, 0.1)
    assert strategy.clients_per_round == 11
    assert "eta" in inspect.signature(flower.FedAdam).parameters
