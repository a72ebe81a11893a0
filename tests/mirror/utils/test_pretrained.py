"""`state_dict_from_pretrained` over checkpoints written by torch and by safetensors."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from flash_attn_npu.errors import ArgumentError, UnsupportedError
from flash_attn_npu.utils.pretrained import state_dict_from_pretrained

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([0.1, 0.2], dtype=torch.float64),
    "b.position_ids": torch.arange(5),
    "b.mask": torch.tensor([True, False]),
}


def _write(folder, form, sharded):
    save, name = torch.save, "pytorch_model.bin"
    if form == "safetensors":
        save = pytest.importorskip("safetensors.torch").save_file
        name = "model.safetensors"
    if not sharded:
        save(STATE, str(folder / name))
        return
    stem, ending = name.split(".")
    files = {}
    for i, key in enumerate(STATE):
        files[key] = f"{stem}-0000{i // 2 + 1}-of-00002.{ending}"
    for file in set(files.values()):
        part = {key: STATE[key] for key in STATE if files[key] == file}
        save(part, str(folder / file))
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))


def _equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].cpu(), tensor)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_local_folders(tmp_path, form, sharded):
    _write(tmp_path, form, sharded)
    _equal(state_dict_from_pretrained(str(tmp_path)), STATE)
    half = {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}
    _equal(state_dict_from_pretrained(tmp_path, dtype=torch.float16), half)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_device(tmp_path, device, dtype):
    _write(tmp_path, "bin", False)
    got = state_dict_from_pretrained(tmp_path, device=device, dtype=dtype)
    assert {tensor.device.type for tensor in got.values()} == {device.type}
    assert got["a.weight"].dtype == (dtype or torch.float32)
    assert torch.equal(got["b.position_ids"].cpu(), STATE["b.position_ids"])


def test_one_file_is_preferred_and_a_missing_part_is_named(tmp_path):
    _write(tmp_path, "bin", True)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ArgumentError, match=r"^model_name: .*model-00002-of-00002.bin, which "):
        state_dict_from_pretrained(tmp_path)
    _write(tmp_path, "safetensors", False)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    _equal(state_dict_from_pretrained(tmp_path), STATE)
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(state_dict_from_pretrained(tmp_path)) == ["other"]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=rf"^model_name: got {tmp_path}; allowed: .*; to fix"):
        state_dict_from_pretrained(tmp_path)


def _hub(monkeypatch, download):
    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    for error in ("EntryNotFoundError", "RepositoryNotFoundError", "HFValidationError"):
        setattr(errors, error, type(error, (Exception,), {}))
    hub.hf_hub_download = lambda name, file: download(name, file, errors.EntryNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


def test_what_is_no_folder_is_asked_for_from_the_hub(tmp_path, monkeypatch):
    _write(tmp_path, "bin", True)
    asked = []

    def download(name, file, absent):
        asked.append((name, file))
        if not (tmp_path / file).is_file():
            raise absent(file)
        return str(tmp_path / file)

    _hub(monkeypatch, download)
    _equal(state_dict_from_pretrained("some/model"), STATE)
    assert asked[:2] == [
        ("some/model", "pytorch_model.bin"),
        ("some/model", "pytorch_model.bin.index.json"),
    ]
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ArgumentError, match=r"^model_name: got some/model; allowed: "):
        state_dict_from_pretrained("some/model")


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "HFValidationError"])
def test_a_name_that_the_hub_does_not_know_is_named(monkeypatch, error):
    def download(name, file, absent):
        raise getattr(sys.modules["huggingface_hub.errors"], error)(name)

    _hub(monkeypatch, download)
    with pytest.raises(ArgumentError, match=r"^model_name: got /no/folder; allowed: .*; to fix"):
        state_dict_from_pretrained("/no/folder")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"huggingface_hub, to download some/model"):
        state_dict_from_pretrained("some/model")
    _write(tmp_path, "safetensors", False)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UnsupportedError, match=r"safetensors, to read model.safetensors; .*instal"):
        state_dict_from_pretrained(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    import pickle

    torch.save({"a": types.SimpleNamespace()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match=r"pytorch_model.bin: it cannot be read") as raised:
        state_dict_from_pretrained(tmp_path)
    assert isinstance(raised.value.__cause__, pickle.UnpicklingError)
