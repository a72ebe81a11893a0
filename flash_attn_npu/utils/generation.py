"""Mirror of `flash_attn.utils.generation`: tokens one by one, over the caches of the layers.

A model here is a callable: model(input_ids, position_ids=..., inference_params=...,
num_last_tokens=n).logits is (batch, n, vocab_size). No graph is captured: what asks for CUDA
graphs (`cg`, `update_graph_cache`, `capture_graph`) runs the model, with the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._core.ground.arguments import require_tensors
from ..errors import ArgumentError, ArgumentTypeError
from ._decoding_cache import (
    DecodingCGCache,
    InferenceParams,
    Run,
    allocate_inference_cache,
    capture_graph,
    update_graph_cache,
)
from ._sampling import (
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    sample_speculative,
)

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "GreedySearchDecoderOnlyOutput",
    "InferenceParams",
    "SampleDecoderOnlyOutput",
    "allocate_inference_cache",
    "capture_graph",
    "decode",
    "decode_speculative",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
    "update_graph_cache",
]


class GreedySearchDecoderOnlyOutput(NamedTuple):
    """What greedy decoding returns.

    Attributes:
        sequences: (batch, length), the prompt included.
        scores: the logits (batch, vocab_size) that each new token was chosen by, or None.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class SampleDecoderOnlyOutput(NamedTuple):
    """What sampling returns: see `GreedySearchDecoderOnlyOutput`."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


_Output = GreedySearchDecoderOnlyOutput | SampleDecoderOnlyOutput


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
) -> _Output:
    """Extend every sequence of a batch, token by token.

    Args:
        input_ids: (batch, seqlen), without padding.
        model: see the top of this module.
        max_length: length of the sequences returned, the prompt included; at least one token is
            made, also for a prompt of this length.
        top_k, top_p, temperature: see `sample`.
        eos_token_id: stop when all sequences get this token in the same step. Sequences that got
            it earlier go on.
        teacher_outputs: (batch, length): tokens to go on with instead of those that are chosen, as
            far as they reach.
        vocab_size: how many logits count; the rest is padding.
        tensor_parallel: how many ranks run this together.
        cg: keep the caches in `model._decoding_cache` between calls.
        enable_timing: print how long it took.

    Returns:
        (sequences, scores), a `GreedySearchDecoderOnlyOutput` for top_k=1 and otherwise a
        `SampleDecoderOnlyOutput`. scores are logits before top_k, top_p and temperature.

    Raises:
        ArgumentError: a prompt longer than max_length, or teacher_outputs of another batch;
            otherwise as `sample`.
        ArgumentTypeError: eos_token_id is no int.

    Contract: flash-attention 2.8, `decode`.
    """
    _check_prompt(input_ids, max_length)
    _check_end(eos_token_id)
    _check_teacher(teacher_outputs, input_ids)
    batch, _ = input_ids.shape
    stepper = _Stepper(model, input_ids, max_length, vocab_size, tensor_parallel, cg, (1,))
    params = stepper.params
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    scores: list[Tensor] = []
    sequences = [input_ids]
    with _timed(enable_timing, tensor_parallel, input_ids.device):
        while not params.seqlen_offset or not (
            params.seqlen_offset >= max_length - 1 or _ended(sequences[-1], eos_token_id)
        ):
            scores.append(stepper(sequences[-1]).squeeze(1))
            at = params.seqlen_offset
            if teacher_outputs is not None and at < taught:
                tokens = teacher_outputs[:, at]
            else:
                tokens = sample(scores[-1], top_k=top_k, top_p=top_p, temperature=temperature)
            sequences.append(tokens.view(batch, 1))
    output = GreedySearchDecoderOnlyOutput if top_k == 1 else SampleDecoderOnlyOutput
    return output(torch.cat(sequences, dim=1), tuple(scores))


@torch.inference_mode()
def decode_speculative(
    input_ids: Tensor,
    model: Any,
    model_draft: Any,
    max_length: int,
    speculative_lookahead: int = 3,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    debug: bool = False,
) -> _Output:
    """`decode` of one sequence, several tokens for one run of the model (arXiv:2211.17192).

    Args:
        input_ids: (1, seqlen).
        model_draft: a smaller model, which proposes speculative_lookahead tokens at a time.
        debug: print how many of them are kept each time.

    The other arguments are those of `decode`, and so is what is returned: with top_k=1 the very
    same tokens, otherwise tokens of the same distribution. It ends with the first eos_token_id.

    Raises:
        ArgumentError: more than one sequence; otherwise as `decode`.

    Contract: flash-attention 2.8, `decode_speculative`.
    """
    _check_prompt(input_ids, max_length)
    _check_end(eos_token_id)
    _check_speculation(input_ids, speculative_lookahead)
    sizes = range(1, speculative_lookahead + 2)
    options = (input_ids, max_length, vocab_size, tensor_parallel)
    target = _Stepper(model, *options, cg, sizes)
    # a model has one kept cache, and both may be the same model
    draft = _Stepper(model_draft, *options, cg and model_draft is not model, (1, 2))
    choice = (top_k, top_p, temperature)
    sequence = input_ids
    scores: list[Tensor] = []
    with _timed(enable_timing, tensor_parallel, input_ids.device):
        while not scores or sequence.shape[1] < max_length:
            length = sequence.shape[1]
            ahead = max(0, min(speculative_lookahead, max_length - length - 1))
            drafted, drafts = sequence, []
            for _ in range(ahead):
                drafts.append(draft(drafted[:, draft.params.seqlen_offset :]))
                token = sample(drafts[-1].squeeze(1), *choice)
                drafted = torch.cat((drafted, token[:, None]), dim=1)
            fresh = drafted[:, target.params.seqlen_offset :]
            logits = target(fresh, num_last_tokens=ahead + 1)
            of_draft = torch.cat(drafts, dim=1) if drafts else logits[:, :0]
            tokens, count = sample_speculative(logits, of_draft, drafted[:, length:], *choice)
            kept = _until(tokens[:, : int(count)], eos_token_id)
            if debug:
                print(f"kept {int(count) - 1} of {ahead} drafted tokens")
            sequence = torch.cat((sequence, kept), dim=1)
            scores += list(logits[:, : kept.shape[1]].unbind(1))
            if _ended(kept[:, -1:], eos_token_id):
                break
            # the last token has not been seen yet, and behind it are tokens that were dropped
            for stepper in (target, draft):
                known = min(stepper.params.seqlen_offset, sequence.shape[1] - 1)
                stepper.params.seqlen_offset = known
    output = GreedySearchDecoderOnlyOutput if top_k == 1 else SampleDecoderOnlyOutput
    return output(sequence, tuple(scores))


class GenerationMixin:
    """Gives a model `generate`. The model is called as the top of this module says.

    Contract: flash-attention 2.8, `GenerationMixin`.
    """

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The cache of each layer, by layer_idx; for the model to define.

        Raises:
            NotImplementedError: the model does not.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`decode` with this model.

        Args:
            return_dict_in_generate: return sequences and scores, and not sequences alone.
            output_scores: without it scores are None.
            kwargs: further arguments of `decode`.

        Returns:
            sequences (batch, length), or what `decode` returns.

        Contract: flash-attention 2.8, `GenerationMixin.generate`.
        """
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, temperature=temperature, **kwargs
        )
        if not return_dict_in_generate:
            return output.sequences
        return output if output_scores else output._replace(scores=None)


