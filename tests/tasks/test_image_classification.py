"""Images of any kind become the pixels that transformers' own processor makes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import MODELS, save_model
from in_process_run import run
from task_rows import experiment_maker, picture, write_rows
from tiny import Silent

from fedpet.data.images import read_image
from fedpet.data.processors import load_image_processor
from fedpet.errors import ConfigError, DataError
from fedpet.run.prepare import Prepared, prepare

TASK = "image-classification"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in MODELS:
        save_model(folder / name, name)
    write_rows(folder / "rows")
    return folder


@pytest.fixture
def experiment(files: Path, tmp_path: Path) -> Any:
    return experiment_maker(files / "rows", lambda task: files / "vit", tmp_path)


def prepared_of(settings: Any) -> Prepared:
    found = prepare(settings, Silent())
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_run_learns_and_its_folder_is_one_that_transformers_reads(
    name: str, experiment: Any, files: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    settings = experiment(TASK, backbone_model=str(files / name), strategy_num_rounds=4)
    result = run(settings)
    assert result["quality"]["final"] > result["quality"]["majority_baseline"]
    folder = Path(settings.run.out) / "model"
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    rows = [json.loads(line) for line in (files / "rows/test.jsonl").read_text().splitlines()]
    images = [np.repeat(np.array(row["image"], np.uint8)[..., None], 3, 2) for row in rows]
    logits = model(**processor(images, return_tensors="pt")).logits
    names = [model.config.id2label[index] for index in logits.argmax(1).tolist()]
    hits = [name == row["word"] for name, row in zip(names, rows, strict=True)]
    assert np.mean(hits) == result["quality"]["final"]


def test_a_batch_is_the_processor_s_of_the_same_images_and_a_byte_a_colour_is_stored(
    experiment: Any, files: Path
) -> None:
    rows = prepared_of(experiment(TASK)).data.train
    lines = (files / "rows/train.jsonl").read_text().splitlines()
    chosen = np.array([5, 0, 9])
    images = [read_image(json.loads(lines[n])["image"], None, "a row") for n in chosen]
    processor = load_image_processor(files / "vit")
    expected = processor(images, return_tensors="pt")["pixel_values"]
    batch = rows.batch(chosen)
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert rows.dense is not None
    assert rows.dense.values.dtype == np.uint8
    assert set(rows.lengths) == {1 + 4 * 4}
    taken = rows.take(chosen).batch(np.array([1]))
    assert torch.equal(taken["pixel_values"], batch["pixel_values"][1:2])
    assert torch.equal(taken["labels"], batch["labels"][1:2])


def test_the_loss_is_transformers_own(experiment: Any) -> None:
    from fedpet.tasks import kind_of

    prepared = prepared_of(experiment(TASK))
    batch = prepared.data.train.batch(np.arange(6))
    labels = batch.pop("labels")
    loss_of = kind_of(TASK).client_loss(
        prepared.data.task, prepared.data.train.labels, 0.0, torch.device("cpu")
    )
    theirs = prepared.pet.model(**batch, labels=labels).loss
    assert loss_of(prepared.pet.model, batch, labels).item() == pytest.approx(theirs.item(), 1e-5)


def test_rates_are_derived_of_random_images(experiment: Any) -> None:
    prepared = prepared_of(experiment(TASK, training_learning_rate="auto"))
    rates = prepared.plan.training.learning_rates
    assert {entry.partition("=")[0] for entry in rates} == {"mask", "lnfit", "head"}


def png(values: list[list[int]]) -> bytes:
    import PIL.Image

    written = io.BytesIO()
    PIL.Image.fromarray(np.array(values, np.uint8)).save(written, "PNG")
    return written.getvalue()


def test_arrays_bytes_paths_and_pictures_are_one_image(tmp_path: Path) -> None:
    import PIL.Image

    values = picture(np.random.default_rng(1), True)
    (tmp_path / "one.png").write_bytes(png(values))
    gray = np.array(values, np.uint8)
    kinds = [values, gray[..., None], np.repeat(gray[..., None], 3, 2), png(values), "one.png",
             {"bytes": png(values), "path": None}, {"bytes": None, "path": "one.png"},
             PIL.Image.fromarray(gray)]  # fmt: skip
    for kind in kinds:
        found = read_image(kind, tmp_path, "a row")
        assert found.shape == (12, 10, 3)
        assert (found == gray[..., None]).all()


def test_a_file_that_changes_under_its_name_is_read_again(
    experiment: Any, files: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(1)
    for split in ("train", "test"):
        lines = []
        for index in range(6):
            name = f"{split}-{index}.png"
            (tmp_path / name).write_bytes(png(picture(generator, index % 2 == 0)))
            row = {"image": name, "word": ["good", "bad"][index % 2], "client": str(index % 2)}
            lines.append(json.dumps(row))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    settings = experiment(TASK, data_source=str(tmp_path))
    before = prepared_of(settings).data.train.dense
    (tmp_path / "train-3.png").write_bytes(png([[255] * 10] * 12))
    after = prepared_of(settings).data.train.dense
    assert before is not None
    assert after is not None
    changed = (before.values != after.values).any((1, 2, 3))
    assert np.flatnonzero(changed).tolist() == [3]


@pytest.mark.parametrize(
    "value", ["absent.png", b"no image", [[300, 1]], [[0.5, 0.1]], [], None, [[[1, 2]]]]
)
def test_what_is_no_image_is_refused_by_its_row(value: Any) -> None:
    with pytest.raises(DataError, match="row 3 of the rows has no image that can be read"):
        read_image(value, None, "row 3 of the rows")


def test_a_checkpoint_without_a_processor_is_refused(
    experiment: Any, files: Path, tmp_path: Path
) -> None:
    bare = save_model(tmp_path / "bare", "vit")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"holds no preprocessor_config\.json"):
        prepare(experiment(TASK, backbone_model=str(bare)), Silent())
    with pytest.raises(ConfigError, match="one column of images"):
        experiment(TASK, data_text_columns=["image", "text"])


def test_a_model_in_memory_is_stored_with_what_reads_its_images(
    files: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    from fedpet.run.model_input import read_model

    model = AutoModelForImageClassification.from_pretrained(files / "vit", num_labels=2)
    found = read_model(model, None, None, tmp_path / "cache")
    folder = Path(found.tables["backbone"]["model"])
    assert load_image_processor(folder).crop_size == load_image_processor(files / "vit").crop_size


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_is_counted_on_a_model_that_reads_images(name: str, files: Path) -> None:
    from fedpet.backbone.module_roles import maskable_weights
    from fedpet.backbone.pretrained import load_backbone
    from fedpet.config import BackboneConfig

    backbone = load_backbone(BackboneConfig(model=str(files / name)), num_outputs=2)
    assert len(maskable_weights(backbone.model, backbone.head)) == 2 * 6
    assert {key.partition(".")[0] for key in backbone.head} == {"classifier"}
