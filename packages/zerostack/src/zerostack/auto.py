"""What each `"auto"` stands for, once there is a model, an optimizer or arguments to take it from.

In: a checked configuration that may hold "auto", and `Surroundings`. Out: the same without "auto", and where
each value came from. Next: `config.parse`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .keys import all_of, join

AUTO = "auto"
OPEN = "auto: from"
"""How the source of a value begins that nothing has answered yet."""

Found = tuple[Any, str]
_REQUIRED = {"scheduler.params.total_num_steps": 1}  # stands in where a key has no default


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a program knows beside its configuration.

    Attributes:
        world: Number of data-parallel ranks.
        model: The model, before it is sharded.
        optimizer: The optimizer that the program built, if any.
        args: The program's arguments; the names of the Hugging Face Trainer are understood.
        micro_batch: Batch size of a data loader that the program built, if any.
    """

    world: int = 1
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    args: Any = None
    micro_batch: int | None = None


def _from_args(*names: str) -> Callable[[Surroundings], Found | None]:
    def find(around: Surroundings) -> Found | None:
        for name in names:
            value = getattr(around.args, name, None)
            if value is not None:
                return value, f"auto: args.{name}"
        return None

    return find


def _from_optimizer(name: str, *arguments: str) -> Callable[[Surroundings], Found | None]:
    def find(around: Surroundings) -> Found | None:
        if around.optimizer is not None and name in around.optimizer.defaults:
            value = around.optimizer.defaults[name]
            return list(value) if isinstance(value, tuple) else value, f"auto: the optimizer's {name}"
        return _from_args(*arguments)(around)

    return find


def _micro_batch(around: Surroundings) -> Found | None:
    if around.micro_batch is not None:
        return around.micro_batch, "auto: the data loader's batch size"
    return _from_args("per_device_train_batch_size", "train_micro_batch_size_per_gpu")(around)


def _dtype_of_model(dtype: torch.dtype, argument: str) -> Callable[[Surroundings], Found | None]:
    def find(around: Surroundings) -> Found | None:
        given = _from_args(argument)(around)
        if given is not None or around.model is None:
            return given
        first = next((p.dtype for p in around.model.parameters() if p.is_floating_point()), torch.float32)
        return first == dtype, f"auto: the model's parameters are {str(first).removeprefix('torch.')}"

    return find


