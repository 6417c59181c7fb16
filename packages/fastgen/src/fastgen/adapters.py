"""LoRA adapters of a model that runs: loaded from PEFT directories, chosen by each request.

In: a directory with adapter_config.json and adapter_model.safetensors. Each target's pair of matrices goes to the
`Linear` that holds it; since q, k and v (or gate and up) are one layer there, pairs are joined: their A below each
other, their B on a diagonal. `batch` says which rows of a forward belong to which adapter.

Source: Hu et al., arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError, RequestError
from .linear import Linear
from .models.families import FAMILIES
from .models.weight_map import Source, pieces
from .weights import LoadedModel

_ROOT = "base_model.model."
_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "corda_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin, by how their names begin, that take the first product of A and B off the base's weights."""
Pair = tuple[Tensor, Tensor]


class Adapters:
    """The adapters of a loaded model.

    Attributes:
        names: of those that are loaded.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._linears = model.linears
        family = FAMILIES.get(model.hf_config.model_type)
        self._prefixes = family.prefixes if family else ()
        self.names: set[str] = set()

    def load(self, name: str, folder: str | Path) -> None:
        """Add an adapter under a name that is not taken; on failure nothing has changed.

        Raises:
            RequestError: the name is taken.
            ModelError: the directory is no LoRA adapter, is damaged, or changes layers that this model does not have or
                that cannot be adapted (embeddings, logits, experts); names them.
        """
        if name in self.names:
            raise RequestError(
                f"adapter {name!r}: expected a new name, got one that is loaded; unload it first"
            )
        pairs = _read(Path(folder), self._prefixes)
        made: list[tuple[Linear, Pair]] = []
        for linear, parts in self._linears:
            own = {part.name: pairs.pop(part.name) for part in parts if part.name in pairs}
            if own:
                made.append((linear, _join(linear, parts, own, folder)))
        if pairs:
            raise ModelError(
                f"{folder}: got pairs for {len(pairs)} layers that cannot be adapted here, the first "
                f"{next(iter(pairs))!r}; train it on attention and MLP layers of this model"
            )
        for linear, pair in made:
            linear.adapters[name] = pair
        self.names.add(name)

    def unload(self, name: str) -> None:
        """Forget an adapter that no running request uses.

        Raises:
            RequestError: there is none of this name.
        """
        if name not in self.names:
            raise RequestError(f"adapter {name!r}: expected one of {sorted(self.names)}")
        self.names.remove(name)
        for linear, _ in self._linears:
            linear.adapters.pop(name, None)


def _read(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Pair]:
    """A and B of each target, B with the scale in it, by the name of the weight that they change."""
    config = _config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: expected a complete safetensors file, got {error}") from error
    pairs: dict[str, Pair] = {}
    for name, a in tensors.items():
        module, _, kind = name.removeprefix(_ROOT).partition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise ModelError(f"{path}: expected tensors ...lora_A.weight and ...lora_B.weight, got {name!r}")
        if kind == "A.weight":
            b = tensors.get(name.replace(".lora_A.", ".lora_B."))
            if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ModelError(f"{path}: {name!r}: expected a lora_B of the same rank beside it, got {b}")
            scale = _scale(config, module, a.shape[0])
            short = next((module[len(each) :] for each in prefixes if module.startswith(each)), module)
            pairs[f"{short}.weight"] = (a, b.float() * scale)
    if not pairs:
        raise ModelError(f"{path}: expected low-rank pairs, got none")
    return pairs


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected a PEFT adapter_config.json, got {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: expected peft_type LORA, got {config!r:.80}")
    for key in _REFUSED:
        if config.get(key):
            raise ModelError(f"{path}: {key}: expected it unset, got {config[key]!r}; not supported")
    began = config.get("init_lora_weights")
    if isinstance(began, str) and began.lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path}: init_lora_weights: expected a way to begin that leaves the base as it is, got {began!r}, which "
            "takes what the adapter began with off the base; save it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias: expected 'none', got {config['bias']!r}; not supported")
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732); alpha may be given for each module."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break  # as PEFT: the first that matches
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _join(linear: Linear, parts: tuple[Source, ...], own: dict[str, Pair], folder: str | Path) -> Pair:
    """The pairs of a layer's parts as one, cut to what this rank holds."""
    shard, policy = linear.shard, linear.policy
    assert shard.cols is not None
    for part in parts:
        if part.name in own:
            a, b = own[part.name]
            if a.shape[1] != shard.width or b.shape[0] != part.size:
                raise ModelError(
                    f"{folder}: {part.name!r}: expected a pair for {part.size} outputs and {shard.width} inputs, "
                    f"got {b.shape[0]} and {a.shape[1]}; the adapter is another model's"
                )
    columns = {}
    total = 0
    for name, (a, _) in own.items():
        columns[name] = slice(total, total + a.shape[0])
        total += a.shape[0]
    joined_b = torch.zeros(shard.num_rows, total, dtype=policy.dtype, device=policy.device)
    first = 0
    for part, rows in pieces(parts, shard.rows):
        if part.name in own:
            b = own[part.name][1][rows.start : rows.stop]
            joined_b[first : first + len(rows), columns[part.name]] = b.to(joined_b)
        first += len(rows)
    cols = slice(shard.cols.start, shard.cols.stop)
    joined_a = torch.cat([a[:, cols] for a, _ in own.values()]).to(joined_b)
    return joined_a.contiguous(), joined_b
