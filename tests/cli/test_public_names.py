"""The names of the package: all there, imported late, each with an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_names import built_in_names

import fedpet

PUBLIC = [name for name in fedpet.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", fedpet.__all__)
def test_every_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(fedpet, name) is not None
    assert name in dir(fedpet)


def test_all_is_sorted_and_says_what_mypy_and_the_lazy_import_say() -> None:
    assert [*fedpet.__all__] == sorted(fedpet.__all__)
    assert set(PUBLIC) == set(fedpet._MODULE_OF)
    source = inspect.getsource(fedpet)
    typed = source[source.index("if TYPE_CHECKING:") : source.index("__version__")]
    for name in PUBLIC:
        assert f" {name}" in typed.replace("(", " ").replace(",", " "), name
        module = importlib.import_module(fedpet._MODULE_OF[name])
        assert name in getattr(module, "__all__", [name])


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedpet.nonsense


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, fedpet; dir(fedpet); "
        "print({'torch', 'transformers', 'flwr', 'numpy', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow  # mypy reads torch and transformers from nothing
def test_a_stranger_s_type_checker_sees_the_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "own.py"
    script.write_text(
        "import fedpet\n"
        "reveal_type(fedpet.PetConfig(mask=fedpet.MaskConfig(density=0.1)))\n"
        "reveal_type(fedpet.get_pet_model)\n"
        "fedpet.LoraConfig(rank=3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", str(script)],
        capture_output=True,
        text=True,
        cwd=Path(fedpet.__file__).parents[2],
        check=False,
    )
    assert 'Revealed type is "fedpet.pet.pet_config.PetConfig"' in done.stdout, done.stdout
    assert "fedpet.pet.model.PetModel" in done.stdout
    assert 'Unexpected keyword argument "rank" for "LoraConfig"' in done.stdout


def _with_examples() -> list[str]:
    return [name for name in PUBLIC if ">>>" in (getattr(fedpet, name).__doc__ or "")]


@pytest.mark.parametrize("name", _with_examples())
def test_every_example_in_a_docstring_gives_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example may leave a run folder
    one: Any = getattr(fedpet, name)
    known = {public: getattr(fedpet, public) for public in PUBLIC} | {"torch": torch}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with built_in_names():
        for example in doctest.DocTestFinder().find(one, name, globs=known):
            runner.run(example)
    assert runner.failures == 0


def test_every_public_function_has_an_example() -> None:
    functions = {name for name in PUBLIC if inspect.isfunction(getattr(fedpet, name))}
    assert functions <= set(_with_examples())
    assert {"PetConfig", "PetModel", "Ledger", "LoraConfig"} <= set(_with_examples())


def test_a_vector_is_encoded_whatever_holds_it_and_decoded_to_the_same_bits() -> None:
    values = np.random.default_rng(0).normal(size=300)
    payloads = {
        fedpet.encode(held, "eden-3", seed=4)
        for held in (values, values.tolist(), torch.from_numpy(values), values.astype(np.float32))
    }
    assert len(payloads) == 1
    decoded = fedpet.decode(payloads.pop(), "eden-3", count=300, seed=4)
    assert np.square(decoded - values).sum() < 0.05 * np.square(values).sum()
    lossless = fedpet.decode(fedpet.encode(values, "float32"), "float32", count=300)
    assert np.array_equal(lossless, values.astype(np.float32))
    halves = [(0, 100), (100, 300)]
    payload = fedpet.encode(values, "int8", groups=halves)
    assert len(fedpet.decode(payload, "int8", count=300, groups=halves)) == 300
    assert len(fedpet.decode(fedpet.encode([], "int8"), "int8", count=0)) == 0


@pytest.mark.parametrize(
    ("values", "codec", "message"),
    [
        ([[1.0]], "int8", r"must be a vector, got the shape \(1, 1\)"),
        ([1.0, float("nan")], "int8", r"must be finite, and 1 of 2 are not"),
        ([1.0], "eden-9", r"eden-9"),
    ],
)
def test_what_no_codec_can_write_is_refused(values: Any, codec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedpet.encode(values, codec)


def test_the_mask_of_plain_tensors_is_the_smallest_entries_of_all() -> None:
    weights = {"b": torch.tensor([0.1, -4.0]), "a": torch.tensor([[3.0, -0.2], [0.5, 2.0]])}
    assert {n: p.tolist() for n, p in fedpet.pafi_mask(weights, 0.5).items()} == {
        "a": [1, 2], "b": [0],
    }  # fmt: skip
    for density in np.linspace(0.25, 1, 4):  # numpy's own floats
        chosen = fedpet.pafi_mask(weights, density)
        assert sum(map(len, chosen.values())) == int(6 * density)
        config = fedpet.MaskConfig(density=density, tiers=(f"{float(density)}=1.0",))
        assert fedpet.build_mask(weights, config).num_values == int(6 * density)
    with pytest.raises(fedpet.InputError, match="density"):
        fedpet.pafi_mask(weights, 0)
