"""Make, write and read a plan: the agreement of all clients of a run, sent once to a node.

In:  an experiment, a loaded checkpoint, a structure or the settings of a search, the rows' task.
Out: a `Plan`, and the server's own model, built as every node will build its own; the plan's bytes,
     and their digest, by which server and nodes name the plan afterwards.

A plan is MessagePack (fedpet/protocol/wire_struct.py): a header, which is JSON compressed by
zstandard, and the coded positions of an explicit mask (fedpet/codec/index_coding.py).

A derived mask is a rule, a density and a SHA-256, which the node compares with the mask that it
computes; an explicit one is the coded set of positions. A plan is hostile until parsed: sizes are
bounded before anything is allocated, msgspec holds every field against its type and the config's
own checks, and a header that is not written exactly as here is refused: no field is unknown.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import zstandard

from fedpet.backbone.module_roles import maskable_weights
from fedpet.codec import VectorCodec, parse_codec
from fedpet.codec.index_coding import decode_positions, encode_positions
from fedpet.config import (
    BackboneConfig,
    ClientEvaluation,
    CodecConfig,
    Experiment,
    MaskConfig,
    SearchConfig,
    TrainingConfig,
)
from fedpet.data import Task
from fedpet.data.collator import COLLATORS
from fedpet.errors import ConfigError, PlanError
from fedpet.pet.layout import layout_hash
from fedpet.pet.mask import Mask, build_mask, rank_positions, tier_counts
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.protocol.frame import DIGEST_BYTES
from fedpet.protocol.wire_struct import WireStruct, decode_struct, encode_struct
from fedpet.search import SearchModel, space_for
from fedpet.training.auto_rates import auto_learning_rates
from fedpet.training.loss import LOSSES
from fedpet.training.metrics import METRICS
from fedpet.training.optimizer import round_factor
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone

__all__ = ["Plan", "encode_mask"]

Groups = Sequence[tuple[int, int]]

MAX_PLAN_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 24


class _PlanBytes(WireStruct, frozen=True, tag="FPLN2"):
    header: bytes
    mask: bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a node needs to train for a run, beside its data and the checkpoint.

    Attributes:
        fingerprint: Of the checkpoint, see `fedpet.backbone.pretrained.fingerprint`.
        head_seed: From which each node draws what of the head is drawn anew.
        task: Kind, label names in order, metric.
        max_length: Tokens a row.
        tokenizer_hash: Of the tokeniser's files.
        mask: Rule, density, tiers and broadcast, or None where no weight is masked.
        mask_sha256: Of the set of positions; empty without a mask.
        mask_positions: Coded positions where the mask is explicit, else empty.
        structure: The modules and their targets.
        num_values: Length of the vector that is communicated; of the strongest tier's.
        layout: SHA-256 over its segments.
        codec: Up and down, and what is kept from round to round.
        training: Local training's settings, with a number for each kind's learning rate.
        num_rounds: For the learning-rate schedule.
        seed: The run's; of a search one of its own.
        search: Of a plan whose rounds search a structure: its settled settings, from which each
            node builds the space that takes the structure's place. None: they train.
        head: Treatment of the checkpoint's head: "train", "new" or "keep".
        collator: Makes the batches, by its import path; "" pads them.
        dtype: Of the frozen weights, see `BackboneConfig`.
        bits: Of the frozen dense weights, likewise.
        evaluation: What clients hold out and measure; None: nothing.
    """

    fingerprint: str
    head_seed: int
    task: Task
    max_length: int
    tokenizer_hash: str
    mask: MaskConfig | None
    mask_sha256: str
    mask_positions: bytes
    structure: Structure
    num_values: int
    layout: str
    codec: CodecConfig
    training: TrainingConfig
    num_rounds: int
    seed: int
    search: SearchConfig | None = None
    head: str = "train"
    collator: str = ""
    dtype: str = "float32"
    bits: int = 0
    evaluation: ClientEvaluation | None = None

    @classmethod
    def for_training(
        cls,
        experiment: Experiment,
        backbone: Backbone,
        structure: Structure,
        task: Task,
        tokenizer_hash: str,
    ) -> tuple[Plan, PetModel]:
        """Make a run's plan, and build the server's own model from it. The backbone is used up."""
        mask = _build_mask(experiment, backbone, structure)
        pet = PetModel(
            backbone,
            mask,
            structure,
            seed=experiment.run.seed,
            products=experiment.training.matmul_backend,
            mask_config=None if mask is None else experiment.mask,
        )
        plan = cls._of(
            pet,
            experiment,
            backbone,
            mask,
            task=task,
            tokenizer_hash=tokenizer_hash,
            structure=structure.to_broadcast(),
            num_rounds=experiment.strategy.num_rounds,
            seed=experiment.run.seed,
        )
        return plan, pet

    @classmethod
    def for_search(
        cls,
        experiment: Experiment,
        search: SearchConfig,
        backbone: Backbone,
        task: Task,
        tokenizer_hash: str,
    ) -> tuple[Plan, SearchModel]:
        """Make the plan of a federated search, and the model that it is of.

        Its seed is another than the training's, so that no two of their rounds draw alike.

        Args:
            experiment: The run's.
            search: Settled, see `fedpet.search.resolve_settings`.
            backbone: In use until `SearchModel.pet.restore` is called, and the checkpoint again
                then.
            task: Kind, labels, metric.
            tokenizer_hash: Of the tokeniser's files.

        Raises:
            InputError: The backbone has no such space, or the budget does not fit it.
        """
        seed = derive_seed("structure search", experiment.run.seed, search.seed)
        space = space_for(search, backbone.model, experiment.mask, head=backbone.head)
        mask = _build_mask(experiment, backbone, space.structure())
        model = SearchModel.of(
            backbone, mask, space, search, seed=seed, products=experiment.training.matmul_backend
        )
        if not search.learning_rate:
            search = search.with_rates(auto_learning_rates(model.pet))
        plan = cls._of(
            model,
            experiment,
            backbone,
            mask,
            task=task,
            tokenizer_hash=tokenizer_hash,
            structure=Structure(),
            num_rounds=search.rounds,
            seed=seed,
            search=search,
        )
        return plan, model

    @classmethod
    def _of(
        cls,
        model: PetModel | SearchModel,
        experiment: Experiment,
        backbone: Backbone,
        mask: Mask | None,
        **fields: Any,
    ) -> Plan:
        rule = ClientEvaluation.of(experiment.clients)
        if rule is not None:  # nodes measure, and must find a user's metric
            task: Task = fields["task"]
            metrics = tuple(map(METRICS.portable, task.metrics))
            fields["task"] = dataclasses.replace(task, metrics=metrics)
        explicit = mask is not None and experiment.mask.broadcast == "send"
        return cls(
            fingerprint=backbone.fingerprint,
            head=experiment.backbone.head,
            head_seed=experiment.backbone.head_seed,
            dtype=experiment.backbone.dtype,
            bits=experiment.backbone.bits,
            max_length=experiment.data.max_length,
            mask=None if mask is None else experiment.mask,
            mask_sha256="" if mask is None else mask.digest().hex(),
            mask_positions=encode_mask(mask) if mask is not None and explicit else b"",
            num_values=model.num_values,
            layout=layout_hash(model.tiers),
            codec=experiment.codec,
            training=_training(experiment, model),
            collator=COLLATORS.portable(experiment.data.collator),
            evaluation=rule,
            **fields,
        )

    def to_bytes(self) -> bytes:
        """Serialise; equal plans give equal bytes."""
        header = zstandard.ZstdCompressor(level=19).compress(self._header())
        return encode_struct(_PlanBytes(header, self.mask_positions))

    @classmethod
    def from_bytes(cls, data: bytes, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Plan:
        """Parse the bytes of `to_bytes`.

        Args:
            data: At most `MAX_PLAN_BYTES`.
            max_header_bytes: That the compressed header opens to, at most.

        Raises:
            PlanError: The bytes are no plan of this version.
        """
        if len(data) > MAX_PLAN_BYTES:
            raise PlanError(f"a plan has at most {MAX_PLAN_BYTES} bytes, got {len(data)}.")
        parts = decode_struct(data, _PlanBytes, "plan", error=PlanError)
        try:
            if not 0 <= zstandard.frame_content_size(parts.header) <= max_header_bytes:
                raise PlanError(f"a plan's header has at most {max_header_bytes} bytes.")
            header = zstandard.ZstdDecompressor().decompress(parts.header)
            plan = msgspec.json.decode(header, type=cls)
            plan.backbone(BackboneConfig())
        except (
            msgspec.MsgspecError, zstandard.ZstdError, ConfigError, UnicodeDecodeError,
            RecursionError,
        ) as error:  # fmt: skip
            raise PlanError(
                f"the plan does not read: {error}. Run the same fedpet on the server and on the "
                "nodes."
            ) from None
        if plan._header() != header:
            raise PlanError("the plan does not read: it holds more, or less, than it should.")
        return dataclasses.replace(plan, mask_positions=parts.mask)

    def _header(self) -> bytes:
        """Write all but the positions, which do not shrink, as JSON."""
        fields = dataclasses.asdict(dataclasses.replace(self, mask_positions=b""))
        if not self.task.weights:
            del fields["task"]["weights"]
        if self.structure.mask is None:
            del fields["structure"]["mask"]
        if not self.collator:
            del fields["collator"]
        if self.dtype == "float32":
            del fields["dtype"]
        if not self.bits:
            del fields["bits"]
        if self.evaluation is None:
            del fields["evaluation"]
        for name in ("gradient_checkpointing", "warmup_rounds"):
            if not fields["training"][name]:
                del fields["training"][name]
        if self.mask is not None:  # a plan's mask is enabled, and most have no tiers
            del fields["mask"]["enabled"]
            if not self.mask.tiers:
                del fields["mask"]["tiers"]
        return msgspec.json.encode(fields)

    @staticmethod
    def digest(data: bytes) -> bytes:
        """Return the name of a plan in messages: the first 16 bytes of its SHA-256."""
        return hashlib.sha256(data).digest()[:DIGEST_BYTES]

    @property
    def measures(self) -> bool:
        """True if clients measure as they train: they hold rows out, and search nothing."""
        rule = self.evaluation
        return rule is not None and rule.fraction > 0 and self.search is None

    def rate_factor(self, server_round: int) -> float:
        """Return the factor of all learning rates in a round."""
        return round_factor(self.training, server_round, self.num_rounds)

    @property
    def is_delta_downlink(self) -> bool:
        """True if clients follow a public reference, see fedpet/protocol/shared_reference.py.

        Lossless values are sent as they are: no client has to remember any.
        """
        codecs = (self.codec.downlink, self.codec.head_downlink or "float32")
        lossy = not all(parse_codec(name).is_lossless for name in codecs)
        return lossy and self.codec.downlink_mode == "delta"

    def uplink(self, groups: Groups, head_groups: Groups) -> VectorCodec:
        """Return the codec of a client's vector of these groups."""
        codec = self.codec
        return VectorCodec.of(groups, head_groups, codec=codec.uplink, head_codec=codec.head_uplink)

    def downlink(self, groups: Groups, head_groups: Groups) -> VectorCodec:
        """Return the codec of the server's vector of these groups."""
        codec = self.codec
        return VectorCodec.of(
            groups, head_groups, codec=codec.downlink, head_codec=codec.head_downlink
        )

    def backbone(self, own: BackboneConfig) -> BackboneConfig:
        """Return a node's own place of the checkpoint, with the plan's head and its weights' form.

        Raises:
            ConfigError: The plan names no kind of head, or no such type or bits.
        """
        return dataclasses.replace(
            own, head=self.head, head_seed=self.head_seed, dtype=self.dtype, bits=self.bits
        )

    def build(self, backbone: Backbone) -> PetModel:
        """Adapt a node's own backbone as the plan says. The backbone is used up.

        Raises:
            PlanError: The checkpoint, the mask computed from it, or the layout is another.
        """
        self._check_fingerprint(backbone)
        pet = PetModel(
            backbone,
            self._mask(backbone),
            self.structure,
            seed=self.seed,
            products=self.training.matmul_backend,
            mask_config=self.mask,
        )
        self._check_layout(pet)
        return pet

    def build_search(self, backbone: Backbone) -> SearchModel:
        """Build the whole space and alpha, of a plan whose rounds search. The backbone is used up.

        Raises:
            InputError: The backbone has no such space.
            PlanError: As `build`.
        """
        assert self.search is not None
        self._check_fingerprint(backbone)
        space = space_for(self.search, backbone.model, self.mask, head=backbone.head)
        model = SearchModel.of(
            backbone,
            self._mask(backbone, space.structure()),
            space,
            self.search,
            seed=self.seed,
            products=self.training.matmul_backend,
        )
        self._check_layout(model)
        return model

    def _check_fingerprint(self, backbone: Backbone) -> None:
        if backbone.fingerprint != self.fingerprint:
            raise PlanError(
                f"the backbone here is {backbone.fingerprint:.16}, the plan's is "
                f"{self.fingerprint:.16}: start server and nodes from the same checkpoint."
            )

    def _check_layout(self, pet: PetModel | SearchModel) -> None:
        if pet.num_values != self.num_values or layout_hash(pet.tiers) != self.layout:
            raise PlanError(
                f"the layout here has {pet.num_values} values in {len(pet.segments)} segments, "
                f"the plan's has {self.num_values}: run the same fedpet and transformers on the "
                "server and on the nodes."
            )

    def _mask(self, backbone: Backbone, space: Structure | None = None) -> Mask | None:
        """Cut the mask of the structure, or of a search's whole `space`, and check its hash."""
        if self.mask is None:
            return None
        scope = maskable_weights(backbone.model, backbone.head)
        if self.mask_positions:
            names = sorted(scope)
            coded = decode_positions(self.mask_positions, [scope[name].numel() for name in names])
            positions = {
                name: torch.from_numpy(chosen.astype(np.int64))
                for name, chosen in zip(names, coded, strict=True)
                if len(chosen)
            }
            sizes = {name: scope[name].numel() for name in names}
            ranked = rank_positions(scope, positions, self.mask)
            mask = Mask(ranked, sizes, tier_counts(scope, ranked, self.mask))
        else:
            mask = build_mask(scope, self.mask, (space or self.structure).mask)
        if mask.digest().hex() != self.mask_sha256:
            raise PlanError(
                f"the mask computed here is {mask.digest().hex():.16}, the plan's is "
                f"{self.mask_sha256:.16}: start from the same checkpoint, or broadcast the mask "
                'with mask.broadcast = "send".'
            )
        return mask


def encode_mask(mask: Mask) -> bytes:
    """Encode the positions of all tensors in scope, in the order of the names."""
    empty = np.empty(0, dtype=np.int64)
    names = sorted(mask.sizes)
    return encode_positions(
        [np.sort(mask.positions[n].numpy()) if n in mask.positions else empty for n in names],
        [mask.sizes[name] for name in names],
    )


def _training(experiment: Experiment, model: PetModel | SearchModel) -> TrainingConfig:
    """Derive automatic rates; name a registered loss by its import path, since nodes must find it.

    A search has its own rates, and trains nothing else.
    """
    training = experiment.training
    rates: dict[str, float] = {}
    if training.has_auto_rates and isinstance(model, PetModel):
        rates = auto_learning_rates(model)
    training = training.settled(rates)
    if not training.loss:
        return training
    LOSSES.find(training.loss)  # an unknown one is refused before any node is asked
    return dataclasses.replace(training, loss=LOSSES.portable(training.loss))


def _build_mask(experiment: Experiment, backbone: Backbone, structure: Structure) -> Mask | None:
    """Build the mask of a structure's counts, else of the experiment's density."""
    counts = structure.mask
    if counts is not None:
        counts.check(experiment.mask)
    if not experiment.mask.enabled:
        return None
    return build_mask(maskable_weights(backbone.model, backbone.head), experiment.mask, counts)
