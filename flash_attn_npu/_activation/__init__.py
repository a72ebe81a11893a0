"""Make `import flash_attn` mean this package, and undo it."""

from .hosts import attribute
from .install import Activation, follow, install, installed, uninstall

__all__ = ["Activation", "attribute", "follow", "install", "installed", "uninstall"]
