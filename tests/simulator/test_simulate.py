"""`python -m flash_attn_npu --simulate`: a user's own program on the simulated card."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flash_attn_npu import _virtual_ascend as virtual_ascend
from flash_attn_npu._commands import run
from flash_attn_npu._virtual_ascend.machine import stubs
from tests.helpers.environments import Environment, build_wheel

PROGRAM = """
import pytest, torch
from flash_attn import flash_attn_func

def test_ten_lines():
    shape = dict(dtype=torch.bfloat16, device="npu", requires_grad=True)
    q, k, v = (torch.randn(2, 64, 4, 32, **shape) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True)
    out.sum().backward()
    assert out.device == torch.device("npu:0") and q.grad.isfinite().all()

def test_device():
    assert torch.npu.is_available() and torch.npu.device_count() == 1
    torch.npu.set_device("npu:0")
    assert torch.npu.current_device() == 0
    assert torch.npu.get_device_name(0) == torch.npu.get_device_properties(0).name
    assert torch.ones(2).npu().is_npu and torch.ones(2).to("npu").device.index == 0
    assert torch.accelerator.current_accelerator().type == "npu"

def test_memory():
    before = torch.npu.memory_allocated()
    x = torch.empty(2**20, device="npu")
    assert 0 <= torch.npu.memory_allocated() - before - 2**22 <= 1024
    del x
    assert torch.npu.memory_allocated() == before < torch.npu.max_memory_allocated()
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before
    torch.npu.empty_cache()

def test_a_full_card(monkeypatch):
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total
    monkeypatch.setenv("VIRTUAL_ASCEND_MEMORY", str(2**28))
    x = torch.empty(2**25, device="npu")
    free, total = torch.npu.mem_get_info()
    assert total == 2**28 and free < 2**27
    with pytest.raises(RuntimeError, match="out of memory. Tried to allocate 2.00 GiB"):
        torch.empty(2**29, device="npu")
    del x
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] > 2**27

def test_streams_and_events():
    stream, start, end = torch.npu.Stream(), *(torch.npu.Event(enable_timing=True) for _ in "12")
    start.record()
    with torch.npu.stream(stream):
        x = torch.ones(3, device="npu") * 2
    torch.npu.current_stream().wait_stream(stream)
    end.record()
    torch.npu.synchronize()
    assert stream.query() and end.query() and start.elapsed_time(end) >= 0
    assert x.cpu().tolist() == [2, 2, 2]

def test_random_numbers():
    def drawn(**how):
        return torch.randn(5, device="npu", **how).cpu()
    torch.npu.manual_seed(1)
    first, second = drawn(), drawn()
    torch.npu.manual_seed(1)
    assert torch.equal(drawn(), first) and not torch.equal(first, second)
    generator = torch.Generator(device="npu").manual_seed(7)
    third = drawn(generator=generator)
    assert torch.equal(drawn(generator=generator.manual_seed(7)), third)

def test_autocast():
    layer = torch.nn.Linear(8, 8).npu()
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 8, device="npu")).dtype == torch.bfloat16

SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
MORE = {"Gemma2": dict(head_dim=16, sliding_window=8), "Qwen2": {}}

def tune(name, attention, device):
    import transformers
    config = getattr(transformers, f"{name}Config")(**SMALL, **MORE[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation=attention, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    losses = []
    for _ in range(5):
        with torch.autocast(device, dtype=torch.bfloat16):
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)

@pytest.mark.parametrize("name", MORE)
def test_a_training_goes_as_eager_attention_on_the_host(name):
    pytest.importorskip("transformers")
    got, eager = tune(name, "flash_attention_2", "npu"), tune(name, "eager", "cpu")
    assert (got - eager).abs().max() < 0.02 < got[0] - got[-1]
"""
MARK = "flash_attn_npu: simulated: "


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, installed beside torch and torch_npu."""
    made = Environment(tmp_path_factory.mktemp("simulated"))
    made.see_packages_of_the_tests()
    made.unpack(build_wheel(made.folder))
    return made


def test_a_users_tests_from_an_installed_wheel(npu: object, environment: Environment) -> None:
    (environment.folder / "test_program.py").write_text(PROGRAM)
    # as in a shell in which nothing was set: torch would load torch_npu, which would miss CANN
    arguments = ("-m", "flash_attn_npu", "--simulate", "-m", "pytest", "-q", "test_program.py")
    done = environment.run(*arguments, TORCH_DEVICE_BACKEND_AUTOLOAD="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    models = importlib.util.find_spec("transformers") is not None
    assert ("9 passed" if models else "7 passed, 2 skipped") in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith(MARK)]
    assert "no card has confirmed it" in said[0]
    assert f"{MARK}flash_attn_func: npu_fusion_attention x1" in said


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("gcc", "gcc is not installed, which builds the stub libraries"),
        ("torch_npu", "torch_npu is not installed: install torch_npu==2.6.0, the one for this"),
        (
            "its version",
            "torch_npu 2.8.0.post2 does not belong to torch 2.6.0: install",
        ),
        ("Linux", "the simulated card needs Linux on x86-64 or aarch64, not darwin"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str, message: str
) -> None:
    versions = {"torch": "2.6.0+cpu", "torch_npu": "2.6.0.post5"}
    if missing == "its version":
        versions["torch_npu"] = "2.8.0.post2"
    monkeypatch.setattr(stubs.metadata, "version", versions.get)
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None if missing == "gcc" else name)
    here = None if missing == "torch_npu" else Path("torch_npu")
    monkeypatch.setattr(stubs, "wheel_directory", lambda: here)
    if missing == "Linux":
        monkeypatch.setattr(stubs.sys, "platform", "darwin")
    monkeypatch.setattr(virtual_ascend, "start", stubs.obstacle)
    with pytest.raises(SystemExit) as stopped:
        run._simulate()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --simulate: {message}")
