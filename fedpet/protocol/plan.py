"""The plan: what every client of a run must agree on, broadcast once to a node.

    ... -> model -> codec -> [plan] -> client -> strategy -> ledger -> report

In:  the backbone's fingerprint, the mask, the structure, the layout of the values, the codec, the
     task's labels, the tokeniser's hash, lengths and training settings; of the rounds of a search,
     its settings instead of a structure.
Out: bytes, and their digest, by which server and nodes name the plan afterwards.

    plan := magic "FPLN" | version u8 | 3 reserved | header bytes u32 | mask bytes u32
            | header (zstandard, JSON) | mask (fedpet/codec/index_coding.py; empty where derived)

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

from fedpet.backbone.module_roles import maskable_weights
from fedpet.codec import VectorCodec, is_lossless
from fedpet.codec.index_coding import decode_positions, encode_positions
from fedpet.config import BackboneConfig, CodecConfig, MaskConfig, SearchConfig, TrainingConfig
from fedpet.data import Task
from fedpet.errors import FedpetError, PlanError
from fedpet.pet.layout import layout_hash
from fedpet.pet.mask import Mask, build_mask, rank_positions, tier_counts
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.search import SearchModel

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone

Groups = Sequence[tuple[int, int]]

MAX_PLAN_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 24
DIGEST_BYTES = 16

# Keys of the codec that a plan names where they are not these.
_RARE_CODEC_KEYS = {
    field.name: field.default
    for field in dataclasses.fields(CodecConfig)
    if field.name not in ("uplink", "downlink")
}
_HEADER = struct.Struct("<4sB3xII")
_MAGIC = b"FPLN"
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a node needs to train for a run, its own data and the checkpoint apart.

    Attributes:
        fingerprint: Of the checkpoint, see `fedpet.backbone.pretrained.fingerprint`.
        head_seed: From which each node draws what of the head is drawn anew.
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
        head: What is made of the checkpoint's head: "train", "new" or "keep".
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

    def to_bytes(self) -> bytes:
        """Serialise; equal plans give equal bytes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        positions = fields.pop("mask_positions")
        for name in ("task", "mask", "codec", "training", "search"):
            value = fields[name]
            fields[name] = None if value is None else dataclasses.asdict(value)
        if self.search is None:
            del fields["search"]  # most plans are of training, and need not say so
        if self.head == Plan.head:
            del fields["head"]  # most plans start from what the checkpoint has
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
            plan = cls(mask_positions=positions, **fields)
            plan.backbone(BackboneConfig())
            return plan
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
    def is_delta_downlink(self) -> bool:
        """Whether clients follow a public reference, see fedpet/protocol/shared_reference.py.

        Values that lose nothing are sent as they are: nobody has to remember any.
        """
        lossy = not (
            is_lossless(self.codec.downlink) and is_lossless(self.codec.head_downlink or "float32")
        )
        return lossy and self.codec.downlink_mode == "delta"

    def uplink(self, groups: Groups, head_groups: Groups) -> VectorCodec:
        """How clients write a vector of these groups."""
        codec = self.codec
        return VectorCodec.of(groups, head_groups, codec=codec.uplink, head_codec=codec.head_uplink)

    def downlink(self, groups: Groups, head_groups: Groups) -> VectorCodec:
        """How the server writes a vector of these groups."""
        codec = self.codec
        return VectorCodec.of(
            groups, head_groups, codec=codec.downlink, head_codec=codec.head_downlink
        )

    def backbone(self, own: BackboneConfig) -> BackboneConfig:
        """A node's own place of the checkpoint, with what the plan makes of it.

        Raises:
            ConfigError: The plan names something that nothing is made of.
        """
        return dataclasses.replace(own, head=self.head, head_seed=self.head_seed)

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
        """The same for a plan whose rounds search: the whole space, and alpha.

        Raises:
            InputError: The backbone has no such space.
            PlanError: As `build`.
        """
        assert self.search is not None
        self._check_fingerprint(backbone)
        model = SearchModel.of(
            backbone,
            self._mask(backbone),
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

    def _mask(self, backbone: Backbone) -> Mask | None:
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
            mask = build_mask(scope, self.mask)
        if mask.digest().hex() != self.mask_sha256:
            raise PlanError(
                f"the mask computed here is {mask.digest().hex():.16}, the plan's is "
                f"{self.mask_sha256:.16}: start from the same checkpoint, or broadcast the mask "
                'with mask.broadcast = "send".'
            )
        return mask


def encode_mask(mask: Mask) -> bytes:
    """A mask as the coded sets of positions of all tensors in scope, in the order of the names."""
    empty = np.empty(0, dtype=np.int64)
    names = sorted(mask.sizes)
    return encode_positions(
        [np.sort(mask.positions[n].numpy()) if n in mask.positions else empty for n in names],
        [mask.sizes[name] for name in names],
    )


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
