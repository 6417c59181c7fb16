"""A model, loaded: from a directory or a transformers module into a `Decoder`, each rank its part, tensor by tensor.

In: config.json and safetensors, or an `nn.Module`. `fill` reads the weights of the families that have a description;
other models are transformers' own modules (`models.generic`). Next: `runner`, with `LoadedModel`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .checkpoint import FileCheckpoint, ModuleCheckpoint
from .config import EngineConfig
from .errors import ConfigError, FastgenError, ModelError
from .fill import fill
from .linear import Linear, LinearPolicy, has_native_linear
from .models.causal import CausalModel
from .models.decoder import Decoder
from .models.families import FAMILIES
from .models.families.family import Family
from .models.spec import DecoderSpec
from .models.weight_map import Source
from .parallel import TensorParallel

_UNSTATED_LEN = 2048  # of configs that do not state a longest sequence


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        decoder: gives logits and hidden states of a batch.
        hf_config: the transformers config.
        linears: layers that adapters may change, each with the checkpoint's matrices that it is made of.
        max_model_len: longest prompt and output.
        dtype: of activations.
        device: of weights.
    """

    decoder: CausalModel
    hf_config: Any
    linears: list[tuple[Linear, tuple[Source, ...]]]
    max_model_len: int
    dtype: torch.dtype
    device: torch.device


def load_model(
    model: str | Path | nn.Module,
    config: EngineConfig,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> LoadedModel:
    """Load a model for inference.

    Args:
        model: directory with config.json and safetensors, or a transformers causal LM, whose tensors are shared where
            their form fits.
        config: dtype, device, weights, length, batch invariance.
        group: ranks that share each layer; every one of them must call this.

    Raises:
        ModelError: files or tensors are missing, damaged, unexpected or of another shape; no such model is known.
        ConfigError: a setting does not fit the model.
    """
    hf_config = _hf_config(model)
    device = _device(config)
    dtype = config.dtype or _own_dtype(model, hf_config)
    policy = LinearPolicy(dtype, device, config.weights, config.batch_invariant)
    if config.batch_invariant and not has_native_linear(device.type, dtype):
        raise ConfigError(
            f"batch_invariant: expected accel-kernels' compiled ops for {dtype} on {device.type}, got none; "
            "see accel_kernels.report() for the reason"
        )
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        return _load_generic(model, hf_config, policy, config, group)
    spec = _spec(family, hf_config, config.max_model_len)
    max_len = _max_len(spec, config.max_model_len)
    decoder = Decoder(spec, policy, TensorParallel(group, ordered=config.batch_invariant), max_len)
    if isinstance(model, nn.Module):
        linears = fill(decoder, family, hf_config, ModuleCheckpoint(model.state_dict(), type(model).__name__))
    else:
        with FileCheckpoint(Path(model)) as checkpoint:
            linears = fill(decoder, family, hf_config, checkpoint)
    return LoadedModel(decoder, hf_config, linears, max_len, dtype, device)


def _device(config: EngineConfig) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = config.device or torch.device("cuda" if num_gpus else "cpu")
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < num_gpus):
        known = ["cpu", *(f"cuda:{number}" for number in range(num_gpus))]
        raise ConfigError(f"device: expected one of {', '.join(known)}, got {device}")
    return device


def _spec(family: Family, hf_config: Any, max_model_len: int | None) -> DecoderSpec:
    try:
        return family.spec(hf_config, max_model_len)
    except FastgenError:
        raise
    except Exception as error:  # whatever a number that cannot be leads to
        raise ModelError(
            f"config of a {hf_config.model_type}: expected one that describes a model, got {type(error).__name__}: "
            f"{error}"
        ) from error


def _load_generic(
    model: str | Path | nn.Module,
    hf_config: Any,
    policy: LinearPolicy,
    config: EngineConfig,
    group: dist.ProcessGroup | DeviceMesh | None,
) -> LoadedModel:
    """A model of no family of ours: the transformers module itself."""
    from .models.generic import GenericDecoder  # imports much of transformers

    kind = hf_config.model_type
    known = f"only for {', '.join(sorted(FAMILIES))}"
    if config.batch_invariant:
        raise ConfigError(f"batch_invariant: expected False for model_type {kind!r}, got True; it is {known}")
    if TensorParallel(group).size > 1:
        raise ConfigError(f"tensor parallelism: expected 1 rank for model_type {kind!r}; more are {known}")
    if isinstance(model, nn.Module):
        first = next(model.parameters())
        if (first.dtype, first.device.type) != (policy.dtype, policy.device.type):
            model = copy.deepcopy(model).to(device=policy.device, dtype=policy.dtype)
    else:
        model = _pretrained(Path(model), policy)
    length = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    max_len = config.max_model_len or length or _UNSTATED_LEN
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if length is not None and max_len > length and length in tables:
        raise ConfigError(f"max_model_len: expected at most {length}, the model's positions, got {max_len}")
    decoder = GenericDecoder(model, policy, max_len)
    linears: list[tuple[Linear, tuple[Source, ...]]] = [
        (linear, (Source(f"{name}.weight", linear.shard.rows, linear.shard.num_rows),))
        for name, linear in decoder.linears()
    ]
    return LoadedModel(decoder, hf_config, linears, max_len, policy.dtype, policy.device)


def _pretrained(folder: Path, policy: LinearPolicy) -> nn.Module:
    """A module by transformers' own loader, with the same faults refused as ours."""
    from transformers import AutoModelForCausalLM

    with FileCheckpoint(folder):  # complains of missing and damaged files better
        pass
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=policy.dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: transformers cannot load it: {error}") from error
    model, info = made
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            names = sorted(map(str, info[fault]))
            raise ModelError(
                f"{folder}: expected no {fault.replace('_', ' ')}, got {len(names)}, the first {names[0]!r}"
            )
    return model.to(policy.device)  # type: ignore[no-any-return]


def _hf_config(model: str | Path | nn.Module) -> Any:
    if isinstance(model, nn.Module):
        hf_config = getattr(model, "config", None)
        if hf_config is None or not hasattr(hf_config, "model_type"):
            raise ModelError(
                f"model: expected a transformers causal LM with a config, got {type(model).__name__}"
            )
        return hf_config
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: expected a directory with config.json, got none; give a local model directory"
        )
    from transformers import AutoConfig  # slow to import, and not needed before

    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each config has checks of its own, which raise what they like
        raise ModelError(f"{folder / 'config.json'}: expected a transformers config, got {error}") from error
    if getattr(hf_config, "quantization_config", None):
        raise ModelError(
            f"{folder}: expected dense weights, got a checkpoint with quantization_config; "
            "give the original model and weights=Weights.INT8 or INT4"
        )
    return hf_config


def _own_dtype(model: str | Path | nn.Module, hf_config: Any) -> torch.dtype:
    """Of a module its parameters' (it may have been cast since it was made), of a directory its config's."""
    if isinstance(model, nn.Module):
        return next(each.dtype for each in model.parameters() if each.is_floating_point())
    dtype = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None) or torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ModelError(f"{model}: expected the name of a torch dtype in the config, got {dtype!r}")
    return found


def _max_len(spec: DecoderSpec, asked: int | None) -> int:
    positions = spec.num_positions - spec.position_offset if spec.num_positions else None
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError(f"max_model_len: expected at most {positions}, the model's positions, got {asked}")
    return asked or spec.max_len
