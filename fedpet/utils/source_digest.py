"""Compute a digest of the fedpet that runs here, wherever it is installed.

In:  nothing.
Out: its source files by their place in a wheel, and one hash of them all.

A deployment's bundle holds two lines that import the fedpet installed on a machine, since code that
is there need not travel with every run. They check this digest: otherwise only results would show,
and late, that server and node run different code.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import fedpet
from fedpet.errors import ConfigError

__all__ = [
    "check_source_digest",
    "code_digest",
    "package_versions",
    "source_files",
    "strategies_folder",
]


def source_files() -> dict[str, Path]:
    """Return each Python file by its place in a wheel: "fedpet/strategies/fedavg.py"."""
    package, strategies = Path(fedpet.__file__).parent, strategies_folder()
    found = {
        f"fedpet/{path.relative_to(package).as_posix()}": path
        for path in package.rglob("*.py")
        if path != package / "strategies.py"  # stands in for the folder in a checkout
    }
    for path in strategies.rglob("*.py"):
        found[f"fedpet/strategies/{path.relative_to(strategies).as_posix()}"] = path
    return dict(sorted(found.items()))


def strategies_folder() -> Path:
    """Return where the strategies lie: in a wheel inside the package, in a checkout beside it."""
    package = Path(fedpet.__file__).parent
    inside = package / "strategies"
    return inside if inside.is_dir() else package.parent / "strategies"


@functools.cache
def code_digest() -> str:
    """Return the SHA-256 of all source files and their places, in hex."""
    digest = hashlib.sha256()
    for place, path in source_files().items():
        content = path.read_bytes()
        digest.update(f"{place}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def package_versions() -> dict[str, str]:
    """Return the versions of what decides a node's results, that a server compares to its own.

    Of a build of torch for one kind of machine the public version is named; of fedpet also the
    code's digest.
    """
    names = ("flwr", "numpy", "safetensors", "tokenizers", "torch", "transformers")
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    return {"fedpet": f"{fedpet.__version__} {code_digest()[:16]}", **found}


def check_source_digest(wanted: str) -> None:
    """Refuse to run as part of a federation of other code.

    Args:
        wanted: The digest that a deployment was made with.

    Raises:
        ConfigError: The code here has another.
    """
    if code_digest() != wanted:
        raise ConfigError(
            f"this run is of the fedpet with the digest {wanted:.16}, and the one installed here, "
            f"{fedpet.__version__}, has {code_digest():.16}: install the deployment's server/app "
            "on this machine."
        )
