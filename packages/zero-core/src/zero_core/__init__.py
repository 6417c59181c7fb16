"""ZeRO stages 0-3 on one structure, the flat unit, for plain PyTorch training loops.

The modules, in the order in which data flows:

- `config`, `errors`, `api`, `overrides`: what a user meets.
- `layout`, `units`, `flat_unit`, `fill`, `sharded_init`: parameters -> units -> flat buffers -> shards.
- `tiles`, `tiling`: layers too large to be whole, in parts that are units.
- `stores`: where shards rest, if not on the device.
- `params`, `gather` -> `turns`, `gather_plan`: stage 3: parameters whole around their use, in one order on all ranks.
- `hooks` -> `buckets` -> `collectives`, `exchange`, `shared_memory` -> `accumulate` -> `precision`, `norms` ->
  `claims`, `optimizer`, `steppers` -> `publish`, `late`: a gradient's way.
- `memory_files`, `wires`, `hierarchy`, `rows`: whose memory is mapped; who talks to whom, across replicas, about rows.
- `streams`: what an accelerator does beside compute.
- `owners`, `whole`: a step of optimizers that look at whole tensors.
- `checkpointing`: activations are computed again in backward; where the inputs wait meanwhile.
- `materialize`, `state`, `memory`: full values, descriptions for checkpoints, plans.
- `agreement`, `full_access`: one full tensor by its parameter's name.
- `saved_layout`: whether the state dict of an optimizer is this rank's.
- `diagnostics`, `tracing`: what collectives cost, in numbers and as a picture.
- `diagnosis`: what a collective that failed says.
- `testing`: functions on several ranks of one machine.
"""

from .api import Sharded, no_sync, shard, sharded
from .checkpointing import (
    CheckpointHandle,
    CheckpointPolicy,
    CheckpointProfile,
    LayerCost,
    checkpoint,
    checkpoint_modules,
    profile_checkpoints,
)
from .claims import steps_whole_tensors
from .collectives import Collectives, Handle, Pending, PlainCollectives, WeightCollectives, Wire
from .config import Overlap, Placement, Precision
from .diagnostics import diagnostics
from .errors import CollectiveError, ReleasedParameterError, ZeroConfigError, ZeroError, ZeroStateError
from .exchange import exchange
from .full_access import get_full, set_full
from .groups import data_parallel_group, sharding_group, sibling_group
from .hierarchy import InOrder
from .materialize import full_specs, full_state_dict, load_full_state_dict, materialized, stream_full
from .memory import MemoryPlan, plan_memory
from .norms import clip_grad_norm, grad_norm
from .optimizer import ShardedOptimizer
from .precision import LossScaler, OverflowReport
from .sharded_init import sharded_init
from .state import (
    Shard,
    forget_optimizer_state,
    load_optimizer_scalars,
    load_optimizer_state,
    load_sharded_state,
    optimizer_scalars,
    sharded_state,
)
from .steppers import ShardOptimizer, ShardSlot, UnitStep
from .stores import ShardStore, Stores
from .tiling import tile_linear
from .tracing import trace
from .version import __version__

__all__ = [
    "CheckpointHandle",
    "CheckpointPolicy",
    "CheckpointProfile",
    "CollectiveError",
    "Collectives",
    "Handle",
    "InOrder",
    "LayerCost",
    "LossScaler",
    "MemoryPlan",
    "OverflowReport",
    "Overlap",
    "Pending",
    "Placement",
    "PlainCollectives",
    "Precision",
    "ReleasedParameterError",
    "Shard",
    "ShardOptimizer",
    "ShardSlot",
    "ShardStore",
    "Sharded",
    "ShardedOptimizer",
    "Stores",
    "UnitStep",
    "WeightCollectives",
    "Wire",
    "ZeroConfigError",
    "ZeroError",
    "ZeroStateError",
    "__version__",
    "checkpoint",
    "checkpoint_modules",
    "clip_grad_norm",
    "data_parallel_group",
    "diagnostics",
    "exchange",
    "forget_optimizer_state",
    "full_specs",
    "full_state_dict",
    "get_full",
    "grad_norm",
    "load_full_state_dict",
    "load_optimizer_scalars",
    "load_optimizer_state",
    "load_sharded_state",
    "materialized",
    "no_sync",
    "optimizer_scalars",
    "plan_memory",
    "profile_checkpoints",
    "set_full",
    "shard",
    "sharded",
    "sharded_init",
    "sharded_state",
    "sharding_group",
    "sibling_group",
    "steps_whole_tensors",
    "stream_full",
    "tile_linear",
    "trace",
]
