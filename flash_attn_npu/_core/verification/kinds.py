"""Kinds of calls: which of them were compared with exact arithmetic, and what came of it.

On an Ascend whose combination of SoC, CANN and torch_npu no report confirms, the first call of
each kind is compared; it may raise instead. What then happens is one setting, `verification`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ...errors import UnsupportedError
from ..ground.capture import capturing
from ..ground.chip import combination
from ..ground.confirmed import confirmed
from ..ground.memory import Memo
from ..ground.settings import verification
from ..kernels.kernel import Kernel
from .judging import Finding

__all__ = [
    "MISSED",
    "RAISED",
    "Case",
    "Check",
    "Kind",
    "Refuted",
    "Verdict",
    "busy",
    "conclude",
    "missed",
    "raised",
    "refuted",
    "unsettled",
    "watched",
    "watching",
]

T = TypeVar("T")

logger = logging.getLogger("flash_attn_npu")

MISSED = "on this machine its first call did not agree with exact arithmetic"
RAISED = "on this machine its first call raised an error"
MOST_TRIES = 8
"""Calls that are looked at in the hope that their values tell something, before it is given up."""


class Kind(NamedTuple):
    """Calls that are alike for a kernel: all that it depends on but the lengths, as plain words.

    part: "forward", or how a gradient comes about: "gradient" by torch_npu's autograd, "gradient
        from softmax_lse" by the operator.
    headdim: the width of a head, or of what is rotated; 0 of the other operators.
    rows: of the table, those that are present.
    traits: what else there is, in the lengths above all: whether there are several sequences, and
        tiles, and whether the window cuts.
    """

    kernel: str
    part: str
    dtype: str
    headdim: int
    rows: tuple[str, ...]
    traits: tuple[str, ...]

    def __str__(self) -> str:
        words = (self.dtype, f"headdim {self.headdim}" if self.headdim else "", *self.traits)
        return f"{self.kernel}, {self.part}: {', '.join(filter(None, (*words, *self.rows)))}"


class Verdict(NamedTuple):
    """What came of the first call of a kind.

    tries: how many calls told nothing so far.
    why: a kind that does not agree is not served by its kernel.
    """

    agrees: bool
    tries: int = 0
    settled: bool = True
    why: str = ""


class Refuted(Exception):  # noqa: N818
    """A call was not served: its kind has just been found out not to agree, so ask again.

    Args:
        serve: gives what a function answers that asks again; what else it does is its own.
    """

    def __init__(self, serve: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        super().__init__()
        self._serve = serve

    def answer(self, ask: Callable[[], T]) -> T:
        """What `ask` answers, which asks again."""
        answer: T = ask() if self._serve is None else self._serve(ask)
        return answer


_verdicts: Memo[Kind, Verdict] = Memo("kinds of calls that were compared", 1024)
_wrong: Memo[str, str] = Memo("operators of which a kind does not serve", 64)


class Check(NamedTuple):
    """How the calls of some kernels are compared.

    kinds: those that a case is of. over: a kernel, compared where it has to be, and why it may not
        serve after all.
    """

    kinds: Callable[[Case], tuple[Kind, ...]]
    over: Callable[[Case, Kernel], tuple[Kernel, tuple[str, ...]]]


def unsettled(kind: Kind, device: torch.device) -> bool:
    """Whether a call of this kind is to be compared."""
    mode = verification()
    if mode == "off":
        return False
    known = _verdicts.recall(kind)
    if known is not None and known.settled:
        return mode == "always" and known.agrees
    return mode == "always" or not confirmed(*combination(device), kind)


def refuted(kind: Kind, function: str) -> tuple[str, ...]:
    """Why calls of this kind must not be served by its kernel any more; empty if they may.

    Raises:
        UnsupportedError: its numbers were wrong, and the setting is `refuse`.
    """
    known, mode = _verdicts.recall(kind), verification()
    if known is None or known.agrees or mode in ("off", "warn"):
        return ()
    if mode != "refuse":
        return (known.why,)
    if known.why == RAISED:
        # the error itself is to be seen
        return ()
    raise UnsupportedError(
        function,
        f"a call of a kind on which {kind.kernel} was found wrong ({kind})",
        "calls that agree with exact arithmetic, under FLASH_ATTN_NPU_VERIFY=refuse",
        "unset FLASH_ATTN_NPU_VERIFY to have it composed of torch operations, exactly",
    )


def watching(kind: Kind, problem: Any) -> bool:
    """Whether a call of this kind is to be compared, or not to be served: its plan may be older."""
    return unsettled(kind, problem.device) or bool(refuted(kind, problem.function))


def busy(tensor: torch.Tensor) -> bool:
    """Whether nothing may be read now: a graph is captured or traced, or there are no values."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
    traced = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    return not plain or bool(traced) or capturing()


