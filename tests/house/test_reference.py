"""The oracle is checked too: against PyTorch's attention, by hand, by finite differences."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.helpers import reference

INF = float("inf")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)


def rows(visible: torch.Tensor) -> list[str]:
    """A mask as one string per query, x for a key that is seen."""
    return ["".join("x" if key else "." for key in row) for row in visible.tolist()]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "window_size", [(-1, -1), (2, 1), (0, 0), (3, -1), (-1, 2)], ids=lambda window: f"{window}"
)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 9), (7, 7), (1, 4)])
def test_agrees_with_torch_and_an_explicit_mask(seqlen_q, seqlen_k, window_size, scale):
    q, k, v = random(seqlen_q, 4, 8), random(seqlen_k, 2, 8, seed=1), random(seqlen_k, 2, 8, seed=2)
    left, right = (INF if side < 0 else side for side in window_size)
    mask = torch.tensor(
        [
            [-left <= j - (i + seqlen_k - seqlen_q) <= right for j in range(seqlen_k)]
            for i in range(seqlen_q)
        ]
    )
    expected = scaled_dot_product_attention(
        *(heads_first(x)[None] for x in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
    )[0]

    result = reference.attention(q, k, v, window_size=window_size, softmax_scale=scale)

    torch.testing.assert_close(heads_first(result.out), expected)


def test_causal_agrees_with_torch():
    q, k, v = (random(6, 3, 8, seed=seed) for seed in range(3))
    expected = scaled_dot_product_attention(*(heads_first(x) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(heads_first(reference.attention(q, k, v, causal=True).out), expected)


def test_lse_is_the_logsumexp_of_the_visible_scores():
    q, k, v = random(4, 1, 8), random(6, 1, 8, seed=1), random(6, 1, 8, seed=2)
    scores = q[:, 0] @ k[:, 0].T / math.sqrt(8)

    lse = reference.attention(q, k, v, causal=True).softmax_lse

    expected = [torch.logsumexp(scores[i, : i + 3], dim=0) for i in range(4)]
    torch.testing.assert_close(lse[0], torch.stack(expected))


def test_softcap_and_alibi_change_the_logits_in_that_order():
    q, k, v = random(3, 2, 8), random(5, 2, 8, seed=1), random(5, 2, 8, seed=2)
    slopes = torch.tensor([0.5, 0.25])
    logits = torch.einsum("qhd,khd->hqk", q, k) * 0.2
    logits = 1.5 * torch.tanh(logits / 1.5)
    for head, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        logits[head, i, j] -= slopes[head] * abs(i + 5 - 3 - j)

    result = reference.attention(q, k, v, softmax_scale=0.2, softcap=1.5, alibi_slopes=slopes)

    torch.testing.assert_close(result.probabilities, logits.softmax(dim=-1))
    torch.testing.assert_close(result.softmax_lse, logits.logsumexp(dim=-1))


def test_sink_takes_its_share_of_the_probability_and_counts_in_the_lse():
    q, k, v = torch.zeros(1, 1, 2), torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    result = reference.attention(q, k, v, sink=torch.tensor([math.log(2.0)]))
    # logits 0, 0 and a sink of log 2: half of the mass goes to the sink
    torch.testing.assert_close(result.out, torch.full((1, 1, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(result.softmax_lse.exp(), torch.tensor([[4.0]]).double())


def test_dropout_scales_what_it_keeps_and_leaves_the_lse():
    q, k, v = (
        torch.zeros(1, 1, 1),
        torch.zeros(4, 1, 1),
        torch.tensor([1.0, 2, 4, 8])[:, None, None],
    )
    kept = torch.tensor([[[True, False, True, False]]])
    result = reference.attention(q, k, v, dropout_mask=kept, dropout_p=0.5)
    assert result.out.item() == pytest.approx((1 + 4) / 4 / 0.5)
    assert result.softmax_lse.item() == pytest.approx(math.log(4))


def test_query_heads_share_key_heads_in_consecutive_groups():
    q = torch.zeros(1, 6, 1)
    k, v = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [2.0]]])
    assert reference.attention(q, k, v).out.flatten().tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "window", "expected"),
    [
        (2, 4, (None, 0), ["xxx.", "xxxx"]),
        (4, 2, (None, 0), ["..", "..", "x.", "xx"]),
        (3, 3, (0, 0), ["x..", ".x.", "..x"]),
        (2, 4, (1, 0), [".xx.", "..xx"]),
        (2, 5, (1, 1), ["..xxx", "...xx"]),
        (3, 3, (None, 1), ["xx.", "xxx", "xxx"]),
        (3, 3, (1, None), ["xxx", "xxx", ".xx"]),
        (4, 2, (0, 1), ["..", "x.", "xx", ".x"]),
    ],
)
def test_windows_by_hand(seqlen_q, seqlen_k, window, expected):
    assert rows(reference.visible_keys(seqlen_q, seqlen_k, window)) == expected


@pytest.mark.parametrize(
    ("window_size", "causal", "max_seqlen_k", "expected"),
    [
        ((-1, -1), False, 8, (None, None)),
        ((-1, -1), True, 8, (None, 0)),
        ((-1, 0), False, 8, (None, 0)),
        ((3, 3), True, 8, (3, 0)),
        ((3, 5), False, 8, (3, 5)),
        ((7, 7), False, 8, (7, 7)),
        ((8, 8), False, 8, (None, None)),
        ((8, 2), True, 8, (None, 0)),
        ((-7, -2), False, 8, (None, None)),
        # the side that is left open is closed at the length of the call, which can bind
        ((3, -1), False, 8, (3, 8)),
        ((3, 9), False, 8, (3, 8)),
        ((-1, 5), False, 8, (8, 5)),
        ((9, 5), False, 8, (8, 5)),
        ((0, 0), False, 0, (None, None)),
    ],
)
def test_window_normalisation(window_size, causal, max_seqlen_k, expected):
    assert reference.normalise_window(window_size, causal, max_seqlen_k) == expected


def test_window_as_wide_as_the_call_does_not_bind_in_a_shorter_sequence():
    q, k, v = random(4, 1, 8), random(2, 1, 8, seed=1), random(2, 1, 8, seed=2)
    literal = reference.attention(q, k, v, window_size=(0, 1), max_seqlen_k=9)
    widened = reference.attention(q, k, v, window_size=(9, 9), max_seqlen_k=9)
    assert literal.softmax_lse[0, 0] == INF
    assert widened.softmax_lse.isfinite().all()


def test_an_open_right_side_still_empties_rows_that_lie_far_before_the_keys():
    q, k, v = random(7, 1, 8), random(2, 1, 8, seed=1), random(2, 1, 8, seed=2)
    # right becomes 2, the length of the call, so rows before 7 - 2 - 2 see nothing
    lse = reference.attention(q, k, v, window_size=(1, -1)).softmax_lse
    assert lse.isinf().tolist() == [[True] * 3 + [False] * 4]


@pytest.mark.parametrize("attend", [reference.attention, reference.same_precision])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(4, 2), (3, 0), (0, 3), (0, 0)])
def test_rows_without_keys_are_zeros_and_infinite_and_pass_no_gradient(attend, seqlen_q, seqlen_k):
    q, k, v = random(seqlen_q, 2, 8), random(seqlen_k, 2, 8), random(seqlen_k, 2, 8)
    empty = max(seqlen_q - seqlen_k, 0)
    result, gradients = reference.with_gradients(attend, q, k, v, torch.ones_like(q), causal=True)
    assert (result.out[:empty] == 0).all()
    assert result.softmax_lse.isinf().sum(dim=1).tolist() == [empty] * 2
    assert (gradients[0][:empty] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window_size": (1, 1)},
        {"softcap": 1.5},
        {"alibi_slopes": torch.tensor([0.5, 0.25])},
        {"dropout_mask": random(2, 5, 3) > 0, "dropout_p": 0.4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_gradients_by_finite_differences(options):
    q, k, v = random(5, 2, 3), random(3, 1, 3, seed=1), random(3, 1, 3, seed=2)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: reference.attention(*x, **options).out, leaves)


def test_gradients_from_a_rounded_out_by_the_formulas_of_the_backward():
    q, k, v, dout = (random(4, 1, 8, seed=seed) for seed in range(4))
    result, (dq, dk, dv) = reference.with_gradients(
        reference.attention, q, k, v, dout, softmax_scale=0.5, out_dtype=torch.float16
    )
    stored = result.out.detach().half().double()
    dp = dout[:, 0] @ v[:, 0].T
    p = result.probabilities[0].detach()
    ds = p * (dp - (dout * stored).sum(dim=-1)) * 0.5
    torch.testing.assert_close(dq[:, 0], ds @ k[:, 0])
    torch.testing.assert_close(dk[:, 0], ds.T @ q[:, 0])
    torch.testing.assert_close(dv[:, 0], p.T @ dout[:, 0])
    _, exact = reference.with_gradients(reference.attention, q, k, v, dout, softmax_scale=0.5)
    assert not torch.equal(exact[0], dq)


def test_varlen_solves_each_sequence_and_leaves_nothing_in_the_tail():
    q, k, v = random(9, 2, 8), random(8, 1, 8, seed=1), random(8, 1, 8, seed=2)
    q[7:], k[6:], v[6:] = (float("nan"),) * 3
    slopes = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    result = reference.varlen(
        q, k, v, [0, 3, 3, 7], [0, 2, 4, 6], max_seqlen_k=2, causal=True, alibi_slopes=slopes
    )
    last = reference.attention(q[3:7], k[4:6], v[4:6], causal=True, alibi_slopes=slopes[2])
    assert torch.equal(result.out[3:7], last.out)
    assert torch.equal(result.softmax_lse[:, 3:7], last.softmax_lse)
    assert (result.out[7:] == 0).all()
    assert (result.softmax_lse[:, 7:] == INF).all()
    assert [p.shape for p in result.probabilities] == [(2, 3, 2), (2, 0, 2), (2, 4, 2)]


def test_dense_is_varlen_of_equal_lengths():
    q, k, v = random(3, 4, 2, 8), random(3, 6, 2, 8, seed=1), random(3, 6, 2, 8, seed=2)
    result = reference.dense(q, k, v, window_size=(2, 0))
    for index in range(3):
        single = reference.attention(q[index], k[index], v[index], window_size=(2, 0))
        assert torch.equal(result.out[index], single.out)
        assert torch.equal(result.softmax_lse[index], single.softmax_lse)


def test_nothing_at_all():
    result = reference.varlen(
        random(2, 1, 8), random(0, 1, 8), random(0, 1, 8), [0], [0], max_seqlen_k=0
    )
    assert result.out.tolist() == torch.zeros(2, 1, 8).tolist()
    assert reference.dense(*[random(0, 3, 2, 8)] * 3).softmax_lse.shape == (0, 2, 3)


def test_the_error_rule_accepts_one_rounding_and_refuses_more():
    exact = torch.tensor([1.0, 2.0]).double()
    one_off = torch.tensor([1.0, 2.0 + 2**-9], dtype=torch.float16)
    two_off = torch.tensor([1.0, 2.0 + 2**-7], dtype=torch.float16)
    reference.assert_close_to_reference(one_off, exact, exact.half(), "out")
    with pytest.raises(AssertionError, match=r"out: off by 0\.00781 at \(1,\), allowed 0\.00201"):
        reference.assert_close_to_reference(two_off, exact, exact.half(), "out")
    reference.assert_close_to_reference(two_off, exact, two_off, "out")
    reference.assert_close_to_reference(two_off, exact, exact.half(), "out", two_off)


@pytest.mark.parametrize("wrong", [float("nan"), INF])
def test_the_error_rule_refuses_values_that_are_not_numbers(wrong):
    exact = torch.zeros(2, 2).double()
    actual = torch.tensor([[0.0, 0.0], [wrong, 0.0]])
    with pytest.raises(AssertionError, match=r"dq: 1 of 4 values .* first at \(1, 0\)"):
        reference.assert_close_to_reference(actual, exact, exact, "dq")


def test_lse_must_be_float32_and_infinite_where_the_reference_is():
    exact = torch.tensor([[INF, 1.0]]).double()
    reference.assert_lse_close(exact.float(), exact)
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        reference.assert_lse_close(exact, exact)
    with pytest.raises(AssertionError, match="1 of 2 values"):
        reference.assert_lse_close(torch.tensor([[-INF, 1.0]]), exact)
    with pytest.raises(AssertionError, match=r"off by 0\.001"):
        reference.assert_lse_close(torch.tensor([[INF, 1.001]]), exact)
