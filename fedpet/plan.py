"""The plan: what every client of a run must agree on, broadcast once to a node.

    ... -> model -> codec -> [plan] -> client -> strategy -> ledger -> report

In:  the backbone's fingerprint, the mask, the structure, the layout of the values, the codec, the
     task's labels, the tokeniser's hash, lengths and training settings; of the rounds of a search,
     its settings instead of a structure.
Out: bytes, and their digest, by which server and nodes name the plan afterwards.

    plan := magic "FPLN" | version u8 | 3 reserved | header bytes u32 | mask bytes u32
            | header (zstandard, JSON) | mask (fedpet/codec/positions.py; empty where derived)

A derived mask is a rule, a density and a SHA-256, which the node compares with what it computes;
an explicit one is the coded set of positions. A plan is hostile until parsed: sizes are bounded
before anything is allocated, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zstandard

from fedpet.codec import Coding, check_codec, is_lossless
from fedpet.codec.positions import decode_positions, encode_positions
from fedpet.config import CodecConfig, Experiment, MaskConfig, SearchConfig, TrainingConfig
from fedpet.data import Task
from fedpet.errors import ConfigError, FedpetError, PlanError
from fedpet.mask import Mask, build_mask, rank_positions, tier_counts
from fedpet.model import PetModel, Segment
from fedpet.positions import mask_scope
from fedpet.search import SearchModel, build_space
from fedpet.seeds import derive_seed
from fedpet.structure import Structure

if TYPE_CHECKING:
    from fedpet.backbone import Backbone

Groups = Sequence[tuple[int, int]]

MAX_PLAN_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 24
DIGEST_BYTES = 16

# Keys of the codec that a plan names where they are not these.
_RARE_CODEC_KEYS = {
    field.name: field.default
    for field in dataclasses.fields(CodecConfig)
    if field.name not in ("up", "down")
}
_HEADER = struct.Struct("<4sB3xII")
_MAGIC = b"FPLN"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a node needs to train for a run, its own data and the checkpoint apart.

    Attributes:
        fingerprint: Of the checkpoint, see `fedpet.backbone.fingerprint`.
        head_seed: From which each node draws the head's start.
        task: Kind, label names in order, metric.
        max_length: Tokens a row.
        tokenizer_hash: Of the tokeniser's files.
        mask: Rule, density, tiers and broadcast, or None where no weight is masked.
        mask_sha256: Of the set of positions; empty without a mask.
        mask_positions: Coded positions where the mask is explicit, else empty.
        structure: Which module acts where.
        num_values: Length of the vector that is communicated; of the strongest tier's.
        layout: SHA-256 over its segments.
        codec: Up and down, and what is kept from round to round.
        training: Local training's settings.
        num_rounds: For the learning-rate schedule.
        seed: The run's; of a search one of its own.
        search: Of a plan whose rounds search a structure: its settled settings, from which each
            node builds the space that takes the structure's place. None: they train.
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

    def to_bytes(self) -> bytes:
        """Serialise; equal plans give equal bytes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        positions = fields.pop("mask_positions")
        for name in ("task", "mask", "codec", "training", "search"):
            value = fields[name]
            fields[name] = None if value is None else dataclasses.asdict(value)
        if self.search is None:
            del fields["search"]  # most plans are of training, and need not say so
        if self.mask is not None and not self.mask.tiers:
            del fields["mask"]["tiers"]  # most plans have none, and need not say so
        for key, default in _RARE_CODEC_KEYS.items():
            if fields["codec"][key] == default:
                del fields["codec"][key]
        fields["structure"] = self.structure.to_json()
        text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        header: bytes = zstandard.ZstdCompressor(level=19).compress(text)
        start = _HEADER.pack(_MAGIC, _VERSION, len(header), len(positions))
        return b"".join((start, header, positions))

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Parse what `to_bytes` wrote.

        Raises:
            PlanError: The bytes are no plan of this version.
        """
        header, positions = _split(data)
        try:
            fields = json.loads(header, parse_constant=_no_number)
            if fields["mask"] is not None:
                fields["mask"] = MaskConfig(**_tuples(fields["mask"]))
            fields["codec"] = CodecConfig(**fields["codec"])
            fields["training"] = TrainingConfig(**_tuples(fields["training"]))
            fields["task"] = Task(**_tuples(fields["task"]))
            if "search" in fields:
                fields["search"] = SearchConfig(**_tuples(fields["search"]))
            fields["structure"] = Structure.from_json(fields["structure"])
            return cls(mask_positions=positions, **fields)
        except (LookupError, TypeError, ValueError, AttributeError, FedpetError) as error:
            raise PlanError(f"the plan's header does not read: {error}") from None
        except RecursionError as error:
            raise PlanError(f"the plan's header does not read: {error}") from None

    @staticmethod
    def digest(data: bytes) -> bytes:
        """The name of a plan in messages: the first 16 bytes of its SHA-256."""
        return hashlib.sha256(data).digest()[:DIGEST_BYTES]

    def progress(self, server_round: int) -> float:
        """Fraction of the rounds that is over when a round begins, in [0, 1)."""
        return min(max(server_round - 1, 0) / self.num_rounds, 1.0)

    @property
    def sends_changes(self) -> bool:
        """Whether clients follow a public reference, see fedpet/reference.py.

        Values that lose nothing are sent as they are: nobody has to remember any.
        """
        lossy = not (
            is_lossless(self.codec.down) and is_lossless(self.codec.head_down or "float32")
        )
        return lossy and self.codec.downlink == "changes"

    def uplink(self, groups: Groups, head_groups: Groups) -> Coding:
        """How clients write a vector of these groups."""
        codec = self.codec
        return Coding.of(groups, head_groups, codec=codec.up, head_codec=codec.head_up)

    def downlink(self, groups: Groups, head_groups: Groups) -> Coding:
        """How the server writes a vector of these groups."""
        codec = self.codec
        return Coding.of(groups, head_groups, codec=codec.down, head_codec=codec.head_down)

    def build(self, backbone: Backbone) -> PetModel:
        """Adapt a node's own backbone as the plan says. The backbone is used up.

        Raises:
            PlanError: The checkpoint, the mask computed from it, or the layout is another.
        """
        self._check_fingerprint(backbone)
        pet = PetModel(backbone, self._mask(backbone), self.structure, seed=self.seed)
        self._check_layout(pet)
        return pet

    def build_search(self, backbone: Backbone) -> SearchModel:
        """The same for a plan whose rounds search: the whole space, and alpha.

        Raises:
            InputError: The backbone has no such space.
            PlanError: As `build`.
        """
        assert self.search is not None
        self._check_fingerprint(backbone)
        model = search_model(backbone, self._mask(backbone), self.search, seed=self.seed)
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

    def _mask(self, backbone: Backbone) -> Mask | None:
        if self.mask is None:
            return None
        scope = mask_scope(backbone.model, backbone.head)
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
            mask = build_mask(scope, self.mask)
        if mask.digest().hex() != self.mask_sha256:
            raise PlanError(
                f"the mask computed here is {mask.digest().hex():.16}, the plan's is "
                f"{self.mask_sha256:.16}: start from the same checkpoint, or broadcast the mask "
                'with mask.broadcast = "explicit".'
            )
        return mask


def make_plan(
    experiment: Experiment,
    backbone: Backbone,
    structure: Structure,
    task: Task,
    tokenizer_hash: str,
) -> tuple[Plan, PetModel]:
    """Settle a run's plan, and build the server's own model from it. The backbone is used up."""
    mask = _mask_of(experiment, backbone)
    pet = PetModel(backbone, mask, structure, seed=experiment.run.seed)
    plan = _plan(
        experiment,
        backbone.fingerprint,
        mask,
        pet,
        task,
        tokenizer_hash,
        structure=Structure(structure.modules),  # gates and origin stay with the server
        num_rounds=experiment.strategy.num_rounds,
        seed=experiment.run.seed,
    )
    return plan, pet


def make_search_plan(
    experiment: Experiment,
    search: SearchConfig,
    backbone: Backbone,
    task: Task,
    tokenizer_hash: str,
) -> tuple[Plan, SearchModel]:
    """Settle the plan of a federated search, and the model that it is of.

    Its seed is another than the training's, so that no round of the one draws as the other does.

    Args:
        experiment: The run's.
        search: Settled, see `fedpet.search.settle`.
        backbone: In use until `SearchModel.pet.restore` is called, and the checkpoint again then.
        task: Kind, labels, metric.
        tokenizer_hash: Of the tokeniser's files.

    Raises:
        InputError: The backbone has no such space, or the budget does not fit it.
    """
    mask = _mask_of(experiment, backbone)
    seed = derive_seed("structure search", experiment.run.seed, search.seed)
    model = search_model(backbone, mask, search, seed=seed)
    plan = _plan(
        experiment,
        backbone.fingerprint,
        mask,
        model,
        task,
        tokenizer_hash,
        structure=Structure(),
        num_rounds=search.rounds,
        seed=seed,
        search=search,
    )
    return plan, model


def search_model(
    backbone: Backbone, mask: Mask | None, config: SearchConfig, *, seed: int
) -> SearchModel:
    """Put the whole space of a search on a backbone, in place."""
    space = build_space(
        backbone.model, config.space, head=backbone.head, rank=config.rank, scale=config.scale
    )
    space.check_budget(float(config.budget))
    return SearchModel(PetModel(backbone, mask, space.structure(), seed=seed), space)


def _mask_of(experiment: Experiment, backbone: Backbone) -> Mask | None:
    if not experiment.mask.enabled:
        return None
    return build_mask(mask_scope(backbone.model, backbone.head), experiment.mask)


def _plan(
    experiment: Experiment,
    fingerprint: str,
    mask: Mask | None,
    model: PetModel | SearchModel,
    task: Task,
    tokenizer_hash: str,
    *,
    structure: Structure,
    num_rounds: int,
    seed: int,
    search: SearchConfig | None = None,
) -> Plan:
    explicit = mask is not None and experiment.mask.broadcast == "explicit"
    return Plan(
        fingerprint=fingerprint,
        head_seed=experiment.backbone.head_seed,
        task=task,
        max_length=experiment.data.max_length,
        tokenizer_hash=tokenizer_hash,
        mask=experiment.mask if mask is not None else None,
        mask_sha256=mask.digest().hex() if mask is not None else "",
        mask_positions=encode_mask(mask) if mask is not None and explicit else b"",
        structure=structure,
        num_values=model.num_values,
        layout=layout_hash(model.tiers),
        codec=experiment.codec,
        training=experiment.training,
        num_rounds=num_rounds,
        seed=seed,
        search=search,
    )


def encode_mask(mask: Mask) -> bytes:
    """A mask as the coded sets of positions of all tensors in scope, in the order of the names."""
    empty = np.empty(0, dtype=np.int64)
    names = sorted(mask.sizes)
    return encode_positions(
        [np.sort(mask.positions[n].numpy()) if n in mask.positions else empty for n in names],
        [mask.sizes[name] for name in names],
    )


def check_codecs(config: CodecConfig) -> None:
    """Refuse codecs that are not known, or do not go together.

    Raises:
        ConfigError: One sentence on the first that is wrong.
    """
    for name in (config.up, config.down, config.head_up, config.head_down):
        if name:
            check_codec(name)
    if (
        config.error_feedback
        and is_lossless(config.up)
        and is_lossless(config.head_up or "float32")
    ):
        raise ConfigError(
            f"codec.error-feedback keeps what codec.up loses, and {config.up!r} loses nothing: "
            "name a lossy codec, such as 'topk-0.1+eden-4', or set it to false."
        )


def _all_lossless(*codecs: str) -> bool:
    return all(is_lossless(codec) for codec in codecs if codec)


def head_groups(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Those of `groups_by_kind` that are the head's."""
    heads = {segment.start for segment in segments if segment.kind == "head"}
    return [group for group in groups_by_kind(segments) if group[0] in heads]


