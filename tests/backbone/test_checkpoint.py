"""Files of a checkpoint that cannot be taken are refused in one sentence, before rows are read."""

from __future__ import annotations

import fnmatch
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import classifiers
import pytest
import tiny
import torch

from fedpet.backbone.checkpoint import locate
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError
from fedpet.run.prepare import prepare

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.make_backbone(tmp_path / "checkpoint")


def config_of(folder: Path) -> BackboneConfig:
    return BackboneConfig(model=str(folder))


def as_bin(folder: Path, *, parts: int = 1) -> Path:
    """The same weights the older way, in so many files."""
    tensors = classifiers.stored(folder)
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i + 1:05}-of-{parts:05}.bin" for i in range(parts)]
    where = {name: names[index % parts] for index, name in enumerate(tensors)}
    for file in names:
        torch.save({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> str:
    """The one sentence, which comes before any row is read."""
    experiment = tiny.make_experiment(folder, folder / "no-rows", folder / "out")
    with pytest.raises(BackboneError) as told:
        prepare(experiment, tiny.Silent())
    return str(told.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_the_file_it_stands_for(
    checkpoint: Path, file: str
) -> None:
    if file.endswith(".bin"):
        as_bin(checkpoint)
    (checkpoint / file).write_text(LFS)
    assert "git lfs pull" in refusal(checkpoint)


def test_an_empty_weight_file_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0005, 0.5])
def test_weights_that_are_cut_short_are_told_so(checkpoint: Path, kind: str, share: float) -> None:
    file = checkpoint / "model.safetensors"
    if kind == "bin":
        as_bin(checkpoint)
        file = checkpoint / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BackboneError, match=r"damaged|could not be loaded"):
        load_backbone(config_of(checkpoint), num_outputs=2)


def test_a_quantised_checkpoint_is_refused_with_its_method(checkpoint: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    classifiers.change_config(checkpoint, quantization_config=quantised)
    told = refusal(checkpoint)
    assert "bitsandbytes" in told
    assert "float" in told


def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_asked_about(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    ran = checkpoint / "ran"
    (checkpoint / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classifiers.change_config(checkpoint, model_type="own-kind", auto_map=code)
    told = refusal(checkpoint)
    assert "own-kind" in told
    assert "no code from a checkpoint" in told
    assert "trust_remote_code" not in told
    # One that transformers knows by itself is loaded by transformers' own code.
    classifiers.change_config(checkpoint, model_type="bert")
    load_backbone(config_of(checkpoint), num_outputs=2)
    assert not ran.exists()


def test_a_pickle_that_runs_code_is_not_unpickled(checkpoint: Path) -> None:
    ran = checkpoint / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(ran), "w")

    as_bin(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(BackboneError):
        load_backbone(config_of(checkpoint), num_outputs=2)
    assert not ran.exists()


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_refused_with_or_without_its_base(checkpoint: Path, beside: bool) -> None:
    base = "elsewhere" if not beside else str(checkpoint)
    table = {"peft_type": "LORA", "base_model_name_or_path": base}
    (checkpoint / "adapter_config.json").write_text(json.dumps(table))
    (checkpoint / "model.safetensors").rename(
        checkpoint / ("adapter_model.safetensors" if not beside else "model.safetensors")
    )
    told = refusal(checkpoint)
    assert "adapter" in told
    assert "merge_and_unload" in told


def test_a_configuration_that_is_no_json_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{'model_type': 'bert'}")
    assert "config.json" in refusal(checkpoint)


def test_a_list_of_parts_without_a_table_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    assert "index.json" in refusal(checkpoint)


def test_a_part_that_is_missing_is_named(checkpoint: Path) -> None:
    as_bin(checkpoint, parts=2)
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin" in refusal(checkpoint)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_older_kind_of_weights_gives_the_same_backbone(checkpoint: Path, parts: int) -> None:
    expected = load_backbone(config_of(checkpoint), num_outputs=2).fingerprint
    as_bin(checkpoint, parts=parts)
    assert load_backbone(config_of(checkpoint), num_outputs=2).fingerprint == expected


class Hub:
    """A hub of one repository: gives what is asked for, and remembers what that was."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.given: set[str] = set()

    def snapshot_download(
        self,
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        etag_timeout: float,
    ) -> str:
        assert name == "someone/model"
        folder = self.cache / "c0ffee"
        assert revision in (None, folder.name)
        folder.mkdir(exist_ok=True, parents=True)
        for path in self.repository.rglob("*"):
            file = path.relative_to(self.repository).as_posix()
            wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if (
                path.is_file()
                and wanted
                and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns)
            ):
                (folder / file).parent.mkdir(exist_ok=True, parents=True)
                shutil.copyfile(path, folder / file)
                self.given.add(file)
        return str(folder)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(checkpoint, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


ON_HUB = BackboneConfig(model="someone/model")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_repository_of_older_weights_alone_is_downloaded(
    hub: Hub, checkpoint: Path, parts: int
) -> None:
    as_bin(checkpoint, parts=parts)
    (checkpoint / "training_args.bin").write_bytes(b"-")
    load_backbone(ON_HUB, num_outputs=2)
    assert "training_args.bin" not in hub.given


def test_older_weights_are_not_downloaded_beside_safetensors(hub: Hub, checkpoint: Path) -> None:
    torch.save(classifiers.stored(checkpoint), checkpoint / "pytorch_model.bin")
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint / "consolidated.safetensors")
    (checkpoint / "onnx").mkdir()
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint / "onnx" / "model.safetensors")
    load_backbone(ON_HUB, num_outputs=2)
    assert {file for file in hub.given if file.endswith((".safetensors", ".bin"))} == {
        "model.safetensors"
    }


@pytest.mark.parametrize(
    "file",
    ["spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes"],
)
def test_a_tokeniser_in_an_older_form_is_downloaded(hub: Hub, checkpoint: Path, file: str) -> None:
    (checkpoint / file).write_bytes(b"-")
    assert (locate(ON_HUB) / file).is_file()


def test_a_repository_without_weights_is_refused(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "tf_model.h5")
    with pytest.raises(BackboneError, match="holds no weights"):
        locate(ON_HUB)
