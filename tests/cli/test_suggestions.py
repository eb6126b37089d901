"""Help before a run: the version, the nearest name, shell completion, no reports of usage."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedpet import __version__
from fedpet.utils.telemetry import OFF


def fedpet(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedpet.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_the_version_is_said() -> None:
    assert fedpet("--version").stdout == f"fedpet {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("simulat",), "'simulate'"),
        (("estimate", "--set", "mask.densty=0.1"), "'density'"),
        (("estimate", "--set", "masks.density=0.1"), "'mask'"),
        (("estimate", "--set", "codec.uplnk=eden-3"), "'uplink'"),
        (("estimate", "--set", "strategy.name=fedprx"), "'fedprox'"),
        (("estimate", "--set", "training.learning-rates=['haed=0.1']"), "'head'"),
        (("estimate", "film-reveiws"), "'film-reviews'"),
        (("estimate", "--set", "num-rounds=3"), "strategy.num-rounds"),
        (("estimate", "--modl", "x"), "'--model'"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(
    arguments: tuple[str, ...], nearest: str
) -> None:
    done = fedpet(*arguments)
    assert done.returncode == 2
    assert f"Did you mean {nearest}?" in " ".join(done.stderr.replace("│", " ").split())


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    done = fedpet("estimate", "--set", "mask.zzz=1")
    assert "Did you mean" not in done.stderr
    assert "Known are" in done.stderr


def test_bash_completes_commands_and_options() -> None:
    program = "import sys; sys.argv = ['fedpet']; from fedpet.cli.main import main; main()"

    def completed(words: str, number: int) -> list[str]:
        given = {
            "COMP_WORDS": words,
            "COMP_CWORD": str(number),
            "_FEDPET_COMPLETE": "complete_bash",
        }
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | given
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        return done.stdout.split()

    assert completed("fedpet si", 1) == ["simulate"]
    assert "--client-column" in completed("fedpet init --cl", 2)


def test_importing_fedpet_turns_telemetry_off_unless_the_user_set_it() -> None:
    program = f"import os, fedpet; print(*(os.environ[name] for name in {list(OFF)}))"
    bare = {name: value for name, value in os.environ.items() if name not in OFF}
    bare["PYTHONPATH"] = os.pathsep.join(sys.path)

    def values(**given: str) -> list[str]:
        command = [sys.executable, "-c", program]
        return subprocess.check_output(command, env=bare | given, text=True).split()

    assert values() == ["0", "1", "0"]
    assert values(FLWR_TELEMETRY_ENABLED="1") == ["1", "1", "0"]


def test_flower_imported_before_fedpet_sends_no_telemetry_either() -> None:
    program = (
        "import flwr.supercore.telemetry as t; assert t.FLWR_TELEMETRY_ENABLED == '1';"
        "import fedpet; print(t.FLWR_TELEMETRY_ENABLED)"
    )
    bare = {name: value for name, value in os.environ.items() if name not in OFF}
    bare["PYTHONPATH"] = os.pathsep.join(sys.path)
    assert subprocess.check_output([sys.executable, "-c", program], env=bare, text=True) == "0\n"
