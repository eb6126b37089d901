"""Read FlowerTune's settings as an experiment: the same model, clients, rounds, steps and LoRA.

In:  the pyproject.toml of a FlowerTune app, as `flwr new` makes it for the LLM leaderboard.
Out: an experiment's tables, and FlowerTune's keys that have no counterpart, each with what fedpet
     does in its place.

The experiment trains what FlowerTune trains: LoRA on queries and values, its factors averaged as
dense float32 arrays. A mask and a codec are a few keys away; the text of the experiment names them.

Where FlowerTune limits a client to `max-steps` steps a round, its trainer, made anew with the same
seed in each round, sees the same rows every time. `clients.max-rows` of as many steps does so too.

Columns are those of the leaderboard's data sets as its template reshapes them: the prompt is
`instruction`; `instruction` and `input` for finance and code; `input` for the medical flashcards;
the answer is `output`. FlowerTune's code drops 7.5 % of LoRA's inputs in training, which its
settings do not say; fedpet's LoRA has no dropout of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedpet.errors import ConfigError

__all__ = ["FlowerTune", "read_flowertune"]

# Keys whose value changes nothing here, with what fedpet does in their place.
_PLACE = "train.training-arguments."
_REASONS = {
    "model.quantization": "frozen weights are bfloat16 (backbone.dtype), or see backbone.bits",
    "train.learning-rate-min": "training.schedule = 'cosine' falls to 0 after the last round",
    "strategy.fraction-evaluate": "the server evaluates on rows held out (data.eval-fraction)",
    f"{_PLACE}output-dir": "the run folder is run.out",
    f"{_PLACE}learning-rate": "the rate of a round is that of train.learning-rate-max",
    f"{_PLACE}gradient-accumulation-steps": "its product with the batch size is a batch here",
    f"{_PLACE}num-train-epochs": "max-steps stands above it",
    f"{_PLACE}logging-steps": "rounds.jsonl has a line a round",
    f"{_PLACE}save-steps": "nothing is saved within a round",
    f"{_PLACE}save-total-limit": "every adapter that is saved stays",
    f"{_PLACE}bf16": "weights are bfloat16, what is trained is float32",
    f"{_PLACE}fp16": "weights are bfloat16, what is trained is float32",
}
_UNKNOWN = "fedpet has no such setting"
_EVAL_FRACTION = 0.02
_DEFAULT_CLIENTS = 20
_ADAM = ("adam", "paged_adam")


@dataclass
class FlowerTune:
    """An experiment made of FlowerTune's settings.

    Attributes:
        tables: Of the experiment.
        without: FlowerTune's keys without a counterpart: what fedpet does in their place.
    """

    tables: dict[str, dict[str, Any]]
    without: dict[str, str] = field(default_factory=dict)

    def to_toml(self, source: str) -> str:
        """Write the experiment's file.

        Args:
            source: The file that was read, for its first line.
        """
        lines = [
            f"# Made of FlowerTune's settings in {source}: LoRA, its factors as dense arrays.",
            "#",
            "# fedpet's own way, in far fewer bytes: leave [codec] out, and take",
            "#",
            "#     mask.enabled = true, mask.density = 0.001, structure.preset = 'lnfit',",
            "#     training.learning-rates = ['mask=0.05', 'lnfit=0.01'].",
            "",
            tomli_w.dumps(self.tables),
        ]
        if self.without:
            lines += ["# FlowerTune's keys without a counterpart, and what is done in their place:"]
            lines += [f"#   {key}: {reason}" for key, reason in self.without.items()]
        return "\n".join(lines).rstrip() + "\n"


def read_flowertune(file: str | Path, *, num_clients: int = 0) -> FlowerTune:
    """Read the settings of a FlowerTune app.

    Args:
        file: Its pyproject.toml, or its folder.
        num_clients: Partitions of the data; 0 takes num-supernodes of the file's federation, or
            20 where it names none.

    Raises:
        ConfigError: There is no such file, it holds no FlowerTune settings, or a value that none
            can have.
    """
    path = Path(file).expanduser()
    path = path / "pyproject.toml" if path.is_dir() else path
    flwr = _read(path).get("tool", {}).get("flwr", {})
    config = flwr.get("app", {}).get("config", {}) if isinstance(flwr, Mapping) else {}
    given = _flat(config)
    given = {key.removeprefix("static."): value for key, value in given.items()}
    if "model.name" not in given or "num-server-rounds" not in given:
        raise ConfigError(
            f"{str(path)!r} is no FlowerTune app: its [tool.flwr.app.config] must have model.name "
            f"and num-server-rounds, and has {', '.join(sorted(given)) or 'no key'}."
        )
    reader = _Reader(given, str(path))
    tables = _tables(reader, num_clients or _num_supernodes(flwr))
    without = {key: _reason(key) for key in given if key not in reader.used}
    if "strategy.clients" in reader.notes:
        without["options.num-supernodes"] = reader.notes["strategy.clients"]
    return FlowerTune(tables, without)


def _tables(reader: _Reader, num_clients: int) -> dict[str, dict[str, Any]]:
    if not num_clients:
        num_clients = _DEFAULT_CLIENTS
        reader.notes["strategy.clients"] = f"the file names none, {num_clients} are taken"
    rank = reader.whole("model.lora.peft-lora-r", 32)
    alpha = reader.number("model.lora.peft-lora-alpha", 64.0)
    batch = reader.whole(f"{_PLACE}per-device-train-batch-size", 8)
    batch *= reader.whole(f"{_PLACE}gradient-accumulation-steps", 1)
    steps = reader.whole(f"{_PLACE}max-steps", -1, least=-1)
    rounds = reader.whole("num-server-rounds", 1)
    every = reader.whole("train.save-every-round", 0, least=0)
    name = reader.text("dataset.name", "")
    old = reader.number("strategy.fraction-fit", 1.0)
    fraction = reader.number("strategy.fraction-train", old)
    clients: dict[str, Any] = {"partition": "iid", "num-clients": num_clients, "min-rows": 1}
    training: dict[str, Any] = {
        "learning-rate": reader.number("train.learning-rate-max", 5e-5),
        "schedule": "cosine",
        "batch-size": batch,
        "weight-decay": reader.number(f"{_PLACE}weight-decay", 0.0),
        "clip-norm": reader.number(f"{_PLACE}max-grad-norm", 1.0),
        "gradient-checkpointing": any(
            [reader.truth(f"{place}gradient-checkpointing", False) for place in ("model.", _PLACE)]
        ),
    }
    if steps > 0:
        clients["max-rows"] = steps * batch
    else:
        epochs = reader.number(f"{_PLACE}num-train-epochs", 3.0)
        training["local-epochs"] = max(1, round(epochs))
    reader.optimizer(f"{_PLACE}optim", training)
    reader.constant(f"{_PLACE}lr-scheduler-type")
    run = {"name": "flowertune", "seed": reader.whole(f"{_PLACE}seed", 0, least=0)}
    return {
        "run": {**run, "save-every": every},
        "backbone": {"model": reader.text("model.name", ""), "dtype": "bfloat16"},
        "data": {
            "source": name or "data/instructions",
            "task": "instruction",
            "text-columns": _prompt_columns(name),
            "response-column": "output",
            "metric": "perplexity",
            "eval-split": "",
            "eval-fraction": _EVAL_FRACTION,
            "max-length": reader.whole("train.seq-length", 512),
        },
        "clients": clients,
        "mask": {"enabled": False},
        "structure": {"preset": "lora-factors", "rank": rank, "scale": alpha / rank},
        "training": training,
        "strategy": {
            "num-rounds": rounds,
            "clients-per-round": max(1, int(fraction * num_clients)),
            "evaluate-every": every or rounds,
        },
        "codec": {"uplink": "float32", "downlink": "float32"},
    }


def _prompt_columns(name: str) -> list[str]:
    """Return the columns of a prompt, by the leaderboard's data set."""
    if "medical" in name:
        return ["input"]
    if "fingpt" in name or "finance" in name or "code" in name:
        return ["instruction", "input"]
    return ["instruction"]


