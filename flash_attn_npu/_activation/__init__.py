"""Make `import flash_attn` mean this package, and undo it."""

from .hosts import attribute
from .install import Activation, claim, follow, install, installed, uninstall

__all__ = ["Activation", "attribute", "claim", "follow", "install", "installed", "uninstall"]
