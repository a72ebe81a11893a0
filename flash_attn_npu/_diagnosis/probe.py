"""Facts that only an import can tell, found out in a child process, as the import may kill it.

The child runs the text of this very module, which may lie in a zip, as a command. It prints a line
of JSON after each stage, so what was found out before it died is kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["START", "Probed", "probe"]

PACKAGE = "flash_attn_npu"
START = "start"
"""What failed where a child did not come to its first stage: torch is not to blame."""

SIMULATED = "simulate"
SECONDS = 180


class Probed(NamedTuple):
    """What a child found out.

    facts: stage -> what it found.
    failed: the stage that ended it, None if all went well.
    why: the error, or the signal, in one line.
    """

    facts: dict[str, Any]
    failed: str | None = None
    why: str = ""


def probe(simulate: bool = False) -> Probed:
    """Import torch, torch_npu and this package in a child, and try a card if there is one."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    # it would tell of modules where the signal is what matters
    environment.pop("PYTHONFAULTHANDLER", None)
    environment.pop("FLASH_ATTN_NPU_INSTALL", None)
    text = (resources.files(__package__) / "probe.py").read_text(encoding="utf-8")
    command = [sys.executable, "-c", text, SIMULATED if simulate else "card", *sys.path]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        stdout = error.stdout or b""
        text = stdout.decode(errors="replace") if isinstance(stdout, bytes) else stdout
        return _read(text, f"no answer in {SECONDS} seconds")
    except OSError as error:
        return Probed({}, START, _line(error))
    return _read(done.stdout, _death(done.returncode, done.stderr))


def _read(stdout: str, death: str) -> Probed:
    facts: dict[str, Any] = {}
    failed: list[tuple[str, str]] = []
    stage = START
    for line in stdout.splitlines():
        if not line.startswith('{"stage"'):
            continue
        told = json.loads(line)
        stage = told["stage"]
        if told.get("begins"):
            continue
        if "error" in told:
            failed.append((stage, told["error"]))
        else:
            facts[stage] = told["found"]
    if death:
        failed.append((stage, death))
    return Probed(facts, *failed[0]) if failed else Probed(facts)


def _death(status: int, stderr: str) -> str:
    if status == 0:
        return ""
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")
    if status < 0:
        import signal

        return f"the process was killed by {signal.Signals(-status).name}; {last}".rstrip("; ")
    return f"the process ended with status {status}; {last}".rstrip("; ")


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "file": _folder(torch)}


def _torch_npu() -> dict[str, Any]:
    import torch_npu

    return {"version": str(torch_npu.__version__), "file": _folder(torch_npu)}


def _card() -> dict[str, Any]:
    import torch

    npu = vars(torch)["npu"]
    count = int(npu.device_count())
    found: dict[str, Any] = {"count": count}
    if count:
        from flash_attn_npu._core.ground.chip import combination

        found |= combination(torch.device("npu:0"))._asdict()
    return found


def _operators() -> list[dict[str, Any]]:
    from flash_attn_npu._core.ground import schemas
    from flash_attn_npu._core.table import installed

    found = []
    for need in installed.NEEDS:
        missing = [f"{name} is absent" for name, *_ in need.calls if not schemas.has(name)]
        missing += [
            f"{name} has no {argument}"
            for name, *arguments in need.calls
            if schemas.has(name)
            for argument in arguments
            if not schemas.has(name, argument)
        ]
        found.append(
            {
                "for": need.feature,
                "operators": [call[0] for call in need.calls],
                "missing": missing,
                "otherwise": need.otherwise or "composed",
            }
        )
    return found


def _attention() -> dict[str, Any]:
    """One small call, packed and causal, forward and backward: which kernel served it."""
    import torch

    import flash_attn_npu
    from flash_attn_npu._core.ground.settings import assumed

    device = "npu" if "npu" in vars(torch) and vars(torch)["npu"].device_count() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(48, 4, 64, generator=generator).to(torch.bfloat16).to(device).requires_grad_()
        for _ in range(3)
    )
    ends = torch.tensor([0, 16, 48], dtype=torch.int32, device=device)
    with flash_attn_npu.reporting() as report:
        out: Any = flash_attn_npu.flash_attn_varlen_func(q, k, v, ends, ends, 32, 32, causal=True)
        out.sum().backward()
    (tally,) = [entry for entry in report.tallies if "backward" not in entry.function]
    return {
        "device": device,
        "kernel": tally.kernel,
        "reasons": list(tally.reasons),
        "on_ascend": tally.on_ascend,
        "assumed": str(assumed()),
        "finite": bool(out.isfinite().all()) and all(x.grad is not None for x in (q, k, v)),
    }


def _clients() -> dict[str, Any]:
    """What transformers answers when it is asked for flash_attn while that is served by us."""
    import importlib.util

    import flash_attn_npu

    if importlib.util.find_spec("transformers") is None:
        return {}
    with flash_attn_npu.install():
        from transformers.utils import is_flash_attn_2_available

        return {"transformers": bool(is_flash_attn_2_available())}


STAGES: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("torch", _torch),
    ("torch_npu", _torch_npu),
    ("card", _card),
    ("operators", _operators),
    ("attention", _attention),
    ("clients", _clients),
)
NEED_TORCH_NPU = ("torch_npu", "card", "operators")


def _folder(module: Any) -> str:
    return str(Path(module.__file__).parent)


def _say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    """Go through the stages until one fails; a missing torch_npu is no failure."""
    word, *sys.path[:] = sys.argv[1:]
    if word == SIMULATED:
        _simulate()
    here = True
    for stage, find in STAGES:
        if stage in NEED_TORCH_NPU and not here:
            continue
        _say(stage=stage, begins=True)
        try:
            found = find()
        except ModuleNotFoundError as error:
            if stage != "torch_npu" or error.name != "torch_npu":
                _say(stage=stage, error=_line(error))
                return
            here, found = False, None
        except BaseException as error:
            _say(stage=stage, error=_line(error))
            if stage != "torch_npu":
                return
            # what is left can be done without it, if nothing tries again
            here, sys.modules["torch_npu"] = False, None  # type: ignore[assignment]
            continue
        _say(stage=stage, found=found)


def _simulate() -> None:
    from importlib import import_module

    card = import_module(f"{PACKAGE}._virtual_ascend")
    reason = card.start()
    if reason is not None:
        _say(stage="card", begins=True)
        _say(stage="card", error=f"the simulated card does not start: {reason}")
        raise SystemExit
    card.enable()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


if __name__ == "__main__":
    main()
