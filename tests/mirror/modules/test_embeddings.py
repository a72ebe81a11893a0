"""flash_attn.modules.embedding on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.modules.embedding import (
    BertEmbeddings,
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)

BATCH, SEQLEN, DIM, VOCAB, POSITIONS = 2, 5, 6, 11, 9
DTYPES = [torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WORDS, PLACES = "word_embeddings.weight", "position_embeddings.weight"
TYPES, PROJECTION = "token_type_embeddings.weight", "project_in.weight"


def ids(device: torch.device, top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape or (BATCH, SEQLEN), device=device)


def expected(
    module: nn.Module, words: Tensor, places: Tensor | None, kinds: Tensor | None = None
) -> Tensor:
    """Row by row in float64, on the host."""
    held = {name: value.detach().cpu().double() for name, value in module.state_dict().items()}
    rows = []
    for b in range(words.shape[0]):
        for s in range(words.shape[1]):
            row = held[WORDS][words[b, s]]
            if PROJECTION in held:
                row = held[PROJECTION] @ row
            if PLACES in held:
                place = s if places is None else places.expand(words.shape)[b, s]
                row = row + held[PLACES][place]
            if TYPES in held:
                kind = 0 if kinds is None else kinds.expand(words.shape)[b, s]
                row = row + held[TYPES][kind]
            rows.append(row)
    return torch.stack(rows).view(*words.shape, -1)


def check(module: nn.Module, words: Tensor, *others: Tensor | None) -> None:
    """Values, and a gradient that counts how often each row of each table was used."""
    want = expected(module, words, *others)
    got = module(words, *others)
    weight = next(module.parameters())
    assert got.dtype == weight.dtype
    assert got.is_contiguous()
    few_roundings = 4 * torch.finfo(got.dtype).eps * max(1.0, float(want.abs().max()))
    assert (got.detach().cpu().double() - want).abs().max() <= few_roundings
    got.sum().backward()
    for name, index in zip((WORDS, PLACES, TYPES), (words, *others), strict=False):
        table = dict(module.named_parameters()).get(name)
        if table is None or (name == WORDS and PROJECTION in module.state_dict()):
            continue
        if index is None:
            index = torch.arange(SEQLEN) if name == PLACES else torch.zeros(SEQLEN).long()
        used = torch.bincount(index.expand(words.shape).flatten().cpu(), minlength=table.shape[0])
        assert table.grad is not None
        assert torch.equal(table.grad.cpu().double(), used[:, None].expand_as(table).double())


GPT2: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "words": (lambda **o: GPT2Embeddings(DIM, VOCAB, 0, **o), [WORDS]),
    "positions": (lambda **o: GPT2Embeddings(DIM, VOCAB, POSITIONS, **o), [WORDS, PLACES]),
    "projected": (
        lambda **o: GPT2Embeddings(DIM, VOCAB, POSITIONS, word_embed_proj_dim=4, **o),
        [WORDS, PROJECTION, PLACES],
    ),
    "one process": (
        lambda **o: ParallelGPT2Embeddings(DIM, VOCAB, POSITIONS, None, **o),
        [WORDS, PLACES],
    ),
    "one process, words": (lambda **o: ParallelGPT2Embeddings(DIM, VOCAB, 0, None, **o), [WORDS]),
}


@each_dtype
@pytest.mark.parametrize("name", GPT2)
@pytest.mark.parametrize("places", ["default", "shared", "own"])
def test_gpt2(device: torch.device, dtype: torch.dtype, name: str, places: str) -> None:
    make, keys = GPT2[name]
    module = make(device=device, dtype=dtype)
    assert list(module.state_dict()) == keys
    given = {
        "default": None,
        "shared": ids(device, POSITIONS, SEQLEN),
        "own": ids(device, POSITIONS),
    }
    check(module, ids(device, VOCAB), given[places])


@each_dtype
@pytest.mark.parametrize("positions", [0, POSITIONS])
@pytest.mark.parametrize("types", [0, 3])
@pytest.mark.parametrize("given", [False, True], ids=["default", "given"])
def test_bert(
    device: torch.device, dtype: torch.dtype, positions: int, types: int, given: bool
) -> None:
    module = BertEmbeddings(DIM, VOCAB, positions, types, device=device, dtype=dtype)
    keys = [WORDS, *[PLACES] * (positions > 0), *[TYPES] * (types > 0)]
    assert list(module.state_dict()) == keys
    places = ids(device, POSITIONS) if given else None
    check(module, ids(device, VOCAB), places, ids(device, 3) if given else None)


def test_padding_idx() -> None:
    for module in (
        GPT2Embeddings(DIM, VOCAB, 0, padding_idx=2),
        BertEmbeddings(DIM, VOCAB, 0, 0, padding_idx=2),
        ParallelGPT2Embeddings(DIM, VOCAB, 0, None, padding_idx=2),
    ):
        table = module.word_embeddings.weight
        assert not table[2].any()
        module(torch.tensor([[2, 3]])).sum().backward()
        assert table.grad.sum(1).tolist() == [0, 0, 0, DIM, *[0] * 7]


def test_the_same_seed_makes_the_same_tables_as_torch() -> None:
    torch.manual_seed(1)
    ours = [
        *GPT2Embeddings(DIM, VOCAB, POSITIONS, word_embed_proj_dim=4).parameters(),
        *BertEmbeddings(DIM, VOCAB, POSITIONS, 3).parameters(),
        *ParallelGPT2Embeddings(DIM, VOCAB, POSITIONS, None).parameters(),
    ]
    torch.manual_seed(1)
    theirs = [
        nn.Embedding(VOCAB, 4),
        nn.Linear(4, DIM, bias=False),
        nn.Embedding(POSITIONS, DIM),
        *(nn.Embedding(rows, DIM) for rows in (VOCAB, POSITIONS, 3, VOCAB, POSITIONS)),
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other.weight)


def test_one_dimension_for_batch_and_seqlen() -> None:
    module = ParallelGPT2Embeddings(DIM, VOCAB, POSITIONS, None)
    words = ids(torch.device("cpu"), VOCAB)
    flat = module(words, combine_batch_seqlen_dim=True)
    assert torch.equal(flat, module(words).view(-1, DIM))


@pytest.mark.parametrize("make", [VocabParallelEmbedding, ColumnParallelEmbedding])
def test_one_process_is_an_embedding(device: torch.device, make: type[nn.Embedding]) -> None:
    table = make(VOCAB, DIM, max_norm=1.0, device=device, dtype=torch.float64)
    assert isinstance(table, nn.Embedding)
    assert list(table.state_dict()) == ["weight"]
    assert (table.num_embeddings, table.embedding_dim, table.max_norm) == (VOCAB, DIM, 1.0)
    plain = nn.Embedding(VOCAB, DIM, max_norm=1.0, _weight=table.weight.detach().clone())
    words = ids(device, VOCAB)
    assert torch.equal(table(words), plain(words))


def bad(argument: str, error: type[Exception], call: Callable[[], Any]) -> Any:
    return pytest.param(argument, error, call)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        bad("input_ids", ArgumentError, lambda: GPT2Embeddings(2, 3, 4)(torch.zeros(5).long())),
        bad("input_ids", ArgumentTypeError, lambda: BertEmbeddings(2, 3, 4, 0)([[1]])),
        bad(
            "input_ids",
            ArgumentError,
            lambda: ParallelGPT2Embeddings(2, 3, 4, None)(torch.zeros(1, 2, 3).long()),
        ),
    ],
)
def test_bad_input_is_named(argument: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: .*; to fix it: "):
        call()
