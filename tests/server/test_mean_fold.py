"""Test a round's mean: that of what the clients sent, whatever codec and tier they sent it by."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import draw

from fedpet.codec import VectorCodec
from fedpet.errors import FrameError
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.server.aggregation import MeanFold
from fedpet.server.replies import LARGEST_VALUE, Update

COUNT = 6000
SMALL = np.arange(0, COUNT, 3)  # the values of the weaker tier
CODECS = ["dither-3", "dither-3-raw", "eden-3", "float32", "topk-0.2+dither-4"]


def update(coding, client, vector=None, where=slice(None)):
    """Encode the update of client number `client`, by its own seeds of round 1."""
    seeds = uplink_seeds(0, 1, client)
    vector = draw("laplace", coding.count, seed=client) if vector is None else vector
    payload = coding.encode(vector, **seeds)
    return Update(f"c{client}", 1, payload, coding, seeds, where, client + 1, 0.5)


@pytest.mark.parametrize("codec", CODECS)
def test_the_mean_is_that_of_the_decoded_updates_over_those_who_trained_an_entry(codec):
    values = draw("gaussian", COUNT, seed=99)
    every = VectorCodec.of([(0, 5000), (5000, COUNT)], codec=codec)
    part = VectorCodec.of([(0, len(SMALL))], codec=codec)
    updates = [
        update(part, client, where=SMALL) if client % 2 else update(every, client)
        for client in range(6)
    ]
    fold, total, weights = MeanFold(values), *np.zeros((2, COUNT))
    for one in updates:
        fold.add(one)
        total[one.where] += one.weight * one.decode().astype(np.float64)
        weights[one.where] += one.weight
    assert fold.moved() == pytest.approx(values + total / weights, abs=1e-5)
    assert fold.weight == 21
    assert fold.names == [f"c{client}" for client in range(6)]


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_that_does_not_decode_leaves_no_trace(codec):
    coding = VectorCodec.of([(0, COUNT)], codec=codec)
    good = [update(coding, client) for client in range(3)]
    whole, disturbed = MeanFold(np.zeros(COUNT)), MeanFold(np.zeros(COUNT))
    for one in good:
        whole.add(one)
        with pytest.raises(FrameError):
            disturbed.add(Update(**{**vars(one), "payload": one.payload[:-1]}))
        disturbed.add(one)
    assert (disturbed.moved() == whole.moved()).all()
    assert disturbed.weight == whole.weight


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_beyond_the_largest_value_is_refused(codec):
    coding = VectorCodec.of([(0, COUNT)], codec=codec)
    huge = np.full(COUNT, 10 * LARGEST_VALUE, dtype=np.float32)
    fold = MeanFold(np.zeros(COUNT))
    with pytest.raises(FrameError, match="magnitude"):
        fold.add(update(coding, 0, huge))
    with pytest.raises(FrameError, match="magnitude"):
        update(coding, 0, huge).decode()
    assert fold.messages() == []


def test_clients_that_agree_err_alike_by_no_codec():
    vector = draw("gaussian", COUNT)
    coding = VectorCodec.of([(0, COUNT)], codec="dither-3")
    fold = MeanFold(np.zeros(COUNT))
    for client in range(40):
        fold.add(update(coding, client, vector))
    error = np.square(fold.moved() - vector).sum() / np.square(vector).sum()
    alone = np.square(update(coding, 0, vector).decode() - vector).sum() / np.square(vector).sum()
    assert error < alone / 25  # weights of 1 to 41: as many as 30 alike
