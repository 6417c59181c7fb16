"""Weights that were read from files lie side by side, in huge pages; those of a module stay where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastgen.config import Weights
from fastgen.huge_pages import HugePages
from fastgen.linear import Linear
from fastgen.models.layers import Embedding
from fastgen.weights import load_model
from hypothesis import given
from hypothesis import strategies as st
from model_lab import engine_config, make_model, save

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.uint8])


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300), DTYPES), max_size=20))
def test_copies_do_not_touch(sizes: list[tuple[int, int, torch.dtype]]) -> None:
    pages = HugePages()
    given_ = [torch.randint(0, 100, (rows, columns)).to(dtype) for rows, columns, dtype in sizes]
    placed = [pages.place(each) for each in given_]
    for each, copy in zip(given_, placed, strict=True):
        assert copy.dtype == each.dtype
        assert torch.equal(copy, each)
        assert copy.numel() == 0 or copy.data_ptr() % 64 == 0


def test_a_transposed_one_and_one_larger_than_a_slab() -> None:
    pages = HugePages()
    small = pages.place(torch.arange(12).view(3, 4).t())
    large = pages.place(torch.full((65 << 20,), 7, dtype=torch.uint8))
    after = pages.place(torch.ones(5))
    assert small.is_contiguous()
    assert torch.equal(small, torch.arange(12).view(3, 4).t())
    assert int(large.min()) == int(large.max()) == 7
    assert torch.equal(after, torch.ones(5))


def _storages(loaded) -> set[int]:
    held = [module for module in loaded.decoder.modules() if isinstance(module, (Linear, Embedding))]
    return {module.weight.untyped_storage().data_ptr() for module in held}


@pytest.mark.parametrize("weights", list(Weights))
def test_weights_of_files_share_one_slab(tmp_path: Path, weights: Weights) -> None:
    model = make_model("llama")
    loaded = load_model(str(save(model, tmp_path)), engine_config(weights=weights))
    assert len(_storages(loaded)) == 1


def test_those_of_a_module_are_its_own() -> None:
    model = make_model("llama")
    loaded = load_model(model, engine_config())
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    assert loaded.decoder.embed.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert own & _storages(loaded)
