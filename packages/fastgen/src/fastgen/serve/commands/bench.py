"""`fastgen bench`: options, and the loads they stand for."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..bench.load import Ask, Run, Target, closed_loop, mixed, open_loop
from ..bench.report import draw, summarize, table, write_json
from ..bench.target import EngineTarget, HttpTarget
from ..loop import EngineLoop
from .options import add_engine_options, amount, loaded_engine, positive

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EPILOG = """
examples:
  fastgen bench http://127.0.0.1:8000                                 1, 4 and 16 clients
  fastgen bench http://127.0.0.1:8000 --rates 1,2,4,8                 Poisson arrivals at four rates
  fastgen bench ./model --clients 8 --prompt-tokens 16-1024 --output-tokens 16-128
  fastgen bench http://127.0.0.1:8000 --json load.json --picture load.png

Any OpenAI-compatible server can be measured. TTFT: time to first token; ITL: between two tokens.
In open loop times count from the arrival that was planned, whether or not the client came to send by then.
"""


def add_bench(commands: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure a server, or a model in this process",
        description="Put load on a server (URL) or on a model in this process (PATH), and show what clients feel.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="URL_OR_PATH", help="http://... or the model's directory")
    parser.add_argument(
        "--clients", type=numbers, metavar="N,N", help="closed loop, with so many clients (1,4,16)"
    )
    parser.add_argument("--rates", type=numbers, metavar="X,X", help="open loop, so many requests a second")
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="at each load (64)")
    parser.add_argument("--prompt-tokens", type=span, default=(16, 512), metavar="LOW-HIGH", help="(16-512)")
    parser.add_argument("--output-tokens", type=span, default=(16, 128), metavar="LOW-HIGH", help="(16-128)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (0)")
    parser.add_argument("--model", help="its name on the server (default: the only one)")
    parser.add_argument("--api-key", metavar="KEY", help="if the server asks for one")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--picture", metavar="FILE", help="draw latency against throughput there")
    add_engine_options(parser)
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    runs = asyncio.run(_measure(args))
    rows = [summarize(run) for run in runs]
    sys.stdout.write(table(rows) + "\n")
    if args.json:
        names = ("target", "requests", "prompt_tokens", "output_tokens", "seed", "model")
        write_json(args.json, rows, {name: getattr(args, name) for name in names}, runs)
    if args.picture:
        low, high = args.output_tokens
        draw(
            args.picture,
            rows,
            f"{args.target}: prompts {_shown(args.prompt_tokens)}, outputs {low}-{high} tokens",
        )
    return 1 if any(row.num_failed for row in rows) else 0


async def _measure(args: argparse.Namespace) -> list[Run]:
    from tqdm import tqdm

    rates = args.rates or []
    clients = args.clients or ([] if rates else [1.0, 4.0, 16.0])
    runs = []

    def asks(text: str, num_requests: int = args.requests) -> list[Ask]:
        return mixed(num_requests, args.prompt_tokens, args.output_tokens, args.seed, text)

    async with _target(args) as target:
        await closed_loop(target, asks("warm up", 1), 1, lambda: None)
        for number in clients:
            with tqdm(total=args.requests, desc=f"{number:g} clients", leave=False) as bar:
                runs.append(await closed_loop(target, asks(f"{number} clients"), int(number), bar.update))
        for rate in rates:
            with tqdm(total=args.requests, desc=f"{rate:g} requests/s", leave=False) as bar:
                runs.append(await open_loop(target, asks(f"{rate} a second"), rate, args.seed, bar.update))
    return runs


@asynccontextmanager
async def _target(args: argparse.Namespace) -> AsyncIterator[Target]:
    _check_target(args)
    if "://" in args.target:
        yield HttpTarget(args.target, model=args.model, api_key=args.api_key)
        return
    with loaded_engine(args.target, args) as engine:
        loop = EngineLoop(engine, max_queued=max(1024, args.requests))
        loop.start()
        try:
            yield EngineTarget(loop)
        finally:
            await loop.close()


def _check_target(args: argparse.Namespace) -> None:
    """Refuse options that are about the other kind of target."""
    parser = argparse.ArgumentParser()
    if "://" in args.target:
        add_engine_options(parser)
        kind = "of a model in this process: a server has its own"
    else:
        parser.add_argument("--model")
        parser.add_argument("--api-key")
        kind = "of a server, and this is a directory"
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: expected none, for it is {kind}; got {getattr(args, name)!r}")


def numbers(text: str) -> list[float]:
    """An option's numbers above 0, with commas."""
    values = [amount(each) for each in text.split(",")]
    if not all(values):
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text}")
    return values


def span(text: str) -> tuple[int, int]:
    """An option's range LOW-HIGH, or one number."""
    low, _, high = text.partition("-")
    values = positive(low), positive(high or low)
    if values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"expected LOW-HIGH, got {text}")
    return values


def _shown(values: tuple[int, int]) -> str:
    return f"{values[0]}-{values[1]}"
