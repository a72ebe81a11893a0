"""`cross_entropy_loss` against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_npu._core.kernels.composed import cross_entropy as kernel
from flash_attn_npu.errors import ArgumentError, ArgumentTypeError
from flash_attn_npu.losses.cross_entropy import CrossEntropyLoss as CrossEntropyModule
from flash_attn_npu.ops.triton.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from tests.helpers import cross_entropy_reference as expected
from tests.helpers.peak_bytes import PeakBytes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(logits, labels, weight=None, **options):
    """(losses, z_losses, gradient) where rows are weighted."""
    logits = logits.detach().requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    weight = torch.ones_like(losses) if weight is None else weight
    (grad,) = torch.autograd.grad(losses, logits, weight)
    return losses.detach(), z_losses, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", expected.CASES)
def test_values_and_gradients_of_many_logits(no_small, case, dtype):
    test_values_and_gradients(torch.device("cpu"), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", expected.CASES)
def test_values_and_gradients(device, case, dtype):
    options = expected.CASES[case]
    logits, labels = expected.make(12, 37, dtype, options.get("ignore_index", expected.IGNORE))
    weight = torch.rand(12, dtype=torch.float64) + 0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    losses, z_losses, grad = run(
        logits.to(device), labels.to(device), weight.to(device, wide), **options
    )
    want, want_z, want_grad = expected.reference(logits, labels, **options)
    assert losses.dtype == z_losses.dtype == wide
    assert grad.dtype == dtype
    # some roundings of numbers about as large as lse, and of the weights
    noise = 16 * torch.finfo(wide).eps
    size = want.abs() + logits.double().abs().amax(1) + 5
    expected.assert_rounded_once(losses, want, noise * size)
    expected.assert_rounded_once(z_losses, want_z, noise * size)
    # the terms of a gradient, which may cancel: the probability, the target's 1, the smoothing
    smallest = options.get("label_smoothing", 0) / 37 + torch.finfo(wide).eps
    terms = want_grad.abs() + smallest + F.one_hot(labels.clamp(min=0), 37)
    bound = noise * size[:, None] * terms
    want_grad = want_grad * weight.to(wide).double()[:, None]
    expected.assert_rounded_once(grad, want_grad, bound)
    assert want[labels == options.get("ignore_index", expected.IGNORE)].eq(0).all()


@pytest.mark.parametrize("case", expected.CASES)
def test_values_of_many_logits_without_a_gradient(no_small, monkeypatch, case):
    """Chunk by chunk, by torch's own loss."""
    monkeypatch.setattr(kernel, "HOST_CHUNK", 5 * 37)
    options = expected.CASES[case]
    logits, labels = expected.make(12, 37, torch.float16, options.get("ignore_index", -100))
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    want, want_z, _ = expected.reference(logits, labels, **options)
    noise = 16 * torch.finfo(torch.float32).eps * (want.abs() + logits.double().abs().amax(1) + 5)
    expected.assert_rounded_once(losses, want, noise)
    expected.assert_rounded_once(z_losses, want_z, noise)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, -1, 4])
def test_torch_gives_the_same(smoothing, ignore_index):
    logits, labels = expected.make(9, 11, torch.float64, ignore_index)
    losses, z_losses, grad = run(
        logits, labels, label_smoothing=smoothing, ignore_index=ignore_index
    )
    x = logits.requires_grad_()
    want = F.cross_entropy(
        x, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )
    want.sum().backward()
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(grad, x.grad)
    assert z_losses.eq(0).all()


@pytest.mark.parametrize("case", expected.CASES)
def test_first_and_second_derivatives(case):
    options = expected.CASES[case]
    logits, labels = expected.make(4, 5, torch.float64, options.get("ignore_index", -100))

    def losses(x):
        return cross_entropy_loss(x, labels, **options)[0]

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(losses, logits)


@pytest.mark.parametrize("case", expected.CASES)
def test_first_and_second_derivatives_of_many_logits(no_small, case):
    test_first_and_second_derivatives(case)


