"""`zerostack explain`: a configuration file as `initialize` would understand it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import explain as explanation
from ..auto import Surroundings
from ..checks import check, stand_in
from ..resolve import effective
from .main import parser_for
from .text import parse_count, say

_EXAMPLES = """\
  zerostack explain ds_config.json
  zerostack explain ds_config.json --params 1.3B --world 8      with bytes per rank
"""


def main(argv: Sequence[str]) -> int:
    """Print the explanation."""
    parser = parser_for("explain", _EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="JSON file with DeepSpeed's keys")
    parser.add_argument(
        "--params", type=parse_count, metavar="N", help="parameters of the model: 7e9, 350M, 1.3B"
    )
    parser.add_argument(
        "--world",
        type=int,
        default=int(os.environ.get("WORLD_SIZE") or "1"),
        metavar="N",
        help="data-parallel ranks",
    )
    args = parser.parse_args(argv)
    if args.world < 1:
        parser.error(f"--world: expected at least 1, got {args.world}")
    settings = effective(args.config, Surroundings(world=args.world), strict=False)
    check(
        settings.config,
        stand_in(settings.config),
        num_shards=settings.num_shards,
        num_replicas=settings.world // settings.num_shards,
    )
    say(explanation.explain(settings, args.params))
    return 0
