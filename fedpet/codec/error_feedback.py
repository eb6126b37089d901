"""Add the error of one round's codec to the values of the next (error feedback).

In:  values, and the residual of the sender's last accepted round.
Out: a payload, and the residual to keep if the receiver takes it.

Nothing is stored here: the client stores residuals by client and round, see
fedpet/client/state_store.py. If a payload is never accepted, the residual before it counts.

Source: Seide et al. 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847.
"""

from __future__ import annotations

import numpy as np

from fedpet.codec.vector_codec import VectorCodec
from fedpet.codec.vector_types import Floats
from fedpet.errors import TrainingError


def encode_with_feedback(
    values: Floats,
    residual: Floats | None,
    coding: VectorCodec,
    *,
    seed: int,
    rotation_seed: int | None = None,
) -> tuple[bytes, Floats]:
    """Write values and the residual of the ones before.

    Args:
        values: float32 (n,), finite.
        residual: float32 (n,), of the last accepted round; None is nothing.
        coding: The codec of the values.
        seed, rotation_seed: As `encode_values`; new ones each round.

    Returns:
        The payload, and the residual float32 (n,): `values + residual` less the decoded
        payload. The sum of all payloads differs from the sum of the values by the last residual
        alone.

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
    payload = coding.encode(wanted, seed=seed, rotation_seed=rotation_seed)
    wanted -= coding.decode(payload, seed=seed, rotation_seed=rotation_seed)
    return payload, wanted
