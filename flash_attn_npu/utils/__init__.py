"""Mirror of `flash_attn.utils`: what several modules of the package need."""
