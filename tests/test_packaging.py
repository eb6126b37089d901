"""One package, be it from a checkout, an editable install, a wheel or a Flower bundle."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from installed_wheel import build_wheel, install_wheel
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedpet
from fedpet.config import Experiment

FOLDERS = ("strategies", "simulations")


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of an environment that has the wheel and not the checkout."""
    return install_wheel(wheel, tmp_path_factory.mktemp("wheel-venv"))


@pytest.fixture(scope="module")
def bundle(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what `flwr run` sends to the nodes, unpacked apart from the checkout."""
    folder = tmp_path_factory.mktemp("bundle")
    # Flower would walk through the environment too, for seconds, to leave it out afterwards.
    roots = [repository / name for name in ("fedpet", *FOLDERS, "tests")]
    paths = [*repository.glob("*"), *(path for root in roots for path in root.rglob("*"))]
    names = [str(path.relative_to(repository)) for path in paths if path.is_file()]
    code = (
        "import sys; from pathlib import Path; from flwr.cli.build import build_fab_from_files; "
        "files = {name: Path(name) for name in sys.argv[1:]}; "
        "sys.stdout.buffer.write(build_fab_from_files(files)[0])"
    )
    command = [sys.executable, "-c", code, *names]
    packed = subprocess.run(command, cwd=repository, check=True, capture_output=True).stdout
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)
    return folder


def answer(code: str, *, cwd: Path, python: Path | str = sys.executable) -> Any:
    """Return the value of an expression after statements, from a new interpreter in `cwd`."""
    *statements, expression = code.split("; ")
    lines = ["import json, sys", *statements, f"print(json.dumps({expression}))"]
    done = subprocess.run(
        [str(python), "-c", "\n".join(lines)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SAME = (
    "from fedpet.strategies import FedAvg; import fedpet.strategies.fedavg; "
    "import fedpet.run.federate; from fedpet.config.builtin import experiments_folder; "
    "[FedAvg is fedpet.strategies.fedavg.FedAvg, fedpet.__file__, "
    "fedpet.strategies.__file__, str(experiments_folder())]"
)


# Where it comes from


def test_in_a_checkout_the_folders_are_the_packages(repository: Path) -> None:
    same, package, strategies, experiments = answer(SAME, cwd=repository)
    assert same
    assert Path(package) == repository / "fedpet" / "__init__.py"
    assert Path(strategies) == repository / "strategies" / "__init__.py"
    assert Path(experiments) == repository / "simulations" / "experiments"


def test_a_wheel_puts_nothing_but_fedpet_into_site_packages(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"fedpet", f"fedpet-{fedpet.__version__}.dist-info"}


def test_a_wheel_holds_each_module_once_and_no_stand_in(wheel: Path, repository: Path) -> None:
    wanted = {path.relative_to(repository) for path in (repository / "fedpet").rglob("*.py")}
    wanted -= {Path("fedpet", "strategies.py")}
    for folder, pattern in (("", "strategies/**/*.py"), ("simulations", "experiments/*.toml")):
        parent = repository / folder
        wanted |= {Path("fedpet") / path.relative_to(parent) for path in parent.glob(pattern)}
    held = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert {path for path in held if path.suffix in (".py", ".toml")} == wanted
    assert Path("fedpet/py.typed") in held


def test_a_wheel_holds_every_template_and_style_of_the_package(
    wheel: Path, repository: Path
) -> None:
    suffixes = (".j2", ".css", ".md")
    beside = [path for path in repository.glob("fedpet/**/*.*") if path.suffix in suffixes]
    assert {path.suffix for path in beside} == {*suffixes}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(repository).as_posix() for path in beside} <= held


def test_a_bundle_holds_the_model_card_that_a_run_writes(bundle: Path, repository: Path) -> None:
    [template] = (path.relative_to(repository) for path in repository.glob("fedpet/**/*.md"))
    assert (bundle / template).is_file()


def test_a_wheel_runs_from_an_empty_folder(binaries: Path, tmp_path: Path) -> None:
    same, *files = answer(SAME, cwd=tmp_path, python=binaries / "python")
    assert same
    package = Path(files[0]).parent
    assert binaries.parent in package.parents
    assert Path(files[1]) == package / "strategies" / "__init__.py"
    assert Path(files[2]) == package / "experiments"


def test_the_command_of_a_wheel_answers_help(binaries: Path, tmp_path: Path) -> None:
    command = [str(binaries / "fedpet"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout


def test_a_bundle_is_small_and_holds_no_tests_or_results(bundle: Path) -> None:
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_200_000  # Flower takes 10 MB, packed
    top = {path.relative_to(bundle).parts[0] for path in files}
    assert top == {"pyproject.toml", "LICENSE", ".info", "fedpet", *FOLDERS}
    assert not (bundle / "benchmarks").exists()


def test_a_bundle_holds_its_own_package_and_both_apps(bundle: Path, tmp_path: Path) -> None:
    code = (
        f"sys.path.insert(0, {str(bundle)!r}); import simulations.server_app as server; "
        "import simulations.client_app as client; import fedpet.strategies; "
        "[type(server.app).__name__, type(client.app).__name__, fedpet.strategies.__file__]"
    )
    server, client, strategies = answer(code, cwd=tmp_path)
    assert (server, client) == ("ServerApp", "ClientApp")
    assert Path(strategies) == bundle / "strategies" / "__init__.py"


# What it says of itself


def test_the_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == fedpet.__version__
    assert importlib.metadata.version("fedpet") == fedpet.__version__


def test_the_app_knows_every_key_of_an_experiment_with_its_default(
    pyproject: dict[str, Any],
) -> None:
    written = pyproject["tool"]["flwr"]["app"]["config"]
    expected = Experiment().to_run_config()
    assert written == expected, "run scripts/app-config to write the table anew"
    assert [type(value) for value in written.values()] == [type(v) for v in expected.values()]
    assert Experiment.from_run_config(written) == Experiment()


@pytest.mark.parametrize("name", ["fedpet", "fedpet.strategies"])
def test_what_a_package_shows_is_what_its_all_names(name: str) -> None:
    package = importlib.import_module(name)
    shown = {
        member
        for member in dir(package)
        if not member.startswith("_") and not isinstance(getattr(package, member), types.ModuleType)
    }
    named = set(getattr(package, "__all__", ())) - {"__version__"}
    assert named == shown - {"annotations"}


def test_every_name_in_an_all_exists(repository: Path) -> None:
    for path in sorted(repository.glob("fedpet/**/*.py")):
        if "__all__" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(module_name(path, repository))
            assert [n for n in module.__all__ if not hasattr(module, n)] == [], module.__name__


def test_importing_fedpet_loads_nothing_heavy(repository: Path) -> None:
    loaded = answer("import fedpet; sorted(sys.modules)", cwd=repository)
    assert not {"torch", "numpy", "flwr", "transformers", "datasets"} & set(loaded)


# What it stands on


def test_every_dependency_is_pinned_within_its_range(
    pyproject: dict[str, Any], repository: Path
) -> None:
    pins = dict(
        line.split("==")
        for line in (repository / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = pyproject["project"]
    asked = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    asked += [one for group in project["optional-dependencies"].values() for one in group]
    for requirement in map(Requirement, asked):
        if requirement.name == "fedpet":  # an extra that brings others
            continue
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, pinned at {version}"


_LISTS = ("bundled", "language", "media")


def test_what_is_installed_names_no_index_and_no_host(repository: Path) -> None:
    for name in ("constraints.txt", *(f"requirements-{of}.txt" for of in _LISTS)):
        for line in (repository / name).read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{name}: {line}"
    for name in ("Makefile", "scripts/install", "pyproject.toml"):
        text = re.sub(r'= "https://arxiv\.org/abs/', "", (repository / name).read_text())  # papers
        assert "://" not in text, name


def test_every_foreign_import_is_a_declared_dependency(
    pyproject: dict[str, Any], repository: Path
) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in (
        "fast",
        "metrics",
        "data",
        "report",
        "language",
        "images",
        "generation",
        "quantised",
    ):
        wanted += extras[extra]
    declared = {canonicalize_name(Requirement(one).name) for one in wanted}
    declared.add("ray")  # in the exact version that flwr[simulation] asks for
    providers = importlib.metadata.packages_distributions()
    for path in sources(repository):
        for name in imports(path):
            top = name.split(".")[0]
            if top not in (*sys.stdlib_module_names, "fedpet"):
                provided_by = {canonicalize_name(one) for one in providers.get(top, [top])}
                assert provided_by & declared, f"{path.relative_to(repository)} imports {name}"


def test_a_node_s_modules_import_nothing_of_an_extra(repository: Path) -> None:
    extras = ("datasets", "pandas", "pyarrow", "matplotlib", "ray", "numba")
    loaded = answer(
        "import fedpet.client.worker, fedpet.client.supernode, fedpet.client.node; "
        "from fedpet.data import load_data; sorted(sys.modules)",
        cwd=repository,
    )
    assert {"torch", "flwr"} <= set(loaded)
    assert not {*extras, "transformers.trainer", "fedpet.server", "fedpet.report"} & set(loaded)


# Who may know whom: a stage imports those before it, and no later one

STAGES = [
    *("errors", "utils", "config", "data", "backbone", "codec", "pet", "training", "search"),
    *(
        "protocol",
        "client",
        "server",
        "strategies",
        "export",
        "run",
        "estimate",
        "report",
        "deploy",
        "cli",
    ),
]
KNOW_FLOWER = {"protocol", "client", "server", "run", "estimate"}


def test_the_stages_before_the_protocol_do_not_know_flower(repository: Path) -> None:
    for path in sorted(repository.glob("fedpet/*/**/*.py")):
        if stage_of(path, repository) not in KNOW_FLOWER:
            known = {name.split(".")[0] for name in imports(path)}
            assert not known & {"flwr", "ray"}, path.relative_to(repository)


def test_a_stage_imports_no_later_one(repository: Path) -> None:
    for path in sources(repository):
        stage = stage_of(path, repository)
        if stage in ("__init__", "simulations"):  # names are imported when they are asked for
            continue
        if stage == "tasks":  # a task's file holds what several stages ask of it
            continue
        for name in imports(path):
            if name.startswith("fedpet.") and (other := name.split(".")[1]) in STAGES:
                later = STAGES.index(other) > STAGES.index(stage)
                assert not later, f"{path.relative_to(repository)} imports {name}"


def test_no_module_name_is_used_twice(repository: Path) -> None:
    names = [path.stem for path in sources(repository) if not path.stem.startswith("__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def stage_of(path: Path, repository: Path) -> str:
    parts = path.relative_to(repository).with_suffix("").parts
    return parts[1] if parts[0] == "fedpet" else parts[0]


def sources(repository: Path) -> list[Path]:
    """Return the files that run in a federation: benchmarks and tests may import more."""
    patterns = ("fedpet/**/*.py", "strategies/**/*.py", "simulations/*.py")
    found = sorted(path for pattern in patterns for path in repository.glob(pattern))
    return [path for path in found if path != repository / "fedpet" / "strategies.py"]


def imports(path: Path) -> set[str]:
    """The modules that a file imports by their full name, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path, repository: Path) -> str:
    parts = path.relative_to(repository).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
