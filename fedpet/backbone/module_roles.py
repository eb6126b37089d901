"""Find the modules of any transformer by their role: one role table for all architectures.

In:  a model, and the names of its newly initialised (head) parameters.
Out: `Position`s: which module is a query, which the norm of the feed-forward part, which module's
     output is that of the whole self-attention, and in which layer; and the weights a mask
     chooses from.

A position is found by the type of its module and by `ROLES`, a table of endings of module names.
No other file knows what an architecture calls its parts. An ending that is not in the table does
not hide a module: a Linear in a repeated block is then an "other-linear", a norm an "other-norm",
so an unknown model keeps everything but the fine distinctions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["ROLES", "Position", "block_of", "find_target_modules", "maskable_weights"]

# (kind, ending of the dotted name as a regular expression, role); the first that fits is taken.
# "self" is BERT, RoBERTa, ELECTRA, DeBERTa; "attn" MPNet and GPT-2; "SelfAttention" T5;
# "self_attn" Llama, BART and most that came later.
_CROSS = r"(EncDecAttention|crossattention\.self|crossattention|encoder_attn|cross_attn)"
ROLES: tuple[tuple[str, str, str], ...] = (
    # Linear and Conv1D: cross-attention first, since its endings are those of self-attention.
    ("linear", _CROSS + r"\.(q|query|q_proj|q_attn)", "cross-query"),
    ("linear", _CROSS + r"\.(k|key|k_proj)", "cross-key"),
    ("linear", _CROSS + r"\.(v|value|v_proj)", "cross-value"),
    ("linear", _CROSS + r"\.(o|out_proj|o_proj|c_proj)", "cross-attention-output"),
    ("linear", r"crossattention\.output\.dense", "cross-attention-output"),
    ("linear", r"(q|query|q_proj|q_lin|query_proj)", "query"),
    ("linear", r"(k|key|k_proj|k_lin|key_proj)", "key"),
    ("linear", r"(v|value|v_proj|v_lin|value_proj)", "value"),
    ("linear", r"(c_attn|query_key_value|qkv|qkv_proj|Wqkv|in_proj)", "query-key-value"),
    ("linear", r"pos_key_proj", "position-key"),
    ("linear", r"pos_query_proj", "position-query"),
    ("linear", r"(o|o_proj|out_lin|out_proj|attn\.c_proj|attention\.dense)", "attention-output"),
    ("linear", r"attention\.output\.dense", "attention-output"),
    ("linear", r"(gate_proj|wi_0)", "ffn-gate"),
    ("linear", r"(intermediate\.dense|lin1|ffn|wi|wi_1|c_fc|up_proj|fc1|dense_h_to_4h)", "ffn-up"),
    ("linear", r"(mlp\.c_proj|lin2|ffn_output|wo|down_proj|fc2|dense_4h_to_h)", "ffn-down"),
    ("linear", r"output\.dense", "ffn-down"),
    ("linear", r"pooler(\.dense)?", "pooler"),
    # Norms.
    ("norm", r"decoder\.block\.\d+\.layer\.1\.layer_norm", "cross-attention-norm"),  # T5
    ("norm", r"(encoder_attn_layer_norm|ln_cross_attn)", "cross-attention-norm"),
    ("norm", r"layer\.0\.layer_norm", "attention-norm"),  # T5
    ("norm", r"layer\.\d+\.layer_norm", "ffn-norm"),  # T5
    ("norm", r"(attention|attention\.output)\.LayerNorm", "attention-norm"),
    (
        "norm",
        r"(sa_layer_norm|self_attn_layer_norm|ln_1|input_layernorm|layernorm_before)",
        "attention-norm",
    ),
    ("norm", r"(output\.LayerNorm|output_layer_norm|full_layer_layer_norm)", "ffn-norm"),
    ("norm", r"(ln_2|post_attention_layernorm|layernorm_after|final_layer_norm)", "ffn-norm"),
    # Modules whose output, element 0 of a tuple, is that of the whole sub-layer before the
    # residual sum. In BERT's family that is the output projection itself.
    ("block", r"(SelfAttention|self_attn|attn|\d+\.attention)", "self-attention"),
    ("block", r"(attention\.output\.dense|attention\.dense)", "self-attention"),
    ("block", r"(DenseReluDense|mlp|\d+\.ffn|\d+\.fc2)", "ffn"),
    ("block", r"(\d+\.output\.dense|ffn_output)", "ffn"),
)
# Classes of activations that act on each entry alone, in torch and in transformers.
ELEMENTWISE = frozenset(
    {
        "AccurateGELUActivation",
        "ClippedGELUActivation",
        "FastGELUActivation",
        "GELU",
        "GELUActivation",
        "GELUTanh",
        "Hardswish",
        "LaplaceActivation",
        "LeakyReLU",
        "LinearActivation",
        "Mish",
        "MishActivation",
        "NewGELUActivation",
        "PytorchGELUTanh",
        "QuickGELUActivation",
        "ReLU",
        "ReLU6",
        "ReLUSquaredActivation",
        "SiLU",
        "SiLUActivation",
        "Sigmoid",
        "Tanh",
    }
)
_COMPILED = tuple((kind, re.compile(rf"(^|\.){ending}$"), role) for kind, ending, role in ROLES)
# Outside the repeated blocks a norm closes the stack, unless it belongs to embeddings.
# DeBERTa's `encoder.LayerNorm` normalises the table of relative positions.
_EMBEDDING = re.compile(r"embed|(^|\.)encoder\.LayerNorm$", re.IGNORECASE)


@dataclass(frozen=True)
class Position:
    """One place where a small module can act."""

    name: str  # of the module: "bert.encoder.layer.0.attention.self.query"
    kind: str  # "linear", "conv1d", "norm", "block" or "activation"
    role: str  # of `ROLES`, or "other-linear", "other-norm", "final-norm", "activation"
    layer: int | None  # of its stack, from 0; None outside the repeated blocks
    stack: str  # "encoder" or "decoder"
    in_features: int  # 0 where that means nothing: a block that is not itself a Linear
    out_features: int
    has_bias: bool


def find_target_modules(model: nn.Module, head: Collection[str] = ()) -> tuple[Position, ...]:
    """Find every position of a transformer, in the order of its modules.

    Args:
        model: Any transformer of `torch.nn` modules.
        head: Names of newly initialised parameters. A module that owns one is no position.

    Returns:
        The positions. Left out are the head, embeddings and what projects them, and Linears
        outside the repeated blocks other than a pretrained pooler. One module can be two
        positions: BERT's `output.dense` is the Linear "ffn-down" and the block "ffn".
    """
    modules = dict(model.named_modules())
    blocks = _repeated_blocks(modules)
    heads = {name.rpartition(".")[0] for name in head}
    decoders = _decoder_prefixes(modules)
    found: list[Position] = []
    for name, module in modules.items():
        if name in heads or any(name.startswith(f"{parent}.") for parent in heads if parent):
            continue
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        layer = int(name[len(block) + 1 :].partition(".")[0]) if block else None
        stack = "decoder" if any(f"{name}.".startswith(f"{p}.") for p in decoders) else "encoder"
        for kind, role in _kinds_and_roles(name, module, layer, modules):
            sizes = _sizes(module)
            bias = getattr(module, "bias", None) is not None
            found.append(Position(name, kind, role, layer, stack, *sizes, bias))
    return tuple(found)


def maskable_weights(model: nn.Module, head: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the weights a mask chooses from: Linear and Conv1D of the blocks, pretrained pooler.

    Returns:
        Weights by parameter name, in the order of the model; a shared or tied one once, under
        the first of its names.
    """
    owners = {
        id(model.get_submodule(position.name).weight)
        for position in find_target_modules(model, head)
        if position.kind in ("linear", "conv1d")
    }
    return {name: p.detach() for name, p in model.named_parameters() if id(p) in owners}


