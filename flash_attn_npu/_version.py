"""The level of flash-attention's API that this package mirrors."""

FLASH_ATTN_VERSION = "2.8.3"
"""What `flash_attn.__version__` and the `flash-attn` metadata say while we are installed.

Not 2.8.4: Transformer Engine and xformers refuse versions from there on."""
