"""install() and uninstall() interrupted at every line: a further uninstall() puts all back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

Script = Callable[..., str]

WORLD = """
import collections, contextlib, importlib, logging, os, sys, types
sys.modules["torch_npu"] = None     # not installed, as far as anybody can tell
import torch
import flash_attn_npu
from flash_attn_npu._activation import occupant
logging.disable()
# tested elsewhere, and slow: they walk all modules
occupant.references_to = occupant.holding = lambda names: []

names = ("utils", "utils.import_utils", "modeling_flash_attention_utils", "modeling_utils",
         "integrations.npu_flash_attention", "integrations.flash_attention")
if not CLIENT:
    names = ()
modules = [importlib.import_module(f"transformers.{name}") for name in names]

def state():
    return (
        [dict(vars(module)) for module in modules],
        CLIENT and dict(modules[2].FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]),
        CLIENT and modules[3].PreTrainedModel._check_and_adjust_attn_implementation,
        [list(logging.getLogger(module.__name__).filters) for module in modules],
        list(sys.meta_path),
        {name: module for name, module in sys.modules.items() if f"{name}.".startswith(
            "flash_attn.")},
        type(torch.ops.flash_attn),
        dict(os.environ),
    )

def ours(code):
    return "/flash_attn_npu/" in code.co_filename or code.co_filename == contextlib.__file__

def interrupted(function, line):
    # whether there was such a line, counted from 0, before which an interrupt could come; those
    # of a loop count twice
    left = line
    seen = collections.Counter()
    def trace(frame, event, argument):
        nonlocal left
        if not ours(frame.f_code):
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and seen[place] < 2:
            seen[place] += 1
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

def every_line(prepare, function):
    line = 0
    while True:
        prepare()
        more = interrupted(function, line)
        flash_attn_npu.uninstall()
        changed = [was for was, is_ in zip(before, state(), strict=True) if was != is_]
        if placeholder in sys.modules.values() or placeholder is None:
            assert not changed, (function, line)
        else:
            gone.append(line)
            sys.modules["flash_attn"] = placeholder
        assert not flash_attn_npu.installed()
        if not more:
            return line
        line += 1

def install():
    flash_attn_npu.install(force=True, children=True)

def nothing():
    pass
"""
OCCUPANTS = {
    "nobody": "",
    "a real one": "import flash_attn.core",
    "a block": "sys.modules['flash_attn'] = None",
    "a placeholder": "sys.modules['flash_attn'] = types.ModuleType('flash_attn')",
}


@pytest.mark.parametrize("occupant", OCCUPANTS)
def test_interrupts_at_every_line(script: Script, tmp_path: Path, occupant: str) -> None:
    real = tmp_path / "elsewhere" / "flash_attn"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("")
    (real / "core.py").write_text("")
    # one world with a client that is hooked is enough
    script(
        f"CLIENT = {occupant == 'a real one'}\n"
        + WORLD
        + OCCUPANTS[occupant]
        + """
before, gone = state(), []
placed = sys.modules.get("flash_attn")
placeholder = placed if getattr(placed, "__path__", 0) == 0 and placed is not None else None
lines = every_line(nothing, install)
assert lines > 90, lines
if placeholder is not None:
    # it goes for good with an install that has done its work
    assert min(gone) >= lines - 3, (gone, lines)
    raise SystemExit
lines = every_line(install, flash_attn_npu.uninstall)
assert lines > 40, lines
if CLIENT:
    raise SystemExit
claims = []
lines = every_line(lambda: claims.append(flash_attn_npu.install(force=True, children=True)),
                   lambda: claims[-1].uninstall())
assert lines > 40, lines
""",
        path=(real.parent,),
        warnings="ignore",
    )
