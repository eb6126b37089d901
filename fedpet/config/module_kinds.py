"""Know the kinds of modules by name, before any of them is imported.

fedpet's own stand here; `fedpet.register_module` adds a user's.
"""

from __future__ import annotations

__all__ = ["add_kind", "known_kinds"]

_registered = {
    *("bitfit", "hiwi-bias", "hiwi-weight", "ln-bias", "lnfit"),
    *("lora", "lora-factors", "lowrank-adapter"),
}


def add_kind(kind: str) -> None:
    """Make the name of a kind known; one that is known stays so."""
    _registered.add(kind)


def known_kinds() -> tuple[str, ...]:
    """List what may have a learning rate of its own: mask, head, then all kinds by name.

    Example:
        >>> known_kinds()[:3]
        ('mask', 'head', 'bitfit')
    """
    return ("mask", "head", *sorted(_registered))
