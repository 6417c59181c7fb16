"""Activation checkpointing: what a backward needs of a forward is computed again, and little is kept for that.

The modules, in the order in which an input travels:

- `policy`: what a user chooses.
- `wrap`: `checkpoint` and `checkpoint_modules`, where the module tree is touched.
- `region` -> `dense` -> `holders`, `partition`, `host`, `arena`: inputs -> flat elements -> where they are kept.
- `selective`: ops whose outputs are saved instead.
- `profile`: what each layer's checkpoint costs and saves.

The recomputation itself is torch's (`torch.utils.checkpoint` without reentrance): early stop, the check that the second
run saves what the first did, random state and autocast restored.
"""

from .policy import CheckpointPolicy
from .profile import CheckpointProfile, LayerCost, profile_checkpoints
from .wrap import CheckpointHandle, checkpoint, checkpoint_modules

__all__ = [
    "CheckpointHandle",
    "CheckpointPolicy",
    "CheckpointProfile",
    "LayerCost",
    "checkpoint",
    "checkpoint_modules",
    "profile_checkpoints",
]
