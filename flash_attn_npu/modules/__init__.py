"""Mirror of `flash_attn.modules`: attention, MLPs, embeddings and blocks as torch modules."""
