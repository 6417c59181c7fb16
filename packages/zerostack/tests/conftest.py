from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))  # helpers are imported by name, in spawned ranks too


@pytest.fixture
def solo():
    """A process group of one rank, in this process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
