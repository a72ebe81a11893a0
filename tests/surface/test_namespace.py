"""Every module of flash-attention: the names it has, and how they are called."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flash_attn_npu
from flash_attn_npu._surface import FROZEN, compared
from flash_attn_npu._surface.signatures import differences

MODULES = [name.partition(".")[2] for name in FROZEN]
NEVER = (
    "flash_attn.cute",
    "flash_attn.flash_attention",
    "flash_attn_3",
    "flash_attn_2_cuda",
    "dropout_layer_norm",
    "rotary_emb",
    "fused_dense_lib",
    "xentropy_cuda_lib",
)
"""Names whose mere presence makes clients take another path."""


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "flash_attn")
def test_is_as_upstream_has_it(module: str) -> None:
    assert [str(defect) for defect in compared().modules[module].defects] == []


def test_nothing_else_is_exposed_and_every_rule_speaks_of_something() -> None:
    assert [str(defect) for defect in compared().defects] == []


def test_every_upstream_name_is_accounted_for() -> None:
    for module in compared().modules.values():
        defective = {defect.name.partition(".")[0] for defect in module.defects}
        accounted = {*module.served, *module.absent, *defective}
        assert not module.present or set(module.upstream) <= accounted


APPLIED = {
    "bert_padding": {
        "index_first_axis": "IndexFirstAxis",
        "index_put_first_axis": "IndexPutFirstAxis",
        "index_first_axis_residual": "IndexFirstAxisResidual",
    },
    "ops.activations": {
        "bias_gelu_impl": "GeLUFunction",
        "fast_gelu_impl": "FastGeLUFunction",
        "swiglu": "SwiGLUFunction",
    },
    "utils.distributed": {
        "all_gather": "AllGatherFunc",
        "all_reduce": "AllReduceFunc",
        "reduce_scatter": "ReduceScatterFunc",
    },
}
"""Upstream calls the class, and the surface says no more of the name than that it is a value."""


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in APPLIED.items() for name in names]
)
def test_what_upstream_applies_takes_the_parameters_of_its_class(module: str, name: str) -> None:
    served = importlib.import_module(f"flash_attn_npu.{module}")
    function, of_class = getattr(served, name), APPLIED[module][name]
    if function == getattr(served, of_class).apply:
        return
    forward = FROZEN[f"flash_attn.{module}"][of_class]["methods"]["forward"]
    assert differences(forward[1:], function, vars(served)) == []


def test_aliases_are_the_same_object() -> None:
    rotary = importlib.import_module("flash_attn_npu.layers.rotary")
    assert rotary.apply_rotary_emb_func is rotary.apply_rotary_emb


@pytest.fixture
def installed() -> Iterator[None]:
    with flash_attn_npu.install():
        yield


@pytest.mark.usefixtures("installed")
def test_what_is_served_is_found_under_its_name() -> None:
    for name, module in compared().modules.items():
        full = f"flash_attn.{name}".rstrip(".")
        if module.present:
            assert importlib.util.find_spec(full) is not None, full
            served = importlib.import_module(full)
            assert all(hasattr(served, one) for one in module.served)


@pytest.mark.usefixtures("installed")
def test_what_is_not_served_is_absent() -> None:
    not_served = [
        f"flash_attn.{name}" for name, module in compared().modules.items() if not module.present
    ]
    for full in (*not_served, *NEVER):
        try:
            spec = importlib.util.find_spec(full)
        except ModuleNotFoundError:
            # the package above is absent too
            assert full.rpartition(".")[0] in not_served
            spec = None
        assert spec is None, full
        with pytest.raises(ModuleNotFoundError):
            exec(f"from {full} import anything")


def test_only_the_surface_reads_itself() -> None:
    package = Path(next(iter(flash_attn_npu.__path__)))
    readers = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"^(from|import) .*\b_surface\b", file.read_text(), re.MULTILINE)
    }
    assert not readers, "importing the package must not read upstream's surface"


def test_an_import_reads_what_a_cpu_asks_for() -> None:
    """What only a card, or only a report, asks for waits."""
    later = ("_diagnosis", "_core.verification.attention", "_core.verification.rowwise")
    later += ("_core.verification.cache", "_surface", "_validation", "_virtual_ascend", "models")
    names = tuple(f"flash_attn_npu.{name}" for name in later)
    program = f"""
import sys
import torch
before = set(sys.modules)
import flash_attn_npu
new = set(sys.modules) - before
print(sorted(name for name in new if name.startswith({names})))
print(*(name for name in ("packaging.version", "transformers", "torch_npu") if name in new))
flash_attn_npu.doctor
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n") == ["[]", "", ""], done.stdout
