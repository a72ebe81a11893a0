"""Changes to other people's modules are taken back, whatever fails and whoever came after."""

from __future__ import annotations

import pytest

from flash_attn_npu._integrations.changes import Changes


def test_what_was_set_is_put_back_unless_replaced() -> None:
    theirs = {"a": 1, "b": 2}
    changes = Changes()
    changes.set(theirs, "a", 10)
    changes.set(theirs, "b", 20)
    changes.set(theirs, "a", 100)
    theirs["b"] = 3
    changes.undo()
    assert theirs == {"a": 1, "b": 3}
    theirs["a"] = 100
    changes.undo()
    assert theirs == {"a": 100, "b": 3}


def test_undo_is_written_down_before_the_change() -> None:
    class Refusing(dict[str, object]):
        def __setitem__(self, key: str, value: object) -> None:
            super().__setitem__(key, value)
            if value == "ours":
                raise KeyboardInterrupt

    theirs, changes = Refusing(a="old"), Changes()
    with pytest.raises(KeyboardInterrupt):
        changes.set(theirs, "a", "ours")
    changes.undo()
    assert theirs == {"a": "old"}


def test_one_that_fails_keeps_no_other_from_being_undone_and_is_tried_again() -> None:
    theirs, changes, fails = {"a": 1, "b": 2}, Changes(), [True]
    calls = []

    def failing() -> None:
        calls.append(1)
        if fails:
            raise RuntimeError("not now")

    changes.set(theirs, "a", 10)
    changes.before(failing)
    changes.set(theirs, "b", 20)
    with pytest.raises(RuntimeError, match="not now"):
        changes.undo()
    assert theirs == {"a": 1, "b": 2}
    fails.clear()
    changes.undo()
    changes.undo()
    assert len(calls) == 2


def test_an_interrupt_leaves_the_rest_for_the_next_call() -> None:
    theirs, changes, interrupts = {"a": 1}, Changes(), [True]

    def interrupted() -> None:
        if interrupts:
            raise KeyboardInterrupt

    changes.set(theirs, "a", 10)
    changes.before(interrupted)
    with pytest.raises(KeyboardInterrupt):
        changes.undo()
    assert theirs == {"a": 10}
    interrupts.clear()
    changes.undo()
    assert theirs == {"a": 1}
