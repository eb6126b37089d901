"""Derive learning rates from the model: a rate a kind of module, with no rows and no training.

In:  an adapted model, and a batch of inputs; random tokens by default.
Out: by kind of module the rate at which a step of AdamW changes outputs by as much as any other's.

AdamW's first step moves every value by its rate, whatever the gradient. How much that changes the
output of the module that has the value depends on the kind: a LayerNorm's gain meets one number of
it, a row of a full weight matrix hundreds. So a seeded step of random signs is taken with all
values of a kind, and the change of each module's output, its input held, is compared with the
output itself. Signs that training chooses agree more than random ones: n values that meet in one
output number add up to between sqrt(n) and n times one of them, and n^(3/4), the geometric mean, is
taken. A kind's rate makes this relative change, over the modules that have its values, `CHANGE`.

A head's outputs are logits, which start near zero and must come to differ by more the more classes
there are: theirs is an absolute change, `HEAD_CHANGE` times the binary logarithm of their number.

Source: ours. Equal relative change is the idea of LARS (You et al., arXiv:1708.03888) and muP (Yang
et al., arXiv:2203.03466), taken here once, before training, and per kind: a rate a tensor would be
neither broadcast in a few bytes nor readable. What it is worth: docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpet.backbone.classifier import generates
from fedpet.errors import ConfigError
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.pet.trainable_model import TrainableModel

__all__ = ["CHANGE", "HEAD_CHANGE", "auto_learning_rates", "random_tokens"]

CHANGE = 0.04  # of a module's output, relative, a step
HEAD_CHANGE = 0.2  # of a logit of two classes, a step
_STEP = 1e-2  # of the probe; what it finds is divided by it
_ROWS, _TOKENS = 8, 32
_IMAGES = 2  # or spectra, of hundreds of tokens each

_NO_RATE = (
    "training.learning-rate = 'auto' takes a step with the values of kind '{0}', and no module's "
    'output changes: name a rate, training.learning-rates = ["{0}=0.01"].'
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def auto_learning_rates(
    model: TrainableModel, batch: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Derive a learning rate for each kind of module that a model trains.

    Args:
        model: What `get_pet_model` gives, at the point that training starts from; it stays there.
        batch: What the model is called with; None draws token ids, see `random_tokens`.
        seed: Of the signs, and of the token ids.

    Returns:
        Rates of AdamW by kind, two digits each: the same numbers on every machine.

    Raises:
        ConfigError: No batch was given, and the model does not take token ids alone.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = get_pet_model(
        ...     BertForSequenceClassification(small), PetConfig(modules=[LayerNormConfig()]))
        >>> rates = auto_learning_rates(model)
        >>> groups = model.parameter_groups()
        >>> optimizer = torch.optim.AdamW(
        ...     [{"params": [group], "lr": rates[kind]} for kind, group in groups.items()])
        >>> sorted(rates)
        ['head', 'ln-bias', 'lnfit']
    """
    was_training = model.model.training
    model.model.eval()
    try:
        return {
            kind: _two_digits((HEAD_CHANGE if kind == "head" else CHANGE) / found)
            for kind, found in _changes(model, batch, seed).items()
        }
    finally:
        model.model.train(was_training)


def _changes(
    model: TrainableModel, batch: Mapping[str, Tensor] | None, seed: int
) -> dict[str, float]:
    """Return by kind the root mean square, over its modules, of the change by a step of 1."""
    sizes: dict[str, dict[str, int]] = {}  # kind -> module -> values
    for segment in model.segments:
        owners = sizes.setdefault(segment.kind, {})
        owner = _owner(model.model, segment.name)
        owners[owner] = owners.get(owner, 0) + segment.size
    for module in model.structure_modules:  # one whose values another module sends has no segment
        sizes.setdefault(module.kind, {}).setdefault(module.target, 0)
    of_head = math.log2(max(getattr(getattr(model.model, "config", None), "num_labels", 2), 2))
    calls = _calls(model.model, {name for of in sizes.values() for name in of}, batch, seed)
    found = {}
    for kind, owners in sizes.items():
        called = [name for name in owners if name in calls]
        if not called:
            raise ConfigError(_NO_RATE.format(kind))
        before = {name: _output(model.model, name, calls[name]) for name in called}
        squares = []
        with _stepped(model, kind, seed):
            for name, old in before.items():
                new = _output(model.model, name, calls[name])
                size = of_head if kind == "head" else float(old.square().mean().sqrt())
                if size == 0.0:
                    continue
                change = float((new - old).square().mean().sqrt()) / size / _STEP
                shared = max(owners[name] / old.shape[-1], 1.0)  # values an output number
                squares.append((change * shared**0.25) ** 2)
        found[kind] = math.sqrt(sum(squares) / max(len(squares), 1))
        if not 0.0 < found[kind] < math.inf:
            raise ConfigError(_NO_RATE.format(kind))
    return found


