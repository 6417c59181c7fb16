"""Models come from directories and modules, tensor by tensor; what is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_engine import tiny_tokenizer
from fastgen.checkpoint import FileCheckpoint, ModuleCheckpoint
from fastgen.config import EngineConfig
from fastgen.errors import ConfigError, ModelError
from fastgen.fill import fill
from fastgen.linear import LinearPolicy
from fastgen.llm import build_engine
from fastgen.models.decoder import Decoder
from fastgen.models.families import FAMILIES
from fastgen.models.weight_map import Source, grouped_rows, pieces
from fastgen.parallel import TensorParallel
from fastgen.weights import LoadedModel, load_model
from model_lab import MODELS, Driver, engine_config, make_model, prompts, random_model, reference_logits, save
from safetensors.torch import load_file, save_file

(_TEXT,) = prompts(19)


def _last_logits(loaded: LoadedModel) -> torch.Tensor:
    driver = Driver(loaded)
    return driver.forward([(driver.add(_TEXT), len(_TEXT))])[0]


def _expect_same(loaded: LoadedModel, model: Any) -> None:
    wanted = reference_logits(model, _TEXT)[-1]
    torch.testing.assert_close(_last_logits(loaded), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def _pretrained(folder: Path, dtype: torch.dtype, attention: str = "eager") -> Any:
    """By transformers, whose angles stay float32 so."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=dtype, attn_implementation=attention).eval()


def test_several_files_with_an_index(tmp_path: Path) -> None:
    model = make_model("llama")
    save(model, tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _expect_same(load_model(str(tmp_path), engine_config()), model)


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.decoder.")]
)
def test_names_without_the_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    """As files of the models' first releases have them."""
    model = make_model(name)
    path = save(model, tmp_path) / "model.safetensors"
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items()}
    if name == "gpt2":
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask
    save_file(tensors, path)
    _expect_same(load_model(tmp_path, engine_config()), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "mixtral", "qwen2-moe", "gemma2"])
def test_module(name: str) -> None:
    """Also mixtures, whose modules hold all experts in one tensor and whose files do not."""
    model = make_model(name)
    loaded = load_model(model, engine_config())
    _expect_same(loaded, model)


def test_module_tensors_are_shared_where_they_fit() -> None:
    model = make_model("llama")
    decoder: Any = load_model(model, engine_config()).decoder
    assert decoder.embed.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (
        decoder.layers[1].mlp.down.weight.data_ptr() == model.model.layers[1].mlp.down_proj.weight.data_ptr()
    )
    before = _last_logits(load_model(model, engine_config()))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2.0)
    family = FAMILIES["llama"]
    fill(
        decoder, family, model.config, ModuleCheckpoint(model.state_dict(), "again")
    )  # new weights, same decoder
    loaded = load_model(model, engine_config())
    assert (_last_logits(loaded) - before).abs().max() > 1e-3
    _expect_same(loaded, model)
    torch.testing.assert_close(
        decoder.layers[0].attention.qkv.weight,
        loaded.decoder.layers[0].attention.qkv.weight,  # type: ignore[attr-defined]
    )


def test_images_part_of_gemma3_is_left(tmp_path: Path) -> None:
    model = make_model("gemma3")
    path = save(model, tmp_path) / "model.safetensors"
    tensors = {f"language_model.{key}": tensor for key, tensor in load_file(path).items()}
    save_file({**tensors, "vision_tower.x.weight": torch.zeros(1)}, path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "dtype": "float32"})
    )
    _expect_same(load_model(tmp_path, engine_config()), model)


def test_dtype_of_config_or_setting(tmp_path: Path) -> None:
    model = make_model("llama").bfloat16()
    save(model, tmp_path)
    assert load_model(tmp_path, engine_config()).dtype is torch.bfloat16
    loaded = load_model(tmp_path, engine_config(dtype=torch.float32))
    assert loaded.dtype is torch.float32
    _expect_same(loaded, _pretrained(tmp_path, torch.float32))


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_close_as_transformers(name: str, tmp_path: Path) -> None:
    save(make_model(name).bfloat16(), tmp_path)
    ours = _last_logits(load_model(tmp_path, engine_config()))
    way = "sdpa" if name == "falcon-alibi" else "eager"  # that one adds Falcon's biases twice
    theirs = reference_logits(_pretrained(tmp_path, torch.bfloat16, way), _TEXT)[-1]
    exact = reference_logits(_pretrained(tmp_path, torch.float32, way), _TEXT)[-1]
    error, allowed = (ours - exact).norm(), (theirs - exact).norm()
    assert 0 < error < 1.5 * allowed


