"""The strategies: Flower's own rules, with the rounds of a plan in front of them.

    config -> [strategy], by `strategy.name`

Each is an instance of the Flower strategy it extends, made with the parameters of the experiment.
Equality (law 4): with density 1, every Linear in scope and a lossless codec, the result of each is
that of the Flower strategy on the same replies, to 1e-6, round after round. Whatever the order of
the replies and the spread of clients over nodes, it is the same bits (law 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)

from fedpet.config import StrategyConfig
from fedpet.protocol.plan import Plan
from fedpet.server.aggregation import LOSS
from fedpet.server.rounds import MeanAggregation, PerClientAggregation
from fedpet.server.server_state import Vectors

SparseStrategy = MeanAggregation | PerClientAggregation


class SparseFedAvg(MeanAggregation, FedAvg):
    """Flower's FedAvg over the sparse values of a plan."""


class SparseFedProx(MeanAggregation, FedProx):
    """Flower's FedProx: FedAvg on the server; the proximal term travels in the plan."""

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {"proximal_mu": plan.training.proximal_mu}


class SparseFedAvgM(MeanAggregation, FedAvgM):
    """Flower's FedAvgM: momentum on the server."""

    server_state_attributes: ClassVar[Vectors] = {"momentum_vector": list}

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {
            **_named(config, server_learning_rate="server_learning_rate"),
            "server_momentum": config.server_momentum,
        }


class SparseFedAdam(MeanAggregation, FedAdam):
    """Flower's FedAdam: Adam on the server, over the mean update."""

    server_state_attributes: ClassVar[Vectors] = {"m_t": dict, "v_t": dict}

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {
            **_named(config, server_learning_rate="eta"),
            "beta_1": config.beta_1,
            "beta_2": config.beta_2,
            "tau": config.tau,
        }


class SparseFedYogi(MeanAggregation, FedYogi):
    """Flower's FedYogi: Yogi on the server, over the mean update."""

    server_state_attributes: ClassVar[Vectors] = {"m_t": dict, "v_t": dict}
    flower_kwargs = SparseFedAdam.flower_kwargs


class SparseFedAdagrad(MeanAggregation, FedAdagrad):
    """Flower's FedAdagrad: Adagrad on the server, over the mean update."""

    server_state_attributes: ClassVar[Vectors] = {"m_t": dict, "v_t": dict}

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {**_named(config, server_learning_rate="eta"), "tau": config.tau}


class SparseFedMedian(PerClientAggregation, FedMedian):
    """Flower's FedMedian: the median of each value."""


class SparseFedTrimmedAvg(PerClientAggregation, FedTrimmedAvg):
    """Flower's FedTrimmedAvg: the mean of each value without the extremes."""

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {"beta": config.trim_fraction}


class SparseKrum(PerClientAggregation, Krum):
    """Flower's Krum: the one reply that is closest to its neighbours."""

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {"num_malicious_nodes": config.num_malicious}


class SparseMultiKrum(PerClientAggregation, MultiKrum):
    """Flower's MultiKrum: the mean of the replies that are closest to their neighbours."""

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {
            "num_malicious_nodes": config.num_malicious,
            "num_nodes_to_select": config.num_selected,
        }


class SparseBulyan(PerClientAggregation, Bulyan):
    """Flower's Bulyan: of replies that Krum selects, the mean of the values near the median."""

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        return {"num_malicious_nodes": config.num_malicious}


class SparseQFedAvg(PerClientAggregation, QFedAvg):
    """Flower's QFedAvg: clients with a high loss weigh more.

    The loss is the mean over the client's own epochs, as it trains; the paper's is that of the
    values it was sent.
    """

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        rate = config.client_learning_rate or plan.training.learning_rate
        return {"client_learning_rate": rate, "q": config.q, "train_loss_key": LOSS}


STRATEGIES: Mapping[str, type[SparseStrategy]] = {
    "fedavg": SparseFedAvg,
    "fedprox": SparseFedProx,
    "fedavgm": SparseFedAvgM,
    "fedadam": SparseFedAdam,
    "fedyogi": SparseFedYogi,
    "fedadagrad": SparseFedAdagrad,
    "fedmedian": SparseFedMedian,
    "fedtrimmedavg": SparseFedTrimmedAvg,
    "krum": SparseKrum,
    "multikrum": SparseMultiKrum,
    "bulyan": SparseBulyan,
    "qfedavg": SparseQFedAvg,
}


def _named(config: StrategyConfig, *, server_learning_rate: str) -> dict[str, float]:
    """The server's learning rate by Flower's name for it; nothing where Flower's own is taken."""
    if not config.server_learning_rate:
        return {}
    return {server_learning_rate: config.server_learning_rate}
