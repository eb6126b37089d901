"""Test the rotation by torch: the bits of numpy, for many vectors where they lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import draw

from fedpet.codec import VectorCodec
from fedpet.codec.torch_rotation import rotate_updates

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(["dither-1", "dither-3", "dither-5-raw"]),
    head_codec=st.sampled_from(["", "dither-8", "float32", "eden-4", "topk-0.3+dither-4"]),
    sizes=st.lists(
        st.one_of(st.integers(0, 140), st.sampled_from([770, 4095, 4096, 4097, 10_764])),
        min_size=2, max_size=4,
    ),
    distribution=st.sampled_from(["gaussian", "laplace", "student-t3"]),
    magnitude=st.sampled_from([1.0, 1e-3, 1e25, 1e-29, 1e-38, 1e-44, 0.0]),
    seed=st.integers(0, 2**64),
    device=st.sampled_from(DEVICES),
)  # fmt: skip
def test_vectors_that_torch_rotates_are_coded_to_the_bytes_of_numpy(
    codec, head_codec, sizes, distribution, magnitude, seed, device
):
    stops = np.cumsum([0, *sizes]).tolist()
    groups = list(itertools.pairwise(stops))
    # The head lies between other groups where there are three.
    coding = VectorCodec.of(groups, groups[1:2], codec=codec, head_codec=head_codec)
    vectors = np.stack([draw(distribution, stops[-1], seed=n) for n in range(3)])
    vectors *= np.float32(magnitude)
    there = torch.from_numpy(vectors.copy()).to(device)
    assert rotate_updates(there, coding, seed)
    for number, (plain, rotated) in enumerate(zip(vectors, there.cpu().numpy(), strict=True)):
        expected = coding.encode(plain, seed=number, rotation_seed=seed)
        found = coding.encode(rotated, seed=number, rotation_seed=seed, rotated=True)
        assert found == expected


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -3e29])
def test_a_value_that_encode_names_leaves_every_vector_as_it_is(wrong):
    coding, values = VectorCodec.of([(0, 100)], codec="dither-3"), torch.randn(3, 100)
    values[1, 70] = wrong
    before = values.clone()
    assert not rotate_updates(values, coding, 5)
    assert torch.equal(values.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("codec", ["float32", "int8", "eden-3", "topk-0.1+dither-4"])
def test_what_each_sender_rotates_alone_is_left_as_it_is(codec):
    coding, values = VectorCodec.of([(0, 100)], codec=codec), torch.randn(3, 100)
    before = values.clone()
    assert not rotate_updates(values, coding, 5)
    assert torch.equal(values, before)
