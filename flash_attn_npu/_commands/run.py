"""`run`: run a program in which `import flash_attn` gives this package."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import os
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from .._startup import VARIABLE
from ..errors import ActivationError, ArgumentError
from . import COMMANDS
from .outputs import writable
from .simulation import MARK, simulate
from .starting import complete

REPORT_SCHEMA = 1

_log = logging.getLogger("flash_attn_npu")


def add(subparsers: Any) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "run",
        help="run a program (may be left out)",
        description="Run a Python program in which `import flash_attn` gives flash_attn_npu.",
        usage="%(prog)s [-h] [-q] [-v] [--report FILE] [--simulate]\n"
        "           (script | -m module | -c command | -) [args ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="do not say at the end which kernels served"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log to stderr what is done")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write at the end which kernels served, as JSON; a launcher's rank N but 0 writes "
        "FILE with .rankN before its suffix",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="run on a simulated Ascend: torch_npu is real, the card under it is not",
    )


def run(options: argparse.Namespace) -> int:
    """Install, run the program as `__main__`, and say on stderr which kernels served."""
    if not options.program:
        _stop("nothing to run: name a script, -m module, -c command or -; see -h")
    report = _report_file(options)
    if options.verbose:
        _log_to_stderr()
    if options.simulate:
        _simulate()
    try:
        complete()
        from .. import _activation

        _activation.claim(children=True, fa3="fa3" in os.environ.get(VARIABLE, "").split(","))
    except (ActivationError, ArgumentError) as error:
        _stop(str(error))
    try:
        _run(options.program)
    finally:
        _tell(options, report)
    return 0


def _report_file(options: argparse.Namespace) -> Path | None:
    """Where this process writes its report; a program runs for hours before it is written."""
    if options.report is None:
        return None
    rank = _rank()
    try:
        file = writable("--report", options.report)
        if rank in ("", "0"):
            return file
        return writable("--report", str(file.with_name(f"{file.stem}.rank{rank}{file.suffix}")))
    except ArgumentError as error:
        _stop(str(error))


def _simulate() -> None:
    reason = simulate()
    if reason is not None:
        _stop(reason)


def _tell(options: argparse.Namespace, report: Path | None) -> None:
    from .._core.ground import usage

    if report is not None:
        _write_report(report, options.simulate)
    if not options.quiet and _rank() in ("", "0"):
        mark = f"{MARK}: " if options.simulate else ""
        for line in usage.summary().splitlines():
            print(f"flash_attn_npu: {mark}{line}", file=sys.stderr)


def _write_report(file: Path, simulated: bool) -> None:
    from .._core.ground import usage

    served = [vars(entry) for entry in usage.report().tallies]
    report = {"schema": REPORT_SCHEMA, "simulated": simulated, "served": served}
    text = json.dumps(report, indent=1)
    try:
        file.write_text(f"{text}\n")
    except OSError as error:
        # the exit status stays the program's
        _log.error("--report: %s is not written (%s); what it was to hold:", file, error.strerror)
        print(text, file=sys.stderr)


def _rank() -> str:
    # a launcher tells its workers who they are; each would say the same
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", ""))


def _run(program: list[str]) -> None:
    what, *rest = program
    if what in ("-m", "-c"):
        if not rest:
            _stop(f"{what} needs an argument; see -h")
        (_run_module if what == "-m" else _run_command)(rest[0], rest[1:])
    elif what == "-":
        sys.argv = ["-", *rest]
        _execute(sys.stdin.read(), "<stdin>")
    else:
        _run_script(what, rest)


def _run_script(path: str, args: list[str]) -> None:
    if not os.path.exists(path):
        meant = difflib.get_close_matches(path, COMMANDS, n=1)
        hint = f"; the command is called {meant[0]}" if meant else ""
        _stop(f"can't open {path!r}: there is no such file{hint}")
    if os.path.isdir(path) and not PathFinder.find_spec("__main__", [path]):
        _stop(f"can't find '__main__' module in {path!r}")
    sys.argv = [path, *args]
    _first_on_path(os.path.dirname(os.path.realpath(path)))
    runpy.run_path(path, run_name="__main__")


def _run_module(name: str, args: list[str]) -> None:
    _first_on_path(os.getcwd())
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        _stop(str(error))
    if found is None:
        _stop(f"no module named {name}")
    sys.argv = ["-m", *args]
    if found.submodule_search_locations and not importlib.util.find_spec(f"{name}.__main__"):
        _stop(f"no module named {name}.__main__; {name!r} is a package and cannot be executed")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_command(code: str, args: list[str]) -> None:
    sys.argv = ["-c", *args]
    _execute(code, "<string>")


def _execute(code: str, name: str) -> None:
    _first_on_path("")
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, name, "exec", dont_inherit=True), vars(module))


def _first_on_path(folder: str) -> None:
    # Python put the current folder there for our own -m, unless told not to (-P, -I)
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path[0] = folder


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
