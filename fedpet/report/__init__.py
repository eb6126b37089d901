"""What a run leaves, made readable: terminal tables, and one HTML page.

    ... -> plan -> client -> strategy -> ledger -> [report]

In:  `result.json`, `rounds.jsonl` and `plan.bin` of run folders; a mask.
Out: Rich tables (`table`, `compare`, `mask`, `gates`, `estimate`) and a page with plots (`page`).

Nothing here is measured: every number was written down by the run.
"""
