"""Torch's own kernels for a CPU, under flash-attn's rules."""
