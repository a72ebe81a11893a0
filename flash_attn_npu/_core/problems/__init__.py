"""What is asked and what is answered, in flash-attn's conventions: vocabulary, no decisions."""
