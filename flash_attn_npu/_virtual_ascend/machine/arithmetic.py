"""Arithmetic for the stub CANN: aten operators of NPU tensors computed by the CPU's kernels.

Python kernels replace torch_npu's own for the PrivateUse1 dispatch key, so autograd, autocast,
dispatch modes and torch.compile see what they see on a card. Views, allocations and metadata stay
torch_npu's own, and an operator without a PrivateUse1 kernel takes torch_npu's CPU fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import copies, derivatives, journal
from .memory import host_view, to_device
from .randomness import default_host_generator, draw_seed, host_generator
from .refusal import not_simulated
from .registering import HOLDS_KERNELS, original

Kernel = Callable[..., Any]

# torch_npu's own implementation is the arithmetic, or dispatches to operators that have it
_KEPT = {
    "_fused_sdp_choice",
    "_lazy_clone",
    "_pin_memory",
    "as_strided_",
    "contiguous",
    "is_pinned",
    "is_set_to",
    "record_stream",
    "resize_",
    "resize_as_",
    "scaled_dot_product_attention",
    "set_",
}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# torch_npu makes these of operators that have arithmetic, or has gradients of its own for them
_KEPT_ABOVE = {
    "contiguous",
    "dropout",
    "dropout_",
    "kl_div",
    "l1_loss",
    "matmul",
    "repeat_interleave",
    "scaled_dot_product_attention",
    "stft",
    "to",
}
# Operators that take host tensors beside device tensors on a card too
_MIXED = {"_index_put_impl_", "_pack_padded_sequence", "index", "index_put", "index_put_"}


def kernels() -> dict[str, Kernel]:
    """Every operator outside the npu namespace that torch_npu implements and this module replaces.

    What nobody computes is refused: torch_npu's own kernel would launch nothing, and answer with
    the memory as it found it.
    """
    table = {}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        op = None if name.startswith("npu::") else overload(name)
        kernel = _kernel_for(op) if op else None
        if kernel:
            table[name] = kernel
    return table


def composed_kernels() -> dict[str, Kernel]:
    """What torch_npu launches above autograd, where torch composes: composed, as torch does.

    There its kernel answers without asking for the one below, and it would launch nothing.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    table = {}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutogradPrivateUse1"):
        op = overload(name) if name.startswith("aten::") else None
        if op is None or op._schema.name.removeprefix("aten::") in _KEPT_ABOVE:
            continue
        if has(op.name(), "CompositeImplicitAutograd"):
            table[name] = op.decompose
    return table


def overload(name: str) -> torch._ops.OpOverload | None:
    """The operator called "namespace::packet.overload", None where no schema is known."""
    namespace, _, rest = name.partition("::")
    packet, _, variant = rest.partition(".")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    return getattr(found, variant or "default", None)


def _kernel_for(op: torch._ops.OpOverload) -> Kernel | None:
    name = op._schema.name.removeprefix("aten::")
    if name in copies.KERNELS:
        return copies.KERNELS[name]
    if name == "matmul_backward":
        return derivatives.matmul_backward
    if name in _WIDENED and op._overloadname == "default":
        return _WIDENED[name](OnHost(op))
    if op.name() == "aten::histc":
        return _histogram(OnHost(op))
    if op.name() == "aten::native_layer_norm_backward":
        return _summed_in_float32(OnHost(op))
    if name in _ALLOCATIONS:
        return _poisoned(original(op)) if HOLDS_KERNELS else None
    if name in _KEPT or _is_view(op) or name.startswith("empty"):
        return None
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    # silu_backward has both, and its composed form rounds at every step
    if has(op.name(), "CompositeImplicitAutograd") and not has(op.name(), "CPU"):
        return op.decompose
    computed = torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), "CPU")
    if computed and not op.name().startswith("c10d::"):
        return OnHost(op)
    return not_simulated(op.name())


