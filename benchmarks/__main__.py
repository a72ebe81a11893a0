"""Time and memory of this package beside their baselines, and the bounds they are held to.

    python -m benchmarks [--check] [-o FILE] [--plots FOLDER] [--only TEXT] [--quick]

Each figure is measured in turns with its baseline in the same run. Times are process time on one
thread (wall time with `--threads` above 1), medians of pairs; a ratio is ours / theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch

from . import costs, plots, rows, speed
from .figures import QUICK, Clock, Figure, Measure, Run, Sizes, verdicts

Held = dict[str, Any]


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bound is missed")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--merge", action="store_true", help="keep what else the output file has")
    parser.add_argument("--plots", type=Path, help="folder for PNG plots; needs matplotlib")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has this in it")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure, about")
    options = parser.parse_args(arguments)
    if options.output and not options.output.parent.is_dir():
        # known before minutes of measuring rather than after
        parser.error(f"-o {options.output}: {options.output.parent} is no folder; make it first")
    return options


def machine(threads: int) -> Held:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "clock": "process time" if threads == 1 else "wall time",
        "date": time.strftime("%Y-%m-%d"),
    }


def cases_of(run: Run) -> dict[str, Measure]:
    return speed.cases(run) | rows.cases(run) | costs.cases(run)


def measure(run: Run, only: list[str]) -> tuple[list[Figure], dict[str, str]]:
    """The figures, printed as they come, and why a case gave none."""
    figures: list[Figure] = []
    without: dict[str, str] = {}
    for name, case in cases_of(run).items():
        if not any(text in name for text in only):
            continue
        try:
            found = case(run)
        except (ImportError, RuntimeError) as error:
            without[name] = f"{type(error).__name__}: {error}"
            print(f"not measured: {name}: {without[name]}", flush=True)
            continue
        for figure in found:
            print(line_of(figure), flush=True)
        figures += found
    return figures, without


def line_of(figure: Figure) -> str:
    value = f"{figure.value:8.3f}{figure.unit}"
    if figure.ours is None or figure.theirs is None:
        return f"{value:12} {figure.name}"
    return f"{value:12} {figure.name}  ({figure.ours:.4g} : {figure.theirs:.4g})"


def merged(held: Held, before: Held) -> Held:
    """What was measured now, and of an earlier file what was not."""
    names = {figure["name"] for figure in held["figures"]}
    lengths = {point["length"] for point in held["curves"]}
    figures = [figure for figure in before["figures"] if figure["name"] not in names]
    curves = [point for point in before["curves"] if point["length"] not in lengths]
    figures, curves = figures + held["figures"], curves + held["curves"]
    return {
        **held,
        "figures": figures,
        "curves": curves,
        "bounds": verdicts(Figure(**figure) for figure in figures),
    }


def print_check(bounds: list[Held]) -> bool:
    """Whether nothing was missed."""
    print(f"\n{'bound':>8} {'worst':>8} {'median':>8}")
    for bound in bounds:
        if bound["met"] is None:
            print(f"{bound['limit']:8g} {'':8} {'':8}  not measured  {bound['text']}")
            continue
        told = "met   " if bound["met"] else "MISSED"
        print(
            f"{bound['limit']:8g} {bound['worst']:8.3f} {bound['median']:8.3f}  {told}  "
            f"{bound['text']} ({len(bound['missed'])} of {bound['measured']} above; "
            f"worst: {bound['worst_at']})"
        )
    return not any(bound["missed"] for bound in bounds)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = time.process_time if options.threads == 1 else time.perf_counter
    clock = Clock(now, 0.05 if options.quick else options.seconds)
    run = Run(clock, QUICK if options.quick else Sizes(), options.threads)
    if options.list:
        print("\n".join(cases_of(run)))
        return 0
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        options.plots = None
    figures, without = measure(run, options.only)
    held: Held = {
        "machine": machine(options.threads),
        "figures": [asdict(figure) for figure in figures],
        "bounds": verdicts(figures),
        "not_measured": without,
        "curves": run.curves,
    }
    if options.output:
        if options.merge and options.output.exists():
            held = merged(held, json.loads(options.output.read_text()))
        options.output.write_text(json.dumps(held, indent=1) + "\n")
    if options.plots and held["curves"]:
        for path in plots.draw(held["curves"], options.plots):
            print(f"wrote {path}")
    good = print_check(held["bounds"]) if options.check else True
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
