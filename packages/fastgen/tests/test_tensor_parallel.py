"""A model cut over ranks gives what one rank gives, and each rank holds its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastgen.config import Weights
from fastgen.errors import ConfigError
from fastgen.parallel import Shard, TensorParallel
from model_lab import engine_config, make_model, save
from ranks_lab import Job, Outcome, run_job, run_on_ranks

_MODELS = (
    "llama-biases",
    "falcon",
    "falcon-new",
    "phi3",
    "gpt2",
    "gpt-neox",
    "bloom",
    "opt-norm-after",
    "qwen2-moe",
)
_Results = dict[str, tuple[Outcome, list[Outcome]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> _Results:
    """Every job on one rank and on two."""
    root = tmp_path_factory.mktemp("parallel")
    jobs = {name: Job(save(make_model(name), root / name), engine_config()) for name in _MODELS}
    jobs["odd-vocabulary"] = Job(
        save(make_model("gemma2", vocab_size=127), root / "odd"), engine_config(), by_mesh=True
    )
    jobs["int8"] = replace(jobs["phi3"], config=engine_config(weights=Weights.INT8))
    jobs["adapter"] = replace(jobs["gpt-neox"], adapter=_adapter(root / "adapter"))
    jobs["batch-invariant"] = replace(jobs["qwen2-moe"], config=engine_config(batch_invariant=True))
    by_rank = run_on_ranks(list(jobs.values()), 2, root)
    return {
        name: (run_job(job), [ranks[number] for ranks in by_rank])
        for number, (name, job) in enumerate(jobs.items())
    }


def _adapter(folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    targets = ["query_key_value", "dense_4h_to_h"]
    wrapped = peft.get_peft_model(make_model("gpt-neox"), peft.LoraConfig(target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*_MODELS, "odd-vocabulary", "int8", "adapter", "batch-invariant"])
def test_two_ranks_equal_one(name: str, results: _Results) -> None:
    one, two = results[name]
    for outcome in two:
        # int8: scales of rows that are cut by columns are made for each part
        tolerance = 0.05 if name == "int8" else 1e-4
        error = (outcome.logits - one.logits).norm() / one.logits.norm()
        assert float(error) < tolerance
        assert outcome.tokens == one.tokens or name == "int8"
    torch.testing.assert_close(two[0].logits, two[1].logits, rtol=0, atol=0)
    assert two[0].tokens == two[1].tokens


def test_an_adapter_changes_what_comes_out(results: _Results) -> None:
    assert (results["adapter"][0].logits - results["gpt-neox"][0].logits).norm() > 0.1


def test_each_rank_holds_its_part(results: _Results) -> None:
    one, two = results["llama-biases"]
    for outcome in two:
        assert outcome.weight_bytes < 0.55 * one.weight_bytes
    assert (one.kv_heads, two[0].kv_heads) == (2, 1)
    one, two = results["falcon"]  # one key head, which both ranks hold
    assert (one.kv_heads, two[0].kv_heads) == (1, 1)


def _alone(rank: int, size: int) -> TensorParallel:
    made = TensorParallel()
    made.rank, made.size = rank, size
    return made


def test_parts_cover_everything_once() -> None:
    for size in (1, 2, 3, 4):
        ranks = [_alone(rank, size) for rank in range(size)]
        assert [i for each in ranks for i in each.split(24, "heads")] == list(range(24))
        assert [i for each in ranks for i in each.vocabulary(10)] == list(range(10))
    assert [_alone(rank, 4).kv_heads(2) for rank in range(4)] == [
        range(1),
        range(1),
        range(1, 2),
        range(1, 2),
    ]
    assert Shard.whole(4, 2, width=3).take_rows(range(2, 4), range(1, 2)).rows == (range(2, 4), range(5, 6))


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 3 ranks, got 4"):
        _alone(0, 3).split(4, "heads")
    with pytest.raises(ConfigError, match="use 2 ranks"):
        _alone(0, 3).kv_heads(2)