def block_of(name: str, layer: int | None) -> str:
    """Cut a position's name after the number of its layer.

    Example:
        >>> block_of("bert.encoder.layer.5.attention.self.query", 5)
        'bert.encoder.layer.5'
    """
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])


def _kinds_and_roles(
    name: str, module: nn.Module, layer: int | None, modules: dict[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    if is_dense(module) and not _is_read_by_its_parent(name, modules):
        role = _role("linear", name)
        if layer is None:
            role = role if role == "pooler" else None
        elif role is None or role == "pooler":
            role = "other-linear"
        if role is not None:
            yield ("conv1d" if is_conv1d(module) else "linear"), role
    if _is_norm(module) and not _EMBEDDING.search(name):
        yield "norm", "final-norm" if layer is None else _role("norm", name) or "other-norm"
    if layer is not None:
        if type(module).__name__ in ELEMENTWISE:
            yield "activation", "activation"
        role = _role("block", name)
        if role is not None and _ends_a_sublayer(name, module):
            yield "block", role


def _ends_a_sublayer(name: str, module: nn.Module) -> bool:
    """Tell whether a module gives the output of a sub-layer, before residual sum and norm."""
    if is_dense(module):
        return _role("linear", name) in ("attention-output", "ffn-down")
    return _holds_dense(module) and not any(_is_norm(inner) for inner in module.modules())


def _role(kind: str, name: str) -> str | None:
    return next((r for k, ending, r in _COMPILED if k == kind and ending.search(name)), None)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's Linear, whose weight is transposed: (in, out).

    It is known by its name, so that transformers need not be imported here.
    """
    return type(module).__name__ == "Conv1D"


def is_dense(module: nn.Module) -> bool:
    """Tell whether a module is a Linear or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _holds_dense(module: nn.Module) -> bool:
    return any(is_dense(inner) for inner in module.modules())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("Norm") and isinstance(weight, Tensor) and weight.dim() == 1
    )


def _is_read_by_its_parent(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell of an `out_proj` whose weight `nn.MultiheadAttention` reads, without calling it."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _sizes(module: nn.Module) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return 0, 0
    if weight.dim() == 1:
        return weight.shape[0], weight.shape[0]
    return (weight.shape[0], weight.shape[1]) if is_conv1d(module) else weight.shape[::-1]  # type: ignore[return-value]


def _repeated_blocks(modules: dict[str, nn.Module]) -> list[str]:
    """Name the outermost lists of layers: `bert.encoder.layer`, `transformer.h`, ..."""
    names: list[str] = []
    for name, module in modules.items():
        if not name or any(name.startswith(f"{outer}.") for outer in names):
            continue
        layers = list(module.children())
        alike = len(layers) > 1 and len({type(layer) for layer in layers}) == 1
        if (
            isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike)
        ) and any(_holds_dense(layer) for layer in layers):
            names.append(name)
    return names


def _decoder_prefixes(modules: dict[str, nn.Module]) -> list[str]:
    """List the parts that are decoders: named so, or else all of a model that attends causally."""
    named = [name for name in modules if name.rpartition(".")[2] == "decoder"]
    if named:
        return named
    causal = any(getattr(module, "is_causal", False) is True for module in modules.values())
    return [name for name, _ in modules.get("", nn.Module()).named_children()] if causal else []
