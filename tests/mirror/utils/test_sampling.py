"""Filters, and the distributions that tokens are drawn from."""

from __future__ import annotations

import pytest
import torch

from flash_attn_npu.errors import ArgumentError
from flash_attn_npu.utils.generation import (
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    sample_speculative,
)

INF = float("inf")
P = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
DRAWS = 20000


def test_top_k_filter():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [4.0, 1.0, 2.0, 3.0]])
    modify_logits_for_top_k_filtering(logits, 2)
    assert logits.tolist() == [[-INF, 3.0, -INF, 3.0], [4.0, -INF, -INF, 3.0]]
    logits = torch.tensor([[[3.0, 3.0, 2.0]]])
    modify_logits_for_top_k_filtering(logits, 1)
    assert logits.tolist() == [[[3.0, 3.0, -INF]]]
    modify_logits_for_top_k_filtering(logits, 9)
    assert logits.tolist() == [[[3.0, 3.0, -INF]]]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.5, [1, 3]), (0.8, [1, 2, 3]), (0.96, range(5)), (1e-9, [1])],
)
def test_top_p_filter_keeps_the_fewest_that_reach_it(top_p, kept):
    logits = torch.stack((P, P.flip(0))).log()[None]
    modify_logits_for_top_p_filtering(logits, top_p)
    expected = torch.full((5,), -INF, dtype=torch.float64)
    expected[list(kept)] = P[list(kept)].log()
    assert torch.equal(logits, torch.stack((expected, expected.flip(0)))[None])


def test_top_p_filter_does_nothing_at_its_ends():
    for top_p in (0.0, -1.0, 1.0, 2.0):
        logits = P.log()
        modify_logits_for_top_p_filtering(logits, top_p)
        assert torch.equal(logits, P.log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_top_p_that_rounding_loses_keeps_the_most_likely(dtype):
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 7] = 5.0
    for top_k in (0, 9):
        assert sample(logits, top_k=top_k, top_p=1e-9).tolist() == [7, 7, 7]
    drafts = torch.full((1, 2), 7)
    tokens, counts = sample_speculative(logits[None], logits[None, :2], drafts, 0, 1e-9)
    assert (tokens.tolist(), counts.tolist()) == ([[7, 7, 7]], [3])


def _renormalised(p, kept):
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 0}, P),
        ({"top_k": 0, "temperature": 0.5}, P.square() / P.square().sum()),
        ({"top_k": 3}, _renormalised(P, [1, 2, 3])),
        ({"top_k": 50, "top_p": 0.5}, _renormalised(P, [1, 3])),
        # two thirds of the three that top_k keeps
        ({"top_k": 3, "top_p": 0.7}, _renormalised(P, [1, 3])),
        ({"top_k": 0, "top_p": 1.0}, P),
    ],
    ids=str,
)
def test_sample_draws_from_the_distribution(options, expected):
    torch.manual_seed(0)
    logits = P.log().expand(DRAWS, 5)
    before = logits.clone()
    tokens = sample(logits, **options)
    assert tokens.shape == (DRAWS,)
    assert torch.equal(logits, before)
    _follows(tokens, expected)
    _follows(_speculated(P, P.flip(0), options)[0], expected)


def _follows(tokens, expected):
    """The frequencies of tokens are within five standard deviations of their expectation."""
    seen = torch.bincount(tokens, minlength=len(expected)).double() / len(tokens)
    deviation = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((seen - expected).abs() <= 5 * deviation).all(), (seen, expected)


def _speculated(p, q, options, seqlen=1):
    """The first tokens, how many are generated, and all tokens; drafts come from q."""
    drafted = sample(q.log().expand(DRAWS * seqlen, 5), **options).view(DRAWS, seqlen)
    logits, of_draft = p.log().expand(DRAWS, seqlen + 1, 5), q.log().expand(DRAWS, seqlen, 5)
    tokens, counts = sample_speculative(logits, of_draft, drafted, **options)
    return tokens[:, 0], counts, tokens


def test_speculation_keeps_as_often_as_the_distributions_overlap():
    torch.manual_seed(0)
    q = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)
    overlap = torch.minimum(P, q).sum()
    first, counts, tokens = _speculated(P, q, {"top_k": 0}, seqlen=3)
    _follows(first, P)
    powers = overlap ** torch.arange(3)
    _follows(counts - 1, torch.cat((powers * (1 - overlap), overlap[None] ** 3)))
    # the token behind what was kept, wherever that is, follows the model too, all in all
    for position in (1, 2, 3):
        reached = counts > position
        _follows(tokens[reached, position], P)


def test_equal_distributions_keep_everything():
    torch.manual_seed(0)
    _, counts, tokens = _speculated(P, P.clone(), {"top_k": 0}, seqlen=3)
    assert (counts == 4).all()
    _follows(tokens[:, 3], P)


def test_greedy_speculation_keeps_what_agrees():
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 1, 4, 0]] * 4), 5).double()
    drafts = torch.tensor([[2, 1, 4], [2, 1, 0], [0, 1, 4], [2, 0, 4]])
    tokens, counts = sample_speculative(logits, logits[:, 1:], drafts)
    assert tokens.tolist() == [[2, 1, 4, 0]] * 4
    assert counts.tolist() == [4, 3, 1, 2]
    assert sample(logits[:, 0]).tolist() == [2] * 4


def test_bad_input_is_named():
    logits, draft = torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.long)
    for argument, call in (
        ("top_p", lambda: sample(logits[0], 2, 1.5)),
        ("temperature", lambda: sample(logits[0], 2, 0.5, -1.0)),
        ("temperature", lambda: sample(logits[0], 2, 0.5, float("nan"))),
        ("top_p", lambda: sample(logits[0], 2, float("nan"))),
        ("top_k", lambda: modify_logits_for_top_k_filtering(logits, 0)),
        ("logits", lambda: sample_speculative(logits[:, 1:], logits[:, 1:], draft)),
        ("logits_draft", lambda: sample_speculative(logits, logits, draft)),
        ("logits", lambda: sample_speculative(logits, logits[:, 1:], draft[0])),
        ("top_p", lambda: sample_speculative(logits, logits[:, 1:], draft, 0, 1.5)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{argument}: got .*; allowed: .*; to fix it: "):
            call()
