"""Bytes by round, from a run's books: they never fall, end at the total, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpet.errors import InputError
from fedpet.protocol.ledger import Ledger
from fedpet.report.curves import read_curve, read_rounds
from fedpet.report.loading import read_report
from fedpet.report.results import read_results

amounts = st.integers(0, 10**12)
rounds_of_a_run = st.lists(
    st.tuples(amounts, amounts, amounts, st.none() | st.floats(0, 1)), min_size=1, max_size=12
)


def books(folder: Path, rounds: list[tuple[int, int, int, float | None]]) -> dict[str, Any]:
    """Books of any rounds, the last one measured, and the result they add up to."""
    file = folder / "rounds.jsonl"
    file.unlink(missing_ok=True)
    ledger = Ledger(file)
    for number, (up, down, plan, metric) in enumerate(rounds):
        record = ledger.begin(number)
        ledger.add_client_bytes(up=up, down=down, plan=plan)
        record.metric = 0.5 if number == len(rounds) - 1 else metric
        ledger.close()
    sums = {
        f"{kind}_bytes": ledger.total(f"{kind}_bytes") for kind in ("uplink", "downlink", "plan")
    }
    return {
        "path": str(folder / "result.json"),
        "communication": sums | {"total_bytes": sum(sums.values())},
        "quality": {
            "by_round": [
                {"round": record.round, "value": record.metric}
                for record in ledger.rounds
                if record.metric is not None
            ]
        },
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds_of_a_run)
def test_cumulative_bytes_never_fall_and_end_at_the_total(
    tmp_path: Path, rounds: list[tuple[int, int, int, float | None]]
) -> None:
    result = books(tmp_path, rounds)
    curve = read_curve(result)
    assert curve.exact
    for sent in ("up", "down", "both"):
        values = [getattr(point, sent) for point in curve.points]
        assert values == sorted(values)
    last = curve.points[-1]
    assert last.both == result["communication"]["total_bytes"]
    assert last.up == result["communication"]["uplink_bytes"]
    assert [point.metric for point in curve.points] == [
        point["value"] for point in result["quality"]["by_round"]
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds_of_a_run)
def test_a_result_without_its_rounds_ends_at_the_same_total_and_says_so(
    tmp_path: Path, rounds: list[tuple[int, int, int, float | None]]
) -> None:
    result = books(tmp_path, rounds) | {"path": str(tmp_path / "cell.json")}
    curve = read_curve(result)
    assert not curve.exact
    values = [point.both for point in curve.points]
    assert values == sorted(values)
    assert values[-1] == result["communication"]["total_bytes"]


def test_rounds_that_do_not_add_up_to_the_result_are_refused(runs: Path) -> None:
    file = runs / "fedpet" / "rounds.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match=r"add up to [\d,]+ uplink_bytes, result\.json .* says"):
        read_report(runs / "fedpet")


@pytest.mark.parametrize("line", ["{", "[]", '{"round": 1}', "3"])
def test_a_line_that_is_no_round_is_refused_by_its_number(runs: Path, line: str) -> None:
    with (runs / "fedpet" / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"line 6 of .*rounds\.jsonl' lacks "):
        read_rounds(read_results([runs / "fedpet"])[0])