def hidden_size(model: nn.Module | None) -> int | None:
    """The width that a model's `config` states, under the names that Hugging Face models use."""
    config = getattr(model, "config", None)
    for name in ("hidden_size", "n_embd", "d_model", "width"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    sizes = getattr(config, "hidden_sizes", None)
    return max(sizes) if sizes else None


def _from_width(formula: str, elements: Callable[[int], int]) -> Callable[[Surroundings], Found | None]:
    def find(around: Surroundings) -> Found | None:
        width = hidden_size(around.model)
        if width is None:
            return None if around.model is None else (..., "default (auto: the model states no hidden size)")
        return elements(width), f"auto: {formula}, hidden size {width}"

    return find


def _solved(around: Surroundings) -> Found | None:
    return ..., "auto"


def _warmup_steps(around: Surroundings) -> Found | None:
    """As the Trainer has it: a ratio counts where no steps are given."""
    steps, ratio = (getattr(around.args, name, None) for name in ("warmup_steps", "warmup_ratio"))
    if steps or not ratio:
        return _from_args("warmup_steps")(around)
    max_steps = getattr(around.args, "max_steps", None) or 0
    if max_steps <= 0:
        return None
    return math.ceil(ratio * max_steps), "auto: args.warmup_ratio of args.max_steps"


def _betas(around: Surroundings) -> Found | None:
    found = _from_optimizer("betas")(around)
    first, second = (getattr(around.args, f"adam_beta{i}", None) for i in (1, 2))
    if found is None and first is not None and second is not None:
        return [first, second], "auto: args.adam_beta1, args.adam_beta2"
    return found


_RESOLVERS: Mapping[str, tuple[str, Callable[[Surroundings], Found | None]]] = {
    "train_batch_size": ("the batch equation", _solved),
    "gradient_accumulation_steps": (
        "args.gradient_accumulation_steps, or the batch equation",
        lambda around: _from_args("gradient_accumulation_steps")(around) or _solved(around),
    ),
    "train_micro_batch_size_per_gpu": ("the data loader or args.per_device_train_batch_size", _micro_batch),
    "gradient_clipping": ("args.max_grad_norm", _from_args("max_grad_norm")),
    "optimizer.params.lr": (
        "the optimizer or args.learning_rate",
        _from_optimizer("lr", "learning_rate", "lr"),
    ),
    "optimizer.params.betas": ("the optimizer or args.adam_beta1 and adam_beta2", _betas),
    "optimizer.params.eps": ("the optimizer or args.adam_epsilon", _from_optimizer("eps", "adam_epsilon")),
    "optimizer.params.weight_decay": (
        "the optimizer or args.weight_decay",
        _from_optimizer("weight_decay", "weight_decay"),
    ),
    "scheduler.params.warmup_min_lr": ("0", lambda around: (0.0, "auto: 0")),
    "scheduler.params.warmup_max_lr": (
        "the optimizer's lr or args.learning_rate",
        _from_optimizer("lr", "learning_rate", "lr"),
    ),
    "scheduler.params.warmup_num_steps": ("args.warmup_steps, or warmup_ratio and max_steps", _warmup_steps),
    "scheduler.params.total_num_steps": ("args.max_steps", _from_args("max_steps")),
    "bf16.enabled": (
        "the dtype of the model's parameters or args.bf16",
        _dtype_of_model(torch.bfloat16, "bf16"),
    ),
    "fp16.enabled": (
        "the dtype of the model's parameters or args.fp16",
        _dtype_of_model(torch.float16, "fp16"),
    ),
    "zero_optimization.reduce_bucket_size": (
        "the model's hidden size",
        _from_width("hidden size squared", lambda width: width * width),
    ),
    "zero_optimization.stage3_prefetch_bucket_size": (
        "the model's hidden size",
        _from_width("0.9 x hidden size squared", lambda width: int(0.9 * width * width)),
    ),
    "zero_optimization.stage3_param_persistence_threshold": (
        "the model's hidden size",
        _from_width("10 x hidden size", lambda width: 10 * width),
    ),
    "zero_optimization.overlap_comm": ("true", lambda around: (True, "auto: true")),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "its default",
        lambda around: (..., "default"),
    ),
}

_DECIDED_LATER = frozenset(
    f"zero_optimization.zenflow.{name}" for name in ("select_strategy", "select_interval", "update_interval")
)
"""Where "auto" is a value of its own."""


def resolve(
    raw: Mapping[str, Any], around: Surroundings, *, strict: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace every "auto".

    Args:
        raw: What `KeyTable.check` returned.
        around: What to take values from.
        strict: Whether an "auto" that nothing answers is an error; otherwise the key's default stands in.

    Returns:
        The configuration without "auto", and where each replaced value came from, by path.

    Raises:
        ConfigError: For each "auto" that nothing answers, by path.
    """
    sources: dict[str, str] = {}
    errors: list[str] = []
    ready = _replace(raw, "", around, sources, errors, strict)
    if errors:
        raise ConfigError(all_of(errors))
    return ready, sources


def _replace(
    section: Mapping[str, Any],
    prefix: str,
    around: Surroundings,
    sources: dict[str, str],
    errors: list[str],
    strict: bool,
) -> dict[str, Any]:
    ready: dict[str, Any] = {}
    for name, value in section.items():
        path = join(prefix, name)
        if isinstance(value, Mapping):
            ready[name] = _replace(value, path, around, sources, errors, strict)
            continue
        if value != AUTO:
            ready[name] = value
            continue
        found = _find(path, around, strict, errors)
        if found is not None:
            sources[path] = found[1]
            if found[0] is not ...:
                ready[name] = found[0]
    return ready


def _find(path: str, around: Surroundings, strict: bool, errors: list[str]) -> Found | None:
    if path in _DECIDED_LATER:
        return AUTO, "auto: decided while training"
    if path not in _RESOLVERS:
        errors.append(
            f'{path}: "auto" is not understood here; write a value, or leave the key out for its default'
        )
        return None
    origin, resolver = _RESOLVERS[path]
    found = resolver(around)
    if found is not None:
        return found
    if strict:
        errors.append(f'{path}: "auto" is taken from {origin}, and there is none; write a value')
        return None
    return _REQUIRED.get(path, ...), f"{OPEN} {origin}, at initialize()"


def paths() -> Iterator[tuple[str, str]]:
    """Every key that may be "auto", with where its value comes from."""
    return ((path, origin) for path, (origin, _) in _RESOLVERS.items())
