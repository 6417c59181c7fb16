"""`zerostack demo`: ask for a run of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..demo import text
from ..demo.launch import launch
from ..demo.settings import CONTEXT, Settings
from .main import parser_for
from .text import parse_count

_EXAMPLES = """\
  zerostack demo                                  about two minutes on two cores
  zerostack demo --text ~/my_project --steps 300  learn from your own files
  zerostack demo --stage 1 --procs 4 --params 8M
  zerostack demo --resume --steps 1200            go on from the last checkpoint

Ctrl-C stops after the current step, with a checkpoint.
"""


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    parser = parser_for("demo", _EXAMPLES)
    defaults = Settings()
    parser.add_argument(
        "--text", metavar="PATH", help="file or folder to learn from (Python's standard library)"
    )
    parser.add_argument("--stage", type=int, choices=range(4), default=defaults.stage, help="ZeRO stage (3)")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help=f"optimizer steps ({defaults.steps})"
    )
    parser.add_argument(
        "--params", type=parse_count, default=defaults.num_params, metavar="N", help="about how many (4M)"
    )
    parser.add_argument("--procs", type=int, default=defaults.procs, help="processes (2)")
    parser.add_argument("--out", default=defaults.out, metavar="DIR", help=f"where files go ({defaults.out})")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of initial values and samples (0)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)
    for name in ("steps", "procs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    path = None if args.text is None else str(Path(args.text).expanduser().resolve())
    text.load(path, CONTEXT)  # complain here, once, rather than in every process
    return launch(
        Settings(
            text=path,
            stage=args.stage,
            steps=args.steps,
            num_params=args.params,
            procs=args.procs,
            out=args.out,
            seed=args.seed,
            resume=args.resume,
        )
    )
