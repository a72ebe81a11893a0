"""The level of flash-attention's API that this package mirrors."""

from _flash_attn_npu_startup import FLASH_ATTN_VERSION

__all__ = ["FLASH_ATTN_VERSION"]