def _num_supernodes(flwr: Mapping[str, Any]) -> int:
    """Return the partitions of the federation that runs by default; 0 where none is named."""
    federations = flwr.get("federations", {})
    if not isinstance(federations, Mapping):
        return 0
    named = {name: one for name, one in federations.items() if isinstance(one, Mapping)}
    first = federations.get("default") or next(iter(named), "")
    count = _flat(named.get(first, {})).get("options.num-supernodes", 0)
    return count if isinstance(count, int) and count > 0 else 0


def _reason(key: str) -> str:
    return _REASONS.get(key, _UNKNOWN)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {str(path)!r}: give a FlowerTune app's.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None


def _flat(table: Any, before: str = "") -> dict[str, Any]:
    """Flatten nested tables, as Flower does: model.lora.peft-lora-r."""
    if not isinstance(table, Mapping):
        return {}
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{before}{key}".replace("_", "-")
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


class _Reader:
    """Read flat settings by key, each of its type, and remember which were read."""

    def __init__(self, given: Mapping[str, Any], file: str) -> None:
        self._given, self._file = given, file
        self.used: set[str] = set()
        self.notes: dict[str, str] = {}

    def whole(self, key: str, absent: int, *, least: int = 1) -> int:
        value = self._take(key, absent)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(key, f"a whole number, at least {least}")
        return value

    def number(self, key: str, absent: float) -> float:
        value = self._take(key, absent)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise self._wrong(key, "a number from 0")
        return float(value)

    def truth(self, key: str, absent: bool) -> bool:
        value = self._take(key, absent)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, absent: str) -> str:
        value = self._take(key, absent)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def optimizer(self, key: str, training: dict[str, Any]) -> None:
        """Take AdamW in any form; another stays without a counterpart."""
        name = self._given.get(key, "adamw_torch")
        if isinstance(name, str) and name.startswith((*_ADAM, "sgd")):
            self.used.add(key)
            training["optimizer"] = "sgd" if name.startswith("sgd") else "adamw"

    def constant(self, key: str) -> None:
        """Take a rate that is constant within a round, as it is here."""
        if self._given.get(key) == "constant":
            self.used.add(key)

    def _take(self, key: str, absent: Any) -> Any:
        self.used.add(key)
        return self._given.get(key, absent)

    def _wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{key} in {self._file!r} must be {what}, got {self._given.get(key)!r}.")
