"""A Python that has imported what is slow to import, and forks for every script that it runs.

A script that is about the order of imports needs an interpreter of its own, and most of what such a
one costs is importing torch. `Warm` starts one process that does it once; each `run` is a fork of
it, in which neither flash_attn_npu nor transformers nor torch_npu was ever imported. What is about
starting itself (the command line, start-up files, imports without torch) wants a real start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = ("numpy", "torch", "torch._dynamo", "torch.distributed.tensor")
NEVER = {"flash_attn_npu", "flash_attn", "transformers", "torch_npu"}
FOR_TRANSFORMERS = (
    *("huggingface_hub", "huggingface_hub.dataclasses", "tokenizers", "safetensors.torch"),
    *("httpx", "jinja2", "regex", "yaml", "filelock", "tqdm", "scipy.linalg", "scipy.stats"),
)
"""Where they are installed: packages that transformers imports, which know nothing of us."""


class Warm:
    """The process; it ends when it is closed or when whoever started it ends."""

    def __init__(self) -> None:
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, script: Path, environment: dict[str, str], path: list[str], warnings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script in its own folder, with `path` before sys.path and every warning as told."""
        out, err = script.with_suffix(".out"), script.with_suffix(".err")
        asked = {"script": str(script), "out": str(out), "err": str(err)}
        asked |= {"environment": environment, "path": path, "warnings": warnings}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(
            [sys.executable, str(script)], status, out.read_text(), err.read_text()
        )

    def close(self) -> None:
        self._process.__exit__(None, None, None)


def _prepare() -> None:
    del sys.path[0]  # the folder of this file
    for name in IMPORTED:
        importlib.import_module(name)
    for name in FOR_TRANSFORMERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = NEVER & sys.modules.keys()
    assert not loaded, f"a warm start has imported {loaded}"


def _become(asked: dict[str, Any]) -> None:
    """Run the script as the main program of this process."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.update(asked["environment"])
    script = Path(asked["script"])
    os.chdir(script.parent)
    sys.path[:0] = [str(script.parent), *asked["path"]]
    sys.argv[:] = [str(script)]
    sys.warnoptions[:] = [asked["warnings"]]
    warnings.resetwarnings()
    warnings.simplefilter(asked["warnings"])
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    exec(compile(script.read_text(), str(script), "exec"), vars(main))


def _status(asked: dict[str, Any]) -> int:
    """The exit status of the script, what it raised told on stderr as Python tells it."""
    try:
        _become(asked)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> NoReturn:
    """What Python does when a program ends, but for freeing every object of torch: that takes
    longer than most of the scripts."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    _prepare()
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            _end(_status(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
