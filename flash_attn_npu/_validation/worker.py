"""The child that asks cases: a name on a line of standard input, its result as JSON on another.

What a case is served by is read from the plans that were made for it, so nothing is remembered from
the case before. It may die of a case; whoever started it then starts another.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .report import within

__all__ = ["main"]

REPETITIONS = 20
TIMED = re.compile(r"npu_(fusion_attention|fused_infer|rotary|rms|add_|swiglu|cross)")
_PATH = re.compile(r"(?:~|/)[\w.@+-]*(?:/[\w.@+-]+)+")


_simulated = False


def main(simulate: bool) -> None:
    """Answer until the input ends."""
    global _simulated
    _simulated = simulate
    if simulate:
        card = importlib.import_module("flash_attn_npu._virtual_ascend")
        reason = card.start()
        if reason is not None:
            _say(failed=f"the simulated card does not start: {reason}")
            return
        card.enable()
    try:
        machine = _machine()
    except Exception as error:
        _say(failed=harmless(error))
        return
    from .cases import NOT_ASKED, cases

    listed = [(case.name, case.row, case.quick) for case in cases()]
    _say(machine=machine, cases=listed, not_asked=NOT_ASKED)
    for line in sys.stdin:
        _say(**_asked(line.strip(), machine["device"]))


def _machine() -> dict[str, str]:
    import platform

    import torch

    try:
        importlib.import_module("torch_npu")
        device = "npu" if vars(torch)["npu"].device_count() else "cpu"
    except ImportError:
        device = "cpu"
    found = {"device": device, "soc": "", "cann": "", "torch_npu": ""}
    if device == "npu":
        from .._core.ground.chip import combination

        found |= combination(torch.device("npu:0"))._asdict()
    return {
        **found,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "architecture": platform.machine(),
    }


def _asked(name: str, where: str) -> dict[str, Any]:
    """The result of one case."""
    import torch

    from .cases import find

    case = find(name)
    device = torch.device("npu:0" if where == "npu" else "cpu")
    start = time.perf_counter()
    result: dict[str, Any] = {"name": name, "row": case.row, "kernel": "", "kinds": []}
    with _decided(case.row) as seen:
        try:
            answer = case.question.ask(device)
        except Exception as error:
            full = "out of memory" in str(error).lower()
            result |= {"status": "skipped" if full else "error", "note": harmless(error)}
            answer = {}
    figures, answers = answer if isinstance(answer, tuple) else (answer, {})
    # JSON has no infinities
    plain = {
        name: {key: value if math.isfinite(value) else None for key, value in one.items()}
        for name, one in figures.items()
    }
    result |= {"kernel": _kernel(case.row, seen.plans), "figures": plain, "answers": answers}
    result["kinds"] = sorted({*seen.kinds})
    if "status" not in result:
        result["status"] = "right" if all(map(within, plain.values())) else "wrong"
    # a simulated card takes its time, which says nothing
    timed = where == "npu" and not _simulated and result["status"] in ("right", "wrong")
    if timed and hasattr(case.question, "again"):
        result["time"] = _timed(case.question.again(device))
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


class _Seen(NamedTuple):
    """Plans that were made, and the kinds of calls that the check of first calls sees in them."""

    plans: list[Any]
    kinds: list[str]


@contextmanager
def _decided(row: str) -> Iterator[_Seen]:
    """What is decided meanwhile, all of it anew; said at once, as the child may die of it."""
    from .._core.ground.memory import forget_all
    from .._core.table import choice

    forget_all()
    seen = _Seen([], [])
    decide = choice._decide

    def noted(problem: Any) -> Any:
        plan = decide(problem)
        seen.plans.append(plan)
        seen.kinds.extend(choice.kinds(plan))
        _say(serving=_kernel(row, seen.plans))
        return plan

    choice._decide = noted
    try:
        yield seen
    finally:
        choice._decide = decide


def _kernel(row: str, plans: list[Any]) -> str:
    """What served the case: the last plan for a problem that has its row, else the first."""
    served = [plan.name for plan in plans if _present(row, plan)]
    return str((served[-1:] or [plan.name for plan in plans[:1]] or [""])[0])


def _present(row: str, plan: Any) -> bool:
    """Whether the problem of a plan has a row of the table that the plan was made from."""
    from .._core.table import choice

    rules = [rule for rule in choice.table_of(plan.problem).rules if rule.name == row]
    try:
        return any(rule.present(plan.problem) for rule in rules)
    except AttributeError:  # a row about problems of another type
        return False


def _timed(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of a call of ours, and of the one call of torch_npu that it makes."""
    import torch

    torch_npu: Any = sys.modules["torch_npu"]
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    originals = {name: getattr(torch_npu, name) for name in dir(torch_npu) if TIMED.match(name)}

    def recording(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            launches.append((function, args, kwargs))
            return function(*args, **kwargs)

        return run

    with torch.no_grad():
        for name, function in originals.items():
            setattr(torch_npu, name, recording(function))
        try:
            _decided_again(call)
        finally:
            for name, function in originals.items():
                setattr(torch_npu, name, function)
        found = {"ours_us": _microseconds(torch_npu, call)}
        if len(launches) == 1:
            function, args, kwargs = launches[0]
            found["direct_us"] = _microseconds(torch_npu, lambda: function(*args, **kwargs))
    return found


def _decided_again(call: Callable[[], Any]) -> None:
    from .._core.ground.memory import forget_all

    # what was prepared for a call may hold the function that was there before
    forget_all()
    call()
    forget_all()


def _microseconds(torch_npu: Any, call: Callable[[], Any]) -> float:
    call()
    torch_npu.npu.synchronize()
    start = time.perf_counter()
    for _ in range(REPETITIONS):
        call()
    torch_npu.npu.synchronize()
    return round((time.perf_counter() - start) / REPETITIONS * 1e6, 1)


def harmless(error: BaseException) -> str:
    """An error in one line without paths, which hold the names of people and machines."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _PATH.sub("(path)", text)[:400]


def _say(**told: Any) -> None:
    print(json.dumps(told), flush=True, file=sys.__stdout__)
