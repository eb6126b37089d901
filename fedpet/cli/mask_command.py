"""`fedpet mask`: build a mask and show what it holds."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpet.cli.app import app, out_console, write_output
from fedpet.utils.paths import check_output, expand


@app.command(epilog="Example: fedpet mask bundled --density 0.005")
def mask(
    model: Annotated[
        str, typer.Argument(help="bundled, a hub name, a folder, a .gguf file, or package:NAME.")
    ] = "bundled",
    density: Annotated[float, typer.Option(help="Fraction of the entries in scope.")] = 0.005,
    rule: Annotated[str, typer.Option(help="smallest (PaFi), largest or random.")] = "smallest",
    granularity: Annotated[str, typer.Option(help="global or per-tensor.")] = "global",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16: the mask is that of the weights in this type.")
    ] = "float32",
    bits: Annotated[
        int,
        typer.Option(help="8 or 4: the mask is that of the weights so quantised; 0: as they are."),
    ] = 0,
    out: Annotated[
        str, typer.Option(help="Write the coded positions to this file, the explicit broadcast.")
    ] = "",
) -> None:
    """Build the magnitude mask of a model; show densities, and bytes against the entropy bound."""
    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.backbone.pretrained import load_backbone
    from fedpet.config import BackboneConfig, MaskConfig
    from fedpet.pet.mask import build_mask
    from fedpet.pet.mask_ties import describe_ties
    from fedpet.protocol.plan import encode_mask
    from fedpet.report.mask_table import mask_table

    if out:
        check_output(expand(out))
    config = MaskConfig(density=density, rule=rule, granularity=granularity)
    source = BackboneConfig(model=model, dtype=dtype, bits=bits)
    backbone = load_backbone(source, num_outputs=2)
    weights = maskable_weights(backbone.model, backbone.head)
    built = build_mask(weights, config)
    coded = encode_mask(built)
    out_console.show(mask_table(built, config, backbone.model, len(coded)))
    if ties := describe_ties(weights, built, config):
        print(f"warning: {ties}")
    if out:
        write_output(expand(out), coded)
        print(f"Positions: {out}")
