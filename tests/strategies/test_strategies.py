"""Laws of the strategies: each is Flower's own, whatever the order of replies and the nodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_training
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from fake_training import (
    CLIENTS,
    NUM_VALUES,
    PARAMETERS,
    ROWS,
    ShuffledGrid,
    make_strategy,
    update_of,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpet.codec import encode_values
from fedpet.config import Experiment, StrategyConfig
from fedpet.errors import ConfigError
from fedpet.protocol.frame import Frame, pack_frame, pack_refusal
from fedpet.protocol.frame import Refusal as RefusalFrame
from fedpet.server.aggregation import from_arrays, to_arrays
from fedpet.server.rounds import SparseStrategy
from fedpet.utils.seeds import client_id64

ROUNDS = 4
OWN: dict[str, Any] = {
    "fedavg": lambda: flower.FedAvg(),
    "fedprox": lambda: flower.FedProx(proximal_mu=0.5),
    "fedavgm": lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.6),
    "fedadam": lambda: flower.FedAdam(eta=0.02, beta_1=0.8, beta_2=0.95, tau=1e-2),
    "fedyogi": lambda: flower.FedYogi(eta=0.02, beta_1=0.8, beta_2=0.95, tau=1e-2),
    "fedadagrad": lambda: flower.FedAdagrad(eta=0.02, tau=1e-2),
    "fedmedian": lambda: flower.FedMedian(),
    "fedtrimmedavg": lambda: flower.FedTrimmedAvg(beta=0.3),
    "krum": lambda: flower.Krum(num_malicious_nodes=2),
    "multikrum": lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4),
    "bulyan": lambda: flower.Bulyan(num_malicious_nodes=2),
    "qfedavg": lambda: flower.QFedAvg(client_learning_rate=0.1, q=0.3, train_loss_key="loss"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def run(strategy: SparseStrategy, grid: ShuffledGrid, rounds: int = ROUNDS) -> np.ndarray:
    start = to_arrays(np.linspace(-0.2, 0.2, NUM_VALUES))
    result = strategy.start(grid, start, num_rounds=rounds)
    return from_arrays(result.arrays if result.arrays else start)


# -- law 4: it is Flower's -------------------------------------------------------------------


def flowers_own(name: str) -> np.ndarray:
    """Flower's strategy on the same replies as dense arrays, one a client, over the rounds."""
    strategy = OWN[name]()
    strategy.fraction_train = 0.0  # nobody is sampled: the replies are made here
    arrays = ArrayRecord({"weights": Array(np.linspace(-0.2, 0.2, NUM_VALUES, dtype=np.float32))})
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    for server_round in range(1, ROUNDS + 1):
        strategy.configure_train(server_round, arrays, ConfigRecord(), None)
        values = arrays["weights"].numpy().astype(np.float32)
        replies = []
        for client in CLIENTS:
            update, loss = update_of(client, server_round, values)
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"weights": Array(values + update)}),
                    "metrics": MetricRecord({"num-examples": ROWS[client], "loss": loss}),
                }
            )
            replies.append(Message(content, reply_to=request))
        arrays, _ = strategy.aggregate_train(server_round, replies)
    return arrays["weights"].numpy()


@pytest.mark.parametrize("name", OWN)
def test_each_strategy_gives_what_flower_s_own_gives_on_the_same_replies(name: str) -> None:
    ours = run(make_strategy(name), ShuffledGrid(3))
    np.testing.assert_allclose(ours, flowers_own(name), rtol=0, atol=1e-6)
    assert not np.allclose(ours, run(make_strategy(name), ShuffledGrid(3), rounds=2))


@pytest.mark.parametrize("name", OWN)
def test_each_strategy_is_the_flower_strategy_it_extends(name: str) -> None:
    assert type(make_strategy(name).rule) is type(OWN[name]())


def test_every_parameter_of_a_strategy_reaches_flower() -> None:
    base = {name: run(make_strategy(name), ShuffledGrid(1), rounds=2) for name in PARAMETERS}
    for name, parameters in PARAMETERS.items():
        for parameter in parameters:
            default = getattr(StrategyConfig(name=name), parameter)
            other = run(make_strategy(name, **{parameter: default}), ShuffledGrid(1), rounds=2)
            assert not np.array_equal(other, base[name]), (name, parameter)


# -- law 6: same seed, same bytes ------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=3)
@given(seed=st.integers(0, 1000), num_nodes=st.integers(1, 11))
def test_the_order_of_replies_and_the_nodes_do_not_change_a_bit(
    name: str, seed: int, num_nodes: int
) -> None:
    first = run(make_strategy(name), ShuffledGrid(1), rounds=2)
    other = run(make_strategy(name), ShuffledGrid(num_nodes, seed), rounds=2)
    assert first.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", OWN)
