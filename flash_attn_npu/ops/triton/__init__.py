"""Mirror of `flash_attn.ops.triton` in names only: there is no Triton here."""
