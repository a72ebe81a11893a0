"""Mirror of `flash_attn.ops.triton`, by its names only: composed of torch operations, any device."""
