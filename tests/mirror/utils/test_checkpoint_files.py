"""Checkpoints that are wrong, or lead out of their folder: nothing is opened, and it is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn_npu._core.ground.usage import Report, Tally
from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.models import gpt, llama
from flash_attn_npu.utils.pretrained import state_dict_from_pretrained

SECRET = {"secret": torch.ones(2)}
INDEX = "pytorch_model.bin.index.json"
PARAMS = {"dim": 64, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": 50}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside a file that must not be opened."""
    torch.save(SECRET, tmp_path / "secret.bin")
    inner = tmp_path / "model"
    inner.mkdir()
    return inner


def _index(folder: Path, name: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.bin",
        "{absolute}",
        "sub/../../secret.bin",
        "..\\secret.bin",
        "C:\\secret.bin",
        "\\\\server\\secret.bin",
        "",
        ".",
        None,
        ["a.bin"],
        "a\0.bin",
    ],
)
def test_an_index_names_files_of_its_folder_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    if name == "{absolute}":
        name = str(folder.parent / "secret.bin")
    (folder / "sub").mkdir()
    _index(folder, name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(ArgumentError, match=r"^model_name: got .*; allowed: .*; to fix it: "):
        state_dict_from_pretrained(folder)


@pytest.mark.parametrize("where", ["file", "folder", "index", "part"])
def test_links_out_of_the_folder_are_not_followed(folder: Path, where: str) -> None:
    secret = folder.parent / "secret.bin"
    if where == "file":
        (folder / "pytorch_model.bin").symlink_to(secret)
    elif where == "folder":
        (folder / "sub").symlink_to(folder.parent)
        _index(folder, "sub/secret.bin")
    elif where == "index":
        (folder.parent / "index").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
        (folder / INDEX).symlink_to(folder.parent / "index")
    else:
        (folder / "a.bin").symlink_to(secret)
        _index(folder, "a.bin")
    with pytest.raises(
        ArgumentError, match=r"^model_name: got .*: it links to .*out of its folder"
    ):
        state_dict_from_pretrained(folder)


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    torch.save(SECRET, blobs / "0f")
    (snapshot / "a.bin").symlink_to(os.path.join("..", "..", "blobs", "0f"))
    (snapshot / "b.bin").symlink_to("a.bin")
    _index(snapshot, "b.bin")
    assert torch.equal(state_dict_from_pretrained(snapshot)["secret"], SECRET["secret"])
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert torch.equal(state_dict_from_pretrained(linked)["secret"], SECRET["secret"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("\xff", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "it holds a list"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": ["a.bin"]}', "it has no weight_map"),
        ('{"weight_map": {"w": 1}}', "its weight_map names 1"),
    ],
)
def test_a_malformed_index(folder: Path, content: str, words: str) -> None:
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(ArgumentError, match=rf"^model_name: got .*{INDEX}: {words}"):
        state_dict_from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "it holds a list"),
        (torch.ones(1), "it holds a Tensor"),
        ({"model": {"w": torch.ones(1)}}, "it holds a dict under 'model'; .*'model'"),
        ({"step": 3}, "it holds a int under 'step'"),
        ({1: torch.ones(1)}, "it holds a Tensor under 1"),
    ],
)
def test_what_is_no_checkpoint(folder: Path, content: Any, words: str) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match=rf"^model_name: got .*pytorch_model.bin: {words}"):
        state_dict_from_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_that_cannot_be_read(folder: Path, name: str, content: bytes) -> None:
    pytest.importorskip("safetensors")
    (folder / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=rf"^model_name: got .*{name}: it cannot be read"):
        state_dict_from_pretrained(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(({key: None}, f"its {key} is None") for key in ("dim", "n_heads", "norm_eps")),
        *(({key: "missing"}, f"it has no {key}") for key in ("dim", "n_layers", "norm_eps")),
        ({"dim": float("inf")}, "its dim is inf"),
        ({"norm_eps": float("nan")}, "its norm_eps is nan"),
        ({"n_heads": 0}, "its n_heads is 0"),
        ({"n_layers": -1}, "its n_layers is -1"),
        ({"n_layers": 1.5}, "its n_layers is 1.5"),
        ({"n_kv_heads": "2"}, "its n_kv_heads is '2'"),
        ({"multiple_of": 0}, "its multiple_of is 0"),
        ({"ffn_dim_multiplier": float("inf")}, "its ffn_dim_multiplier is inf"),
        ({"rope_theta": True}, "its rope_theta is True"),
        ({"vocab_size": 0}, "its vocab_size is 0"),
    ],
    ids=str,
)
def test_numbers_of_params_json(folder: Path, changed: dict[str, Any], words: str) -> None:
    pytest.importorskip("transformers")
    params = {k: v for k, v in {**PARAMS, **changed}.items() if v != "missing"}
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(ArgumentError, match=rf"^checkpoint_path, model_name: got .*: {words}"):
        llama.config_from_meta_checkpoint(folder.parent, "model")


