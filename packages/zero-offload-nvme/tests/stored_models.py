"""A small model of repeated blocks with what makes sharding hard, and a loop over stores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zero_offload_nvme import HostStore, NvmeStore, OffloadedOptimizer, ZenFlow

VOCAB, WIDTH = 61, 48


class Block(nn.Module):
    """Odd sizes, a scalar, and a parameter that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.down = nn.Linear(3 * WIDTH + 1, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied embedding and head around repeated blocks."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AllUsed(Net):
    """Every parameter gets a gradient: one rank alone knows which ones move."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            del block.unused


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(-1, 1).flatten())


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(100 * step + rank))


def store_of(kind: str, folder: str):
    return {"none": lambda: None, "host": HostStore, "nvme": lambda: NvmeStore(folder)}[kind]()


def stores(kind: str, what: str, stage: int, folder: str):
    """A store of a kind for what is to rest there."""
    store = store_of(kind, folder)
    if store is None or what == "all":
        return store
    return zero.Stores(**dict.fromkeys(what.split("+"), store))


def build(
    store,
    stage: int,
    dtype: torch.dtype = torch.float32,
    world: int = 2,
    *,
    window_bytes: int = 1 << 16,
    make=None,
    zenflow: ZenFlow | None = None,
    overlap: str | None = None,
    scaler: zero.LossScaler | None = None,
    net=None,
    timeout_s: float = 30.0,
    **options,
):
    """A model and its optimizer; a window far smaller than a unit's states."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = zero.shard(
        (net or Net)(),
        mesh,
        stage=stage,
        precision=zero.Precision(compute=dtype),
        store=store,
        overlap=zero.Overlap(timeout_s=timeout_s),
    )
    inner = (make or (lambda params: torch.optim.AdamW(params, lr=1e-2)))(model.parameters())
    if store is None:
        return model, zero.ShardedOptimizer(model, inner, scaler=scaler)
    overlap = overlap or ("exact" if zenflow is None else "zenflow")
    return model, OffloadedOptimizer(
        model, inner, window_bytes=window_bytes, overlap=overlap, zenflow=zenflow, scaler=scaler, **options
    )


def train(
    model, opt, rank: int, steps: range, *, accumulate: int = 1, backwards: int = 1, clip: float | None = 0.5
) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(accumulate):
            for _ in range(backwards):
                loss = loss_of(model, batch(step * accumulate + micro, rank))
                loss.backward()
        if clip is not None:
            zero.clip_grad_norm(opt, clip)
        opt.step()
        opt.zero_grad()
        losses.append(float(loss))
    return losses
