"""Let a user's own script, which makes a `transformers.Trainer`, train the clients.

In:  a script with one line of ours, `fedpet.patch(trainer)`; a client's name and rows.
Out: the script's Trainer, on the adapted model of the plan.

The script is run once a client, up to that line. The first one's model takes the checkpoint's place
and is adapted, and every later client's Trainer is given the same model: all that a Trainer put on
it, as TRL's does with its loss, is there. The values of one client at a time stand in it.

Only a node's own machine names a script: no plan and no setting of a server's does.
"""

from __future__ import annotations

import logging
import runpy
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedpet.backbone.quantised import quantise
from fedpet.client.trainer_loop import RATES, train_by_trainer
from fedpet.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer

    from fedpet.backbone.pretrained import Backbone
    from fedpet.data import Client, FederatedData
    from fedpet.pet.model import PetModel
    from fedpet.protocol.plan import Plan
    from fedpet.training.loop import TrainResult

__all__ = ["ScriptTrainers", "TrainerScript", "client_name", "client_rows", "patch"]

LOG = logging.getLogger("fedpet")
_MOST_TRAINERS = 16  # of which a process keeps data sets and collators; models it has one


class _Patched(BaseException):
    """Carry a script's Trainer out of the script; no handler of an Exception in it stops that."""

    def __init__(self, trainer: Trainer, rates: str) -> None:
        super().__init__("fedpet.patch was called")
        self.trainer, self.rates = trainer, rates


@dataclass(frozen=True)
class _ForClient:
    """The client that a script is run for."""

    name: str
    rows: list[dict[str, Any]]


_running: ContextVar[_ForClient | None] = ContextVar("client of a script", default=None)


def patch(trainer: Any, *, learning_rates: str = "federation") -> Any:
    """Let a `Trainer` train this client in a federation; elsewhere it is left as it is.

    In a federation (`clients.script`, or a node started with `--script`) the script ends here. Each
    round the Trainer's model is set to the values that came, `trainer.train()` is called, and what
    it changed is sent. Loop, batches, collator, loss, optimiser and callbacks are the Trainer's;
    what is trained and sent is the plan's. The optimiser is made anew in every round. Nothing is
    saved by the Trainer: the run folder holds the model.

    Args:
        trainer: A `transformers.Trainer` or one of its subclasses, TRL's `SFTTrainer` say, of the
            checkpoint that the federation trains; not of a peft model.
        learning_rates: "federation" takes those of the run's [training] for each kind of module,
            since a mask or norms need others than a whole model; "trainer" takes the Trainer's one.

    Returns:
        The Trainer, outside a federation.

    Raises:
        ConfigError: It is no Trainer, or one that cannot train fedpet's values.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import Trainer, TrainingArguments
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> arguments = TrainingArguments("trained", max_steps=10, report_to="none")
        >>> trainer = Trainer(BertForSequenceClassification(small), arguments)
        >>> patch(trainer) is trainer  # outside a federation, where trainer.train() is as ever
        True
    """
    _check(trainer, learning_rates)
    if _running.get() is not None:
        raise _Patched(trainer, learning_rates)
    return trainer


def client_name(default: str = "") -> str:
    """Return the name of the client that this script is run for, to find its rows by.

    Args:
        default: Is returned outside a federation.

    Example:
        >>> client_name("ward-1")
        'ward-1'
    """
    client = _running.get()
    return default if client is None else client.name


def client_rows() -> list[dict[str, Any]]:
    """Return the rows that this client trains on, tokenised, as a data collator takes them.

    They are those of the experiment's [data], or of the node's file, without what is held out.

    Raises:
        ConfigError: The script is not run for a client of a federation.

    Example:
        >>> rows = client_rows() if client_name() else [{"input_ids": [2, 7, 3], "labels": 1}]
        >>> len(rows)
        1
    """
    client = _running.get()
    if client is None:
        raise ConfigError(
            "fedpet.client_rows() are a client's, and this script runs outside a federation: read "
            "rows of your own where fedpet.client_name() is ''."
        )
    return client.rows


def _check(trainer: Any, rates: str) -> None:
    import transformers

    if not isinstance(trainer, transformers.Trainer):
        raise ConfigError(
            f"fedpet.patch takes a transformers.Trainer, got {type(trainer).__name__}."
        )
    if rates not in RATES:
        raise ConfigError(f"learning_rates is one of {', '.join(RATES)}, got {rates!r}.")
    if hasattr(trainer.model, "peft_config"):
        raise ConfigError(
            "fedpet.patch takes a Trainer of a plain model, and this one's is adapted by peft: "
            "leave peft_config out, and name modules by the run's structure (structure.preset)."
        )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ConfigError(
            "the Trainer was given an optimiser or a schedule of the model's own parameters, which "
            "a federation leaves frozen: name them in TrainingArguments (optim, lr_scheduler_type)."
        )


