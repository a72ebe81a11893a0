"""The choice: the first candidate of a table that none of its rules refuses, as a plan.

There is one for attention and for everything row by row. A plan is made once for each distinct
thing that is asked and remembered, so all layers of a model share one. Under torch.compile nothing
is remembered, and counted and logged once for each graph, so that tracing leaves no trace in it.

How to add a kernel:
1. Write its file in `kernels`, with a `Kernel` for the kind of problem it is for; the docstring of
   `Kernel` says what its functions take and give.
2. Give it a row in the list of candidates of its kind, at the end of `table.attention` or
   `table.rowwise`, at its place in the order. What is passed over there is told to the user, unless
   it is a `shortcut`; so the function that gives the list leaves out what cannot be meant (the
   inference kernel, say, where no keys lie in a cache).
3. Say what it refuses: add its name, and a reason in the words of the caller's arguments, to each
   rule that concerns it. What no rule says is served.
The warnings, the report, compat_matrix.md and the tests of every cell follow from that.
A wrapper of a kernel is a `Kernel` too, `kernel._replace(forward=...)`, and stands in for it where
`_decide` makes the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch

from ...errors import UnsupportedError
from ..ground import policy, usage
from ..ground.absent import WORD, Absent, absent
from ..ground.chip import known_wrong
from ..ground.memory import Memo
from ..ground.records import named, replaced
from ..ground.settings import assumed, policy_here, verification
from ..ground.traced import note
from ..kernels.kernel import Kernel
from ..problems import attention, rowwise, transfer
from ..problems.rowwise import TORCH
from ..verification.kinds import Case, missed
from . import attention as attention_table
from . import cache as cache_table
from . import rowwise as rowwise_table
from .rule import Candidate, Table, disproved, reasons

__all__ = [
    "KERNELS",
    "ROWS",
    "Elsewhere",
    "Plan",
    "Verdict",
    "begin",
    "choose",
    "kinds",
    "on_ascend",
    "permit",
]
__all__ += ["plan", "recall", "refusals", "table_of"]

_plans: Memo[Hashable, Plan] = Memo("plans of calls", 512, nbytes=1 << 26)
recall = _plans.recall
"""The plan that was remembered for what is asked, None if there is none."""

_TABLES: dict[type, Table] = {
    attention.Problem: attention_table.WHOLE,
    rowwise.Rotation: rowwise_table.WHOLE,
    rowwise.Lookup: rowwise_table.WHOLE,
    rowwise.Norm: rowwise_table.WHOLE,
    rowwise.Gate: rowwise_table.WHOLE,
    rowwise.Geglu: rowwise_table.WHOLE,
    rowwise.Loss: rowwise_table.WHOLE,
    transfer.Append: cache_table.WHOLE,
    transfer.Gather: cache_table.WHOLE,
}

ROWS = frozenset(rule.name for table in _TABLES.values() for rule in table.rules)
KERNELS = frozenset((*attention_table.NAMES, *rowwise_table.ALL, *cache_table.ALL, TORCH))
"""By which reports name what they are about."""


def table_of(problem: Any) -> Table:
    """The table that is asked about a problem."""
    return _TABLES[type(problem)]


class Verdict(NamedTuple):
    """What the table said of one candidate: it was accepted if there are no reasons."""

    kernel: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kernel}: {', '.join(self.reasons)}"


@dataclass(eq=False)
class Plan:
    """What serves a call.

    problem: what the kernel is to compute.
    trace: the verdicts in the order in which candidates were asked, the accepted one last.
    reasons: what is told of those that were passed over.
    direct: the kernel's own differentiable function, None if its forward and backward serve.
    allowed: the same, where the policy is to be asked first, because others were passed over.
    few: how calls of a few rows on a CPU are served that have the key of this plan, if anyhow.
    tally: counts the calls, for the report; absent under torch.compile, where nothing is counted.
    """

    problem: Any
    candidate: Candidate
    kernel: Kernel
    trace: tuple[Verdict, ...]
    reasons: tuple[str, ...]
    direct: Callable[..., Any] | None
    allowed: Callable[..., Any] | None
    few: Callable[..., Any] | None = field(init=False, default=None)
    tally: usage.Tally = field(init=False)
    permitted: str | None = None
    """The policy that let this plan's last call pass: what it says once it has said."""

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def nbytes(self) -> int:
        return getattr(self.problem, "nbytes", 0)

    @cached_property
    def backward_tally(self) -> usage.Tally:
        """Counts backwards that this plan serves apart from its forwards, which have begun."""
        name, told = f"{self.problem.function} (backward)", self.tally.on_ascend
        return usage.tally(name, self.name, self.reasons, told)


