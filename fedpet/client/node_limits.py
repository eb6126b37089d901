"""Bound what a plan may ask of a device, before anything of it is built.

The device's owner sets the bounds in `node.toml`; the server cannot raise them:

    max-plan-mib      of a plan, as it is sent (default 64)
    max-values        communicated values (50 million)
    max-rank          of a module, in a structure or a search (1024)
    max-modules       of a structure (10,000)
    max-classes       of the task (10,000)
    max-epochs        over a client's rows in one message; steps of a search too, times 100 (100)
    max-batch-tokens  rows of a batch times their length (262,144)
    max-clients       named in one message (10,000)
    max-disk-mib      for plans and state, see fedpet/client/disk_quota.py (2048)

A plan's header opens to at most 2 MiB. A simulated node, which is the server's own, has no limits.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedpet.errors import PlanError
from fedpet.protocol.plan import Plan

__all__ = ["LIMIT_KEYS", "NodeLimits"]

HEADER_BYTES = 2 << 20
_MOST_THREADS = 64  # unless the device has more cores


@dataclass(frozen=True, kw_only=True)
class NodeLimits:
    """Hold a device's bounds; see the module."""

    max_plan_mib: int = 64
    max_values: int = 50_000_000
    max_rank: int = 1024
    max_modules: int = 10_000
    max_classes: int = 10_000
    max_epochs: int = 100
    max_batch_tokens: int = 1 << 18
    max_clients: int = 10_000
    max_disk_mib: int = 2048

    @classmethod
    def from_node_config(cls, given: Mapping[str, Any]) -> NodeLimits:
        """Take the limits out of a node config whose keys were checked."""
        found = {key.replace("-", "_"): given[key] for key in LIMIT_KEYS if key in given}
        return cls(**found)

    @property
    def disk_bytes(self) -> int:
        """Most bytes of plans and state."""
        return self.max_disk_mib << 20

    def check_request(self, num_clients: int) -> None:
        """Refuse a message that names too many clients.

        Raises:
            PlanError: It does.
        """
        if num_clients > self.max_clients:
            raise _beyond("clients in a message", num_clients, "max-clients", self.max_clients)

    def read_plan(self, data: bytes) -> Plan:
        """Read a plan, and refuse one that asks for more than the device gives.

        Raises:
            PlanError: It is no plan, or beyond a limit, which is named.
        """
        if len(data) > self.max_plan_mib << 20:
            raise _beyond("bytes of a plan", len(data), "max-plan-mib", self.max_plan_mib)
        plan = Plan.from_bytes(data, max_header_bytes=HEADER_BYTES)
        for what, asked, key in _asked(plan):
            most = getattr(self, key.replace("-", "_"))
            if asked > most:
                raise _beyond(what, asked, key, most)
        threads = max(_MOST_THREADS, os.cpu_count() or 1)
        if plan.training.threads > threads:
            raise _beyond("threads", plan.training.threads, "threads", threads)
        return plan


LIMIT_KEYS = tuple(field.name.replace("_", "-") for field in dataclasses.fields(NodeLimits))


def _asked(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Yield what a plan asks for: in words, how much, and the key that bounds it."""
    training, search = plan.training, plan.search
    yield "communicated values", plan.num_values, "max-values"
    yield "classes", len(plan.task.label_names), "max-classes"
    yield "modules", len(plan.structure.modules), "max-modules"
    yield "as rank", max((one.rank for one in plan.structure.modules), default=0), "max-rank"
    yield "epochs", training.local_epochs, "max-epochs"
    yield "tokens of a batch", training.batch_size * plan.max_length, "max-batch-tokens"
    yield "clients at once", training.clients_at_once, "max-clients"
    if search is not None:
        yield "as rank", search.rank, "max-rank"
        yield "hundred steps of a search", search.local_steps // 100, "max-epochs"
        yield "tokens of a batch", search.batch_size * plan.max_length, "max-batch-tokens"


def _beyond(what: str, asked: int, key: str, most: int) -> PlanError:
    return PlanError(
        f"the plan asks for {asked} {what}, and this node gives {key} = {most}: its owner may "
        "raise it in node.toml."
    )
