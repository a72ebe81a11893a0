"""Mirror of `flash_attn.models`: whole models out of the modules of this package."""
