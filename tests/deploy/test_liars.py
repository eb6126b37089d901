"""Nodes that lie about their rows, their names and their number, or flood the server: in vain."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import tiny
from deployed import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAULTY = Path(__file__).parents[1] / "helpers" / "faulty_node"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows", clients=2, rows_per_client=8)
    return tiny.make_backbone(folder / "backbone"), rows


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("inflates", "says that it holds 4294967295 rows, and may hold 100"),
        ("squats:honest", "brings the name of 'honest'"),
        ("multiplies:1000", "brings 1000 clients and may bring 1"),
        ("floods:300", "has more bytes than the plan's replies can have"),
    ],
)
def test_a_lie_is_refused_by_name_and_the_honest_average_stays(
    files: tuple[Path, Path], tmp_path: Path, fault: str, words: str
) -> None:
    place = Place(files, tmp_path, ["honest", "liar"])
    changes = {"strategy_num_rounds": 1, "strategy_quorum": 0.5}
    changes["strategy_node_wait_seconds"] = 90.0
    with place.deploy(2, bounds={"max_rows": 100, "reply_mib": 8}, **changes) as real:
        real.start_server()
        real.register()
        real.start_node("liar", PYTHONPATH=str(FAULTY), FAULT=fault)
        real.start_node("honest")
        done = real.run(limit_seconds=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result, rounds = real.result("tiny-1"), real.rounds("tiny-1")
    for part in ("server", "nodes"):  # updates lie in the database, rows in the cache
        found = [path for path in (real.folder / part).rglob("*") if not path.is_symlink()]
        readable = [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]
        assert {path.name for path in readable} <= {"data.jsonl"}  # which this test wrote
    refused = [one for line in rounds for one in line["refused"]]
    assert {one["who"] for one in refused} == {"liar"}
    assert words in refused[0]["reason"]
    assert result["final_values_sha256"] == place.expected(["honest"], **changes)


def test_a_row_s_value_stays_on_the_node_where_it_is_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["honest", "mistyped"])
    with place.deploy(2, strategy_num_rounds=1, strategy_node_wait_seconds=90.0) as real:
        path = real.folder / "nodes" / "mistyped" / "data.jsonl"
        path.write_text(path.read_text() + '{"text": "a film", "label": "DIAGNOSIS-F32"}\n')
        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name)
        done = real.run(limit_seconds=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        said = real.log("mistyped")
        kept = [p for p in (real.folder / "server").rglob("*") if p.is_file()]
        assert not [path for path in kept if b"DIAGNOSIS" in path.read_bytes()]
        assert "DIAGNOSIS" not in done.stdout + done.stderr + real.log("server")
        refused = [one for line in real.rounds("tiny-1") for one in line["refused"]]
    assert {one["who"] for one in refused} == {"mistyped"}
    assert all("the node's log says why" in one["reason"] for one in refused)
    assert "DIAGNOSIS-F32" in said
