"""Where a generation stands and the caches of its layers; `utils.generation` re-exports it.

Upstream captures CUDA graphs for decoding. Nothing is captured here: the functions that ask for
graphs run the model, with the same numbers, and say so once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._core.ground.memory import Memo
from ..errors import ArgumentError

__all__ = [
    "DecodingCGCache",
    "InferenceParams",
    "Run",
    "allocate_inference_cache",
    "capture_graph",
    "update_graph_cache",
]

logger = logging.getLogger("flash_attn_npu")

Run = Callable[[Tensor, "Tensor | None", int], Tensor]

_said: Memo[str, bool] = Memo("remarks on decoding that were logged", 16)


@dataclass
class InferenceParams:
    """Where a generation stands; every layer reads it and fills its own cache.

    Attributes:
        max_seqlen, max_batch_size: how large caches are made.
        seqlen_offset: how many positions are in the caches; 0 while the prompt is processed.
        batch_size_offset: the row of the caches that the batch starts at.
        key_value_memory_dict: the cache of each layer, by layer_idx.
        lengths_per_sample: int32 (max_batch_size,), how much of each row is filled, where that is
            not seqlen_offset for all.

    Contract: flash-attention 2.8, `InferenceParams`.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start anew over the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Sequence[int],
    device: torch.device | str | None,
    dtype: torch.dtype = torch.float16,
) -> dict[int, Tensor]:
    """An uninitialised cache (max_batch_size, max_seqlen, 2, nheads, headdim) for each layer.

    Args:
        layers: how many, or their numbers.

    Contract: flash-attention 2.8, `allocate_inference_cache`. Wider: float64.
    """
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    numbers = range(layers) if isinstance(layers, int) else layers
    return {layer: torch.empty(shape, device=device, dtype=dtype) for layer in numbers}


@dataclass
class DecodingCGCache:
    """What `update_graph_cache` keeps between generations: the caches of the layers.

    Contract: flash-attention 2.8, `DecodingCGCache`. Different: callables run the model, and
    mempool stays None, because no graph is captured.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Run] = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Run | None = None


def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Make or extend what decoding with graphs needs: `cache.run(input_ids, position_ids, seqlen)`.

    Args:
        model: with parameters, and `allocate_inference_cache` or a config that tells sizes.
        cache: what an earlier call returned, or None. Its tensors are made anew if they are too
            small, or of another device or dtype.
        batch_size, max_seqlen: of the generation to come.
        seqlen_og: the length of its prompt; it changes nothing here.
        decoding_seqlens: how many tokens `run` will be given at once.
        tensor_parallel: how many ranks share the heads, for a model without the method.
        dtype: of the caches; that of the parameters if None.
        n_warmups: it changes nothing here.

    Contract: flash-attention 2.8, `update_graph_cache`. Different: no graph is captured, `run` runs
    the model; it is logged once. lengths_per_sample stays None.
    """
    cache = DecodingCGCache() if cache is None else cache
    example = next(iter(model.parameters()))
    dtype = example.dtype if dtype is None else dtype
    fits = batch_size <= cache.max_batch_size and max_seqlen <= cache.max_seqlen
    if (example.device, dtype) != (cache.device, cache.dtype) or not fits:
        cache.callables = {}
        # the old tensors are given back before new ones are made, which may fail
        cache.inference_params = cache.run = None
        cache.max_batch_size = cache.max_seqlen = 0
        caches = _caches(model, batch_size, max_seqlen, tensor_parallel, example.device, dtype)
        cache.device, cache.dtype = example.device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.inference_params = InferenceParams(
            max_seqlen, batch_size, key_value_memory_dict=caches
        )
    assert cache.inference_params is not None
    for length in decoding_seqlens:
        # anew each time: those of a copied model's cache run the model that it was copied from
        cache.callables[batch_size, length] = capture_graph(
            model, cache.inference_params, batch_size, max_seqlen, length, None, n_warmups
        )
    callables = cache.callables

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        return callables[input_ids.shape[0], input_ids.shape[1]](input_ids, position_ids, seqlen)

    cache.run = run
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Run:
    """A function (input_ids, position_ids, seqlen) -> logits that runs the model over its caches.

    Args:
        batch_size, decoding_seqlen: the shape of input_ids and position_ids. logits are
            (batch_size, decoding_seqlen, vocab_size), and seqlen is how many positions are cached.
        max_seqlen, mempool, n_warmups: they change nothing here.

    Contract: flash-attention 2.8, `capture_graph`. Different: nothing is captured.
    """
    _say_once("no graph is captured for decoding: the model itself runs at every step")
    shape = (batch_size, decoding_seqlen)

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        if input_ids.shape != shape:
            raise ArgumentError(
                "input_ids",
                f"shape {tuple(input_ids.shape)}",
                f"{shape}, what this was made for",
                "make one for each batch_size and decoding_seqlen",
            )
        before = inference_params.seqlen_offset
        inference_params.seqlen_offset = seqlen
        try:
            with torch.no_grad():
                logits: Tensor = model(
                    input_ids,
                    position_ids=position_ids,
                    inference_params=inference_params,
                    num_last_tokens=decoding_seqlen,
                ).logits
        finally:
            inference_params.seqlen_offset = before
        return logits

    return run


def _caches(
    model: Any,
    batch_size: int,
    max_seqlen: int,
    tensor_parallel: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[Any, Any]:
    if hasattr(model, "allocate_inference_cache"):
        caches: dict[Any, Any] = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
        return caches
    config = model.config
    heads = config.num_attention_heads
    headdim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    return allocate_inference_cache(
        batch_size, max_seqlen, heads // tensor_parallel, headdim, layers, device, dtype
    )


def _say_once(message: str) -> None:
    if not _said.recall(message):
        _said.put(message, True)
        logger.warning(message)
