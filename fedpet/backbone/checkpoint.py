"""Find the files of a checkpoint, and refuse those that no later stage could use.

In:  a hub name, a folder, a .gguf file, or `package:NAME` for a Python package that ships weights.
Out: the folder of its files; a hub's are downloaded once, safetensors where there are any, and a
     GGUF file, or a package's weights of another program, are converted once.

Refused before anything reads it: pointers of git-lfs in the
place of weights, adapters without their base, quantised weights, code that comes with a checkpoint.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedpet.backbone.dinov2_file import ONNX_SUFFIX, convert_dinov2
from fedpet.backbone.gguf_file import GGUF_SUFFIX, convert_gguf
from fedpet.backbone.whisper_file import WHISPER_FILE, convert_whisper
from fedpet.config import BackboneConfig
from fedpet.errors import BackboneError
from fedpet.utils import bundled

__all__ = [
    "CONFIG_FILE",
    "WEIGHT_FILES",
    "locate",
    "package_name",
    "resolve_config",
    "weight_files",
]

CONFIG_FILE = "config.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Of a hub's repository: everything small and safetensors first, the older kind where it has none.
HUB_FILES = ("*.json", "*.txt", "*.model", "*.codes", "*.jinja", "*.safetensors")
OLDER_HUB_FILES = ("pytorch_model*.bin",)
# Parts of other models, weights for other programs, Mistral's second copy.
NOT_OF_THE_HUB = ("*/*", "consolidated*")
# Packages whose weights are another program's: the end of the file's name, and what converts it.
CONVERTED: Mapping[str, tuple[str, Callable[..., Path]]] = {
    bundled.SPEECH_MODEL: (WHISPER_FILE, convert_whisper),
    bundled.IMAGE_MODEL: (ONNX_SUFFIX, convert_dinov2),
}
ADAPTER_FILE = "adapter_config.json"
_LFS = b"version https://git-lfs"


def locate(config: BackboneConfig) -> Path:
    """Find the folder that holds a checkpoint's files; a hub's are downloaded once.

    Raises:
        BackboneError: There is no such folder or package, the hub is out of reach, or its files
            are none that fedpet can take.
    """
    folder = _folder(config)
    _check_usable(folder, config.model)
    return folder


def _folder(config: BackboneConfig) -> Path:
    source = config.model
    if package := package_name(source):
        return _package_folder(package, config)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return convert_gguf(path.resolve(), source, dtype=config.dtype)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise BackboneError(f"there is no folder {source!r} to take a backbone from.")
    return _hub_folder(source, config.revision or None)


def resolve_config(config: BackboneConfig) -> Path:
    """Find a model's config.json, weights or none beside it; of a hub's model that file alone.

    Args:
        config: Its model may also name a folder without weights, or a configuration file.

    Raises:
        BackboneError: There is no such file, folder or package, or the hub is out of reach.
    """
    source = config.model
    if package := package_name(source):
        return _package_folder(package, config) / CONFIG_FILE
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == GGUF_SUFFIX:
        return _folder(config) / CONFIG_FILE
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise BackboneError(f"the folder {source!r} holds no {CONFIG_FILE}.")
        return (path / CONFIG_FILE).resolve()
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise BackboneError(f"there is no folder or file {source!r} to take a configuration from.")
    if path.suffix == ".json":
        raise BackboneError(f"there is no configuration file {source!r}.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(source, CONFIG_FILE, revision=config.revision or None, etag_timeout=10)
        )
    except Exception as error:  # as in `_hub_folder`
        raise _out_of_reach(source, error) from None


def package_name(model: str) -> str:
    """Return the package that `backbone.model` names; "" where it names none."""
    if model == "bundled":
        return bundled.name_of(bundled.MODEL)
    return model.removeprefix("package:") if model.startswith("package:") else ""


def _package_folder(package: str, config: BackboneConfig) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"the backbone's package {package!r} is not installed: run "
            f"{bundled.how_to_install(bundled.pinned_requirement(package))}."
        ) from None
    for file in files:
        if file.name in WEIGHT_FILES:
            return Path(str(file.locate())).parent
    converted = [file for file in files if file.suffix == GGUF_SUFFIX]
    if len(converted) == 1:
        path = Path(str(converted[0].locate()))
        return convert_gguf(path, config.model, dtype=config.dtype, sha256=_recorded(converted[0]))
    for requirement, (name, convert) in CONVERTED.items():
        if bundled.name_of(requirement) == package:
            found = [file for file in files if Path(file).name.endswith(name)]
            if len(found) == 1:
                return convert(Path(str(found[0].locate())), config.model, dtype=config.dtype)
    raise BackboneError(
        f"the package {package!r} holds no weights (none of {', '.join(WEIGHT_FILES)}, nor one "
        f"{GGUF_SUFFIX} file)."
    )


def _recorded(file: importlib.metadata.PackagePath) -> str:
    """Return the SHA-256 of an installed file, in hex, as its package records it; "" if not."""
    if file.hash is None or file.hash.mode != "sha256":
        return ""
    value = file.hash.value  # without the "=" that its code ends with
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()


def _hub_folder(name: str, revision: str | None) -> Path:
    folder = _download(name, revision, HUB_FILES)
    if not any(file.is_file() for file in weight_files(folder)):
        # of the same commit, which names the folder
        folder = _download(name, folder.name, OLDER_HUB_FILES)
    return folder


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": list(NOT_OF_THE_HUB),
    }
    try:
        return Path(snapshot_download(name, **options, etag_timeout=10))
    except Exception as error:  # the hub's client raises a dozen kinds, of four libraries
        raise _out_of_reach(name, error) from None


def _out_of_reach(name: str, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    return BackboneError(
        f"{name!r} is no folder here, and the hub could not give it "
        f"({type(error).__name__}: {reason[:160]}). Download it beforehand, or give a folder "
        "or package:NAME."
    )


def weight_files(folder: Path) -> list[Path]:
    """List the files that transformers would read a checkpoint's weights from; [] if none.

    Raises:
        BackboneError: The list of a checkpoint in several parts does not read.
    """
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        return []
    if first.suffix != ".json":
        return [first]
    try:
        parts = _read_table(first)["weight_map"].values()
        return [folder / str(name) for name in sorted(set(parts))]
    except (KeyError, AttributeError, TypeError):
        raise BackboneError(
            f"{str(first)!r} does not say where the weights are: it needs a weight_map."
        ) from None


def _check_usable(folder: Path, source: str) -> None:
    """Refuse what would fail later, or go wrong without a word."""
    if (folder / ADAPTER_FILE).exists():
        raise BackboneError(
            f"{source!r} holds a PEFT adapter ({ADAPTER_FILE}), and a backbone is one whole "
            "checkpoint. Merge the adapter into its base with peft's merge_and_unload(), save "
            "that and give its folder; or take the adapter's files away to train the base alone."
        )
    if not (folder / CONFIG_FILE).is_file() or not (weights := weight_files(folder)):
        raise BackboneError(
            f"the checkpoint {source!r} holds no weights: it needs {CONFIG_FILE} and one of "
            f"{', '.join(WEIGHT_FILES)}."
        )
    for file in (folder / CONFIG_FILE, *weights):
        if _start_of(file) in (b"", _LFS):
            raise BackboneError(
                f"{str(file)!r} is a pointer of git-lfs, or empty, in the place of the file "
                "itself: fetch it with `git lfs pull`, or download the checkpoint anew."
            )
    _check_config(_read_table(folder / CONFIG_FILE), source)


def _start_of(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS))
    except FileNotFoundError:
        raise BackboneError(
            f"{str(file)!r} is not there, and the checkpoint names it among its weights: "
            "download it anew."
        ) from None
    except OSError as error:
        raise BackboneError(f"{str(file)!r} does not read: {error.strerror or error}.") from None


def _check_config(config: Mapping[str, Any], source: str) -> None:
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
        raise BackboneError(
            f"the checkpoint {source!r} is quantised ({method or 'quantization_config'}), and a "
            "mask ranks and changes entries of float weights: give the checkpoint that it was "
            "made from."
        )
    code = config.get("auto_map")
    if isinstance(code, Mapping) and "AutoConfig" in code:
        from transformers import CONFIG_MAPPING

        if (kind := config.get("model_type")) not in CONFIG_MAPPING:
            raise BackboneError(
                f"the checkpoint {source!r} is a {kind!r} model, which transformers knows only by "
                "code that comes with the checkpoint, and fedpet runs no code from a checkpoint. "
                "Take a checkpoint of an architecture that is in transformers."
            )


def _read_table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{str(file)!r} does not read as JSON: {error}.") from None
    if not isinstance(table, dict):
        raise BackboneError(f"{str(file)!r} does not read: it must hold a table.")
    return table
