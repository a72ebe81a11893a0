"""Mirror of `flash_attn.losses`: cross entropy."""
