"""Count the bytes that torch allocates on the processor, by its profiler, exactly."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Allocations"]


class Allocations:
    """Count allocations within `with Allocations() as counted:`.

    Attributes:
        left: Bytes at the end, above the start.
        peak: The most at once, above the start.
    """

    def __enter__(self) -> Allocations:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._profile.__exit__(*failure)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        events = [event for event in results.events() if event.name() == "[memory]"]
        self.left = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.left += event.nbytes()
            self.peak = max(self.peak, self.left)
        del self._profile  # with every event