def test_a_strategy_that_goes_on_from_its_state_gives_the_same_bits(name: str) -> None:
    whole = run(make_strategy(name), ShuffledGrid(2))
    before = make_strategy(name)
    values = run(before, ShuffledGrid(2), rounds=2)
    after = make_strategy(name)
    after.rounds_done = 2
    after.load_state(before.state())
    result = after.start(ShuffledGrid(2), to_arrays(values), num_rounds=ROUNDS - 2)
    assert from_arrays(result.arrays).tobytes() == whole.tobytes()
    assert [record.round for record in after.ledger.rounds] == [3, 4]


# -- law 7: a wrong reply never becomes part of the result -----------------------------------


def spoiled(victim: str, reason: str) -> fake_training.Change:
    """Refuses for one client, honest for the others."""
    number = client_id64(victim)

    def change(frame: Frame) -> bytes:
        if frame.client == number:
            return pack_refusal(RefusalFrame(frame.plan_digest, frame.server_round, number, reason))
        return pack_frame(frame)

    return change


def with_infinity(victim: str) -> fake_training.Change:
    number = client_id64(victim)

    def change(frame: Frame) -> bytes:
        if frame.client != number:
            return pack_frame(frame)
        values = np.full(frame.count, np.inf, dtype=np.float32)
        return pack_frame(replace(frame, payload=b"\0" + values.tobytes()))

    return change


@pytest.mark.parametrize("name", OWN)
def test_a_client_that_is_refused_leaves_no_trace_in_the_result(name: str) -> None:
    changes = {"num_malicious": 1} if name == "bulyan" else {}  # 10 replies, not 11
    without = make_strategy(name, **changes)
    silent = run(without, ShuffledGrid(2, change=spoiled(CLIENTS[3], "too hot.")))
    liar = make_strategy(name, **changes)
    assert run(liar, ShuffledGrid(2, change=with_infinity(CLIENTS[3]))).tobytes() == (
        silent.tobytes()
    )
    for record in liar.ledger.rounds:
        assert [refused["who"] for refused in record.refused] == [CLIENTS[3]]
        assert record.replies == 10
        assert record.aggregated
    assert without.ledger.rounds[0].refused[0]["reason"] == "too hot."


def beyond_reason(victim: str) -> fake_training.Change:
    """Values that are finite, and of a size that no training comes to."""
    number = client_id64(victim)

    def change(frame: Frame) -> bytes:
        if frame.client != number:
            return pack_frame(frame)
        values = np.full(frame.count, 3e38, dtype=np.float32)
        groups = [(0, frame.count)]
        return pack_frame(
            replace(frame, payload=encode_values(values, frame.codec, groups, seed=0))
        )

    return change


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_a_finite_value_that_would_overflow_later_is_refused_by_name(name: str) -> None:
    # A server that sends its values by EDEN could not send 3e38, and squares of it are infinite.
    without, liar = make_strategy(name), make_strategy(name)
    silent = run(without, ShuffledGrid(2, change=spoiled(CLIENTS[3], "too hot.")))
    grid = ShuffledGrid(2, change=beyond_reason(CLIENTS[3]))
    assert run(liar, grid).tobytes() == silent.tobytes()
    [refused] = liar.ledger.current.refused
    assert refused["who"] == CLIENTS[3]
    assert "at most 1e+18 in magnitude" in refused["reason"]


@pytest.mark.parametrize("kind", ["refusal", "frame"])
def test_nobody_is_refused_by_what_another_node_says_in_its_name(kind: str) -> None:
    victim = client_id64(CLIENTS[3])

    def change(frame: Frame) -> bytes:
        if frame.client == victim:
            return pack_frame(frame)
        forged = (
            pack_refusal(RefusalFrame(frame.plan_digest, frame.server_round, victim, "I give up."))
            if kind == "refusal"
            else pack_frame(replace(frame, client=victim))
        )
        return forged if frame.client == client_id64(CLIENTS[4]) else pack_frame(frame)

    strategy = make_strategy("fedavg")
    run(strategy, ShuffledGrid(len(CLIENTS), change=change), rounds=1)
    refused = {r["who"]: r["reason"] for r in strategy.ledger.current.refused}
    assert CLIENTS[3] not in refused
    assert "no reply came" in refused[CLIENTS[4]]
    [stranger] = refused.keys() - {CLIENTS[4]}
    assert f"{victim:016x}" in stranger
    assert "was not asked to train this client" in refused[stranger]
    assert strategy.ledger.current.replies == len(CLIENTS) - 1


def test_a_reason_in_the_books_is_one_printable_line() -> None:
    strategy = make_strategy("fedavg")
    said = "too hot\x1b[2J\nround 1: all is well\u202e"
    run(strategy, ShuffledGrid(2, change=spoiled(CLIENTS[3], said)), rounds=1)
    [refused] = strategy.ledger.current.refused
    assert refused["reason"] == "too hot [2J round 1: all is well "


