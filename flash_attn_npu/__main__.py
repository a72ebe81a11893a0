"""`python -m flash_attn_npu`: run a program in which `import flash_attn` gives this package."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from ._activation import install
from ._core.ground import usage
from .errors import ActivationError

_EPILOG = """\
examples:
  python -m flash_attn_npu train.py --lr 1e-4
  python -m torch.distributed.run --nproc-per-node 8 -m flash_attn_npu train.py
  python -m flash_attn_npu -c "from flash_attn import flash_attn_func"

Everything after the script, the module or the command belongs to it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Install, run what `argv` names as `__main__`, and say on stderr which kernels served."""
    ours, program = _split(list(sys.argv[1:] if argv is None else argv))
    options = _parser().parse_args(ours)
    if options.verbose:
        _log_to_stderr()
    if not program:
        _stop("nothing to run: name a script, -m module or -c command; see -h")
    try:
        install(children=True)
    except ActivationError as error:
        _stop(str(error))
    try:
        _run(program)
    finally:
        if not options.quiet and _speaks_for_all():
            for line in usage.summary().splitlines():
                print(f"flash_attn_npu: {line}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_npu",
        usage="%(prog)s [-h] [-q] [-v] (script | -m module | -c command) [args ...]",
        description="Run a Python program in which `import flash_attn` gives flash_attn_npu.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="do not say at the end which kernels served"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log to stderr what is done")
    return parser


def _speaks_for_all() -> bool:
    # a launcher tells its workers who they are; each would say the same
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", ""))
    return rank in ("", "0")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program with its arguments; `-mname` counts as `-m name`."""
    for position, word in enumerate(argv):
        if not word.startswith("-"):
            return argv[:position], argv[position:]
        flag, joined = word[:2], word[2:]
        if flag in ("-m", "-c"):
            return argv[:position], [flag, *([joined] if joined else []), *argv[position + 1 :]]
    return argv, []


def _run(program: list[str]) -> None:
    what, *rest = program
    if what in ("-m", "-c"):
        if not rest:
            _stop(f"{what} needs an argument; see -h")
        (_run_module if what == "-m" else _run_command)(rest[0], rest[1:])
    else:
        _run_script(what, rest)


def _run_script(path: str, args: list[str]) -> None:
    if not os.path.exists(path):
        _stop(f"can't open {path!r}: there is no such file")
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
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_command(code: str, args: list[str]) -> None:
    sys.argv = ["-c", *args]
    _first_on_path("")
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, "<string>", "exec", dont_inherit=True), vars(module))


def _first_on_path(folder: str) -> None:
    # Python put the current folder there for our own -m, unless told not to (-P, -I)
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path[0] = folder


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("flash_attn_npu")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
