"""The kernels: each turns a validated problem into a function of tensors.

Only this package and `integrations` may import torch_npu, and only when a problem needs it.
"""

from __future__ import annotations
