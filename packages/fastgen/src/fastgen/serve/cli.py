"""The `fastgen` command: serve, generate, chat, bench.

Errors are one line on standard error and exit code 2; an interrupted command ends with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import FastgenError
from ..version import __version__
from .commands.bench import add_bench
from .commands.generate import add_chat, add_generate
from .commands.serve import add_serve

EPILOG = """
examples:
  fastgen serve ./model                              an OpenAI API and a chat page on http://127.0.0.1:8000
  fastgen generate ./model "Once upon a time"        text to the terminal, as it comes
  fastgen chat ./model                               a conversation in the terminal
  fastgen bench http://127.0.0.1:8000                how fast a server is, at several loads

A model is a local Hugging Face directory: config.json, *.safetensors, tokenizer.json.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="fastgen",
        description="Serve Hugging Face models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (add_serve, add_generate, add_chat, add_bench):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stderr.close()
        return 0
    except (FastgenError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"fastgen {args.command}: error: {message}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
