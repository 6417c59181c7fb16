"""Options of the commands that load a model, and the engine made of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..engine_spec import EngineSpec
from ..interface import Engine

if TYPE_CHECKING:
    import torch

    from ...config import EngineConfig

GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What `engine_spec` reads."""
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", choices=DTYPES, help="of the model (default: as its config says)")
    group.add_argument(
        "--weights", choices=("dense", "int8", "int4"), default="dense", help="how they are held"
    )
    group.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    group.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        default=1,
        help="processes that share each layer, each on a GPU of its own, or all on the CPU (1)",
    )
    group.add_argument(
        "--max-model-len", type=positive, metavar="N", help="longest prompt and output together"
    )
    group.add_argument(
        "--token-budget",
        type=positive,
        metavar="N",
        help="tokens of a forward (default: measured at the start)",
    )
    group.add_argument(
        "--max-gap-ms",
        type=amount,
        metavar="X",
        help="between two tokens of a running sequence for the sake of prompts, which then take longer (default: any)",
    )
    group.add_argument(
        "--max-sequences", type=positive, metavar="N", default=256, help="that run at once (256)"
    )
    group.add_argument(
        "--cache-gib",
        type=amount,
        metavar="X",
        help="of each process's KV cache (default: 0.8 of free memory)",
    )
    group.add_argument(
        "--cache-dtype", choices=(*DTYPES, "int8"), help="of keys and values (default: the model's)"
    )
    group.add_argument(
        "--swap-gib",
        type=amount,
        metavar="X",
        default=0.0,
        help="host memory of each process for preempted sequences (0: recompute)",
    )
    group.add_argument(
        "--no-prefix-cache", action="store_true", help="share nothing between prompts that begin alike"
    )
    group.add_argument(
        "--speculate",
        metavar="HOW",
        help="guess tokens ahead: 'ngram' looks in the text so far, else the directory of a smaller model",
    )
    group.add_argument("--drafts", type=positive, metavar="N", help="tokens guessed at once (4)")
    group.add_argument(
        "--batch-invariant", action="store_true", help="the same bits whatever else runs; slower"
    )
    group.add_argument("--adapters", nargs="+", metavar="NAME=DIR", default=[], help="LoRA adapters to load")


def engine_config(args: argparse.Namespace, **schedule: Any) -> EngineConfig:
    """The policies that the options stand for; `schedule` adds fields of `SchedulePolicy`."""
    import torch

    from ...config import CachePolicy, EngineConfig, SchedulePolicy, Speculation, Weights

    if args.drafts and not args.speculate:
        raise ConfigError(f"--drafts {args.drafts}: expected --speculate beside it, which says who guesses")
    speculation = None
    if args.speculate:
        draft_model = None if args.speculate == "ngram" else args.speculate
        speculation = Speculation(num_drafts=args.drafts or 4, draft_model=draft_model)
    return EngineConfig(
        cache=CachePolicy(
            max_bytes=None if args.cache_gib is None else int(args.cache_gib * GIB),
            dtype=getattr(torch, args.cache_dtype) if args.cache_dtype else None,
            swap_bytes=int(args.swap_gib * GIB),
            prefix=not args.no_prefix_cache,
        ),
        schedule=SchedulePolicy(
            token_budget=args.token_budget,
            gap_s=None if args.max_gap_ms is None else args.max_gap_ms / 1e3,
            max_sequences=args.max_sequences,
            **schedule,
        ),
        speculation=speculation,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        weights=Weights(args.weights),
        max_model_len=args.max_model_len,
        batch_invariant=args.batch_invariant,
        device=_device(args.device) if args.device else None,
    )


def _device(name: str) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: expected one such as cpu or cuda:0, got {name!r}") from error


def text_of(path: str) -> str:
    """What a file says, which an option names."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, got other bytes") from error


def engine_spec(path: str, args: argparse.Namespace, **schedule: Any) -> EngineSpec:
    """What the options say of the engine; `schedule` adds fields of `SchedulePolicy`."""
    adapters = tuple(adapter_pairs(args.adapters))
    return EngineSpec(path, engine_config(args, **schedule), args.tensor_parallel, adapters)


@contextmanager
def loaded_engine(path: str, args: argparse.Namespace, **schedule: Any) -> Iterator[Engine]:
    """The engine that the options describe, with its adapters; ends its processes at the end.

    Raises:
        FastgenError: the model or an adapter cannot be loaded.
    """
    with engine_spec(path, args, **schedule).loaded() as engine:
        yield engine


def adapter_pairs(options: list[str]) -> list[tuple[str, str]]:
    """(name, directory) of each `NAME=DIR`."""
    pairs = []
    for option in options:
        name, equals, directory = option.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--adapters: expected NAME=DIR, got {option!r}")
        pairs.append((name, directory))
    return pairs


def positive(text: str) -> int:
    """An option's whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected >= 1, got {text}")
    return value


def amount(text: str) -> float:
    """An option's number that is not negative."""
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected >= 0, got {text}")
    return value
