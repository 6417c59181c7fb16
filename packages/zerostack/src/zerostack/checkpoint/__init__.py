"""Checkpoints that any number of ranks can read: named slices of logical tensors, and typed small values.

What is saved describes itself as `name -> (global shape, dtype, offset, local slice)`; nothing here knows what a
model or an optimizer is, and nothing is pickled.

Modules, in the order in which a checkpoint is written and read:

- `layout`: which rank writes which pieces, and which pieces a range needs. Pure.
- `values`: what may be stored beside tensors.
- `files`: directories that appear whole or not at all, and the `latest` pointer.
- `tensor_file`: one rank's safetensors file, streamed out and read by piece.
- `index`: the JSON that lists every piece with its checksum.
- `write`, `read`: all ranks together.

On disk: `DIR/TAG/index.json`, `DIR/TAG/rank-00000.safetensors`, ..., and `DIR/latest`, which holds the last tag.
"""

from .layout import Range, ShardLike
from .read import Reader, open_checkpoint
from .write import save

__all__ = ["Range", "Reader", "ShardLike", "open_checkpoint", "save"]
