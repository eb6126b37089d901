"""Run a Flower user's methods without fedpet, and meter them as fedpet is."""

from benchmarks.baselines.client import reply
from benchmarks.baselines.ledger import DenseLedger
from benchmarks.baselines.methods import METHODS, Baseline
from benchmarks.baselines.rounds import DenseFedAvg
from benchmarks.baselines.run import federate_baseline, prepare_baseline, run_baseline

__all__ = [
    "METHODS",
    "Baseline",
    "DenseFedAvg",
    "DenseLedger",
    "federate_baseline",
    "prepare_baseline",
    "reply",
    "run_baseline",
]
