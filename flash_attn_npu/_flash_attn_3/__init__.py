"""FlashAttention 3's import package, which `install(fa3=True)` serves as `flash_attn_3`.

It lies under a name of its own because clients prefer it the moment it can be imported.
"""