@pytest.mark.parametrize("name", ["krum", "multikrum", "bulyan", "fedmedian", "fedtrimmedavg"])
def test_a_round_with_fewer_replies_than_the_rule_needs_changes_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = make_strategy(name, quorum=0.0)
    needed = strategy.config.min_usable_replies
    few = {client_id64(client) for client in CLIENTS[: needed - 1]}

    def change(frame: Frame) -> bytes:
        return pack_frame(frame) if frame.client in few else b""

    before = from_arrays(to_arrays(np.linspace(-0.2, 0.2, NUM_VALUES)))
    assert run(strategy, ShuffledGrid(1, change=change), rounds=1).tobytes() == before.tobytes()
    assert not strategy.ledger.current.aggregated
    assert f"{needed - 1} of 11 replies are usable, {needed} are needed by '{name}'" in caplog.text


def test_a_result_that_is_no_number_leaves_values_and_optimiser_as_they_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    huge = make_strategy("fedavgm", server_learning_rate=1e38, server_momentum=0.9)
    assert np.isfinite(run(huge, ShuffledGrid(1), rounds=3)).all()
    assert "the rule's result holds NaN or infinity" in caplog.text
    assert all(np.isfinite(vector).all() for vector in huge.state().values())


# -- the parameters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "fedsgd"}, "must be one of fedavg, fedprox"),
        ({"name": "fedavg", "beta-1": 0.5}, "'fedavg' takes no beta-1.* fedadam, fedyogi"),
        ({"name": "krum", "num-selected": 3}, "'krum' takes no num-selected"),
        ({"name": "fedadam", "beta-1": 1.0}, r"strategy\.beta-1 must be in \[0, 1\)"),
        ({"name": "fedadam", "tau": 0.0}, r"strategy\.tau must be at least 1e-12"),
        ({"name": "fedtrimmedavg", "trim-fraction": 0.5}, r"must be in \[0, 0\.5\)"),
        ({"name": "fedavgm", "server-learning-rate": -1.0}, "must be at least 0"),
        ({"name": "fedavgm", "server-learning-rate": float("inf")}, "and finite"),
        ({"name": "qfedavg", "q": float("nan")}, r"strategy\.q must be at least 0"),
        ({"name": "krum", "num-malicious": 9}, "need 21 usable replies.*clients-per-round is 20"),
        ({"name": "bulyan", "num-malicious": 5}, "need 23 usable replies"),
        ({"name": "fedmedian", "clients-per-round": 2}, "need 3 usable replies"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Experiment.from_tables({"strategy": table})


@pytest.mark.parametrize("fraction", [0.01, 0.07, 0.1, 0.2, 0.3, 1 / 3, 0.49])
def test_a_trimmed_mean_needs_just_as_many_replies_as_let_it_trim(fraction: float) -> None:
    config = StrategyConfig(name="fedtrimmedavg", trim_fraction=fraction, clients_per_round=200)
    least = config.min_usable_replies
    assert int(fraction * least) == 1
    assert int(fraction * (least - 1)) == 0


def test_all_keys_at_their_defaults_are_taken_by_every_strategy() -> None:
    defaults = StrategyConfig().to_table()
    for name in OWN:
        table = {"strategy": {**defaults, "name": name}, "training": {"proximal-mu": 0.1}}
        if name == "fedavg":
            del table["training"]
        assert Experiment.from_tables(table).strategy == StrategyConfig(name=name)


# -- what does not go together with frames ---------------------------------------------------


@pytest.mark.parametrize("wrapper", ["ServerSideFixed", "ClientSideFixed", "ServerSideAdaptive"])
def test_flower_s_wrappers_for_differential_privacy_are_refused_with_the_reason(
    wrapper: str,
) -> None:
    wrap = getattr(flower, f"DifferentialPrivacy{wrapper}Clipping")
    arguments = {} if "Adaptive" in wrapper else {"clipping_norm": 1.0}
    wrapped = wrap(
        make_strategy("fedavg"), noise_multiplier=0.1, num_sampled_clients=11, **arguments
    )
    with pytest.raises(ConfigError, match=r"clip and perturb arrays of floats.*coded frames"):
        wrapped.start(ShuffledGrid(1), to_arrays(np.zeros(NUM_VALUES)), num_rounds=1)


def test_a_client_mod_that_clips_is_refused_with_the_reason() -> None:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod

    from fedpet.protocol.request import to_record

    for mod in (LocalDpMod(1.0, 1.0, 1.0, 0.1), fixedclipping_mod):
        app = ClientApp(mods=[mod])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(to_record(b"a frame"), reply_to=message)

        class WithMod(ShuffledGrid):
            def _answer(self, message: Message, app: ClientApp = app) -> Message:
                from flwr.app import Error

                context = Context(1, 1, {}, RecordDict(), {})
                try:
                    return app(message, context)
                except Exception as error:
                    return Message(Error(2, str(error)), reply_to=message)

        strategy = make_strategy("fedavg")
        run(strategy, WithMod(1), rounds=1)
        reasons = {refused["reason"] for refused in strategy.ledger.current.refused}
        assert len(reasons) == 1
        assert "take the mod off the ClientApp" in reasons.pop()
