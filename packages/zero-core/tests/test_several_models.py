"""Actor, critic, reference and reward in one process, at stages of their own; a teacher and its student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from torch.optim import SGD, AdamW
from zero_core.testing import run_ranks
from zero_core_models import VOCAB, Net, batches, dp_mesh, plain_copy, relative_error, seeded

ROLES = ("actor", "critic", "reference", "reward")


def objective(models: dict[str, nn.Module], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A policy-gradient loss with a penalty for leaving the reference, and the critic's loss."""
    with torch.no_grad():
        reference = models["reference"](ids).log_softmax(-1)
        reward = models["reward"](ids).mean((1, 2))
    value = models["critic"](ids).mean((1, 2))
    logits = models["actor"](ids).log_softmax(-1)
    chosen = logits.gather(-1, ids[..., None]).sum((1, 2))
    distance = F.kl_div(logits, reference, log_target=True, reduction="batchmean") / VOCAB
    return -(chosen * (reward - value.detach())).mean() + distance, F.mse_loss(value, reward)


def reinforce(rank: int, world_size: int, stages: tuple[int, ...]) -> float:
    mesh = dp_mesh(world_size)
    plain = {role: seeded(Net, seed) for seed, role in enumerate(ROLES)}
    for role in ("reference", "reward"):
        plain[role].requires_grad_(False)
    plain = {role: plain_copy(model) for role, model in plain.items()}
    models = {
        role: zero.shard(plain_copy(plain[role]), mesh, stage=stage)
        for role, stage in zip(ROLES, stages, strict=True)
    }
    opts = [
        zero.ShardedOptimizer(models["actor"], SGD(models["actor"].parameters(), lr=0.01)),
        zero.ShardedOptimizer(models["critic"], AdamW(models["critic"].parameters(), lr=1e-3)),
    ]
    inner = [SGD(plain["actor"].parameters(), lr=0.01), AdamW(plain["critic"].parameters(), lr=1e-3)]
    for step in range(4):
        for loss in objective(models, list(batches(rank, step + 1))[step]):
            loss.backward()
        for r in range(world_size):
            for loss in objective(plain, list(batches(r, step + 1))[step]):
                (loss / world_size).backward()
        for optimizer in (*opts, *inner):
            optimizer.step()
            optimizer.zero_grad()
    return max(relative_error(zero.full_state_dict(models[role]), plain[role].state_dict()) for role in ROLES)


@pytest.mark.parametrize("stages", [(3, 3, 3, 3), (3, 2, 3, 0), (1, 3, 0, 3)])
def test_four_models_at_stages_of_their_own(stages: tuple[int, ...]) -> None:
    assert max(run_ranks(reinforce, 2, 2, stages)) <= 5e-6


def distill(rank: int, world_size: int, stage: int) -> float:
    mesh = dp_mesh(world_size)
    teacher, student = seeded(Net, 1).requires_grad_(False), seeded(lambda: Net(2), 2)
    plain_teacher, plain_student = plain_copy(teacher), plain_copy(student)
    teacher, student = (zero.shard(model, mesh, stage=stage) for model in (teacher, student))
    opt = zero.ShardedOptimizer(student, SGD(student.parameters(), lr=0.1))
    inner = SGD(plain_student.parameters(), lr=0.1)

    def loss(wise: nn.Module, young: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        wanted = wise(ids).softmax(-1)  # not under no_grad, as people forget
        return F.cross_entropy(young(ids).flatten(0, 1), wanted.flatten(0, 1))

    for step in range(4):
        loss(teacher, student, list(batches(rank, step + 1))[step]).backward()
        for r in range(world_size):
            (loss(plain_teacher, plain_student, list(batches(r, step + 1))[step]) / world_size).backward()
        for optimizer in (opt, inner):
            optimizer.step()
            optimizer.zero_grad()
    return relative_error(zero.full_state_dict(student), plain_student.state_dict())


@pytest.mark.parametrize("stage", [1, 3])
def test_a_student_learns_from_its_teacher(stage: int) -> None:
    assert max(run_ranks(distill, 2, 2, stage)) <= 2e-6