def missed(kernel: str) -> tuple[str, ...]:
    """Why a graph that is traced does not use an operator: some kind of its calls is refuted."""
    why = _wrong.recall(kernel)
    return () if why is None else (why,)


# what torch.compiler.assume_constant_result sets, which would import all of dynamo
missed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Case(NamedTuple):
    """A kernel that is about to serve a problem.

    rows: of the table, those that are present in the problem.
    autograd: its own autograd serves.
    instead: the kernel that serves the problem after this one was found wrong.
    forget: drops every plan.
    """

    name: str
    problem: Any
    rows: tuple[str, ...]
    autograd: bool
    instead: Callable[[], Kernel]
    forget: Callable[[], None]


def watched(
    case: Case, kernel: Kernel, kinds: Sequence[Kind], watch: Callable[[], Kernel]
) -> tuple[Kernel, tuple[str, ...]]:
    """The kernel, compared by `watch` where it has to be, and why it may not serve after all."""
    problem = case.problem
    for kind in kinds:
        why = refuted(kind, problem.function)
        if why:
            return kernel, why
    if any(unsettled(kind, problem.device) for kind in kinds):
        return watch(), ()
    return kernel, ()


def conclude(case: Case, kind: Kind, findings: Sequence[Finding]) -> bool:
    """Settle a kind by what was found; whether it agrees.

    Args:
        findings: none where the values of the call told nothing.

    """
    wrong = [finding for finding in findings if not finding.agrees]
    mode = verification()
    if wrong:
        _verdicts.put(kind, Verdict(False, why=MISSED))
        found = f"does not agree with exact arithmetic: {'; '.join(map(str, wrong))}"
        _report(case, kind, MISSED, found)
    else:
        known = _verdicts.recall(kind)
        tries = 1 + (0 if known is None else known.tries)
        _verdicts.put(kind, Verdict(True, tries, bool(findings) or tries >= MOST_TRIES))
    # the plans that were made compare, or use what has just been found wrong
    case.forget()
    return not wrong or mode == "warn"


def raised(case: Case, kind: Kind, error: Exception, words: str, instead: Callable[[], T]) -> T:
    """What `instead` answers, asked with the kind settled: its launch raised an error.

    Raises:
        Exception: `error`, if `instead` cannot serve either, and nothing is settled then: it may
            be the machine.
    """
    before = _verdicts.recall(kind)
    _verdicts.put(kind, Verdict(False, why=RAISED))
    case.forget()
    try:
        answer = instead()
    except Exception as other:
        _verdicts.put(kind, before or Verdict(True, settled=False))
        case.forget()
        raise error from other
    _report(case, kind, RAISED, f"raised an error at its first call: {words}")
    return answer


REQUEST = (
    "Please report this line together with what `python -m flash_attn_npu doctor` prints: with it "
    "the kernel can be refused, or the comparison mended, for everybody"
)


def _report(case: Case, kind: Kind, why: str, found: str) -> None:
    mode, problem = verification(), case.problem
    if mode != "warn":
        _wrong.put(kind.kernel, why)
    consequence = {
        "warn": "it is used all the same (FLASH_ATTN_NPU_VERIFY=warn)",
        "refuse": "calls of this kind are refused (FLASH_ATTN_NPU_VERIFY=refuse)",
    }.get(mode, "calls of this kind are composed of torch operations from here on")
    here = f"{combination(problem.device)}, torch {torch.__version__}"
    told = f"in `{problem.function}` {kind.kernel} {found}; kind: {kind}; {here}"
    logger.error("flash_attn_npu: %s; %s. %s", told, consequence, REQUEST)
