"""Mirror of `flash_attn.ops`: the single operations that layers are made of."""
