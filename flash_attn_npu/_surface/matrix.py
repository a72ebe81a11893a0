"""compat_matrix.md, printed by `python -m flash_attn_npu._surface.matrix`.

The kernels' parts come from `table.attention` and `table.rowwise`, the
namespace's from the comparison of `_surface`. What is written out here cannot be computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .._core.ground.confirmed import combination_of, counting, told
from .._core.table import cache, rowwise
from .._core.table.attention import BLOCKWISE, FUSION, HOST, INFER, INFER_2, NAMES, TABLE
from .._core.table.rule import Rule
from .._version import FLASH_ATTN_VERSION
from . import compared, wheels
from .comparison import Module
from .exceptions import RULES

__all__ = ["matrix", "namespace"]


def _standing() -> str:
    found = [f"{combination_of(report)} ({name})" for name, report in counting()]
    if found:
        return f"Reports came from: {', '.join(found)}."
    return (
        "No Ascend machine has confirmed any of this: it\n"
        "holds for the real torch_npu 2.13.0 over a simulated card."
    )


_HEAD = f"""\
# Compatibility matrix

What each kernel does with each property of an attention problem. Printed from the table that
plans are made from (`flash_attn_npu/_core/table/attention.py`) by
`python -m flash_attn_npu._surface.matrix`; a test fails when this file differs, and another reaches
every cell.

- **native**: the kernel takes it. **refused**: it does not, for the reason given.
- **simulated**: no report of a card has looked at it. **confirmed on**: a report that somebody sent
  has, by `flash-attn-npu validate`, and it was right. **refuted on**: it was wrong, and with that
  chip, CANN and torch_npu the table refuses it.
- **fused**: on Ascend the call is one launch of `{FUSION}`, rows without keys and rows of no
  sequence being left out before it and filled in after it.
- **composed**: on Ascend the call is computed exactly from torch operations by `{BLOCKWISE}`, in
  memory linear in sequence length, with one logged reason. Off Ascend every call is, but on a
  CPU what `{HOST}` serves.
- **gathered**: the keys are copied out of the cache for `{FUSION}`, with one logged reason.
- **impossible**: no kernel takes it, and the call raises `UnsupportedError`.

`{INFER}` is asked only where the keys lie in a cache, and `{INFER_2}` before
it only where they do beside a sink: what it refuses is fused all the same, the sink added to the
answer of the first. A call is fused only if every property it has is native to the fused kernel.
{_standing()}

The API level is that of flash-attention {FLASH_ATTN_VERSION}.
"""

_ROWWISE = """\
## Rotary, norms, gates and losses

What torch_npu's other fused operators refuse, from the second table
(`flash_attn_npu/_core/table/rowwise.py`). What no line names is fused on Ascend; the rest is
composed of torch operations, exactly, with one logged reason. `layer_norm` is torch's own
operator, one kernel on Ascend. A residual of the same 16-bit dtype is added before the norm in that
dtype; composed, and with a residual in float32, the norm sees the sum as it was before rounding.

| a problem with | refused by | because |
| --- | --- | --- |
"""

_CACHE = """\
## Into a cache, and out of it

What torch_npu's operators refuse that write new keys and values into a cache, and copy keys out of
one, from the third table (`flash_attn_npu/_core/table/cache.py`). What no line names is one launch
on Ascend for keys and values together; the rest is one for each, with the same bits, and is not
reported.

| a call with | refused by | because |
| --- | --- | --- |
"""

_NAMESPACE = """\
## Namespace

Every name of every module of flash-attention, compared with the upstream surface frozen in
`flash_attn_npu/_surface/flash_attn.json`. A name counts as served if it is there with upstream's
parameters, their kinds and defaults, and upstream's base classes; a test fails for every other
one that has no reason here. A name or module that is absent raises `ImportError` when it is
imported, on which clients fall back.

| module | served | absent, and why |
| --- | --- | --- |
"""

_DIFFERENCES = """\
## Differences from flash-attention

