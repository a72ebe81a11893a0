"""Tokens from logits: filters, sampling, and the acceptance step of speculative sampling.

`utils.generation` re-exports all of it under upstream's names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError

__all__ = [
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
]


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set to -inf, in place, what is smaller than the top_k-th largest entry.

    Args:
        logits: (..., vocab_size); entries equal to the top_k-th largest all stay.
        top_k: at least 1; everything stays if it exceeds vocab_size.

    Raises:
        ArgumentError: top_k is smaller.

    Contract: flash-attention 2.8, `modify_logits_for_top_k_filtering`.
    """
    if top_k < 1:
        raise ArgumentError("top_k", top_k, "at least 1", "leave this filter out")
    smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    logits.masked_fill_(logits < smallest, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set to -inf, in place, all but the most likely entries that together reach top_p.

    Args:
        logits: (..., vocab_size).
        top_p: nothing happens outside of 0 < top_p < 1.

    Contract: flash-attention 2.8, `modify_logits_for_top_p_filtering`.
    """
    if not 0.0 < top_p < 1.0:
        return
    ascending, order = logits.sort(dim=-1, descending=False)
    unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    # where top_p is lost in rounding, the most likely entry is left
    unlikely[..., -1:] = False
    logits.masked_fill_(unlikely.scatter(-1, order, unlikely), float("-inf"))


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw one token for each row.

    Args:
        logits: (batch, vocab_size); not changed.
        top_k: 1 takes the most likely token; 0 or less considers all.
        top_p: if positive, draw from the most likely of these that together reach top_p.
        temperature: what logits are divided by first.

    Returns:
        (batch,) int64.

    Raises:
        ArgumentError: top_p above 1, or a temperature that is not positive.

    Contract: flash-attention 2.8, `sample`.
    """
    require_tensors(logits=logits)
    if top_k == 1:
        return logits.argmax(dim=-1)
    _check(top_p, temperature)
    tokens = None
    if top_k > 0:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    drawn = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


def sample_speculative(
    logits: Tensor,
    logits_draft: Tensor,
    tokens_draft: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Keep as many drafted tokens as the model agrees to, and draw one more (arXiv:2211.17192).

    What is kept and drawn is distributed as if the model had been sampled token by token.

    Args:
        logits: (batch, seqlen + 1, vocab_size), of the model: before each drafted token, and
            behind the last.
        logits_draft: (batch, seqlen, vocab_size), that the drafted tokens were drawn from.
        tokens_draft: (batch, seqlen), drawn with the same top_k, top_p and temperature.
        top_k, top_p, temperature: see `sample`.

    Returns:
        (tokens, num_generated_tokens): (batch, seqlen + 1), and how many of each row count,
        (batch,) from 1 to seqlen + 1.

    Raises:
        ArgumentError: the shapes do not fit; otherwise as `sample`.

    Contract: flash-attention 2.8, `sample_speculative`.
    """
    require_tensors(logits=logits, logits_draft=logits_draft, tokens_draft=tokens_draft)
    _check_draft(logits, logits_draft, tokens_draft)
    seqlen = tokens_draft.shape[1]
    if top_k == 1:
        tokens = logits.argmax(dim=-1)
        kept = _leading(tokens[:, :seqlen] == tokens_draft)
        return tokens, kept + 1
    _check(top_p, temperature)
    likely = _distribution(logits, top_k, top_p, temperature)
    drafted = _distribution(logits_draft, top_k, top_p, temperature)
    chosen = tokens_draft[..., None]
    p, q = likely[:, :seqlen].gather(-1, chosen), drafted.gather(-1, chosen)
    kept = _leading((torch.rand_like(q) * q <= p).squeeze(-1))
    # where all were kept, the next token is drawn from the model alone
    drafted = torch.cat((drafted, torch.zeros_like(likely[:, :1])), dim=1)
    at = kept[:, None, None].expand(-1, 1, likely.shape[-1])
    of_model, of_draft = likely.gather(1, at).squeeze(1), drafted.gather(1, at).squeeze(1)
    rest = (of_model - of_draft).clamp(min=0.0)
    # rounding alone can reject a token of equal distributions, which leaves nothing
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, of_model)
    drawn = torch.multinomial(rest, num_samples=1)
    tokens = torch.cat((tokens_draft, drawn), dim=1).scatter(1, kept[:, None], drawn)
    return tokens, kept + 1


def _leading(accepted: Tensor) -> Tensor:
    """How many entries of each row are True before the first False."""
    return accepted.long().cumprod(dim=-1).sum(dim=-1)


def _distribution(logits: Tensor, top_k: int, top_p: float, temperature: float) -> Tensor:
    logits = logits / temperature
    if top_k > 0:
        modify_logits_for_top_k_filtering(logits, top_k)
    modify_logits_for_top_p_filtering(logits, top_p)
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _check(top_p: float, temperature: float) -> None:
    if not top_p <= 1.0:
        raise ArgumentError("top_p", top_p, "at most 1", "pass a probability, or 0 for no limit")
    if not temperature > 0.0:
        raise ArgumentError(
            "temperature", temperature, "a positive number", "pass top_k=1 to be greedy"
        )


def _check_draft(logits: Tensor, logits_draft: Tensor, tokens_draft: Tensor) -> None:
    for argument, tensor, length, dims in (
        ("logits", logits, tokens_draft.shape[-1] + 1, 3),
        ("logits_draft", logits_draft, tokens_draft.shape[-1], 3),
    ):
        expected = (*tokens_draft.shape[:1], length, logits.shape[-1])
        if tokens_draft.dim() != 2 or tensor.dim() != dims or tensor.shape != expected:
            raise ArgumentError(
                argument,
                f"shape {tuple(tensor.shape)} beside tokens_draft of shape "
                f"{tuple(tokens_draft.shape)}",
                "logits (batch, seqlen + 1, vocab_size), logits_draft (batch, seqlen, "
                "vocab_size) and tokens_draft (batch, seqlen)",
                "pass the model's logits for every drafted token and the one behind them",
            )