def test_other_files_of_checkpoints(folder: Path) -> None:
    read: list[tuple[str, Callable[[], Any]]] = [
        ("params.json", lambda: llama.config_from_meta_checkpoint(folder.parent, "model")),
        ("config.json", lambda: gpt.GPTLMHeadModel.from_pretrained(folder, None)),
    ]
    for name, call in read:
        for content in ("", "[]", "nonsense"):
            (folder / name).write_text(content)
            with pytest.raises(ArgumentError, match=rf"{name}: it "):
                call()
    hf = folder.parent / "model-hf"
    hf.mkdir()
    (hf / "config.json").write_text("[]")
    with pytest.raises(ArgumentError, match=r"config.json: it holds a list"):
        llama.config_from_hf_checkpoint(folder.parent, "model")
    (folder / "params.json").unlink()
    (folder.parent / "params.json").write_text(json.dumps(PARAMS))
    (folder / "params.json").symlink_to(folder.parent / "params.json")
    with pytest.raises(ArgumentError, match=r"params.json: it links to .*out of its"):
        llama.config_from_meta_checkpoint(folder.parent, "model")


def test_parts_of_a_checkpoint_of_metas(folder: Path) -> None:
    for number in (0, 2, 10):
        torch.save({"w": torch.full((1,), number)}, folder / f"consolidated.{number:02d}.pth")
    torch.save(SECRET, folder / "consolidated.old.pth")
    parts = llama.state_dicts_from_checkpoint(folder.parent, "model")
    assert [int(part["w"]) for part in parts] == [0, 2, 10]
    torch.save([1], folder / "consolidated.01.pth")
    with pytest.raises(ArgumentError, match=r"consolidated.01.pth: it holds a list"):
        llama.state_dicts_from_checkpoint(folder.parent, "model")
    (folder / "consolidated.01.pth").unlink()
    (folder / "consolidated.01.pth").symlink_to(folder.parent / "secret.bin")
    with pytest.raises(ArgumentError, match=r"consolidated.01.pth: it links to "):
        llama.state_dicts_from_checkpoint(folder.parent, "model")


def test_a_name_forges_no_line_of_a_message(tmp_path: Path) -> None:
    _index(tmp_path, "a\nERROR: all is lost\x1b[31m.bin")
    with pytest.raises(ArgumentError) as raised:
        state_dict_from_pretrained(tmp_path)
    assert str(raised.value).isprintable()
    assert r"a\nERROR: all is lost\x1b[31m.bin" in str(raised.value)
    tallies = [Tally("one\ntwo", "torch", ("be\rcause",), 1), Tally("three", "torch", (), 2)]
    assert str(Report(tallies)).splitlines()[1] == r"one\ntwo  torch   1      be\rcause"
    assert len(str(Report(tallies)).splitlines()) == 3


def test_a_name_that_is_no_folder_forges_none_either(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ArgumentError) as raised:
        state_dict_from_pretrained(tmp_path / "no\nfolder/of\nmine\0")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("text", ["a\nb", "a\r\x1b[2Kb", "a\u2028b"])
def test_what_is_logged_of_a_checkpoint_is_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    named = folder / text
    named.mkdir()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, n_positions=4)
    (named / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    transformers.GPT2LMHeadModel(config).save_pretrained(named, safe_serialization=True)
    with caplog.at_level("INFO"):
        gpt.GPTLMHeadModel.from_pretrained(named, config)
    loaded = [r.getMessage() for r in caplog.records if "loaded " in r.getMessage()]
    assert len(loaded) == 1
    assert loaded[0].isprintable()