| where | here |
| --- | --- |
| dtypes | float32 and float64 as well |
| headdim | any; upstream stops at 256 |
| `dropout_p` | other random bits than on a GPU; `torch.manual_seed` repeats them |
| `softcap` with `dropout_p` | computed; upstream refuses it |
| S_dmask | normalised probabilities, the sign the dropout; upstream's lack the last rescaling |
| `num_splits` | accepted; it changes no number here, on a GPU the last bits |
| pickled modules, exported graphs | name this package and its operators: they load where it is |
| `rng_state` | on the host; a negative offset marks a mask drawn by the composed kernel |
| `softmax_lse`, causal with ALiBi | of the documented bias; upstream's may differ by slope * row |
| `cu_seqlens_*` | may also be a tensor on the host or a list, at no cost |
| `max_seqlen_*` below the longest sequence | refused; upstream skips the rest silently |
| `max_seqlen_*` as a tensor on the device | not read; the longest sequence counts instead |
| forward-mode derivatives | refused; upstream has none either |
| rows past the last sequence | zeros and +inf; upstream leaves them unwritten |
| `softmax_lse` in a backward | read by its memory, as upstream does, where it is a permuted view |
| `bert_padding.rearrange`, `repeat` | einops' if it is installed; else our own, and no `repeat` |
| dropout of norms | masks are stored; upstream repeats them from seeds |
| `cross_entropy_loss` | a label that is no class is refused on the host, nan on a device |
| `utils.distributed.all_reduce_raw` | leaves its argument alone; upstream may write it |
| `utils.generation`, `cg=True` | runs without a graph: the same numbers, one warning |
| MHA while decoding | keeps its window; refuses what it would otherwise have to ignore |
| asserts on `is_cuda` and 16-bit dtypes | none |

Not a difference, though it surprises: as in flash-attention, a side of the window at least as long
as seqlen_k (max_seqlen_k for packed sequences) is unlimited, and beside a limited side an unlimited
one counts seqlen_k. So with window_size (1, -1) and more than twice as many queries as keys, the
first queries see nothing.
"""


def matrix() -> str:
    """The whole file, as text."""
    rows = "\n".join(_row(row) for row in TABLE)
    head = (
        f"| a problem with | {' | '.join(NAMES)} | on Ascend |\n"
        f"| --- |{' --- |' * len(NAMES)} --- |"
    )
    attention = f"## Attention\n\n{head}\n{rows}\n"
    rowwise_rules = f"{_ROWWISE}{_rules(rowwise.TABLE, rowwise.ALL)}\n"
    cache_rules = f"{_CACHE}{_rules(cache.TABLE, cache.ALL)}\n"
    kernels = (attention, rowwise_rules, cache_rules, wheels.table())
    parts = (_HEAD, *kernels, namespace(), _DIFFERENCES)
    return "\n".join(parts)


def _rules(table: tuple[Rule, ...], operators: tuple[str, ...]) -> str:
    lines = []
    for rule in table:
        if not rule.refused:
            continue
        whose = "all" if tuple(rule.refused) == operators else _listed(rule.refused)
        (why,) = set(rule.refused.values())
        lines.append(f"| {rule.name} | {whose} | {why} |")
    return "\n".join(lines)


def namespace() -> str:
    """The section about modules and names, as text."""
    modules = compared().modules.values()
    rows = "\n".join(_module(module) for module in modules)
    ours = [
        f"| `{_full(rule.module)}` | {_listed(rule.names)} | {rule.reason} |"
        for rule in RULES.added
    ] + [
        f"| `{_full(rule.module)}.{rule.function}` | {_listed(rule.parameters)} | {rule.reason} |"
        for rule in RULES.different
    ]
    return (
        f"{_NAMESPACE}{rows}\n\nNames and parameters of ours that upstream has not, or has "
        "otherwise:\n\n| where | what | why |\n| --- | --- | --- |\n" + "\n".join(ours) + "\n"
    )


def _module(module: Module) -> str:
    count = f"{len(module.served)} of {len(module.upstream)}"
    if not module.upstream:
        count = "package" if module.present else "no"
    return f"| `{_full(module.name)}` | {count} | {_absent(module)} |"


def _absent(module: Module) -> str:
    if module.reason is not None:
        return f"all: {module.reason}"
    by_reason: dict[str, list[str]] = {}
    for name, reason in _reasons(module).items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{_listed(names)}: {reason}" for reason, names in by_reason.items())


def _reasons(module: Module) -> Mapping[str, str]:
    wrong = {
        name: "not as upstream has it, a defect"
        for name in module.upstream
        if name not in module.served and name not in module.absent
    }
    return {**module.absent, **wrong}


def _full(module: str) -> str:
    return f"flash_attn.{module}".rstrip(".")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def outcome(rule: Rule) -> str:
    """What becomes, on Ascend, of a problem whose only unusual property is this one."""
    if rule.name.startswith("keys in a cache"):
        return "gathered" if INFER in rule.refused else "fused"
    if FUSION not in rule.refused:
        return "fused or impossible" if BLOCKWISE in rule.refused else "fused"
    return "impossible" if BLOCKWISE in rule.refused else "composed"


def _row(rule: Rule) -> str:
    cells = (_cell(rule, kernel) for kernel in NAMES)
    return f"| {rule.name} | {' | '.join(cells)} | {outcome(rule)} |"


def _cell(rule: Rule, kernel: str) -> str:
    if kernel in rule.refused:
        return f"refused: {rule.refused[kernel]}"
    ascend = kernel in (FUSION, INFER, INFER_2)
    return f"native, {told((rule.name, kernel))}" if ascend else "native"


if __name__ == "__main__":
    print(matrix(), end="")
