"""Wrap a model in an `nn.Module` that shows a training loop the few trainables alone.

In:  a model, and its trainables by name.
Out: a module with the model's call, signature and attributes, whose parameters and state dict are
     the trainables'.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["ModelWrapper"]


class ModelWrapper(nn.Module):
    """A model inside, trainables beside it.

    Attributes:
        model: Called, moved and switched between training and evaluation as a part of this one.
        trainable: The only parameters that are shown, saved and loaded.
    """

    model: nn.Module
    trainable: nn.ParameterDict

    def wrap(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
        """Take the model and the trainables; `nn.Module.__init__` was called before."""
        self.model = model
        self.training = model.training
        self.trainable = nn.ParameterDict(list(trainable.items()))  # a dict would be sorted
        # nn.Module calls what it finds under this name, an instance's own first.
        self.forward = _Forward(model)  # type: ignore[method-assign]
        hooked: Any = self  # torch leaves both untyped
        hooked.register_state_dict_post_hook(_leave_out_model)
        hooked.register_load_state_dict_post_hook(_miss_no_model)

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Call the model. Each instance has a forward of the model's own signature.

        This one is for `Trainer`, which asks the class what labels are called.
        """
        raise AssertionError("`wrap` gives the instance its own")

    def __getattr__(self, name: str) -> Any:
        """Return the model's own: config, generate, device, gradient_checkpointing_enable, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the trainables; those of the model are `model.named_parameters()`."""
        return self.trainable.named_parameters(f"{prefix}.trainable".lstrip("."))


class _Forward:
    """The call of a model, with the signature of its forward: `Trainer` drops other columns."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


def _leave_out_model(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Leave out the model: a hook on `state_dict`."""
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def _miss_no_model(module: ModelWrapper, incompatible: Any) -> None:
    """Take the model for no missing part: a hook on `load_state_dict`."""
    left_out = tuple(f".model.{name}" for name in module.model.state_dict())
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not f".{name}".endswith(left_out)]