def choose(problem: Any, key: Hashable = None) -> Plan:
    """What serves a call, which begins now: `plan`, and the policy asked, and the call counted.

    Raises:
        UnsupportedError: the call is composed, and the fallback policy is `error`.
    """
    found = plan(problem, key)
    if torch.compiler.is_compiling():
        work = not problem.empty
        note(problem.function, problem.device.type, found.name, found.reasons, work)
        return found
    return begin(found)


def plan(problem: Any, key: Hashable = None) -> Plan:
    """What serves a problem, and has not begun.

    Args:
        key: what `recall` will know the plan by, and knows none by yet; it must hold all that the
            problem, and the checks before it, depend on. The problem itself if None.
    """
    if torch.compiler.is_compiling():
        return _decide(problem)
    found = recall(problem) if key is None else None
    if found is None:
        found = _decide(problem)
        told = "" if problem.device.type == "npu" else str(on_ascend(problem, assumed()))
        found.tally = usage.tally(problem.function, found.name, found.reasons, told)
        _plans.put(problem if key is None else key, found)
    return found


def begin(found: Plan) -> Plan:
    """Ask the policy about a call and count it, before it is served by this plan."""
    # what it has let pass once it lets pass again
    if found.permitted is None or found.permitted != policy_here():
        permit(found)
    found.tally.calls += 1
    return found


def permit(found: Plan) -> None:
    """Apply the fallback policy to a plan; a problem without work loses nothing by no fusion."""
    if not found.reasons or found.problem.empty:
        return
    word = policy_here()
    if found.permitted != word:
        problem = found.problem
        meant = absent(word)
        if meant and problem.device.type != "npu":
            there = on_ascend(problem, meant)
            if not there.fused:
                policy.refuse(problem.function, there.reasons, f"{WORD} ({meant})")
        policy.permit(
            problem.function, problem.device, found.reasons, detour=found.candidate.detour
        )
        found.permitted = word


class Elsewhere(NamedTuple):
    """What would serve a problem on an Ascend that is not there.

    reasons: why kernels would be passed over there.
    """

    kernel: str
    fused: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if self.fused:
            return f"fused: {self.kernel}"
        return f"composed, because {'; '.join(self.reasons) or 'there is nothing to compute'}"


def on_ascend(problem: Any, there: Absent) -> Elsewhere:
    """What the table says of the same problem on another device."""
    if isinstance(problem, attention.Problem):
        moved: Any = replace(problem, device=cast(torch.device, there))
    else:
        moved = problem._replace(device=there)
    told: tuple[str, ...] = ()
    for candidate in _TABLES[type(problem)].candidates(moved):
        refused = refusals(candidate.name, moved)
        if not refused:
            fused = not told or candidate.detour is not None
            return Elsewhere(candidate.name, fused, told)
        if not candidate.shortcut:
            told = (*told, str(Verdict(candidate.name, refused)))
    return Elsewhere("none", False, told)


def refusals(kernel: str, problem: Any) -> tuple[str, ...]:
    """Why a kernel, or its autograd, may not serve a problem; empty if it may.

    Besides the rules a report of this very chip, CANN and torch_npu may have found it wrong.
    """
    rules = _TABLES[type(problem)].rules
    refused = reasons(rules, kernel, problem)
    found_wrong = known_wrong(problem.device)
    return (*refused, *disproved(rules, kernel, problem, found_wrong)) if found_wrong else refused


