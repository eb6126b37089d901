"""The table of searched structures: against random and manual ones under the same budget.

    table file -> [structures] -> [tune: rates, manual choice] -> [final: seeds] -> table

In:  a TOML file (data sets, budgets, seeds, grids), and the folder of the data sets.
Out: `RESULTS/{structures,tune,final}/NAME.json`, a cell each, and `RESULTS/checks.json`.

Training is central: one model, some thousand rows. For each data set and budget, in values of the
backbone with the head not counted, these are trained from scratch and evaluated:

    searched   the structure that a search with this seed found on the training rows
    VARIANT    the same of a search with other settings, at the rate settled for "searched"
    random     structures drawn under the budget, several a seed
    manual     of the presets put under the budget, the one that was best on the tuning rows
    transfer   the structure that a search with this seed found on the other data set

Rates are settled once, for each method, data set and budget, on rows that no result is reported on,
with a seed that no result has; the manual choice is settled there too. The structures that a rate
is settled with are another search's, or another draw. All methods have the same grid of rates, the
manual one has it once for each preset.
"""

from benchmarks.search_table.cell import Cell, read_cell, write_cell
from benchmarks.search_table.file import SearchTable
from benchmarks.search_table.running import PHASES, SearchTableRun
from benchmarks.search_table.summary import final_table, overlaps, summary, tuning_table

__all__ = [
    "PHASES",
    "Cell",
    "SearchTable",
    "SearchTableRun",
    "final_table",
    "overlaps",
    "read_cell",
    "summary",
    "tuning_table",
    "write_cell",
]