def _owner(model: nn.Module, name: str) -> str:
    """Return the path of the module that a segment's values are of: its own, or its parameter's."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name.rpartition(".")[0]
    return name


def _calls(
    model: nn.Module, names: set[str], batch: Mapping[str, Tensor] | None, seed: int
) -> dict[str, Call]:
    """Run the model once, and return what each of these modules was last called with."""
    calls: dict[str, Call] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = args, kwargs

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True)
        for name in sorted(names)
    ]
    try:
        model(**(random_tokens(model, seed) if batch is None else batch))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if batch is not None:
            raise
        raise ConfigError(
            f"training.learning-rate = 'auto' runs the model on random token ids, which "
            f"{type(model).__name__} does not take ({error}): name a rate, or from Python give "
            "auto_learning_rates a batch."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def random_tokens(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Draw a batch of token ids, uniform over the vocabulary without its special ids.

    Args:
        model: Of transformers; its config states the vocabulary.
        seed: Of the draw.

    Returns:
        `input_ids` and `attention_mask`, or `pixel_values` or `input_features` of a model that
        reads those, and `decoder_input_ids` where a decoder writes a text,
        int64, (8, 32), or fewer tokens where the model has fewer
        positions: each row ends in the end-of-text id, where there is one.

    Raises:
        ConfigError: The model's config states no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    if (dense := _random_inputs(model, config, seed)) is not None:
        return dense
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        raise ConfigError(
            f"training.learning-rate = 'auto' runs the model on random token ids, and "
            f"{type(model).__name__} states no vocabulary: name a rate, or from Python give "
            "auto_learning_rates a batch."
        )
    special = {
        getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")
    }
    ids = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(derive_seed("auto rates, tokens", seed))
    limit = getattr(text, "max_position_embeddings", None) or _TOKENS + 2  # some begin at 2
    shape = _ROWS, max(1, min(_TOKENS, limit - 2))
    drawn = ids[torch.randint(len(ids), shape, generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < vocabulary:
        drawn[:, -1] = end
    batch = {"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}
    if generates(model) and getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = drawn
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _random_inputs(model: nn.Module, config: Any, seed: int) -> dict[str, Tensor] | None:
    """Draw a few images or spectra, standard normal, for a model that reads no tokens."""
    name = getattr(model, "main_input_name", "")
    if name == "pixel_values":
        size: Any = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape: tuple[int, ...] = (_IMAGES, config.num_channels, height, width)
    elif name == "input_features":
        shape = _IMAGES, config.num_mel_bins, 2 * config.max_source_positions
    else:
        return None
    generator = torch.Generator().manual_seed(derive_seed("auto rates, inputs", seed))
    batch = {name: torch.randn(*shape, generator=generator)}
    if name == "input_features":
        width = min(_TOKENS, config.max_target_positions)
        batch["decoder_input_ids"] = torch.randint(
            config.vocab_size, (_IMAGES, width), generator=generator
        )
    device = next(model.parameters()).device
    return {key: tensor.to(device) for key, tensor in batch.items()}


def _output(model: nn.Module, name: str, call: Call) -> Tensor:
    args, kwargs = call
    output = model.get_submodule(name)(*args, **kwargs)
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.float().clone()


@contextmanager
def _stepped(model: TrainableModel, kind: str, seed: int) -> Iterator[None]:
    """Move all trainables of a kind by a step of random signs within the context."""
    group = model.parameter_groups()[kind]
    kept = group.detach().clone()
    generator = torch.Generator().manual_seed(derive_seed("auto rates, signs", seed, kind))
    signs = torch.randint(2, (group.numel(),), generator=generator).to(group) * 2 - 1
    try:
        group.detach().add_(signs.view_as(group), alpha=_STEP)
        model.after_step()
        yield
    finally:
        group.detach().copy_(kept)
        model.after_step()


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")
