"""`transformers` models through a life: loaded and resized as shards, generating between steps."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers_models import FAMILIES, batch_of, require_transformers
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, relative_error, seeded

require_transformers()


def parameters() -> list[nn.Parameter]:
    """All that are alive in this process."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter)]


def from_pretrained(rank: int, world_size: int, family: str, folder: str) -> tuple[float, int, int]:
    """Load a local directory as shards; returns the error, and the most bytes that whole parameters held meanwhile."""
    import transformers

    plain = seeded(FAMILIES[family].build)
    if rank == 0:
        plain.save_pretrained(folder, max_shard_size="20KB")
    dist.barrier()
    whole = sum(p.numel() * p.element_size() for p in plain.parameters())
    peak = 0

    def watch(*_) -> None:
        nonlocal peak
        found = [t for t in parameters() if id(t) not in ids and not t.is_meta]
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}
        peak = max(peak, sum(sizes.values()))

    others = parameters()
    ids = {id(p) for p in others}
    with zero.sharded_init(dp_mesh(world_size), whole_bytes=0):
        hook = register_module_parameter_registration_hook(watch)
        model = getattr(transformers, type(plain).__name__).from_pretrained(folder)
        hook.remove()
    model = zero.shard(model, dp_mesh(world_size), stage=3)
    return relative_error(zero.full_state_dict(model), plain.state_dict()), peak, whole


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_from_pretrained_streams(family: str, tmp_path: Path) -> None:
    for error, peak, whole in run_ranks(from_pretrained, 2, 2, family, str(tmp_path / "model")):
        assert error == 0
        assert 0 < peak <= whole / 5, "more than a layer was whole at once"


def resized(rank: int, world_size: int) -> None:
    mesh = dp_mesh(world_size)
    plain = seeded(FAMILIES["qwen2"].build)
    torch.manual_seed(1)
    plain.resize_token_embeddings(80)
    with zero.sharded_init(mesh):
        model = seeded(FAMILIES["qwen2"].build)
        torch.manual_seed(1)
        model.resize_token_embeddings(80)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "no longer tied"
    model = zero.shard(model, mesh, stage=3)
    assert relative_error(zero.full_state_dict(model), plain.state_dict()) == 0


def test_embeddings_are_resized_as_shards() -> None:
    run_ranks(resized, 2, 2)


def life(rank: int, world_size: int, family: str, rounds: int) -> tuple[list[int], list[int], float]:
    """Train, evaluate, generate to lengths that differ by rank, again and again."""
    torch.manual_seed(0)
    plain = FAMILIES[family].build()
    model = zero.shard(seeded(FAMILIES[family].build), dp_mesh(world_size), stage=3)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.01))
    inner = torch.optim.SGD(plain.parameters(), lr=0.01)
    live, found = [], []
    for step in range(rounds):
        model.train()
        model(**batch_of(family, rank, step)).loss.backward()
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            (plain(**batch_of(family, r, step)).loss / world_size).backward()
        inner.step()
        inner.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**batch_of(family, 1 - rank, step))
        prompt = batch_of(family, rank, step)["input_ids"][:1]
        kwargs = {"max_new_tokens": 1 + (3 * rank + step) % 5, "do_sample": False, "eos_token_id": None}
        tokens = model.generate(prompt, **kwargs)
        if step % 10 == 0:
            plain.eval()
            found.append(int((tokens != plain.generate(prompt, **kwargs)).sum()))
            plain.train()
            gc.collect()
            live.append(sum(issubclass(type(t), torch.Tensor) for t in gc.get_objects()))
        assert all(unit.residency is Residency.SHARDED for unit in zero.sharded(model).units)
    return live, found, relative_error(zero.full_state_dict(model), plain.state_dict())


def test_generating_a_hundred_times_between_steps_leaks_nothing() -> None:
    for live, wrong_tokens, error in run_ranks(life, 2, 2, "llama", 100, timeout_s=120):
        assert max(live[1:]) <= live[1] + 2, live
        assert sum(wrong_tokens) == 0
        assert error <= 1e-5


def test_encoder_and_decoder_generate_between_steps() -> None:
    for _, wrong_tokens, error in run_ranks(life, 2, 2, "t5", 12, timeout_s=60):
        assert sum(wrong_tokens) == 0
        assert error <= 1e-5
