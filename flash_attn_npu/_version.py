"""The level of flash-attention's API that this package mirrors, and what it runs on."""

from ._startup import FLASH_ATTN_VERSION

__all__ = ["FLASH_ATTN_VERSION", "OLDEST_TORCH_NPU"]

OLDEST_TORCH_NPU = "2.6.0"
"""The oldest torch_npu that is supported: the first whose torch is."""
