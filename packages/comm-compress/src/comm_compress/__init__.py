"""Less on the wire: codecs, compressed collectives, and the optimizers that are built on them.

Modules, in the order in which a tensor passes through them:

- ``errors``, ``version``.
"""

from .errors import CommCompressError, CompressConfigError, CompressStateError
from .version import __version__

__all__ = ["CommCompressError", "CompressConfigError", "CompressStateError", "__version__"]
