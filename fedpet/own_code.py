"""The code of the fedpet that runs here, wherever it lies, and its digest.

In:  nothing.
Out: its source files by their place in a wheel, and one hash of them all.

A deployment's bundle holds two lines that import the fedpet installed on a machine, since code that
is there need not travel with every run. What they check is this digest: a server and a node of
different code would be told apart by their results only, and late.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import fedpet
from fedpet.errors import ConfigError

__all__ = ["NOT_SHIPPED", "PARTS", "check_code", "code_digest", "folder_of", "source_files"]

PARTS = ("strategies", "simulations")  # in a checkout they lie beside the package
NOT_SHIPPED = ("benchmarks",)  # and in a wheel they are not


def source_files() -> dict[str, Path]:
    """Each Python file by its place in a wheel: "fedpet/strategies/mean.py"."""
    package = Path(fedpet.__file__).parent
    stand_ins = {package / f"{name}.py" for name in PARTS}
    found = {
        f"fedpet/{path.relative_to(package).as_posix()}": path
        for path in package.rglob("*.py")
        if path not in stand_ins and path.relative_to(package).parts[0] not in PARTS
    }
    for name in PARTS:
        part = folder_of(name)
        for path in part.rglob("*.py"):
            inside = path.relative_to(part)
            if inside.parts[0] not in NOT_SHIPPED:
                found[f"fedpet/{name}/{inside.as_posix()}"] = path
    return dict(sorted(found.items()))


def folder_of(part: str) -> Path:
    """Where one of `PARTS` lies, which need not be imported for that."""
    package = Path(fedpet.__file__).parent
    inside = package / part
    return inside if inside.is_dir() else package.parent / part


@functools.cache
def code_digest() -> str:
    """SHA-256 of all source files and their places, in hex."""
    digest = hashlib.sha256()
    for place, path in source_files().items():
        content = path.read_bytes()
        digest.update(f"{place}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def check_code(wanted: str) -> None:
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
