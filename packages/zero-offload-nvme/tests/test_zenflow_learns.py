"""A small GPT learns the text of Python's standard library from nothing, and what is stepped at once helps it.

Three seeds, the same initial values and batches for all. Under ZenFlow nearly all channels take a quarter of the
updates, so where updates are what training lacks, as here, it is behind exact AdamW. It must be ahead, seed by seed, of
exact AdamW whose every update is as rare as those of the rest (the same batches, four to a step).
"""

from __future__ import annotations

import argparse
import inspect

import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, OffloadedOptimizer, ZenFlow

WIDTH, CONTEXT, STEPS, SEEDS = 64, 48, 240, (0, 1, 2)
POLICIES = {
    "exact": None,
    "late": None,  # exact, a step for every four batches
    "defaults": ZenFlow(),
    "auto": ZenFlow(update_interval="auto", max_update_interval=4, topk_ratio=0.1),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x_BTC)).chunk(3, 2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_BTC = x_BTC + self.out(mixed)
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class SmallGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, text_BT: torch.Tensor) -> torch.Tensor:
        x_BTC = self.words(text_BT) + self.positions.weight[: text_BT.shape[1]]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


def loss_of(model: nn.Module, text_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(text_BT[:, :-1]).flatten(0, 1), text_BT[:, 1:].flatten())


def batch(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(text) - CONTEXT - 1, (count,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])


def learned(rank: int) -> dict[str, list[float]]:
    """Held-out losses by policy and seed."""
    text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "ignore")))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    found = {name: [trained(train, held_out, name, seed) for seed in SEEDS] for name in POLICIES}
    found["before"] = [trained(train, held_out, "exact", seed, steps=0) for seed in SEEDS]
    return found


def trained(
    train: torch.Tensor, held_out: torch.Tensor, name: str, seed: int, *, steps: int = STEPS
) -> float:
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = zero.shard(SmallGPT(), mesh, stage=2, store=zero.Stores(optimizer=HostStore()))
    policy, batches = POLICIES[name], 4 if name == "late" else 1
    overlap = "exact" if policy is None else "zenflow"
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    with OffloadedOptimizer(model, inner, overlap=overlap, zenflow=policy) as opt:
        for _ in range(steps // batches):
            for _ in range(batches):
                (loss_of(model, batch(train, 16, generator)) / batches).backward()
            zero.clip_grad_norm(opt, 1.0)
            opt.step()
            opt.zero_grad()
        opt.flush()
    with torch.no_grad():
        return float(loss_of(model, batch(held_out, 64, torch.Generator().manual_seed(9))))


def test_what_is_stepped_at_once_helps() -> None:
    found = run_ranks(learned, 1, timeout_s=600)[0]
    mean = {name: sum(losses) / len(losses) for name, losses in found.items()}
    print({name: [round(loss, 3) for loss in losses] for name, losses in found.items()})
    assert mean["exact"] < mean["late"] - 0.2 < mean["before"]  # rare updates cost something here
    for name in ("defaults", "auto"):
        assert all(ours < late - 0.02 for ours, late in zip(found[name], found["late"], strict=True)), found