def _to_float(on_host: Kernel) -> Kernel:
    """A softmax of float16 that answers in float32, which the CPU's kernel has not."""

    def kernel(values: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        if half_to_float and values.dtype != torch.float16:
            raise RuntimeError(f"conversion is supported for Half type only, got {values.dtype}")
        return on_host(values.float() if half_to_float else values, dim, False)

    return kernel


def _from_float(on_host: Kernel) -> Kernel:
    """Its gradient, back in float16."""

    def kernel(
        grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
    ) -> torch.Tensor:
        return on_host(grad, output, dim, grad.dtype).to(input_dtype)

    return kernel


_WIDENED = {
    "_log_softmax": _to_float,
    "_log_softmax_backward_data": _from_float,
    "_softmax": _to_float,
    "_softmax_backward_data": _from_float,
}


def _histogram(on_host: Kernel) -> Kernel:
    """A card counts integers too; the CPU's kernel has no such case."""

    def kernel(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return on_host(values.double(), *args, **kwargs).to(values.dtype)

    return kernel


def _summed_in_float32(on_host: Kernel) -> Kernel:
    """The sums over rows of a card are in float32, those of the CPU's kernel are not."""

    def kernel(*args: Any) -> tuple[torch.Tensor | None, ...]:
        half = (torch.float16, torch.bfloat16)
        dtypes = [getattr(args[place], "dtype", None) for place in (1, 5, 6)]
        wide = [a.float() if getattr(a, "dtype", None) in half else a for a in args]
        grads = zip(on_host(*wide), dtypes, strict=True)
        return tuple(None if grad is None else grad.to(dtype) for grad, dtype in grads)

    return kernel


def _is_view(op: torch._ops.OpOverload) -> bool:
    aliases = (value.alias_info for value in op._schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)


def _poisoned(allocate: Kernel) -> Kernel:
    """An allocation whose floating memory is NaN until somebody writes it."""

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        if out.is_floating_point() and out.device.type == "npu" and out.numel():
            with torch._C.DisableTorchFunction():
                host_view(out).fill_(torch.nan)
        return out

    return kernel


class OnHost:
    """One operator, computed by the CPU's kernel on the device's memory."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        self.op = op
        self.out_names = {argument.name for argument in schema.arguments if argument.is_out}
        self.returned = [_returned_argument(schema, value) for value in schema.returns]
        self.positions = {argument.name: i for i, argument in enumerate(schema.arguments)}
        self.takes_generator = "generator" in self.positions
        self.is_random = torch.Tag.nondeterministic_seeded in op.tags
        self.mixes = schema.name.removeprefix("aten::") in _MIXED

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        journal.asked(self.op.name())
        with torch._C.DisableTorchFunction():
            call = _Call(self)
            host_args = [call.to_host(value) for value in args]
            host_kwargs = {
                name: call.to_host(value, is_out=name in self.out_names)
                for name, value in kwargs.items()
            }
            call.check_devices()
            result = self._compute(args, host_args, kwargs, host_kwargs)
            call.finish_outputs()
            return self._to_device(result, args, kwargs, call.device)

    def _compute(self, args: Any, host_args: list, kwargs: Any, host_kwargs: dict) -> Any:
        if self.takes_generator:
            generator = self._argument("generator", args, kwargs)
            host_kwargs["generator"] = host_generator(draw_seed(generator))
            return self.op(*host_args[: self.positions["generator"]], **host_kwargs)
        if self.is_random:
            with default_host_generator(draw_seed(None)):
                return self.op(*host_args, **host_kwargs)
        return self.op(*host_args, **host_kwargs)

    def _argument(self, name: str, args: Any, kwargs: Any) -> Any:
        position = self.positions[name]
        return args[position] if position < len(args) else kwargs.get(name)

    def _to_device(self, result: Any, args: Any, kwargs: Any, device: Any) -> Any:
        if len(self.returned) <= 1:
            name = self.returned[0] if self.returned else None
            if name:
                return self._argument(name, args, kwargs)
            return _result(result, device)
        return tuple(
            self._argument(name, args, kwargs) if name else _result(value, device)
            for name, value in zip(self.returned, result, strict=True)
        )


def _returned_argument(schema: Any, value: Any) -> str | None:
    """The name of the argument that an in-place or out operator returns."""
    if value.alias_info is None:
        return None
    for argument in schema.arguments:
        alias = argument.alias_info
        if alias is not None and alias.before_set == value.alias_info.before_set:
            return argument.name
    return None


def _result(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return to_device(value, device)
    if isinstance(value, (list, tuple)):
        return [_result(item, device) for item in value]
    if isinstance(value, (bool, int, float)):
        journal.copied_to_host(torch.tensor(value))
    return value


class _Call:
    """The tensors of one call: host views for the device's, and what they say about devices."""

    def __init__(self, kernel: OnHost) -> None:
        self.kernel = kernel
        self.device: torch.device | None = None
        self.host_shape: torch.Size | None = None
        self.inputs: set[int] = set()
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_host(self, value: Any, is_out: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, is_out)
        if isinstance(value, (list, tuple)):
            return [self.to_host(item) for item in value]
        if isinstance(value, torch.device) and value.type == "npu":
            self.device = value
            return torch.device("cpu")
        return value

    def _tensor(self, value: torch.Tensor, is_out: bool) -> torch.Tensor:
        if value.device.type != "npu":
            if value.dim() > 0:
                self.host_shape = value.shape
            return value
        self.device = value.device
        memory = value.untyped_storage().data_ptr()
        if is_out and memory not in self.inputs:
            # The CPU's kernel resizes it, which a view over foreign memory cannot follow
            host = torch.empty(0, dtype=value.dtype, device="cpu")
            self.outputs.append((value, host))
            return host
        self.inputs.add(memory)
        return host_view(value)

    def check_devices(self) -> None:
        if self.host_shape is not None and self.device is not None and not self.kernel.mixes:
            raise RuntimeError(
                f"{self.kernel.op}: expected all tensors to be on the same device, but found one "
                f"of shape {tuple(self.host_shape)} on the CPU beside {self.device}"
            )

    def finish_outputs(self) -> None:
        for device_tensor, host in self.outputs:
            if device_tensor.shape != host.shape:
                device_tensor.resize_(host.shape)
            host_view(device_tensor).copy_(host)
