"""`ckpt-universal`: look at checkpoints, check them, convert them, remove old ones."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from tqdm import tqdm

from .errors import CheckpointError, ConfigError, NotACheckpointError
from .interchange.convert import FORMATS, convert, export_safetensors
from .places import open_directory
from .steps import Retention, Step, list_steps, prune, prune_partial
from .stores import Directory
from .values import DTYPES
from .verify import diff, inspect, marked_steps, verify
from .version import __version__

EXAMPLES = """
examples:
  ckpt-universal inspect checkpoints                         what the latest step holds
  ckpt-universal verify checkpoints --all                    read and check every byte of every step
  ckpt-universal diff checkpoints/step-000000100 checkpoints/step-000000200
  ckpt-universal export checkpoints hf-model --dtype bfloat16   for from_pretrained, beside a config.json
  ckpt-universal convert hf-model checkpoints --to step --prefix model.
  ckpt-universal convert deepspeed-dir checkpoints --to step
  ckpt-universal convert checkpoints dcp-dir --to dcp
  ckpt-universal prune checkpoints --keep-last 3 --keep-every 1000 --partial

PATH is a directory of steps (the latest one is taken) or of one step, or a URL (s3://bucket/run) where fsspec and the
store's package are installed. What is converted from may also be a directory of safetensors files, of
torch.distributed.checkpoint, or of DeepSpeed (ZeRO 0 to 3, universal): it is recognised.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something was found (verify, diff), 2 for an error.

    141, as a shell has it, if nobody reads the output any more: what was to be found may not have been.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        code = run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # an OSError, too
        with suppress(OSError, ValueError):  # or the interpreter complains of it at its end
            output = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        return 141
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"ckpt-universal: {error}\n")
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ckpt-universal",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    one = command("inspect", _inspect, "Print what a step holds: tensors with dtype and shape, and values.")
    _path(one)
    one.add_argument("--steps", action="store_true", help="only list the committed steps")

    one = command(
        "verify", _verify, "Read and check every byte; exit code 1 and a line a problem if there is any."
    )
    _path(one)
    one.add_argument("--all", action="store_true", help="every committed step, not only the latest")

    one = command("convert", _convert, "Read one format, write another; tensors pass through part by part.")
    _path(one)
    one.add_argument("out", metavar="OUT", help="where to write")
    one.add_argument("--to", choices=FORMATS, required=True, help="what to write")
    one.add_argument("--only", default="*", help="pattern of tensors' names (default: all)")
    one.add_argument("--strip", default="", help="take this off the beginning of names")
    one.add_argument("--prefix", default="", help="put this before names")
    one.add_argument("--step", type=int, help="number of the step to write")
    one.add_argument("--compress", type=int, metavar="LEVEL", help="zstd level, for a step")
    _dtype_and_size(one)

    one = command(
        "export", _export, "Write a model for Hugging Face: safetensors files, with an index if several."
    )
    _path(one)
    one.add_argument("out", metavar="OUT", help="new directory")
    one.add_argument("--only", default="model.*", help="pattern of tensors' names (default: model.*)")
    one.add_argument("--strip", default="model.", help="taken off the beginning of names (default: model.)")
    _dtype_and_size(one)

    one = command("diff", _diff, "Print in what two steps differ; exit code 1 if they do.")
    one.add_argument("path", metavar="PATH", help="a directory of steps, or of one step")
    one.add_argument("other", metavar="OTHER", help="another")

    one = command("prune", _prune, "Remove old steps; the one that 'latest' points to always stays.")
    one.add_argument("path", metavar="PATH", help="a directory of steps")
    one.add_argument("--keep-last", type=int, metavar="N", help="keep so many of the newest")
    one.add_argument("--keep-every", type=int, metavar="N", help="and those whose number is a multiple of it")
    one.add_argument("--partial", action="store_true", help="remove what interrupted saves have left, too")
    one.add_argument(
        "--older-than-h",
        type=float,
        default=24.0,
        metavar="H",
        help="in stores without locks, leftovers of at least so many hours (default: 24)",
    )
    return parser


def _path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory of steps, or of one step")
    parser.add_argument("--name", help="the name of the step below PATH (default: the latest)")


def _dtype_and_size(parser: argparse.ArgumentParser) -> None:
    floats = sorted(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
    parser.add_argument("--dtype", choices=floats, help="cast floating-point tensors")
    parser.add_argument(
        "--max-file-gb", type=float, default=5.0, metavar="GB", help="size of safetensors files (default: 5)"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int], None]]:
    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def progress(nbytes: int) -> None:
            bar.update(nbytes)

        yield progress


def _inspect(options: argparse.Namespace) -> int:
    if options.steps:
        for step in _some_steps(open_directory(options.path)):
            _say(step.name)
        return 0
    for line in inspect(options.path, name=options.name):
        _say(line)
    return 0


def _some_steps(root: Directory) -> list[Step]:
    steps = list_steps(root)
    if not steps:
        raise NotACheckpointError(f"{root.path}: no committed checkpoint")
    return steps


def _verify(options: argparse.Namespace) -> int:
    names = marked_steps(options.path) if options.all else [options.name]
    failed = False
    for name in names:
        with _bar("verifying") as progress:
            report = verify(options.path, name=name, progress=progress)
        for problem in report.problems:
            _say(problem)
        failed |= not report.ok
        if report.ok:
            _say(f"{report.path}: {report.num_tensors} tensors, {report.num_bytes} bytes: all as written")
    return int(failed)


def _convert(options: argparse.Namespace) -> int:
    with _bar("converting") as progress:
        written, left_out = convert(
            options.path,
            options.out,
            to=options.to,
            name=options.name,
            only=options.only,
            strip=options.strip,
            prefix=options.prefix,
            dtype=_dtype(options),
            step=options.step,
            compress=options.compress,
            max_file_bytes=_max_file_bytes(options),
            progress=progress,
        )
    for line in left_out:
        _say(f"left out: {line}")
    _say(written)
    return 0


def _export(options: argparse.Namespace) -> int:
    with _bar("exporting") as progress:
        path = export_safetensors(
            options.path,
            options.out,
            only=options.only,
            strip=options.strip,
            dtype=_dtype(options),
            name=options.name,
            max_file_bytes=_max_file_bytes(options),
            progress=progress,
        )
    _say(str(path))
    return 0


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    return None if options.dtype is None else DTYPES[options.dtype]


def _max_file_bytes(options: argparse.Namespace) -> int:
    if not math.isfinite(options.max_file_gb) or options.max_file_gb * 1e9 < 1:
        raise ConfigError(f"--max-file-gb: expected a number > 0, got {options.max_file_gb}")
    return int(options.max_file_gb * 1e9)


def _diff(options: argparse.Namespace) -> int:
    found = False
    with _bar("comparing") as progress:
        for line in diff(options.path, options.other, progress=progress):
            tqdm.write(line, file=sys.stdout)
            found = True
    return int(found)


def _prune(options: argparse.Namespace) -> int:
    if not 0 <= options.older_than_h < math.inf:
        raise ConfigError(f"--older-than-h: expected hours >= 0, got {options.older_than_h}")
    root = open_directory(options.path)
    if not (options.partial and root.names()):  # interrupted saves may be all there is
        _some_steps(root)
    removed = prune(root, Retention(keep_last=options.keep_last, keep_every=options.keep_every))
    if options.partial:
        removed += prune_partial(root, older_than_s=3600 * options.older_than_h)
    for name in removed:
        _say(f"removed {name}")
    return 0
