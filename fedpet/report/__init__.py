"""Show what a run leaves: tables in the terminal, and one HTML page.

In:  `result.json`, `rounds.jsonl` and `plan.bin` of run folders; a mask.
Out: Rich tables (`table`, `compare`, `mask`, `gates`, `estimate`) and a page with plots (`page`).

Nothing here is measured: every number was written down by the run.
"""