def _decide(problem: Any) -> Plan:
    """Ask the candidates one by one: the only place where a call is decided."""
    trace: tuple[Verdict, ...] = ()
    told: tuple[str, ...] = ()
    for candidate in _TABLES[type(problem)].candidates(problem):
        refused, kernel = refusals(candidate.name, problem), candidate.kernel
        if not refused and candidate.check is not None:
            kernel, refused = _checked(candidate, problem)
        verdict = Verdict(candidate.name, refused)
        trace = (*trace, verdict)
        if not verdict.reasons:
            direct = _direct(kernel, candidate.autograd, problem)
            ways = (None, direct) if told else (direct, None)
            return Plan(problem, candidate, kernel, trace, told, *ways)
        if not candidate.shortcut:
            told = (*told, str(verdict))
    raise UnsupportedError(
        problem.function,
        "a call that no kernel can serve",
        "; ".join(told),
        "change the arguments named here",
    )


def kinds(found: Plan) -> tuple[str, ...]:
    """What a plan's calls are confirmed by, in reports; empty of a kernel that is exact itself."""
    check = found.candidate.check
    if check is None:
        return ()
    return tuple(map(str, check.kinds(_case(found.candidate, found.problem))))


def _checked(candidate: Candidate, problem: Any) -> tuple[Kernel, tuple[str, ...]]:
    """The kernel, compared with exact arithmetic where it has to be, and why it may not serve."""
    kernel = candidate.kernel
    if torch.compiler.is_compiling():
        return kernel, _missed(candidate.name, problem)
    if verification() == "off" or candidate.check is None:
        return kernel, ()
    return candidate.check.over(_case(candidate, problem), kernel)


def _missed(name: str, problem: Any) -> tuple[str, ...]:
    """Why the graph that is traced must not hold a kernel: it was compared, or is compared now."""
    # a trace may begin anew, and must come by here alike when more is known; sizes, floats
    # and what is compared with them may be symbols in it, and a kernel that serves depends on one
    if isinstance(problem, rowwise.Rotation):
        plain: Any = replaced(problem, empty=False, nheads=1, rotary_dim=_even(problem.rotary_dim))
    elif isinstance(problem, rowwise.Norm):
        plain = replaced(problem, empty=False, dropout=False)
    elif isinstance(problem, rowwise.Loss):
        smoothing = 0.1 if problem.label_smoothing > 0 else 0.0
        scales = {"logit_scale": 1.0, "lse_square_scale": 0.0}
        plain = replaced(problem, empty=False, rows=1, label_smoothing=smoothing, **scales)
    else:
        return missed(name)
    return _compared(name, type(problem).__name__, tuple(named(plain).values()))


def _even(size: int) -> int:
    """The size itself, as a number: a symbol is specialised by the comparison."""
    for number in range(2, rowwise_table.MAX_ROTARY_DIM, 2):
        if size == number:
            return number
    return rowwise_table.MAX_ROTARY_DIM


def _compared(name: str, kind: str, fields: tuple[Any, ...]) -> tuple[str, ...]:
    from ..verification.graphs import PROBLEMS, found_wrong

    problem = PROBLEMS[kind](*fields)
    for candidate in _TABLES[type(problem)].candidates(problem):
        if candidate.name == name and candidate.check is not None:
            return found_wrong(candidate.check, _case(candidate, problem), candidate.kernel)
    return ()


# what torch.compiler.assume_constant_result sets: it runs while a graph is traced, untraced
_compared._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _case(candidate: Candidate, problem: Any) -> Case:
    # every rule of the other table is about what some operator refuses, so none is present here
    rules = attention_table.TABLE if isinstance(problem, attention.Problem) else ()
    return Case(
        candidate.name,
        problem,
        tuple(rule.name for rule in rules if rule.present(problem)),
        autograd=candidate.kernel.direct is not None
        and not _own_refused(candidate.autograd, problem),
        instead=lambda: _decide(problem).kernel,
        forget=_plans.clear,
    )


def _own_refused(autograd: str | None, problem: Any) -> bool:
    return autograd is not None and bool(refusals(autograd, problem))


def _direct(kernel: Kernel, autograd: str | None, problem: Any) -> Callable[..., Any] | None:
    if kernel.direct is None or _own_refused(autograd, problem):
        return None
    return kernel.direct(problem)