def test_z_losses_are_part_of_losses_and_have_no_gradient():
    logits, labels = expected.make(6, 8, torch.float32)
    logits.requires_grad_()
    plain = cross_entropy_loss(logits, labels)[0]
    losses, z_losses = cross_entropy_loss(logits, labels, lse_square_scale=0.1)
    assert not z_losses.requires_grad
    torch.testing.assert_close(losses, plain + z_losses)
    assert losses.requires_grad
    assert z_losses[labels != -100].gt(0).all()


@pytest.mark.parametrize("create_graph", [False, True])
def test_precomputed_lse_is_taken_as_it_is(create_graph):
    logits, labels = expected.make(6, 8, torch.float32)
    options = {"lse_square_scale": 0.1}
    lse = logits.double().logsumexp(1)
    losses, z_losses, grad = run(logits, labels, precomputed_lse=lse, **options)
    want, want_z, want_grad = expected.reference(logits, labels, **options)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z_losses.double(), want_z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-6)
    # one that is not the logits' own: every term takes it
    other = (lse.half() + 1).requires_grad_()
    logits.requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, labels, other, **options)
    (grad,) = torch.autograd.grad(losses.sum(), logits, create_graph=create_graph)
    x, o, counted = logits.detach().double(), other.detach().double(), labels != -100
    target = x.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    want = o - target + 0.1 * o**2
    torch.testing.assert_close(losses.double(), want * counted)
    torch.testing.assert_close(z_losses.double(), 0.1 * o**2 * counted)
    want_grad = (x - o[:, None]).exp() * (1 + 0.2 * o[:, None])
    want_grad -= F.one_hot(labels.clamp(min=0), 8)
    torch.testing.assert_close(grad.double(), want_grad * counted[:, None])
    assert other.grad is None


@pytest.mark.parametrize(
    "options", [{"logit_scale": 0.5}, {"label_smoothing": 0.1}, expected.CASES["all"]]
)
def test_with_a_scale_or_smoothing_a_precomputed_lse_counts_for_nothing(device, options):
    logits, labels = expected.make(6, 8, torch.float32, options.get("ignore_index", -100))
    logits, labels = logits.to(device), labels.to(device)
    given = torch.full((6,), 3.0, device=device)
    got = run(logits, labels, precomputed_lse=given, **options)
    for mine, want in zip(got, run(logits, labels, **options), strict=True):
        assert torch.equal(mine, want)


def test_the_values_of_flash_attn_for_a_precomputed_lse_with_a_scale():
    x, y = torch.randn(4, 8), torch.randint(0, 8, (4,))
    loss = CrossEntropyModule(reduction="none", logit_scale=0.5)
    want = torch.tensor([2.1574, 2.1021, 1.7925, 1.5760])
    torch.testing.assert_close(
        loss(x, y, precomputed_lse=x.logsumexp(-1)), want, rtol=0, atol=5.1e-5
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_every_integer_dtype(dtype):
    logits, labels = expected.make(6, 200, torch.float32)
    labels[2::4], labels[0] = 199, 156
    torch.testing.assert_close(run(logits, labels.to(dtype))[0], run(logits, labels)[0])
    ignoring = cross_entropy_loss(logits, labels.to(dtype), ignore_index=199)[0]
    assert ignoring.eq(0).equal(labels == 199)


def _layouts(x):
    batch, vocab = x.shape
    wider = torch.full((2 * batch, vocab + 3), torch.nan, dtype=x.dtype)
    wider[::2, 2:-1] = x
    return {
        "transposed": x.t().contiguous().t(),
        "sliced": wider[::2, 2:-1],
        "every other column": torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0],
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other column"])
@pytest.mark.parametrize("inplace", [False, True])
def test_strides(layout, inplace):
    logits, labels = expected.make(6, 8, torch.float32)
    weight = torch.rand(1).expand(6)
    want, _, want_grad = run(logits, labels, weight)
    given = _layouts(logits)[layout]
    base = given._base if given._base is not None else given
    around = base.clone()
    losses, _, grad = run(
        given, torch.stack((labels, labels), 1)[:, 0], weight, inplace_backward=inplace
    )
    # the order of a sum depends on the layout
    torch.testing.assert_close(losses, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-7)
    if inplace:
        assert grad.data_ptr() == given.data_ptr()
        assert grad.stride() == given.stride()
        assert base.isnan().equal(around.isnan())
    else:
        assert torch.equal(given, logits)
        assert grad.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 1)])
