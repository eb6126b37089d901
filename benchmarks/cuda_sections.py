"""Name the sections of `cuda_check`."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import cuda_clients, cuda_costs, cuda_laws
from benchmarks.cuda_models import Place

SECTIONS: dict[str, Callable[[Place], None]] = {
    "environment": cuda_laws.environment,
    "laws": cuda_laws.laws,
    "suite": cuda_laws.suite,
    "run": cuda_laws.run,
    "steps": cuda_costs.steps,
    "profile": cuda_costs.profile,
    "sampled": cuda_costs.sampled,
    "precision": cuda_costs.precision,
    "rotation": cuda_costs.rotation_there,
    "clients": cuda_clients.clients_at_once,
    "large": cuda_clients.large_model,
}
