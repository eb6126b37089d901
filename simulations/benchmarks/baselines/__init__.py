"""What a Flower user does without fedpet, run and metered as fedpet is.

methods -> client -> rounds, and `run` around them
"""

from .client import reply
from .ledger import DenseLedger
from .methods import METHODS, Baseline
from .rounds import DenseFedAvg
from .run import federate_baseline, prepare_baseline, run_baseline

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
