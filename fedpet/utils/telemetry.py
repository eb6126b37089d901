"""Turn off the usage reports of Flower and Ray, unless the user has turned them on.

Both read the environment; Flower does so when it is imported, so `import fedpet` comes first. A
process that Flower itself starts has imported it by then, and its setting is replaced.
"""

from __future__ import annotations

import os
import sys

__all__ = ["OFF", "turn_off_telemetry"]

OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def turn_off_telemetry() -> None:
    """Set what the user has not set in the environment."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    flower = sys.modules.get("flwr.supercore.telemetry")
    if flower is not None:
        name = "FLWR_TELEMETRY_ENABLED"
        setattr(flower, name, os.environ[name])