def test_the_smallest_shapes(device, shape):
    logits = torch.randn(shape, device=device)
    labels = torch.zeros(shape[0], dtype=torch.long, device=device)
    losses, z_losses, grad = run(logits, labels, label_smoothing=0.1)
    assert losses.shape == z_losses.shape == shape[:1]
    assert grad.shape == shape
    if shape[1] == 1:
        assert losses.abs().max() < 1e-6
        assert grad.abs().max() < 1e-6


def test_huge_logits():
    logits, labels = expected.make(8, 16, torch.float32, spread=1e4)
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-6}
    losses, _, grad = run(logits, labels, **options)
    want, _, want_grad = expected.reference(logits, labels, **options)
    # what one rounding of the largest logit does to a difference of logits, and to its exp
    eps, size = torch.finfo(torch.float32).eps, float(logits.abs().max())
    noise = 4 * eps * size
    expected.assert_rounded_once(losses, want, noise * (1 + 2e-6 * size))
    expected.assert_rounded_once(grad, want_grad, noise * (want_grad.abs() + 2e-6))
    assert not run(1e30 * logits, labels)[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_classes(device, dtype):
    logits, labels = expected.make(8, 16, dtype)
    logits[:, 12:] = -torch.inf
    labels = torch.where(labels < 0, labels, labels % 12)
    losses, _, grad = run(logits.to(device), labels.to(device), lse_square_scale=0.1)
    want, _, want_grad = run(logits[:, :12], labels, lse_square_scale=0.1)
    torch.testing.assert_close(losses.cpu(), want)
    torch.testing.assert_close(grad.cpu()[:, :12], want_grad)
    assert grad[:, 12:].eq(0).all()


def test_masked_classes_with_smoothing_cost_infinity_and_the_target_too():
    logits, labels = expected.make(4, 6, torch.float32)
    logits[:, 5] = -torch.inf
    labels[0], labels[1] = 5, 1
    losses, _, grad = run(logits, labels)
    assert losses.isinf().tolist() == [True, False, False, labels[3].item() == 5]
    losses, _, grad = run(logits, labels, label_smoothing=0.1)
    assert losses.eq(torch.inf).equal(labels != -100)
    assert grad.isfinite().all()


def test_ignored_rows_get_zeros_whatever_they_hold_and_whatever_comes_back():
    logits, labels = expected.make(4, 6, torch.float32)
    logits[2] = -torch.inf
    weight = torch.tensor([1.0, torch.inf, torch.nan, 2.0])
    losses, z_losses, grad = run(logits, labels, weight, lse_square_scale=0.1)
    assert losses[2] == z_losses[2] == 0
    assert grad[2].eq(0).all()
    assert not grad[1].isfinite().all()
    assert grad[[0, 3]].isfinite().all()


class _LargestWide(TorchDispatchMode):
    """The most bytes that a float32 result takes, and the most of any."""

    def __init__(self):
        super().__init__()
        self.wide = self.any = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * tensor.element_size()
                self.any = max(self.any, size)
                if tensor.dtype == torch.float32:
                    self.wide = max(self.wide, size)
        return out


@pytest.mark.parametrize("options", [{}, expected.CASES["all"]])
def test_rows_are_taken_in_chunks(no_small, monkeypatch, options):
    logits, labels = expected.make(23, 64, torch.bfloat16, options.get("ignore_index", -100))
    want = run(logits, labels, **options)
    chunk = 5 * 64
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", chunk)
    with _LargestWide() as seen:
        got = run(logits, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert seen.wide == 4 * chunk
    assert seen.any == logits.numel() * 2
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    got = run(logits, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_kept_for_backward(no_small):
    logits, labels = expected.make(8, 32, torch.bfloat16)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy_loss(logits.requires_grad_(), labels)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [
        (torch.bfloat16, (8, 32)),
        (torch.int64, (8,)),
        (torch.float32, (8,)),
    ]
    assert kept[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_writes_over_the_logits(no_small, device, dtype):
    writes_over_the_logits(device, dtype, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", expected.CASES)
def test_inplace_backward_writes_over_few_logits(case, dtype):
    writes_over_the_logits(torch.device("cpu"), dtype, **expected.CASES[case])


def writes_over_the_logits(device, dtype, **options):
    values, labels = expected.make(6, 8, dtype, options.get("ignore_index", expected.IGNORE))
    values, labels = values.to(device), labels.to(device)
    want = run(values, labels, **options)[2]
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    pointer, seen = logits.data_ptr(), []
    logits.register_hook(lambda grad: seen.append((grad.data_ptr(), grad.clone())))
    losses = cross_entropy_loss(logits, labels, inplace_backward=True, **options)[0]
    losses.sum().backward(retain_graph=True)
    assert seen[0][0] == pointer
    assert torch.equal(seen[0][1], want)
    assert torch.equal(logits.detach(), want)
    assert torch.equal(leaf.grad, want)
    # the logits are gone, and autograd knows
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_of_few_logits_is_differentiated_elsewhere(dtype):
    values, labels = expected.make(6, 8, dtype)

    def second(inplace):
        logits = values.clone().requires_grad_()
        losses = cross_entropy_loss(logits, labels, inplace_backward=inplace)[0]
        (grad,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
        assert torch.equal(logits.detach(), values)
        return torch.autograd.grad(grad.float().square().sum(), logits)[0]

    want = second(inplace=False)
    assert want.abs().sum() > 0
    assert torch.equal(second(inplace=True), want)


def test_inplace_backward_of_few_logits_forgets_ignored_rows():
    values, labels = expected.make(6, 8, torch.float32)
    values[labels == expected.IGNORE] = float("nan")
    logits = values.requires_grad_()
    losses, _ = cross_entropy_loss(logits, labels, inplace_backward=True)
    losses.backward(torch.ones(6))
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert logits.grad.isfinite().all()
    assert logits.grad[labels == expected.IGNORE].eq(0).all()


def test_logits_keep_their_values_without_inplace_backward():
    values, labels = expected.make(6, 8, torch.float32)
    logits = values.clone().requires_grad_()
    losses = cross_entropy_loss(logits, labels)[0]
    losses.sum().backward(retain_graph=True)
    first = logits.grad.clone()
    losses.sum().backward()
    assert torch.equal(logits.detach(), values)
    assert torch.equal(logits.grad, 2 * first)


def test_inplace_backward_does_not_corrupt_what_another_backward_needs():
    values, labels = expected.make(6, 8, torch.float32)
    leaf = values.requires_grad_()
    logits = leaf.exp()  # exp keeps its result for its backward
    losses = cross_entropy_loss(logits, labels, inplace_backward=True)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


OVERLAPPING = [(0, 1), (3, 1), (1, 1), (2, 4)]


@pytest.mark.parametrize("strides", OVERLAPPING, ids=str)
def test_inplace_backward_of_overlapping_logits_takes_memory_of_its_own(no_small, strides):
    takes_memory_of_its_own(strides)


@pytest.mark.parametrize("strides", OVERLAPPING, ids=str)
def test_inplace_backward_of_few_overlapping_logits(strides):
    takes_memory_of_its_own(strides)


def takes_memory_of_its_own(strides):
    memory = torch.randn(40)
    logits = memory.as_strided((4, 8), strides)
    labels = torch.tensor([0, 1, -100, 3])
    want = run(logits.contiguous(), labels)[2]
    before = memory.clone()
    assert torch.equal(run(logits, labels, inplace_backward=True)[2], want)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("options", [{}, expected.CASES["all"]])
def test_inplace_backward_takes_a_work_space_of_fixed_size(monkeypatch, options):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1 << 16)
    logits = torch.randn(256, 1 << 15).bfloat16().requires_grad_()
    labels = torch.randint(0, 1 << 15, (256,))
    with PeakBytes() as bytes_of:
        losses, _ = cross_entropy_loss(logits, labels, inplace_backward=True, **options)
        (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()
    # two rows in float32 are 256 KiB, and there are up to six of them
    assert bytes_of.peak < 2 << 20 < logits.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, autocast):
    logits, labels = expected.make(6, 8, dtype, 2)
    want = run(logits, labels, **expected.CASES["all"])
    with torch.autocast("cpu", dtype=autocast):
        got = run(logits, labels, **expected.CASES["all"])
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("label", [-1, 8, 1 << 40])
def test_a_label_that_is_no_class_is_refused(label):
    logits, labels = expected.make(4, 8, torch.float32)
    labels[1], labels[2] = label, 0
    with pytest.raises(ArgumentError, match=rf"labels: got a label {label}; allowed: 0 to 7, or"):
        cross_entropy_loss(logits, labels)
    assert cross_entropy_loss(logits, labels, ignore_index=label)[0][1] == 0


def test_a_label_that_is_no_class_is_nan_where_it_is_not_looked_at(npu):
    logits, labels = expected.make(4, 8, torch.float32)
    labels[1], labels[3] = -1, 8
    losses, z_losses, _ = run(logits.to(npu), labels.to(npu), lse_square_scale=0.1)
    assert losses.isnan().tolist() == [False, True, False, True]
    assert z_losses.isfinite().all()


BAD = {
    "logits": (torch.randn(2, 3, 4), torch.zeros(2).long(), {}, r"logits: got shape \(2, 3, 4\)"),
    "no class": (torch.randn(2, 0), torch.zeros(2).long(), {}, "logits: .*at least one class"),
    "integer logits": (torch.ones(2, 3).int(), torch.zeros(2).long(), {}, "logits: .*floating"),
    "label shape": (torch.randn(2, 3), torch.zeros(2, 1).long(), {}, r"labels: got shape \(2, 1\)"),
    "label dtype": (torch.randn(2, 3), torch.zeros(2), {}, "labels: got torch.float32"),
    "bool labels": (torch.randn(2, 3), torch.zeros(2).bool(), {}, "labels: got torch.bool"),
    "lse shape": (
        torch.randn(2, 3),
        torch.zeros(2).long(),
        {"precomputed_lse": torch.ones(2, 1)},
        r"precomputed_lse: got shape \(2, 1\)",
    ),
    "lse dtype": (
        torch.randn(2, 3),
        torch.zeros(2).long(),
        {"precomputed_lse": torch.ones(2).long()},
        "precomputed_lse: got torch.int64",
    ),
    "smoothing": (
        torch.randn(2, 3),
        torch.zeros(2).long(),
        {"label_smoothing": float("nan")},
        "label_smoothing: got nan",
    ),
    "device": (
        torch.randn(2, 3),
        torch.zeros(2, device="meta").long(),
        {},
        "labels: got meta; allowed: cpu, as logits",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    logits, labels, options, message = BAD[name]
    with pytest.raises(ArgumentError, match=message) as raised:
        cross_entropy_loss(logits, labels, **options)
    assert "; to fix it: " in str(raised.value)


def test_arguments_of_a_wrong_type_are_named():
    logits, labels = torch.randn(2, 3), torch.zeros(2).long()
    for arguments, options, name in [
        ((None, labels), {}, "logits"),
        ((logits, [0, 1]), {}, "labels"),
        ((logits, labels, 1.0), {}, "precomputed_lse"),
        ((logits, labels), {"label_smoothing": "0"}, "label_smoothing"),
        ((logits, labels), {"logit_scale": None}, "logit_scale"),
        ((logits, labels), {"ignore_index": 0.5}, "ignore_index"),
    ]:
        with pytest.raises(ArgumentTypeError, match=f"^{name}: got .*; to fix it: "):
            cross_entropy_loss(*arguments, **options)


def test_the_function_takes_its_arguments_in_upstreams_order():
    logits, labels = expected.make(4, 8, torch.float32, 3)
    values = (None, 0.1, 0.7, 0.2, 3, False, None)
    named = cross_entropy_loss(
        logits,
        labels,
        precomputed_lse=None,
        label_smoothing=0.1,
        logit_scale=0.7,
        lse_square_scale=0.2,
        ignore_index=3,
        inplace_backward=False,
        process_group=None,
    )
    by_place = CrossEntropyLoss.apply(logits, labels, *values)
    assert all(torch.equal(a, b) for a, b in zip(named, by_place, strict=True))
