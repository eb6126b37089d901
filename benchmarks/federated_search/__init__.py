"""The table of federated search: bytes, quality, and how much of the structure is the central one.

    table file -> [structures] -> [tune: rates] -> [final: seeds] -> table

In:  a TOML file: an experiment with its search, a grid of rates, splits, seeds.
Out: `RESULTS/structures/*.json`, `RESULTS/{tune,final}/NAME.json`, and `RESULTS/checks.json`.

Three methods train on the same clients and rounds, under one budget of values:

    federated   the clients search and then train, in one run; both are paid for in bytes
    central     the structure of a search on all clients' rows together; its search sends nothing
    random      structures drawn under the budget, one or several a seed

Each search and each draw has the seed of its run. Rates are settled once for "central", whose rate
"federated" takes, and once for "random", on rows and with a seed that no result is reported on. A
cell is a run of fedpet in a process of its own.
"""

from benchmarks.federated_search.file import FederatedSearchTable
from benchmarks.federated_search.running import METHODS, PHASES, FederatedSearchRun, run_cell
from benchmarks.federated_search.summary import final_table, overlaps, summary

__all__ = [
    "METHODS",
    "PHASES",
    "FederatedSearchRun",
    "FederatedSearchTable",
    "final_table",
    "overlaps",
    "run_cell",
    "summary",
]
