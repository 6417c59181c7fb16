"""Checkpoints that know no topology and cannot be half there.

The modules, in the order in which data flows:

- `errors`, `version`: what a user meets.
- `boxes`, `plan`, `merge`: parts of tensors; who writes which; one tree of values from all ranks'. Pure.
- `values`, `tree`: a state tree -> named parts of tensors, and small values, typed.
- `stores`, `local_store`, `remote_store`, `places`: files, here and elsewhere.
- `buffers`, `pages`, `codecs`: aligned memory, checksums, compression.
- `index`, `steps`: what a step consists of; which are committed, which is the latest, who writes one now.
- `ranks` -> `holdings` -> `compression`, `writer` -> `save` -> `async_save`: the way out.
- `targets`, `reader` -> `load`: the way back, into any other layout.
- `random_states`: random numbers, rank by rank.
- `interchange`: safetensors, torch.distributed.checkpoint, DeepSpeed.
- `cli`: the command.
- `verify`: whether a step is what was written, what it holds, in what two differ.
"""

from .async_save import AsyncSaver
from .errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    CorruptError,
    MismatchError,
    NotACheckpointError,
)
from .interchange.convert import convert, export_safetensors
from .interchange.safetensors_files import write_safetensors_file
from .load import Description, Loaded, describe, load, read_tree
from .random_states import RandomStates
from .save import SavePolicy, save
from .steps import Retention
from .tree import PerRank, Shard
from .values import PerRankValues, TensorRef
from .verify import Verification, diff, inspect, verify
from .version import __version__

__all__ = [
    "AsyncSaver",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "CorruptError",
    "Description",
    "Loaded",
    "MismatchError",
    "NotACheckpointError",
    "PerRank",
    "PerRankValues",
    "RandomStates",
    "Retention",
    "SavePolicy",
    "Shard",
    "TensorRef",
    "Verification",
    "__version__",
    "convert",
    "describe",
    "diff",
    "export_safetensors",
    "inspect",
    "load",
    "read_tree",
    "save",
    "verify",
    "write_safetensors_file",
]
