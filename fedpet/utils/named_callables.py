"""Find a function by a registered name or by its import path, in whichever process needs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from fedpet.errors import ConfigError

__all__ = ["NamedCallables"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class NamedCallables(Generic[_Function]):
    """Functions of one purpose by name.

    A name is known in the process that registered it. An import path, "package.module:function",
    is known wherever the module can be imported: on nodes and in Ray's workers.
    """

    def __init__(self, noun: str, decorator: str, *, only_registered: bool) -> None:
        """Start without any.

        Args:
            noun: The purpose, for messages: "loss".
            decorator: Registers one, for messages: "fedpet.register_loss".
            only_registered: A path must lead to a registered function. So a server can have a node
                run no function that was not made for it.
        """
        self._noun, self._decorator = noun, decorator
        self._only_registered = only_registered
        self._functions: dict[str, _Function] = {}

    def add(self, name: str, function: _Function) -> _Function:
        """Register a function; the same one again, from a module that is run anew, replaces it.

        Raises:
            ConfigError: The name cannot be one, or belongs to another function.
        """
        if not name or ":" in name or "," in name:
            raise ConfigError(
                f"the name of a {self._noun} must be a word without ':' and ',', got {name!r}."
            )
        known = self._functions.get(name)
        if known is not None and _path(known) != _path(function):
            raise ConfigError(
                f"a {self._noun} must have a name of its own, and {name!r} is {_path(known)}. "
                "Take another."
            )
        self._functions[name] = function
        return function

    @property
    def names(self) -> tuple[str, ...]:
        """Return the registered names."""
        return tuple(self._functions)

    def __iter__(self) -> Iterator[_Function]:
        return iter(self._functions.values())

    def find(self, name: str) -> _Function:
        """Return the function of a name or an import path.

        Raises:
            ConfigError: There is none.
        """
        if name in self._functions:
            return self._functions[name]
        module, colon, attribute = name.partition(":")
        if not colon:
            known = ", ".join(sorted(self._functions)) or "none so far"
            raise ConfigError(
                f"no {self._noun} {name!r} is registered in this process ({known}). Name it as "
                f"package.module:function, of a module that can be imported here, or register it "
                f"with @{self._decorator}."
            )
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"the {self._noun} {name!r} cannot be imported here: {error}. Install its package "
                "on every machine of the federation, or put its folder on PYTHONPATH."
            ) from None
        if not callable(found) or (self._only_registered and not self._is_registered(found)):
            raise ConfigError(
                f"{name!r} is no {self._noun}: put @{self._decorator}('...') above the function."
            )
        function: _Function = found
        return function

    def find_registered(self, name: str) -> _Function:
        """Return the same, where it is registered: of a name that a server sent to a node.

        Raises:
            ConfigError: There is none, or it was not made for this.
        """
        function = self.find(name)
        if not self._is_registered(function):
            raise ConfigError(
                f"{name!r} is no {self._noun} that may run on a node: put "
                f"@{self._decorator}('...') above the function."
            )
        return function

    def portable(self, name: str) -> str:
        """Return the import path of a registered name, where other processes can import it.

        A function of a script or a notebook has none, and a name that is a path already is one.
        """
        function = self._functions.get(name)
        path = "<" if function is None else _path(function)
        return name if "<" in path or path.startswith("__main__:") else path

    def name_of(self, function: object) -> str:
        """Return the name or the import path of a registered function; either is left as it is.

        Raises:
            ConfigError: It is registered under no name.
        """
        if isinstance(function, str):
            return function
        for name, known in self._functions.items():
            if known is function:
                return name
        raise ConfigError(
            f"{function!r} is no {self._noun} with a name: put @{self._decorator}('...') above the "
            "function, or give what calls it one."
        )

    def _is_registered(self, function: object) -> bool:
        return any(function is known for known in self._functions.values())


def _path(function: Callable[..., Any]) -> str:
    """Return where a function can be imported from; no place for an object of a class."""
    return f"{function.__module__}:{getattr(function, '__qualname__', '<object>')}"
