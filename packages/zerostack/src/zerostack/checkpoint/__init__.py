"""What a checkpoint of an engine holds, and how it is taken back; the engine imports `save` and `load`, no more.

Modules, in the order in which data flows:

- `names`: what tensors are called in a checkpoint. Pure.
- `contents`: an engine -> its tensors by those names, and `Saved`, the values beside them.
- `saving`: both -> `ckpt_universal.save`.
- `fit`: what a checkpoint has and what an engine needs of it: room, where to read, what does not fit. Pure.
- `loading`: reads, checks on all ranks, and only then changes the engine.
"""

from .loading import load
from .saving import save

__all__ = ["load", "save"]
