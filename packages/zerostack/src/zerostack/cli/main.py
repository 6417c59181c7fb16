"""Which command was asked for, and what every command has in common: help that teaches, errors without a traceback.

In: arguments. Out: an exit status. The commands' own modules are imported only when they run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import ZerostackError
from ..version import __version__
from .text import complain

_COMMANDS = {
    "run": "start a training script on several processes (torchrun, with defaults for one machine)",
    "demo": "train a small GPT with ZeRO-3 on this machine, in about two minutes",
    "doctor": "what is installed here, which kernels are used, how fast processes talk",
    "explain": "what a DeepSpeed configuration means here: every value, its origin, bytes per rank",
    "estimate": "bytes per rank at every stage, before anything is allocated",
}

_EXAMPLES = """\
examples:
  zerostack demo                                        see it work
  zerostack explain ds_config.json --params 7e9 --world 16
  zerostack run --num-procs 4 train.py --lr 3e-4        everything after the script is the script's
  zerostack COMMAND --help                              more examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in _COMMANDS:
        return _without_command(arguments)
    command = importlib.import_module(f".{arguments[0]}", __package__)
    try:
        status: int = command.main(arguments[1:])
    except ZerostackError as error:
        complain(f"zerostack {arguments[0]}: error: {error}")
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        return 1
    except OSError as error:
        complain(f"zerostack {arguments[0]}: error: {error}")
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    return status


def parser_for(command: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the command's one-line description and its examples."""
    return argparse.ArgumentParser(
        prog=f"zerostack {command}",
        description=_COMMANDS[command],
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _without_command(arguments: list[str]) -> int:
    """`zerostack`, `zerostack --help`, `zerostack --version`, or a mistake."""
    listed = "\n".join(f"  {name:<10} {text}" for name, text in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="zerostack",
        description="A DeepSpeed-shaped front for small ML-systems packages.\n\ncommands:\n" + listed,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the above")
    parser.parse_args(arguments or ["--help"])
    return 2
