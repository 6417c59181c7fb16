"""What other formats held is loaded like what was saved: into modules, and into dictionaries of tensors."""

from __future__ import annotations

import ckpt_universal as ckpt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ckpt_universal.interchange.convert import tree_of
from safetensors.torch import save_file


def a_model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.LayerNorm(4)))


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("prefix", ["model.", "whole.model."])
def test_a_hugging_face_directory_is_loaded_into_a_module_and_into_a_dictionary(tmp_path, prefix):
    expected = a_model().state_dict()
    save_file(expected, tmp_path / "model.safetensors")
    ckpt.convert(tmp_path, tmp_path / "run", to="step", prefix=prefix)
    assert set(ckpt.describe(tmp_path / "run").tensors) == {prefix + name for name in expected}

    def into(node):
        for key in reversed(prefix.rstrip(".").split(".")):
            node = {key: node}
        return node

    model = a_model()
    ckpt.load(tmp_path / "run", into=into(model))
    same(expected, model.state_dict())
    flat = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    ckpt.load(tmp_path / "run", into=into(flat))
    same(expected, flat)


def test_what_torch_wrote_is_loaded_into_a_module_with_the_values_beside_it(tmp_path):
    expected = a_model().state_dict()
    dcp.save(
        {"model": expected, "epoch": 4, "loader": {"seed": 7}}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    ckpt.convert(tmp_path / "dcp", tmp_path / "run", to="step")
    model, values = a_model(), {"epoch": 0, "loader": {"seed": 0}}
    ckpt.load(tmp_path / "run", into=(state := {"model": model, **values}))
    same(expected, model.state_dict())
    assert (state["epoch"], state["loader"]) == (4, {"seed": 7})


def test_other_names_for_a_step_s_tensors(tmp_path):
    expected = a_model().state_dict()
    ckpt.save(tmp_path / "run", {"ema": expected, "step": 3}, step=3)
    ckpt.convert(tmp_path / "run", tmp_path / "two", to="step", only="ema.*", strip="ema.", prefix="model.")
    model = a_model()
    assert ckpt.load(tmp_path / "two", into={"model": model}).step == 3
    same(expected, model.state_dict())


@pytest.mark.parametrize(
    ("names", "prefix", "expected"),
    [
        ([], "", {}),
        (["w"], "", {"w": "w"}),
        (["a.b.c"], "", {"a": {"b.c": "a.b.c"}}),
        (["a.b.c", "a.b.d"], "a.b.", {"a": {"b": {"c": "a.b.c", "d": "a.b.d"}}}),
        (["a", "a.b"], "", {"a": "a", "a.b": "a.b"}),
        (["a.b", "a"], "", {"a.b": "a.b", "a": "a"}),
        (["a.b", "a.b.c"], "a.", {"a": {"b": "a.b", "b.c": "a.b.c"}}),
        (["a.b", "a.b.c", "a.d.e"], "x.y.", {"a": {"b": "a.b", "d": {"e": "a.d.e"}}, "a.b.c": "a.b.c"}),
        (["model.x"], "model", {"model": {"x": "model.x"}}),
    ],
)
def test_no_name_is_lost_in_a_tree(names, prefix, expected):
    assert tree_of({name: name for name in names}, prefix) == expected