@dataclass(frozen=True)
class TrainerScript:
    """A script of this machine.

    Attributes:
        path: Its file.
    """

    path: Path

    def run_for(self, client: str, rows: list[dict[str, Any]]) -> tuple[Trainer, str]:
        """Run the script for a client, up to `fedpet.patch`.

        Returns:
            Its Trainer, and whose learning rates it takes.

        Raises:
            ConfigError: There is no such file, it fails, or it does not call `fedpet.patch`.
        """
        if not self.path.is_file():
            raise ConfigError(f"there is no script {str(self.path)!r}.")
        try:
            with _as_client(_ForClient(client, rows)), _as_program(self.path):
                runpy.run_path(str(self.path), run_name="__main__")
        except _Patched as found:
            return found.trainer, found.rates
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # a stranger's; it may quote rows
            LOG.warning("the script %s failed", self.path, exc_info=error)
            raise ConfigError(
                f"the script {self.path.name!r} failed for a client, in line {self._line(error)}, "
                f"with {type(error).__name__}: the log of where it ran says more. There it is run "
                "without arguments."
            ) from None
        raise ConfigError(
            f"the script {self.path.name!r} ended without fedpet.patch(trainer): put the line "
            "behind the one that makes its Trainer."
        )

    def _line(self, error: BaseException) -> int:
        """Return the last line of the script that an error passed through."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self.path)]
        return lines[-1] or 0 if lines else getattr(error, "lineno", None) or 0


class ScriptTrainers:
    """The Trainers of a script, a client each, all on one model.

    Args:
        script: Makes them.
        data: The clients and their rows.
    """

    def __init__(self, script: TrainerScript, data: FederatedData) -> None:
        self._script, self._data = script, data
        self._trainers: OrderedDict[str, tuple[Trainer, str]] = OrderedDict()

    def with_rows(self, data: FederatedData) -> ScriptTrainers:
        """Return those of other rows."""
        return ScriptTrainers(self._script, data)

    def adopt_model(self, backbone: Backbone) -> Backbone:
        """Return the backbone with the script's own model in the place of the loaded one.

        A head that is drawn is the backbone's.

        Raises:
            ConfigError: The script's model is of another checkpoint.
        """
        if not self._data.clients:
            return backbone
        client = self._data.clients[0]
        trainer, rates = self._run(client)
        model: Any = trainer.model
        if backbone.bits:
            quantise(model, backbone.bits, backbone.head)
        _check_same(model, backbone)
        with torch.no_grad():
            for name in backbone.head:
                model.get_parameter(name).copy_(backbone.model.get_parameter(name))
        model.requires_grad_(False)
        model.eval()
        self._trainers[client.id] = trainer, rates
        return replace(backbone, model=model, shared=False)

    def train(
        self, client: Client, pet: PetModel, plan: Plan, seed: int, factor: float
    ) -> TrainResult:
        """Train a client from where the model stands; see `train_by_trainer`."""
        if client.id not in self._trainers:
            self._trainers[client.id] = self._run(client)
            _release(self._trainers[client.id][0].model, pet)
            if len(self._trainers) > _MOST_TRAINERS:
                self._trainers.popitem(last=False)
        self._trainers.move_to_end(client.id)
        trainer, rates = self._trainers[client.id]
        return train_by_trainer(
            trainer, pet, plan, self._data.train, client.rows,
            seed=seed, factor=factor, own_rates=rates == "trainer",
        )  # fmt: skip

    def _run(self, client: Client) -> tuple[Trainer, str]:
        rows = [self._data.train.features(index) for index in client.rows]
        return self._script.run_for(client.id, rows)


def _check_same(model: Any, backbone: Backbone) -> None:
    """Refuse a model of another class or with other weights than the checkpoint's."""
    ours = dict(backbone.model.named_parameters())
    theirs = dict(model.named_parameters())
    reason = ""
    if type(model).__name__ != type(backbone.model).__name__:
        reason = f"a {type(model).__name__}, and the plan's is a {type(backbone.model).__name__}"
    elif ours.keys() != theirs.keys():
        reason = f"one that differs in {min(ours.keys() ^ theirs.keys())}"
    else:
        for name in ours:
            one, other = ours[name], theirs[name]
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                reason = (
                    f"one with {name} of {tuple(other.shape)}, {other.dtype}, and the plan's is "
                    f"{tuple(one.shape)}, {one.dtype}"
                )
            elif name not in backbone.head and not torch.equal(one, other.to(one.device)):
                reason = f"one with other weights in {name}"
            if reason:
                break
    if reason:
        raise ConfigError(
            f"the script's model is {reason}: load it from the federation's checkpoint, "
            f"{backbone.source!r}, in the type of backbone.dtype."
        )


def _release(model: Any, pet: PetModel) -> None:
    """Free the weights of a model in whose place the adapted one stands."""
    if model is pet.model:
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


@contextmanager
def _as_client(client: _ForClient) -> Iterator[None]:
    token = _running.set(client)
    try:
        yield
    finally:
        _running.reset(token)


@contextmanager
def _as_program(path: Path) -> Iterator[None]:
    """Give a script the arguments and the folder for imports that it has as a program."""
    arguments, folder = sys.argv, str(path.parent)
    sys.argv = [str(path)]
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.argv = arguments
        if folder in sys.path:
            sys.path.remove(folder)
