"""Everything that the package remembers between calls.

Each memo has a name, a bound, and is listed here, so that one call clears them all. There are two
kinds. `Memo` remembers answers under a key that holds all that they depend on: such an answer is
never stale. `PerTensorMemo` remembers what a tensor on a device holds, which would cost a copy to
look up again; what lies on the host costs none, and is never remembered by the tensor it lay in.

Only single operations on dictionaries touch shared state, so threads and forks need no lock.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar, cast

import torch

from .capture import capturing
from .unseen_writes import listen

__all__ = ["Memo", "PerTensorMemo", "forget_all", "forget_lengths", "held", "memos", "snapshot"]

_transforming = torch._C._are_functorch_transforms_active

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")

logger = logging.getLogger("flash_attn_npu")

_memos: list[weakref.ref[Memo[Any, Any]]] = []


class Memo(Generic[K, V]):
    """Answers by keys; when it is full, the oldest make room.

    The key must hold all that the answer depends on.

    Attributes:
        name: what is remembered, in a user's words.
        entries, nbytes: at most so many answers, and at most so many bytes of `held` by them; an
            answer that is larger by itself is not remembered. None where answers hold no tensors.
        contents: the answers are made of what tensors hold, so `forget_lengths` drops them.
        recall: the answer that is remembered for a key, None if there is none.
    """

    def __init__(
        self, name: str, entries: int, *, nbytes: int | None = None, contents: bool = False
    ) -> None:
        self.name, self.entries, self.nbytes, self.contents = name, entries, nbytes, contents
        self._known: dict[K, V] = {}
        self.recall: Callable[[K], V | None] = self._known.get
        _memos.append(weakref.ref(self))

    def put(self, key: K, answer: V) -> None:
        """Let `recall(key)` give `answer`.

        Tensors that are made while a graph is captured are not kept: they have values, and memory
        of their own, as long as the graph runs, and not before. Nor are those that are made inside
        of a torch.func transform, which wraps them for itself.
        """
        if self.nbytes is not None and (_transforming() or capturing()):
            return
        if self._make_room(answer):
            self._known[key] = answer

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def held(self) -> int:
        """Bytes of the tensors in all answers."""
        return sum(held(answer) for _, answer in snapshot(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def _make_room(self, answer: object) -> bool:
        free = None if self.nbytes is None else self.nbytes - held(answer)
        if free is not None and free < 0:
            return False
        if self._fits(free):
            return True
        for key in list(self._known):
            self._known.pop(key, None)
            if self._fits(free):
                break
        return True

    def _fits(self, free: int | None) -> bool:
        return len(self._known) < self.entries and (free is None or self.held() <= free)


_Reading = tuple[weakref.ref[torch.Tensor], int, int, int, T]
"""The tensor, its version counter, address and number of elements, and what was read of it."""


class PerTensorMemo(Memo[int, _Reading[T]]):
    """Results computed from the contents of tensors on devices, valid while those contents are.

    An entry answers only for the very same tensor object with the same version counter and the
    same memory, so neither an in-place change nor a reallocation can be served stale, and it goes
    when its tensor goes. Tensors on the host, and those made under `torch.inference_mode`, which
    have no version counter, are never remembered. Operators that move no counter are heard
    (`unseen_writes`). A write through `tensor.data`, by a collective of torch.distributed or by a
    kernel that PyTorch does not know is not: `forget_lengths` is for those.
    """

    def __init__(self, name: str, entries: int, *, nbytes: int | None = None) -> None:
        super().__init__(name, entries, nbytes=nbytes, contents=True)

    def known(self, tensor: Any) -> T | None:
        """What is remembered of `tensor`, None if nothing is."""
        entry = self.recall(id(tensor))
        if entry is not None:
            reference, version, address, numel, value = entry
            owner: Any = reference()
            if (
                owner is tensor
                and owner._version == version
                and owner.data_ptr() == address
                and owner.numel() == numel
            ):
                return value
        return None

    def get(self, tensor: torch.Tensor, compute: Callable[[torch.Tensor], T]) -> T:
        """What `compute(tensor)` returns, or returned when it was last asked."""
        known = self.known(tensor)
        if known is not None:
            if capturing():
                self._tell_of_graph()
            return known
        if not _can_be_remembered(tensor) or _transforming():
            return compute(tensor)
        # the counter is read first: a change during `compute` makes the entry stale, not wrong
        version = tensor._version
        value = compute(tensor)
        self._store(tensor, version, value)
        return value

    def _tell_of_graph(self) -> None:
        if _in_graphs.recall(self.name) is None:
            _in_graphs.put(self.name, True)
            logger.warning(
                "flash_attn_npu: a graph is captured with %s as they are now, which a replay goes "
                "on with whatever the tensor holds then: kernels take them from the host",
                self.name,
            )

    def tell(self, tensor: torch.Tensor, value: T) -> None:
        """Remember `value` as what the present contents of `tensor` give."""
        if _can_be_remembered(tensor):
            self._store(tensor, tensor._version, value)

    def drop(self, storages: set[int]) -> None:
        """Forget what was read of tensors in these storages, known by their addresses."""
        for key, entry in snapshot(self._known):
            owner = entry[0]()
            if owner is None or owner.untyped_storage().data_ptr() in storages:
                self._known.pop(key, None)

    def _store(self, tensor: torch.Tensor, version: int, value: T) -> None:
        try:
            address = tensor.data_ptr()
        except RuntimeError:
            # a tensor without memory of its own, inside a functorch transform
            return
        listen(_forget_memory)
        key, readings = id(tensor), self._known

        def gone(reference: weakref.ref[torch.Tensor]) -> None:
            entry = readings.get(key)
            if entry is not None and entry[0] is reference:
                readings.pop(key, None)

        owner = weakref.ref(tensor, gone)
        self.put(key, (owner, version, address, tensor.numel(), value))


_in_graphs: Memo[str, bool] = Memo("readings that a captured graph holds", 16)


def memos() -> tuple[Memo[Any, Any], ...]:
    """Every memo of the package, in the order in which its modules were imported."""
    listed = (reference() for reference in list(_memos))
    return tuple(memo for memo in listed if memo is not None)


def forget_all() -> None:
    """Drop everything that is remembered; the next calls find everything out again."""
    for memo in memos():
        memo.clear()


def forget_lengths() -> None:
    """Drop everything that was read from tensors; the next calls read it again.

    To be called after cumulative lengths, `cache_seqlens`, block tables, attention masks or
    position ids on a device were written in a way that PyTorch does not see: through
    `tensor.data`, by a collective of torch.distributed, or by a kernel of another library.
    What lies on the host is read at every call and needs no such word.
    """
    for memo in memos():
        if memo.contents:
            memo.clear()


def _forget_memory(storages: set[int]) -> None:
    for memo in memos():
        if isinstance(memo, PerTensorMemo):
            memo.drop(storages)


def held(value: object) -> int:
    """Bytes of the tensors in a value: in tuples, lists, dictionaries, and whatever has nbytes."""
    if isinstance(value, dict):
        return sum(held(part) for _, part in snapshot(value))
    if isinstance(value, (tuple, list)):
        return sum(map(held, value))
    return cast(int, getattr(value, "nbytes", 0))


def snapshot(shared: dict[K, V]) -> list[tuple[K, V]]:
    """The entries of a dictionary that other threads may change meanwhile.

    `list` of the keys runs without a pause for other threads. That of the items makes a tuple for
    each, which may start the garbage collector, and with it any finalizer.
    """
    entries = [(key, shared.get(key, _GONE)) for key in list(shared)]
    return [(key, cast(V, value)) for key, value in entries if value is not _GONE]


_GONE = object()


def _can_be_remembered(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu" and not tensor.is_inference()
