"""The tables of docs/from-deepspeed.md, written from the table that the configuration is checked against.

python tools/key_tables.py           write them
python tools/key_tables.py --check   exit with 1 if the page is not what would be written
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from zerostack.key_table import TABLE
from zerostack.keys import Key, Policy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from-deepspeed.md"
BLOCK = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {"honoured": Policy.HONOURED, "moot": Policy.NO_EFFECT, "refused": Policy.REFUSED}
HEADS = {
    "honoured": "| key | becomes |",
    "moot": "| key | because |",
    "refused": "| key | because, or instead | accepted as |",
}


def written(text: str) -> str:
    """The page with its tables as they should be."""
    return BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def table(kind: str) -> str:
    """One table; keys that share a row's meaning share a line."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for key in TABLE:
        if key.policy is KINDS[kind]:
            rows.setdefault(cells(key), []).append(key.path)
    lines = [f"| {paths(names)} | {' | '.join(rest)} |" for rest, names in rows.items()]
    columns = HEADS[kind].count("|") - 1
    return "\n".join([HEADS[kind], "|" + " --- |" * columns, *lines]) + "\n"


def cells(key: Key) -> tuple[str, ...]:
    """What stands beside the paths."""
    note = key.note.replace("|", "\\|")
    if key.policy is not Policy.REFUSED:
        return (note,)
    off = [f"`{json.dumps(value)}`" for value in key.off]
    return note, ", ".join([*off, *(["switched off, or defaults"] if key.inside is not None else [])]) or "-"


def paths(names: Iterable[str]) -> str:
    """Paths, each in full where its section differs from the one before."""
    shown, section = [], None
    for name in names:
        prefix, _, last = name.rpartition(".")
        shown.append(f"`{last if prefix and prefix == section else name}`")
        section = prefix
    return ", ".join(shown)


def main() -> int:
    """Write or check."""
    have = PAGE.read_text(encoding="utf-8")
    want = written(have)
    if "--check" in sys.argv[1:]:
        if have != want:
            print(f"{PAGE.name}: its tables are not those of the key table; run python tools/key_tables.py")
        return int(have != want)
    PAGE.write_text(want, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
