"""The command line: `zerostack run | demo | doctor | explain | estimate`.

Modules: `main` (which command), then one module a command; `text` writes to the terminal.
"""

from .main import main

__all__ = ["main"]