def test_a_rank_reads_only_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("phi3")
    save(model, tmp_path)
    read: list[int] = []
    original = FileCheckpoint.read

    def counting(self: FileCheckpoint, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        tensor = original(self, name, index)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(FileCheckpoint, "read", counting)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    load_model(tmp_path, engine_config())
    assert sum(read) == total
    read.clear()
    parallel = TensorParallel()
    parallel.rank, parallel.size = 1, 2
    policy = LinearPolicy(torch.float32, torch.device("cpu"))
    family = FAMILIES["phi3"]
    decoder = Decoder(family.spec(model.config, None), policy, parallel)
    with FileCheckpoint(tmp_path) as checkpoint:
        fill(decoder, family, model.config, checkpoint)
    assert sum(read) < 0.55 * total


def _edit(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_faults_of_tensors(tmp_path: Path) -> None:
    def fails(match: str, change: Any) -> None:
        save(make_model("llama"), tmp_path)
        _edit(tmp_path, change)
        with pytest.raises(ModelError, match=match):
            load_model(tmp_path, engine_config())

    name = "model.layers.1.self_attn.k_proj.weight"
    fails(r"'layers\.1\.self_attn\.k_proj\.weight'.*incomplete", lambda tensors: tensors.pop(name))
    fails(
        r"no place for.*'model\.extra\.weight'",
        lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}),
    )
    fails(
        r"k_proj\.weight': expected shape \[32, 64\], got \[16, 64\]",
        lambda tensors: tensors.update({name: tensors[name][:16].contiguous()}),
    )
    fails(
        "with and without a prefix",
        lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}),
    )
    fails(r"'norm\.weight'", lambda tensors: tensors.pop("model.norm.weight"))


def test_faults_of_files(tmp_path: Path) -> None:
    config = engine_config()
    model = make_model("llama")
    path = save(model, tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1000, 100, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors: expected a complete"):
            load_model(tmp_path, config)
    path.unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        load_model(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load_model(tmp_path, config)
    sharded = tmp_path / "sharded"
    save(model, sharded, max_shard_size="60KB")
    first = min(sharded.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(ModelError, match=first.name):
        load_model(sharded, config)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ModelError, match=r"\.\./model\.safetensors"):
        load_model(sharded, config)
    index.write_text("{")
    with pytest.raises(ModelError, match=r"index\.json"):
        load_model(sharded, config)


def test_faults_of_configs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path, engine_config())
    save(make_model("llama"), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())

    def fails(match: str, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=match):
            load_model(tmp_path, engine_config())

    fails(r"config\.json", "{")
    fails(r"config\.json.*nonesuch", json.dumps({"model_type": "nonesuch"}))
    fails(
        "quantization_config",
        json.dumps({**fields, "quantization_config": {"quant_method": "gptq", "bits": 4}}),
    )
    fails("activation.*'tanh'", json.dumps({**fields, "hidden_act": "tanh"}))
    fails(r"layers\.2", json.dumps({**fields, "num_hidden_layers": 3}))
    fails(r"config\.json.*modulo by zero", json.dumps({**fields, "num_attention_heads": 0}))
    fails(r"config\.json.*hidden_size", json.dumps({**fields, "hidden_size": "abc"}))
    fails("a torch dtype in the config, got 1", json.dumps({**fields, "dtype": 1}))
    own = json.loads((save(make_model("gpt2"), tmp_path / "gpt2") / "config.json").read_text())
    fails("describes a model, got ZeroDivisionError", json.dumps({**own, "n_head": 0}))
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": None}))
    with pytest.raises(ModelError, match=r"its model's config, got .*rms_norm_eps"):
        build_engine(tmp_path, engine_config())
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        build_engine(tmp_path, engine_config(max_model_len=8), tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"device: expected one of cpu.*got cuda:99"):
        load_model(tmp_path, EngineConfig(device=torch.device("cuda:99")))
    with pytest.raises(ModelError, match="a config"):
        load_model(torch.nn.Linear(2, 2), engine_config())


def test_damaged_directory_of_another_family(tmp_path: Path) -> None:
    model = random_model(
        "olmo2", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96}
    )
    save(model, tmp_path)
    _edit(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"missing keys.*up_proj"):
        load_model(tmp_path, engine_config())


def test_length() -> None:
    def length(name: str, asked: int | None) -> int:
        return load_model(
            make_model(name), EngineConfig(max_model_len=asked, device=torch.device("cpu"))
        ).max_model_len

    assert length("llama", None) == 256
    assert length("llama", 1000) == 1000
    assert length("gpt2", 100) == 100
    with pytest.raises(ConfigError, match="at most 256"):
        length("gpt2", 257)
    with pytest.raises(ConfigError, match="at most 256"):
        length("opt", 257)
    assert length("bloom", None) == 2048


def test_rows_of_pieces() -> None:
    """Every wanted row comes from where a plain concatenation has it."""
    parts = (
        Source("a", (range(4, 6), range(3)), 8),
        Source("b", (range(7),), 7),
        Source("c", (range(2, 4),), 4),
    )
    order = [(part.name, row) for part in parts for rows in part.rows for row in rows]
    for wanted in ((range(14),), (range(3, 9), range(12, 14)), (range(2),), ()):
        found = [(part.name, row) for part, rows in pieces(parts, wanted) for row in rows]
        assert found == [order[i] for each in wanted for i in each]
    assert [part.name for part, _ in pieces(parts, (range(5, 12),))] == ["b"]  # one read


def test_rows_of_interleaved_heads() -> None:
    rows = [row for each in grouped_rows(4, 2, 3) for row in each]
    layout = torch.arange(8 * 3).view(2, 4, 3)  # groups; two queries, key, value; elements
    wanted = torch.cat([layout[:, :2].flatten(), layout[:, 2].flatten(), layout[:, 3].flatten()])
    assert rows == wanted.tolist()
