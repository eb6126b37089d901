"""Check fedpet on a GPU: its laws, and the cost of its steps.

    python -m benchmarks.cuda_check --out FOLDER [--minutes 8] [--sections laws steps]
    python -m benchmarks.cuda_check --out FOLDER --device cpu --tiny      # a rehearsal

Each section is a process of its own with a limit of its own, so that one that fails or hangs takes
nothing from the others. Its findings go into FOLDER/cuda_check.json at once; those of other
sections stay there. `cuda_laws.py` holds the sections that compare a GPU with the processor,
`cuda_costs.py` those that measure time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

FILE = "cuda_check.json"
# By value. Sections of one group are not timed and run side by side; each with its share of the
# time. A share is a limit: what a section leaves of it the next ones have.
GROUPS = (
    {"environment": 0.15},
    {"laws": 0.3, "suite": 0.3, "run": 0.3},
    {"steps": 0.4},
    {"profile": 0.15},
    {"sampled": 0.15},
    {"precision": 0.15},
    {"rotation": 0.1},
    {"clients": 0.4},
    {"large": 0.3},
)
FLOOR = "bitfit (torch)"
SPARE = 10.0  # s that a section is given to stop by itself, before it is stopped


class Results:
    """Write findings by section and name to a file, whole after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.sections: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.sections = json.loads(path.read_text(encoding="utf-8"))

    def begin(self, section: str) -> None:
        """Forget what an earlier run found of this section."""
        self.sections[section] = {"status": "running"}

    def put(self, section: str, name: str, value: Any) -> None:
        """Keep one finding."""
        with self._lock:
            self.sections[section][name] = value
            whole = self._path.with_suffix(".part")
            whole.write_text(json.dumps(self.sections, indent=1) + "\n", encoding="utf-8")
            whole.replace(self._path)


def _watch(pipe: IO[str], section: str, results: Results, shown: list[str]) -> None:
    """Keep the findings that a section prints as JSON lines, and the rest as its log."""
    for line in pipe:
        if line.startswith('{"finding": '):
            found = json.loads(line)
            results.put(section, found["finding"], found["value"])
        else:
            shown.append(line)
            del shown[:-200]


def _run_group(group: Sequence[str], limit: float, options: Any, results: Results) -> None:
    running = []
    for section in group:
        results.begin(section)
        command = [sys.executable, "-u", "-m", __spec__.name, "--section", section]
        command += ["--seconds", str(limit), "--device", options.device]
        command += ["--out", str(options.out)] + ["--tiny"] * options.tiny
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        shown: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(
            target=_watch, args=(process.stdout, section, results, shown), daemon=True
        )
        reader.start()
        running.append((section, process, reader, shown))
    started = time.monotonic()
    for section, process, reader, shown in running:
        status = "done"
        try:
            code = process.wait(max(limit + SPARE - (time.monotonic() - started), 0.1))
            if code:
                status = f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {limit + SPARE:.0f} s"
        reader.join(5)
        results.put(section, "seconds", round(time.monotonic() - started, 1))
        if status != "done":
            results.put(section, "log", "".join(shown)[-6000:])
        results.put(section, "status", status)
        print(f"{section}: {status}, {time.monotonic() - started:.0f} s", flush=True)


def _one_section(options: Any) -> int:
    """Run one section in this process, and print its findings."""

    def found(name: str, value: Any) -> None:
        print(json.dumps({"finding": name, "value": value}), flush=True)

    try:
        from benchmarks.cuda_models import Place
        from benchmarks.cuda_sections import SECTIONS

        place = Place(options.device, options.tiny, time.monotonic() + options.seconds, found)
        SECTIONS[options.section](place)
    except Exception:
        found("error", traceback.format_exc()[-6000:])
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the sections there is time for; return 0 if every one came to its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, few steps")
    parser.add_argument("--sections", nargs="+", default=[s for group in GROUPS for s in group])
    parser.add_argument("--section", help="of this process alone")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(arguments)
    if options.section:
        return _one_section(options)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / FILE)
    whole = 60 * options.minutes
    finish = time.monotonic() + whole
    for group in GROUPS:
        wanted = [section for section in group if section in options.sections]
        if not wanted:
            continue
        limit = min(max(map(group.__getitem__, wanted)) * whole, finish - time.monotonic() - SPARE)
        if limit < 10:
            for section in wanted:
                results.begin(section)
                results.put(section, "status", "no time was left")
            continue
        _run_group(wanted, limit, options, results)
    print(json.dumps(_summary(results.sections)), flush=True)
    return int(any(found["status"] != "done" for found in results.sections.values()))


def _summary(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return each section's short findings, which survive a log that is cut."""
    return {
        section: {
            name: value
            for name, value in found.items()
            if name in ("status", "error") or len(json.dumps(value)) < 250
        }
        for section, found in sections.items()
    }


def as_text(sections: dict[str, dict[str, Any]]) -> str:
    """Return Markdown: steps as multiples of BitFit's, their cost, clients at once where measured.

    Args:
        sections: As FOLDER/cuda_check.json holds them.
    """
    steps: dict[str, dict[str, dict[str, float]]] = {}  # setting -> method -> findings
    for name, row in sections["steps"].items():
        if isinstance(row, dict):
            model, batch, method = name.split(" ", 2)
            steps.setdefault(f"{model}, {batch.replace('x', ' x ')}", {})[method] = row
    # Here, so that a check that runs its sections elsewhere needs no torch.
    from benchmarks.cuda_clients import as_text as clients_as_text

    largest = "bert-base, 32 x 128"
    lines = [
        f"| | {' | '.join(steps)} | {largest}, peak MB |",
        "|---|" + "---:|" * (len(steps) + 1),
    ]
    for method in next(iter(steps.values())):
        cells = [
            f"{rows[method]['step_ms'] / rows[FLOOR]['step_ms']:.2f}" for rows in steps.values()
        ]
        peak = f"{steps[largest][method]['peak_MB']:,.0f}"
        lines.append(f"| {method} | {' | '.join(cells)} | {peak} |")
    busy = []
    for name, found in sections["profile"].items():
        if name.endswith(" mask-0.5%: profile"):
            model, batch, method = name.removesuffix(": profile").split(" ", 2)
            setting = f"{model}, {batch.replace('x', ' x ')}"
            took = steps[setting][method]["step_ms"]
            busy.append(
                f"on {setting} the GPU works {found['gpu_us_a_step'] / 1e3:.1f} ms of a step of "
                f"{took:.1f} ms, in {found['kernels_a_step']:.0f} kernels"
            )
    where = sections["environment"]
    paragraph = (
        f"A step's median time as a multiple of {FLOOR} on the same model and batch (rows x "
        f"tokens), and the peak memory of one setting; one run, {where['gpu']}, torch "
        f"{where['torch']}, float32; small steps vary by a third. With the 0.5 % mask, "
        f"{'; '.join(busy)}. Small steps are bound by launches from Python, not by arithmetic: "
        "there a mask saves memory and no time (`python -m benchmarks.cuda_check`)."
    )
    lines += ["", textwrap.fill(paragraph, 103, break_on_hyphens=False)]
    if more := clients_as_text(sections):
        lines += ["", more]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
