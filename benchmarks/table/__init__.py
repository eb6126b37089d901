"""The table of methods: rates tuned on one split, results reported on another, a file a cell.

    table file -> [tune: method x rates] -> best rates -> [final: method x seeds] -> table

In:  a TOML file: an experiment, the methods with their grids, the splits and the seeds.
Out: `RESULTS/{tune,final}/NAME.json`, a cell each, and `RESULTS/checks.json`.

Every method, fedpet's plans among them, has a grid of the same size. A cell is a run in a process
of its own; its file holds the settings that decide it and the run's `result.json`. A cell that is
there is not run again, and one that was run with other settings is refused, never overwritten.
"""

from benchmarks.table.cell import fingerprint, read_cell, run_in_process, write_cell
from benchmarks.table.file import FEDPET, Cell, Method, Rate, TableFile
from benchmarks.table.running import PHASES, TableRun

__all__ = [
    "FEDPET",
    "PHASES",
    "Cell",
    "Method",
    "Rate",
    "TableFile",
    "TableRun",
    "fingerprint",
    "read_cell",
    "run_in_process",
    "write_cell",
]
