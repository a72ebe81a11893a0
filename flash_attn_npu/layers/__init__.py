"""Mirror of `flash_attn.layers`: rotary position embedding."""
