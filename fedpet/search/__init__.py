"""Search a structure by gradient under an exact budget (S3PET), on one machine or on clients.

The steps in their order: `space` lists the candidates, `gates` gives each a probability, `bilevel`
moves them, `select` chooses under the budget. `central` runs a whole search on the rows that
`search_rows` splits, and `saved_search` keeps its state; `from_dataset` searches for a model of
one's own. `on_client` is a client's part of a federated search, whose other part is
strategies/structure_search.py. `manual` and `drawn` make what a search must beat.
"""

from fedpet.config import SearchConfig
from fedpet.search.bilevel import BiLevel, StepLosses, hypergradient, virtual_step
from fedpet.search.central import SearchProgress, SearchResult, candidate_records, run_search
from fedpet.search.drawn import random_structure
from fedpet.search.from_dataset import search_structure
from fedpet.search.gates import concrete, expected_size, probabilities, solve_zeta, uniform
from fedpet.search.manual import manual_structure
from fedpet.search.on_client import SearchModel, client_config, split_in_two
from fedpet.search.saved_search import repeat_file
from fedpet.search.search_rows import Split, split_rows, step_batches
from fedpet.search.select import chosen_size, select, select_at_random
from fedpet.search.settings import (
    budget_values,
    deviations,
    faithful,
    reproducible_settings,
    resolve_settings,
    temperature,
)
from fedpet.search.space import (
    SPACES,
    Candidate,
    Space,
    build_space,
    space_for,
    space_of_structure,
)

__all__ = [
    "SPACES",
    "BiLevel",
    "Candidate",
    "SearchConfig",
    "SearchModel",
    "SearchProgress",
    "SearchResult",
    "Space",
    "Split",
    "StepLosses",
    "budget_values",
    "build_space",
    "candidate_records",
    "chosen_size",
    "client_config",
    "concrete",
    "deviations",
    "expected_size",
    "faithful",
    "hypergradient",
    "manual_structure",
    "probabilities",
    "random_structure",
    "repeat_file",
    "reproducible_settings",
    "resolve_settings",
    "run_search",
    "search_structure",
    "select",
    "select_at_random",
    "solve_zeta",
    "space_for",
    "space_of_structure",
    "split_in_two",
    "split_rows",
    "step_batches",
    "temperature",
    "uniform",
    "virtual_step",
]
