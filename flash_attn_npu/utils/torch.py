"""Mirror of `flash_attn.utils.torch`: autocast for autograd.Functions, on the device of each call.

Upstream's decorators mean CUDA. These take the device from the tensors they are called with.
"""

from __future__ import annotations

from typing_extensions import deprecated  # torch depends on it

from .._core.ground.autocast import custom_amp_decorator, custom_bwd, custom_fwd

__all__ = ["custom_amp_decorator", "custom_bwd", "custom_fwd", "deprecated"]
