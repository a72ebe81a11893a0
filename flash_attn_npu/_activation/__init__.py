"""Make `import flash_attn` mean this package, and undo it."""

from .install import Activation, install, installed, uninstall

__all__ = ["Activation", "install", "installed", "uninstall"]
