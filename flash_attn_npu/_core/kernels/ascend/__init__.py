"""Ascend's fused kernels under flash-attn's rules; torch_npu is imported when first needed."""
