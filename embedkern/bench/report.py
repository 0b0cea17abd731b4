"""Runs the suites, each in a process of its own, and writes what they measured as a CSV, a table and a plot."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from ..machine import cpu_name
from ..version import __version__
from .harness import Row


def run(suites: Sequence[str], out: Path | None) -> int:
    """A suite leaves its process changed (kept memory, threads), so each gets a fresh one that prints CSV lines."""
    rows: list[Row] = []
    for suite in suites:
        code = f"from embedkern.bench import report; report.print_suite({suite!r})"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for record in csv.reader(process.stdout):
                row = Row(*record[:3], *map(float, record[3:6]), *record[6:])  # type: ignore[arg-type]
                rows.append(row)
                print(_line(row), flush=True)
        if process.returncode:
            print(f"suite {suite} failed with exit status {process.returncode}")
            return 1
        if out is not None:  # after each: all of them take half an hour and more
            write(rows, out)
    return 0


def print_suite(suite: str) -> None:
    writer = csv.writer(sys.stdout)
    for row in importlib.import_module(f"embedkern.bench.{suite}").rows():
        writer.writerow(asdict(row).values())
        sys.stdout.flush()


def _line(row: Row) -> str:
    times = f"{row.ours:.4g} against {row.peer:.4g} {row.unit}"
    return f"{row.suite}: {row.work}, against {row.against}: {times}, ratio {row.ratio:.2f} (goal {row.goal})"


def write(rows: Iterable[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    with (out / "bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)] + ["machine", "torch", "embedkern"])
        for row in rows:
            writer.writerow([*asdict(row).values(), machine, torch.__version__, __version__])
    with (out / "bench.md").open("w") as file:
        file.write(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.\n\n")
        file.write("| what | against | ours | peer | | ratio | goal |\n| --- | --- | --- | --- | --- | --- | --- |\n")
        for r in rows:
            file.write(
                f"| {r.work} | {r.against} | {r.ours:.4g} | {r.peer:.4g} | {r.unit} | {r.ratio:.2f} | {r.goal} |\n"
            )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([f"{row.work}\nagainst {row.against}" for row in rows], [row.ratio for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("ratio (how many times better than the peer, or the share of a peak)")
    figure.savefig(out / "bench.png", dpi=100)
