"""Error feedback: what a codec loses in one round is added to what it sends in the next.

In:  values, and the residual of the sender's last settled round.
Out: a payload, and the residual to keep if the receiver takes it.

Both are values, nothing is kept here: where residuals live, and which of them were settled, is for
the client to know, by client and round. If a payload is never taken, the residual before it counts.

Source: Seide et al. 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847.
"""

from __future__ import annotations

import numpy as np

from fedpet.codec.arrays import Floats
from fedpet.codec.vector_codec import VectorCodec
from fedpet.errors import TrainingError


def encode_with_feedback(
    values: Floats, residual: Floats | None, coding: VectorCodec, *, seed: int
) -> tuple[bytes, Floats]:
    """Write values and what was left of the ones before.

    Args:
        values: float32 (n,), finite.
        residual: float32 (n,), what the last settled round left; None is nothing.
        coding: How the values are written.
        seed: As `encode_values`; a new one each round.

    Returns:
        The payload, and the residual float32 (n,): `values + residual` less what the payload
        decodes to. All payloads together miss what was to be sent by the last residual alone.

    Raises:
        TrainingError: A value is NaN, or infinite.
    """
    wanted = np.array(values, dtype=np.float32)
    if residual is not None:
        if residual.shape != wanted.shape:
            raise ValueError(
                f"a residual must have the shape of the values, {wanted.shape}, got "
                f"{residual.shape}: it belongs to another plan. Drop it."
            )
        if not np.isfinite(residual).all():
            raise TrainingError("a residual must be finite, this one is not. Drop it.")
        wanted += residual
    payload = coding.encode(wanted, seed=seed)
    wanted -= coding.decode(payload, seed=seed)
    return payload, wanted
