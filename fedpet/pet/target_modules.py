"""Choose the modules of a transformer that `target_modules` names, as peft does and by role.

In:  the positions of a model, and None, a regular expression, "all-linear", or names.
Out: paths of modules, in the order of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from fedpet.backbone.module_roles import Position
from fedpet.errors import StructureError

__all__ = ["TargetModules", "choose_targets"]

# None takes the usual positions of the kind of module; a string is "all-linear" or a regular
# expression for whole paths; of several strings each is a path, its end, or a role.
TargetModules = str | Sequence[str] | None

_DENSE = ("linear", "conv1d")


def choose_targets(
    positions: Sequence[Position],
    wanted: TargetModules,
    *,
    kinds: Collection[str],
    usual: Callable[[Position], bool],
    what: str,
) -> list[str]:
    """Choose among the positions that can carry a kind of module.

    Args:
        positions: Of the model, from `find_target_modules`.
        wanted: See `TargetModules`.
        kinds: Of positions, that can carry the module: "linear", "norm", ...
        usual: Says which are taken where `wanted` is None.
        what: The module, for the message.

    Raises:
        StructureError: A name fits no position, or nothing is usual in this model.
    """
    able = [position for position in positions if position.kind in kinds]
    if wanted is None:
        chosen = [position.name for position in able if usual(position)]
        if not chosen:
            raise StructureError(
                f"{what} finds none of its usual modules in this model. Name some as "
                f"target_modules: {_some(able)}."
            )
        return list(dict.fromkeys(chosen))
    tests = [_test(wanted)] if isinstance(wanted, str) else [_named(name) for name in wanted]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name, test in zip(names, tests, strict=True):
        if not any(test(position) for position in able):
            raise StructureError(
                f"target_modules of {what} must name modules that can carry it, and {name!r} fits "
                f"none. This model has {_some(able)}."
            )
    chosen = [position.name for position in able if any(test(position) for test in tests)]
    return list(dict.fromkeys(chosen))


def _test(wanted: str) -> Callable[[Position], bool]:
    if wanted == "all-linear":
        return lambda position: position.kind in _DENSE
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise StructureError(
            f"target_modules as one string must be 'all-linear' or a regular expression, got "
            f"{wanted!r}: {error}. Give names as a list."
        ) from None
    return lambda position: pattern.fullmatch(position.name) is not None


def _named(name: str) -> Callable[[Position], bool]:
    return lambda position: position.role == name or f".{position.name}".endswith(f".{name}")


def _some(positions: Sequence[Position]) -> str:
    """List roles and, where they differ, the last parts of names."""
    roles = [position.role for position in positions]
    ends = [position.name.rpartition(".")[2] for position in positions]
    return ", ".join(dict.fromkeys([*roles, *ends])) or "nothing that can carry it"
