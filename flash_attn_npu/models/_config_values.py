"""What every model reads from its config in the same way."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError

__all__ = ["mlp_checkpoint_level", "padded_size"]


def mlp_checkpoint_level(config: Any, layer_idx: int | None) -> int:
    """config.mlp_checkpoint_lvl, of this layer if it is a sequence; 0 if there is none.

    Raises:
        ArgumentError: a sequence, and no layer_idx within it.
    """
    level: Any = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(level, int):
        return level
    if layer_idx is None or not 0 <= layer_idx < len(level):
        raise ArgumentError(
            "layer_idx",
            layer_idx,
            f"0 to {len(level) - 1}, as config.mlp_checkpoint_lvl has {len(level)} levels",
            "pass layer_idx, and a level for each layer",
        )
    return int(level[layer_idx])


def padded_size(config: Any) -> int:
    """config.vocab_size, rounded up to config.pad_vocab_size_multiple."""
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    size: int = -(-config.vocab_size // multiple) * multiple
    return size
