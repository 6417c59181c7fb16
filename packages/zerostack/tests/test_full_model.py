"""The whole model in one file: of tiled layers, and where the rank that writes cannot."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
import zerostack
from safetensors.torch import load_file
from torch import nn
from zero_core.testing import run_ranks
from zerostack import full_model
from zerostack_models import config


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(8, 64)
        self.out = nn.Linear(64, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.out(self.wide(x).relu()).square().mean()


def export(rank, root, broken):
    expected = Tail().state_dict()
    model = zero.tile_linear(Tail(), max_bytes=512)
    engine, *_ = zerostack.initialize(model=model, config=config(3))
    if not broken:
        engine.save_16bit_model(root)
        found = load_file(root / "model.safetensors")
        assert list(zero.full_specs(engine.module)) == list(expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        return

    def fail(path, specs, parts):
        next(iter(parts))
        path.write_bytes(b"half")
        raise KeyError("anything")

    with pytest.MonkeyPatch.context() as patch:  # processes serve other tests, too
        patch.setattr(full_model, "write_safetensors_file", fail)
        with pytest.raises(KeyError if rank == 0 else zerostack.CheckpointError, match="anything"):
            engine.save_16bit_model(root)
    assert not list(root.iterdir())


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_of_the_whole_model_is_whole_or_not_there(tmp_path, broken):
    run_ranks(export, 2, tmp_path, broken)


def into_a_file(rank, root):
    engine, *_ = zerostack.initialize(model=Tail(), config=config(3))
    with pytest.raises(FileExistsError if rank == 0 else zerostack.CheckpointError, match="File exists"):
        engine.save_16bit_model(root / "file")


def test_where_a_file_is_in_the_way_all_ranks_hear_of_it(tmp_path):
    (tmp_path / "file").touch()
    run_ranks(into_a_file, 2, tmp_path, timeout_s=60)
