"""Units: repeated blocks by default, tied parameters with what contains all uses, errors that say what is there."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core.units import find_units
from zero_core_models import Block, Net, dp_mesh, plain_copy, relative_error


def names(model: nn.Module, units=None) -> dict[str, list[str]]:
    return {spec.name: [n for group, _ in spec.params for n in group] for spec in find_units(model, units)}


def test_repeated_blocks_and_the_rest() -> None:
    found = names(Net(num_blocks=2))
    assert list(found) == ["(root)", "blocks.0", "blocks.1"]
    assert found["(root)"] == ["embed.weight", "head.weight", "norm.weight", "norm.bias"]
    assert "blocks.1.up.bias" in found["blocks.1"]


def test_every_parameter_is_in_exactly_one_unit() -> None:
    model = Net(unused=True)
    listed = [n for group in names(model).values() for n in group]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))


def test_parameter_shared_by_two_blocks_goes_to_the_root() -> None:
    model = Net(num_blocks=3)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    found = names(model)
    assert "blocks.0.up.weight" in found["(root)"]
    assert "blocks.2.up.weight" in found["(root)"]


def test_large_leaf_outside_the_blocks_is_its_own_unit() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(500, 8),
            "blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)),
            "norm": nn.LayerNorm(8),
        }
    )
    assert list(names(model)) == ["(root)", "embed", "blocks.0", "blocks.1"]


def test_dtype_and_trainability_split_a_unit() -> None:
    model = Net(num_blocks=2)
    model.blocks[0].up.requires_grad_(False)
    model.blocks[1].up.bfloat16()
    specs = {spec.name: spec.trainable for spec in find_units(model)}
    assert specs["blocks.0[float32, frozen]"] is False
    assert specs["blocks.0[float32]"] is True
    assert "blocks.1[bfloat16]" in specs


def test_classes_predicates_and_nesting() -> None:
    model = Net(num_blocks=2)
    assert list(names(model, Block)) == ["(root)", "blocks.0", "blocks.1"]
    nested = names(model, lambda name, module: isinstance(module, Block) or name == "blocks.0.up")
    assert nested["blocks.0.up"] == ["blocks.0.up.weight", "blocks.0.up.bias"]
    assert "blocks.0.up.weight" not in nested["blocks.0"]


def test_model_without_repeats_is_one_unit() -> None:
    assert list(names(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))) == ["(root)"]
    assert find_units(nn.ReLU()) == []


@pytest.mark.parametrize("units", [nn.Conv2d, [nn.Conv2d, nn.GRU], lambda name, module: False])
def test_choice_that_matches_nothing_names_what_is_there(units) -> None:
    with pytest.raises(zero.ZeroConfigError, match="made of Block, Embedding, LayerNorm"):
        find_units(Net(), units)


def test_choice_of_the_wrong_kind() -> None:
    with pytest.raises(zero.ZeroConfigError, match=r"nn\.Module classes"):
        find_units(Net(), [torch.Tensor])


class Held(nn.Module):
    """Layers that are bare holders: only their parts are ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            layer = nn.Module()
            layer.attention, layer.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            layer.scale = nn.Parameter(torch.ones(8))
            self.layers.append(layer)
        self.pairs = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.scale * layer.mlp(layer.attention(x))
        for pair in self.pairs:
            x = pair[1](pair[0](x))
        return x


def test_what_is_never_called_is_no_unit() -> None:
    found = names(Held())
    assert "layers.0" not in found
    assert found["layers.1.attention"] == ["layers.1.attention.weight", "layers.1.attention.bias"]
    assert len(found["layers.2.mlp"]) == 4
    assert "pairs.0" not in found
    assert found["pairs.1.0"] == ["pairs.1.0.weight", "pairs.1.0.bias"]
    assert found["(root)"] == ["layers.0.scale", "layers.1.scale", "layers.2.scale"]


def held(rank: int) -> float:
    torch.manual_seed(0)
    model = Held()
    plain = plain_copy(model)
    model = zero.shard(model, dp_mesh(2), stage=3)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(4, 8)  # the same on both ranks
        for each in (model, plain):
            each(x).square().mean().backward()
        for each in (opt, inner):
            each.step()
            each.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_bare_holders_train_at_stage_3() -> None:
    assert max(run_ranks(held, 2)) <= 1e-6