class _Stepper:
    """A model and where it stands: each call feeds tokens and moves seqlen_offset behind them."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        max_length: int,
        vocab_size: int | None,
        tensor_parallel: int,
        cg: bool,
        sizes: Sequence[int],
    ) -> None:
        batch, seqlen = input_ids.shape
        self.model = model
        self.vocab_size = vocab_size
        self.params = InferenceParams(max_length, batch)
        self.run: Run | None = None
        if cg:
            kept = getattr(model, "_decoding_cache", None)
            model._decoding_cache = cache = update_graph_cache(
                model, kept, batch, seqlen, max_length, sizes, tensor_parallel
            )
            assert cache.inference_params is not None
            self.run, self.params = cache.run, cache.inference_params
            self.params.reset(max_length, batch)

    def __call__(self, tokens: Tensor, num_last_tokens: int = 1) -> Tensor:
        """Logits (batch, num_last_tokens, vocab_size)."""
        start, (batch, length) = self.params.seqlen_offset, tokens.shape
        positions = None
        if start:
            positions = torch.arange(start, start + length, device=tokens.device).repeat(batch, 1)
        if start and self.run is not None:
            logits = self.run(tokens, positions, start)[:, -num_last_tokens:]
        else:
            logits = self.model(
                tokens,
                position_ids=positions,
                inference_params=self.params,
                num_last_tokens=num_last_tokens,
            ).logits
        self.params.seqlen_offset += length
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]


@contextmanager
def _timed(wanted: bool, tensor_parallel: int, device: torch.device) -> Iterator[None]:
    """Print how long the block took, on the device and in all ranks."""

    def now() -> float:
        if tensor_parallel > 1:
            dist.barrier()
        torch.get_device_module(device).synchronize()
        return time.perf_counter()

    start = now() if wanted else 0.0
    yield
    if wanted:
        print(f"Prompt and decoding took {1000 * (now() - start):.0f} ms")


def _check_end(eos_token_id: Any) -> None:
    one = isinstance(eos_token_id, Integral | None)
    if not one and not (isinstance(eos_token_id, Tensor) and eos_token_id.numel() == 1):
        raise ArgumentTypeError(
            "eos_token_id", repr(eos_token_id), "an int or None", "pass one token"
        )


def _check_teacher(teacher_outputs: Tensor | None, input_ids: Tensor) -> None:
    if teacher_outputs is None:
        return
    require_tensors(teacher_outputs=teacher_outputs)
    if teacher_outputs.dim() != 2 or teacher_outputs.shape[0] != input_ids.shape[0]:
        raise ArgumentError(
            "teacher_outputs",
            f"shape {tuple(teacher_outputs.shape)}",
            f"({input_ids.shape[0]}, length), one row for each sequence of input_ids",
            "pass tokens for every sequence",
        )


def _ended(tokens: Tensor, eos_token_id: int | None) -> bool:
    return eos_token_id is not None and bool((tokens == eos_token_id).all())


def _until(tokens: Tensor, eos_token_id: int | None) -> Tensor:
    """Of tokens (1, n), those up to the first eos_token_id."""
    if eos_token_id is None:
        return tokens
    found = (tokens[0] == eos_token_id).nonzero()
    return tokens[:, : int(found[0]) + 1] if len(found) else tokens


def _check_prompt(input_ids: Tensor, max_length: int) -> None:
    require_tensors(input_ids=input_ids)
    if input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= max_length:
        raise ArgumentError(
            "input_ids",
            f"shape {tuple(input_ids.shape)}",
            f"(batch, seqlen), seqlen from 1 to {max_length}, which is max_length",
            "pass at least one token, and a max_length that counts the prompt too",
        )


def _check_speculation(input_ids: Tensor, speculative_lookahead: int) -> None:
    if input_ids.shape[0] != 1:
        raise ArgumentError(
            "input_ids",
            f"a batch of {input_ids.shape[0]}",
            "one sequence, since each would keep another number of tokens",
            "call once for each sequence, or use decode",
        )
    if speculative_lookahead < 1:
        raise ArgumentError(
            "speculative_lookahead", speculative_lookahead, "1 or more", "use decode"
        )
