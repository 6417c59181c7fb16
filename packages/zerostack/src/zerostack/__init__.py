"""A DeepSpeed-shaped front for small ML-systems packages: it translates and wires, and holds no maths.

Modules, in the order in which data flows:

- `key_table`, `key_table_later`, `keys`: every documented DeepSpeed key and what becomes of it.
- `config`, `schema`: JSON to typed values.
- `auto`, `batch`, `resolve`: "auto", the batch equation, the effective configuration with its sources.
- `policies`, `schedules`, `lion`: typed values to zero-core's policies, an optimizer and a schedule.
- `offload`, `compression`, `signs`: to tiers of memory, compressed collectives and 1-bit optimizers.
- `checks`: what cannot go together.
- `launchers`, `distributed`, `api`: `initialize`.
- `facts`, `engine`, `clock`, `loader`: the engine.
- `checkpoint`, `full_model`, `ranks`: what is saved, how, and how it comes back.
- `explain`, `footprint`, `machine`, `cli`, `demo`: what a person runs.
"""

from .api import add_config_arguments, initialize
from .distributed import init_distributed
from .engine import Engine
from .errors import CheckpointError, ConfigError, EngineStateError, LostRankError, ZerostackError
from .version import __version__

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineStateError",
    "LostRankError",
    "ZerostackError",
    "__version__",
    "add_config_arguments",
    "init_distributed",
    "initialize",
]