def groups_by_kind(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Runs of segments of one kind, as (start, stop): what a codec scales and rotates apart."""
    groups: list[tuple[int, int]] = []
    kind = None
    for segment in segments:
        stop = segment.start + segment.size
        if segment.kind == kind:
            groups[-1] = (groups[-1][0], stop)
        else:
            groups.append((segment.start, stop))
        kind = segment.kind
    return groups


def layout_hash(tiers: Sequence[Sequence[Segment]]) -> str:
    """SHA-256 (hex) over the order, kinds, names and sizes of the values of each tier."""
    lines = [f"{s.kind} {s.name} {s.start} {s.size}" for segments in tiers for s in segments]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def _no_number(name: str) -> float:
    raise ValueError(f"its numbers are finite, got {name}.")


def _split(data: bytes) -> tuple[bytes, bytes]:
    if not _HEADER.size <= len(data) <= MAX_PLAN_BYTES:
        raise PlanError(f"a plan has {_HEADER.size} to {MAX_PLAN_BYTES} bytes, got {len(data)}.")
    magic, version, header_bytes, mask_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise PlanError(
            f"a plan starts with {_MAGIC!r} and version {_VERSION}, got {magic!r} and {version}: "
            "run the same fedpet on the server and on the nodes."
        )
    if _HEADER.size + header_bytes + mask_bytes != len(data):
        raise PlanError(
            f"the plan's parts add up to {_HEADER.size + header_bytes + mask_bytes} bytes, got "
            f"{len(data)}."
        )
    header = data[_HEADER.size : _HEADER.size + header_bytes]
    try:
        if not 0 <= zstandard.frame_content_size(header) <= MAX_HEADER_BYTES:
            raise PlanError(f"a plan's header has at most {MAX_HEADER_BYTES} bytes.")
        return zstandard.ZstdDecompressor().decompress(header), data[-mask_bytes or len(data) :]
    except zstandard.ZstdError as error:
        raise PlanError(f"the plan's header does not decompress: {error}") from None
