from __future__ import annotations

import pytest
import torch.distributed as dist


@pytest.fixture
def solo():
    """A process group of one rank, in this process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
