"""The effective configuration: every value that counts, and where it came from.

In: a configuration as written, and `auto.Surroundings`. On the way: `key_table`, `auto`, `config.parse`,
`batch`. Out: `Effective`. Next: `policies` makes zero-core's objects of it, `explain` prints it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from . import auto, config
from .auto import Surroundings
from .batch import ACCUMULATION, MICRO, TRAIN, Batch, solve
from .errors import ConfigError
from .key_table import TABLE
from .keys import Findings, Policy, join
from .schema import Config


@dataclass(frozen=True, kw_only=True)
class Effective:
    """A configuration that is complete and consistent.

    Attributes:
        config: Typed values; defaults filled in.
        batch: The solved batch equation.
        world: Number of data-parallel ranks it was solved for.
        sources: Where each value came from, by path: "file", "default", "auto: ..." or "derived: ...".
        findings: Keys that were accepted and do nothing.
    """

    config: Config
    batch: Batch
    world: int
    sources: Mapping[str, str]
    findings: Findings

    @property
    def num_shards(self) -> int:
        """Ranks that share one set of shards, where the program brings no mesh of its own."""
        asked = self.config.zero_optimization.mics_shard_size
        return asked if asked >= 1 else self.world

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """(path, value, source) of every honoured value."""
        batch = {TRAIN: self.batch.train, MICRO: self.batch.micro, ACCUMULATION: self.batch.accumulation}
        for path, value in leaves(self.config):
            row = TABLE.get(path)
            if row is not None and row.policy is Policy.HONOURED:
                source = self.sources[path]
                yield path, auto.AUTO if source.startswith(auto.OPEN) else batch.get(path, value), source


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a model by its dotted path."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, join(prefix, name))
        else:
            yield join(prefix, name), value


def effective(
    source: str | os.PathLike[str] | Mapping[str, Any], around: Surroundings, *, strict: bool = True
) -> Effective:
    """Read, check, complete and type a configuration.

    Args:
        source: Path of a JSON file, or the dictionary.
        around: What "auto" may be taken from, and the number of ranks.
        strict: Whether an "auto" that nothing answers is an error.

    Raises:
        ConfigError: With everything that is wrong at the first step that finds something.
    """
    checked, findings = TABLE.check(config.read(source))
    spelt = {}
    if isinstance(on := checked.get("zero_optimization"), bool):
        checked["zero_optimization"] = {"stage": int(on)}
        spelt["zero_optimization.stage"] = f"file: {str(on).lower()}, an older spelling of {int(on)}"
    ready, sources = auto.resolve(checked, around, strict=strict)
    typed = config.parse(ready)
    _check_consistent(typed)
    _check_ranks(typed, around.world)
    findings.no_effect.update(_of_no_device(ready, typed))
    micro = typed.train_micro_batch_size_per_gpu
    if typed.train_batch_size is None and micro is None and not strict:
        micro, sources[MICRO] = 1, sources.get(MICRO, "nothing given: 1 assumed")
    batch = solve(typed.train_batch_size, micro, typed.gradient_accumulation_steps, around.world)
    origin = {
        path: "file"
        if _given(ready, path)
        else "default"
        if value is not None
        else "default: zero-core decides"
        for path, value in leaves(typed)
    }
    return Effective(
        config=typed,
        batch=batch,
        world=around.world,
        sources={**origin, **spelt, **sources, **batch.sources},
        findings=findings,
    )


def _given(raw: Mapping[str, Any], path: str) -> bool:
    node: Any = raw
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True


def _of_no_device(ready: Mapping[str, Any], typed: Config) -> dict[str, str]:
    """What is given for an offload that is switched off."""
    found: dict[str, str] = {}
    for name in ("offload_param", "offload_optimizer"):
        section = join("zero_optimization", name)
        given = (ready.get("zero_optimization") or {}).get(name) or {}
        if getattr(typed.zero_optimization, name).device == "none":
            found |= {
                join(section, key): f'{name}.device is "none"'
                for key, value in given.items()
                if key != "device" and value is not None
            }
    return found


def _check_ranks(typed: Config, world: int) -> None:
    """Refuse shards that do not fill the ranks."""
    shard_size = typed.zero_optimization.mics_shard_size
    if shard_size >= 1 and world % shard_size:
        raise ConfigError(
            f"zero_optimization.mics_shard_size: expected a divisor of the {world} ranks, got {shard_size}"
        )


def _check_consistent(typed: Config) -> None:
    """Refuse settings that contradict each other."""
    on = [name for name in ("fp16", "bf16", "torch_autocast") if getattr(typed, name).enabled]
    if len(on) > 1:
        raise ConfigError(f"{' and '.join(on)} are both enabled; keep one")
    fp16 = typed.fp16
    first_scale = fp16.loss_scale or 2.0**fp16.initial_scale_power
    if not fp16.loss_scale and fp16.min_loss_scale > first_scale:
        raise ConfigError(
            f"fp16.min_loss_scale: expected at most the first scale, {first_scale:g}, got {fp16.min_loss_scale:g}"
        )
    if typed.optimizer is not None and getattr(typed.optimizer.params, "nesterov", False):
        params = typed.optimizer.params
        if not params.momentum or params.dampening:
            raise ConfigError("optimizer.params.nesterov: needs a momentum above 0 and a dampening of 0")
    master, states = typed.bf16.bf16_master_weights_and_grads, typed.bf16.bf16_optimizer_states
    if master != states:
        raise ConfigError(
            "bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states must be given together: no step here "
            "keeps fp32 states of bf16 masters, or the other way round"
        )
    if master and not typed.bf16.enabled:
        raise ConfigError("bf16.bf16_master_weights_and_grads needs bf16.enabled")
    if typed.fp32_allreduce and typed.communication_data_type not in {None, "fp32", "float32"}:
        raise ConfigError(
            f"fp32_allreduce and communication_data_type {typed.communication_data_type!r} contradict "
            "each other"
        )
    if (
        typed.optimizer is not None
        and typed.optimizer.type == "AdamW"
        and not typed.optimizer.params.adam_w_mode
    ):
        raise ConfigError('optimizer: "AdamW" with adam_w_mode false contradict each other; use "Adam"')
