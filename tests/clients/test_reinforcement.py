"""Clients that train by reinforcement: verl and OpenRLHF, which unpad, and take log-probabilities
from flash_attn's cross entropy for no other reason than that it imports."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.client_references import assert_gives, assert_gradients, cross_entropy, packed
from tests.helpers.probes import cumulative, mask, randn

pytestmark = pytest.mark.usefixtures("flash_attn")

LENGTHS, SEQLEN, VOCABULARY = [5, 3], 6, 11
TOKENS = sum(LENGTHS)
KEPT = [0, 1, 2, 3, 4, 6, 7, 8]


def minus(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels."""
    return -cross_entropy(logits, labels)


def test_verl_padding(device: torch.device) -> None:
    """verl/workers/actor/dp_actor.py: index_first_axis, pad_input, rearrange, unpad_input."""
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    attention_mask = mask(LENGTHS, SEQLEN, device).long()
    input_ids = torch.arange(2 * SEQLEN, device=device).view(2, SEQLEN)
    tokens, indices, *_ = unpad_input(input_ids.unsqueeze(-1), attention_mask)
    assert tokens.transpose(0, 1).tolist() == [KEPT]

    positions = torch.arange(3 * 2 * SEQLEN, device=device).view(3, 2, SEQLEN)
    rows = index_first_axis(rearrange(positions, "c b s ... -> (b s) c ..."), indices)
    assert torch.equal(rows.T.cpu(), positions.cpu().flatten(1)[:, KEPT])

    values = randn(device, TOKENS).requires_grad_()
    whole = pad_input(
        hidden_states=values.unsqueeze(-1), indices=indices, batch=2, seqlen=SEQLEN
    ).squeeze(-1)
    assert torch.equal(whole[attention_mask.bool()], values)
    assert not whole[~attention_mask.bool()].any()
    (gradient,) = torch.autograd.grad(whole.sum(), values)
    assert bool((gradient == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verl_log_probabilities(device: torch.device, dtype: torch.dtype) -> None:
    """verl/utils/torch_functional.py: ops.triton.cross_entropy.cross_entropy_loss, a tuple."""
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        available = True
    except ImportError:
        available = False
    assert available

    logits = randn(device, TOKENS, VOCABULARY, dtype=dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,)).to(device)
    dout = randn(device, TOKENS, dtype=torch.float32)
    before = logits.detach().clone()
    with torch.autocast(device.type, torch.bfloat16):
        # a copy: inplace_backward writes the gradient over the logits
        output = cross_entropy_loss(logits * 1, labels, inplace_backward=True)
    assert isinstance(output, tuple)
    assert output[0].dtype == torch.float32
    (gradient,) = torch.autograd.grad(-output[0], logits, dout)
    assert_gives(-output[0], minus, before, labels)
    assert_gradients([gradient], dout, minus, before, labels)


def test_verl_packed_attention(device: torch.device) -> None:
    """verl/models/transformers/qwen2_vl.py: flash_attn_varlen_func with max_seqlen in a tensor."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    assert "window_size" in list(inspect.signature(flash_attn_func).parameters)

    q, k, v = randn(device, TOKENS, 4, 16), *(randn(device, TOKENS, 2, 16) for _ in "kv")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = cumulative(LENGTHS, device)
    longest = cu_seqlens.diff().max()
    assert longest.dim() == 0
    out = flash_attn_varlen_func(
        *leaves,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=0.0,
        softmax_scale=None,
        causal=True,
        deterministic=False,
        window_size=(2, 2),
    )
    dout = randn(device, TOKENS, 4, 16)
    options: dict[str, Any] = {"lengths_q": LENGTHS, "causal": True, "window_size": (2, 2)}
    assert_gives(out.view(1, -1, 4, 16)[0], packed, q, k, v, **options)
    assert_gradients(torch.autograd.grad(out, leaves, dout), dout, packed, q, k, v, **options)


def test_openrlhf_padding(device: torch.device) -> None:
    """openrlhf/models/ring_attn_utils.py: bert_padding, and cu_seqlens that it writes into."""
    from flash_attn import flash_attn_varlen_func
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    attention_mask = mask(LENGTHS, SEQLEN, device).long()
    sequences = torch.arange(2 * SEQLEN, device=device).view(2, SEQLEN)
    rows, indices, cu_seqlens, _, _ = unpad_input(sequences.unsqueeze(-1), attention_mask)
    assert rows.transpose(0, 1).tolist() == [KEPT]
    rolled = torch.roll(sequences, shifts=-1, dims=1)
    flat = rearrange(rolled.unsqueeze(-1), "b s ... -> (b s) ...")
    assert index_first_axis(flat, indices)[:, 0].tolist() == rolled.flatten()[KEPT].tolist()

    # one row of padding, to divide by the size of the ring, is counted to the last sequence
    cu_seqlens[-1] += 1
    q, k, v = (randn(device, TOKENS + 1, 2, 16) for _ in "qkv")
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True)
    assert_gives(out, packed, q, k, v, lengths_q=[5, 4], causal=True)

    back = pad_input(rows, indices, 2, SEQLEN).squeeze(-1)
    assert torch.equal(back, sequences * attention_mask)


def test_openrlhf_gather(process_group: dist.ProcessGroup) -> None:
    """openrlhf/models/ring_attn_utils.py: utils.distributed.all_gather, imported without try."""
    from flash_attn.utils.distributed import all_gather

    x = randn(torch.device("cpu"), 1, TOKENS, dtype=torch.float32).requires_grad_()
    gathered = all_gather(x.transpose(0, 1), process_group).transpose(0, 1)
    assert torch.equal(gathered, x)
    dout = torch.rand(1, TOKENS)
    (gradient,) = torch.autograd.grad(gathered, x, dout)
    assert torch.equal(gradient, dout)


def test_openrlhf_log_probabilities(device: torch.device) -> None:
    """openrlhf/models/utils.py: cross_entropy_loss, of float32 logits only."""
    logits = randn(device, 2, 4, VOCABULARY, dtype=torch.float32)
    labels = torch.randint(VOCABULARY, (2, 4)).to(device)
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        output = cross_entropy_loss(logits.reshape(-1, VOCABULARY), labels.reshape(-1))
        log_probabilities = -output[0].view(2, 4)
    except ImportError:
        pytest.fail("OpenRLHF would take its own, slower way")
    assert_gives(log_probabilities.view(-1), minus, logits.flatten(0, 1), labels.flatten())
