"""The check of a GPU, rehearsed on the processor; its table, and the committed result."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_check, cuda_clients, cuda_costs, cuda_laws, cuda_models, cuda_sections
from fedpet.pet.model import PetModel


def _found(section: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    place = cuda_models.Place("cpu", True, math.inf, found.__setitem__)
    cuda_sections.SECTIONS[section](place)
    return found


def test_all_laws_hold_on_the_processor() -> None:
    found = _found("laws")
    assert found["laws that do not hold"] == []
    assert all(found["tiny: masks are the same to the bit"].values())
    assert {f"tiny: {name}" for name in cuda_laws.LAWS} <= found.keys()


def test_a_law_that_does_not_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_laws, "LAWS", {"mask": (0.01, "none"), "lora": (0.0, "lora")})
    plain = PetModel.merged

    def forgets(pet: PetModel) -> Any:
        merged = plain(pet)
        merged.get_parameter("bert.embeddings.LayerNorm.weight").data[:] += 1.0
        return merged

    monkeypatch.setattr(PetModel, "merged", forgets)
    wrong = _found("laws")["laws that do not hold"]
    for name in ("mask", "lora"):
        assert f"tiny: {name}: merged equals adapted to 1e-5" in wrong
        assert f"tiny: {name}: untouched is bit-identical" in wrong


def test_the_rotation_by_torch_gives_the_bits_of_numpy() -> None:
    assert _found("rotation")["3 x 1000 values"]["the same bits"]


def test_the_sampled_product_is_compared_with_the_dense_one() -> None:
    for row in _found("sampled").values():
        assert row["sampled_addmm"]["error"] < 1e-5


@pytest.mark.parametrize("section", ["clients", "large"])
def test_clients_at_once_are_timed_beside_each_alone_and_differ_by_rounding(section: str) -> None:
    found = _found(section)
    differences = [value for name, value in found.items() if name.endswith("difference")]
    assert len(differences) == (1 if section == "large" else len(cuda_clients.METHODS))
    for difference in differences:
        for row in difference.values():
            assert row["most"] < 1e-5 < 1e-3 < row["moved"]
    timed = [value["trained"] for name, value in found.items() if name.endswith("at once")]
    assert timed == [2 if section == "large" else 6] * len(differences)


def test_a_section_that_fails_says_so_and_leaves_the_others_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(place: cuda_models.Place) -> None:
        place.found("before", 1)
        raise RuntimeError("an illegal access")

    monkeypatch.setitem(cuda_sections.SECTIONS, "rotation", breaks)
    assert cuda_check.main(["--out", str(tmp_path), "--section", "rotation"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"finding": "before", "value": 1}
    assert "an illegal access" in lines[1]["value"]


def test_the_file_keeps_what_an_earlier_call_found_of_other_sections(tmp_path: Path) -> None:
    path = tmp_path / cuda_check.FILE
    results = cuda_check.Results(path)
    results.begin("laws")
    results.put("laws", "mask", True)
    again = cuda_check.Results(path)
    again.begin("steps")
    again.put("steps", "full", 1.0)
    assert json.loads(path.read_text())["laws"]["mask"] is True


RESULT = Path(cuda_check.__file__).parent / "results" / "cuda_check.json"


def test_the_table_has_a_row_a_method_relative_to_bitfit_and_says_what_bounds_a_step() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    shown = cuda_check.as_text(found)
    lines = shown.splitlines()
    rows = [line for line in lines[: lines.index("")] if line.startswith("| ")]
    assert len(rows) == 1 + len(cuda_costs.METHODS)
    assert [len(row.split("|")) for row in rows] == [len(cuda_costs.SETTINGS) + 4] * len(rows)
    [floor] = [row for row in rows if row.startswith("| bitfit (torch) ")]
    assert floor.count(" 1.00 ") == len(cuda_costs.SETTINGS)
    assert "3.5 ms of a step of 19.8 ms" in " ".join(shown.split())
    found["steps"]["bert-base 32x128 full"]["step_ms"] = 2 * 41.714
    assert "| full | 1.01 | 2.00 |" in cuda_check.as_text(found)


def test_the_text_tells_seconds_of_a_round_by_clients_at_once_and_a_large_models_peak() -> None:
    timed = {"ms_a_client": 50.0, f"s_for_{cuda_clients.CLIENTS}": 50.0, "peak_MB": 2000.0}
    ways = ["one by one", *(f"{most} at once" for most in cuda_clients.AT_ONCE)]
    clients: dict[str, Any] = {"gpu": "card"}
    for method in cuda_clients.METHODS:
        clients[f"{method}: difference"] = {"sgd": {"most": 2e-7}}
        clients |= {f"{method}: {way}": timed for way in ways}
    model = {"parameters": 1.12e9, "mask_values": 1_056_964, "mask_s": 7.2}
    large = {"gpu": "card", "model": model, "one by one": timed, "8 at once": timed}
    sections = json.loads(RESULT.read_text(encoding="utf-8"))
    shown = cuda_check.as_text(sections | {"clients": clients, "large": large})
    assert "| mask-0.5% | 50.0 | 50.0 | 50.0 | 50.0 | 2,000 |" in shown
    assert "by 2e-07 at most" in " ".join(shown.split())
    assert "1.12 billion random parameters in float32 on one card" in " ".join(shown.split())
    assert "of 8 at once, at peaks of 2.0 and 2.0 GB" in " ".join(shown.split())


def test_the_committed_result_holds_every_law_and_names_no_place_on_a_machine() -> None:
    text = RESULT.read_text(encoding="utf-8")
    found = json.loads(text)
    assert all(section["status"] == "done" for section in found.values())
    assert found["laws"]["laws that do not hold"] == []
    assert found["suite"]["tests"][0].startswith("52 passed")
    runs = [run for run in found["run"].values() if isinstance(run, dict)]
    assert runs
    assert all(run["two runs there are the same to the bit"] for run in runs)
    assert not re.search(r"/(opt|home|root|usr|tmp|work|mnt)/", text)


def test_the_tests_that_ask_for_a_gpu_are_where_the_check_looks() -> None:
    assert (cuda_laws.ROOT / "tests" / "backbone" / "test_device.py").exists()
