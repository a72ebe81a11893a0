"""`python -m flash_attn_npu`, and the console script `flash-attn-npu`: from words to a command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ._commands import COMMANDS
from ._commands.starting import SCRIPT
from ._startup import PROVIDER
from ._version import FLASH_ATTN_VERSION

_EPILOG = """\
examples:
  {prog} train.py --lr 1e-4
  {prog} -m pytest tests
  {prog} -c "from flash_attn import flash_attn_func"
  {prog} -q --report used.json train.py
  python -m torch.distributed.run --nproc-per-node 8 -m flash_attn_npu train.py

Everything behind the script, the module or the command belongs to it; - is standard input. A
script that is called as a WORD is run by `run`. `{prog} WORD -h` explains one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` says, and return the exit status."""
    ours, words = split(list(sys.argv[1:] if argv is None else argv))
    parser = _parser()
    if any(word in ("-h", "--help", "--version") for word in ours):
        parser.parse_args(ours)
    if words and words[0] in COMMANDS and words[0] != "run":
        options = parser.parse_args([words[0], *ours, *words[1:]])
        try:
            return int(_command(words[0]).run(options))
        except BrokenPipeError:
            # `| head` has seen enough; Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    if words and words[0] == "run":
        more, words = split(words[1:])
        ours += more
    options = parser.parse_args(["run", *ours])
    options.program = words
    return int(_command("run").run(options))


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the rest from its first word on; `-mname` counts as `-m name`."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "-" or not word.startswith("-"):
            return argv[:position], argv[position:]
        flag, joined = word[:2], word[2:]
        if flag in ("-m", "-c"):
            return argv[:position], [flag, *([joined] if joined else []), *argv[position + 1 :]]
        position += 2 if word == "--report" else 1
    return argv, []


def _command(word: str) -> Any:
    return importlib.import_module(f"{__package__}._commands.{word}")


def _parser() -> argparse.ArgumentParser:
    script = os.path.basename(sys.argv[0] or "").removesuffix(".exe") == SCRIPT
    prog = SCRIPT if script else "python -m flash_attn_npu"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [-h] [--version] [WORD] [-q] [-v] [--report FILE] [--simulate]\n"
        "           (script | -m module | -c command | -) [args ...]",
        description="flash-attention's API on Ascend NPUs. Without a WORD, run a Python program\n"
        "in which `import flash_attn` gives flash_attn_npu.",
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(title="commands", metavar="WORD", dest="word", prog=prog)
    for word in COMMANDS:
        _command(word).add(subparsers)
    return parser


def _version() -> str:
    try:
        ours = metadata.version(PROVIDER)
    except metadata.PackageNotFoundError:
        ours = "not installed as a distribution"
    return f"{PROVIDER} {ours} (API of flash-attention {FLASH_ATTN_VERSION})"


if __name__ == "__main__":
    sys.exit(main())
