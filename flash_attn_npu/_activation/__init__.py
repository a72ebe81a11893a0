"""Make `import flash_attn` mean this package, and undo it."""

from .install import Activation, follow, install, installed, uninstall

__all__ = ["Activation", "follow", "install", "installed", "uninstall"]
