"""Learning rates by kind of module: each kind exists, is named once, and a search's own win."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedpet.config import SearchConfig, TrainingConfig
from fedpet.config.value_checks import rates_by_kind
from fedpet.errors import ConfigError
from fedpet.pet.structure import KINDS
from fedpet.search import resolve_settings


def settled(search: SearchConfig, training: TrainingConfig) -> SearchConfig:
    return resolve_settings(search, training, backbone_parameters=10**6)


def test_a_search_s_rate_of_a_kind_wins_over_training_s() -> None:
    training = TrainingConfig(learning_rate=0.2, learning_rates=("head=0.01", "mask=0.002"))
    found = settled(SearchConfig(learning_rates=("head=0.5", "lora=0.3")), training)
    assert [found.rate_of(kind) for kind in ("head", "lora", "mask", "bitfit")] == [
        *(0.5, 0.3, 0.002, 0.2)
    ]


def test_what_is_settled_names_a_kind_once_and_can_be_settled_again() -> None:
    training = TrainingConfig(learning_rates=(" head = 0.01", "mask=0.002"))
    found = settled(SearchConfig(learning_rates=("head=0.5",)), training)
    assert found.learning_rates == ("mask=0.002", "head=0.5")
    assert settled(found, training).learning_rates == found.learning_rates


def test_a_search_with_a_rate_for_all_kinds_takes_none_of_training_s() -> None:
    training = TrainingConfig(learning_rates=("mask=0.002",))
    assert settled(
        SearchConfig(learning_rate=0.1, learning_rates=("head=0.5",)), training
    ).learning_rates == ("head=0.5",)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (("haed=0.01",), r"which are mask, head, bitfit.*got 'haed=0\.01'"),
        (("Mask=0.01",), "must name kinds of modules"),
        (("=0.01",), "must name kinds of modules"),
        (("head=0.01", "lora=0.1", "head=0.02"), r"'head' twice, in 'head=0\.02'"),
        (("head=0.01", " head =0.01"), "'head' twice"),
        (("head=nan",), "finite rate above 0, got 'head=nan'"),
        (("head=inf",), "finite rate above 0"),
        (("mask=0.1", "head=-1"), "finite rate above 0, got 'head=-1'"),
        (("head",), "such as 'head=0.01'"),
    ],
)
def test_an_entry_that_would_do_nothing_or_harm_is_refused(
    entries: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.learning-rates .*{words}"):
        TrainingConfig(learning_rates=entries)
    with pytest.raises(ConfigError, match=rf"search\.learning-rates .*{words}"):
        SearchConfig(learning_rates=entries)


@pytest.mark.parametrize("kind", ["mask", "head", *KINDS])
def test_every_kind_that_a_model_may_have_can_be_named(kind: str) -> None:
    assert rates_by_kind([f"{kind}=0.01"], "training.learning-rates") == {kind: 0.01}
    assert TrainingConfig(learning_rates=(f"{kind}=0.01",)).rate_of(kind) == 0.01


def test_the_configuration_names_exactly_the_kinds_that_the_package_registers() -> None:
    code = "from fedpet.config.module_kinds import known_kinds as names; before = names()\n"
    code += "from fedpet.pet.structure import KINDS; print({*before} == {'mask', 'head', *KINDS})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True\n"
