"""Tell which packages of fedpet's extras are installed: a node of a deployment has none of them."""

import functools
from importlib.util import find_spec

from fedpet.errors import ConfigError

__all__ = ["check_extra", "has_arrow"]


@functools.cache
def has_arrow() -> bool:
    """Tell whether columns may be Arrow arrays."""
    return find_spec("pyarrow") is not None


def check_extra(package: str, extra: str, what: str) -> None:
    """Refuse what needs a package of an extra that is not installed.

    Args:
        package: Its name for imports.
        extra: Of pyproject.toml, which brings it.
        what: What needs it, for the message.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"{what} needs {package}, which is not installed: `pip install 'fedpet[{extra}]'`."
        )
