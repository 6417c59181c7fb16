"""Saving and loading a checkpoint, beside torch's DCP and DeepSpeed, and against the disk itself.

    python3 tools/dev.py bench checkpoint
    python3 tools/dev.py bench checkpoint --model 350m --rounds 3 --folder /mnt/fast
    python3 tools/dev.py bench checkpoint --quick

The state is that of a GPT trained in bfloat16 with AdamW on two ranks: bfloat16 parameters, float32 masters and
moments, each rank its half (14 bytes a parameter in all). In every round each engine in turn writes it, files synced,
and reads it back, with the page cache dropped before each where that is allowed. The limit is what plain threads reach
that write and read as many bytes with O_DIRECT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _measure
from _checkpoint_disk import drop_page_cache
from _checkpoint_worker import BYTES_PER_PARAMETER, KINDS
from _processes import HERE, RANKS, Engine, missing, say
from gpt import GPT, PRESETS, num_parameters

LIMIT, OURS = "limit", "ckpt-universal"
ENGINES = (LIMIT, OURS, "dcp", "deepspeed")


def measure(engines: Sequence[Engine], folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the slower rank, for each engine and act, by round; and MiB on disk."""
    found: dict[str, dict[str, list[float]]] = {e.name: {"save": [], "load": [], "mib": []} for e in engines}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" + " (warm-up)" * (number == 0))
        first = number % len(engines)  # nobody always comes after the same other
        for engine in [*engines[first:], *engines[:first]]:
            path = folder / f"{engine.name}-{number}"
            took: dict[str, float] = {}
            for act in ("save", "load"):
                drop_page_cache()
                took[act] = max(each["s"] for each in engine.ask({"do": act, "path": str(path)}))
            if number:
                found[engine.name]["save"].append(took["save"])
                found[engine.name]["load"].append(took["load"])
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                found[engine.name]["mib"].append(size / _measure.MIB)
            shutil.rmtree(path)
    return found


def ratio(mine: Sequence[float], its: Sequence[float]) -> float:
    """The median over rounds of a ratio inside each."""
    return statistics.median(a / b for a, b in zip(mine, its, strict=True))


def table(found: dict[str, dict[str, list[float]]], nbytes: int) -> list[str]:
    """Save and load."""
    lines = [
        "| engine | save + sync s | GB/s | of the limit | load s | GB/s | of the limit | MiB on disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        save, load = (statistics.median(row[act]) for act in ("save", "load"))
        speed = [ratio(found[LIMIT][act], row[act]) for act in ("save", "load")]
        lines.append(
            f"| {name} | {save:.2f} | {nbytes / save / 1e9:.2f} | **{100 * speed[0]:.0f} %** | {load:.2f} "
            f"| {nbytes / load / 1e9:.2f} | **{100 * speed[1]:.0f} %** | {statistics.median(row['mib']):.0f} |"
        )
    return lines


def extras(ours: Engine, folder: Path) -> dict[str, Any]:
    """What only ckpt-universal is asked: another layout, saving beside training, compression."""
    say("another layout, saving beside training, compression")
    answers = {}
    for act in ("resplit", "beside", "codecs"):
        said = ours.ask({"do": act, "path": str(folder / act)})
        answers[act] = (
            said[0] if act == "codecs" else {key: max(each[key] for each in said) for key in said[0]}
        )
        shutil.rmtree(folder / act)
    return answers


def more_lines(more: dict[str, Any]) -> list[str]:
    """The extras as tables."""
    resplit, beside, found = more["resplit"], more["beside"], more["codecs"]
    lines = [
        "",
        "| ckpt-universal | |",
        "| --- | --- |",
        "| load of halves that were saved as 1/3 and 2/3, against halves "
        f"| **{resplit['other'] / resplit['same']:.2f}** |",
        f"| bytes read, against bytes needed | **{resplit['read_ratio']:.3f}** |",
        f"| a step waits for an asynchronous save, against a copy of the bytes | {beside['blocked']:.3f} s, "
        f"{beside['copied']:.3f} s: **{beside['blocked'] / beside['copied']:.2f}** |",
        "",
        "| zstd (bytes of like significance together) | level | stored / raw | MB/s, one thread |",
        "| --- | --- | --- | --- |",
    ]
    for kind, dtype in KINDS.items():
        for level, stored, speed in found[kind]:
            dtype_name = str(dtype).removeprefix("torch.")
            lines.append(f"| {kind}, {dtype_name} | {level} | {stored:.2f} | {speed / 1e6:.0f} |")
    lines.append(f"| the disk, beside | | | {found['disk'] / 1e6:.0f} |")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="110m")
    parser.add_argument(
        "--engines", default=",".join(ENGINES), help="comma-separated; the limit is always there"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write checkpoints (default: the current folder)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints, writes nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.rounds, options.engines = "tiny", 1, OURS
    options.sequences, options.accumulate, options.recompute = 1, 1, False
    names = [n for n in dict.fromkeys([LIMIT, *options.engines.split(",")]) if not missing(n)]
    engines: list[Engine] = []
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix="checkpoint-bench-") as folder:
        try:
            for name in names:
                say(f"starting {name}")
                engines.append(Engine(name, "bf16", options, script="_checkpoint_worker.py"))
            found = measure(engines, Path(folder), options.rounds)
            for engine in engines:
                if engine.name == OURS:
                    more = extras(engine, Path(folder))
        finally:
            for engine in engines:
                engine.stop()
    parameters = num_parameters(GPT(PRESETS[options.model]))
    nbytes = BYTES_PER_PARAMETER * parameters
    hardware = _measure.hardware()
    lines = [
        f"# Checkpoints of a GPT of {parameters / 1e6:.1f} M parameters, {nbytes / 1e9:.2f} GB",
        "",
        f"{_measure.today()}; {hardware['processor']} ({hardware['instruction_set']}), {hardware['cores']} cores; "
        f"{RANKS} ranks; medians of {options.rounds} rounds. DeepSpeed: stage 2, whose bfloat16 parameters one "
        "rank writes.",
        "",
        *table(found, nbytes),
        *(more_lines(more) if more else []),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if not options.quick:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"checkpoint_{options.model}.md").write_text(text)
        result = {"rounds": found, "more": more, "hardware": hardware, "date": _measure.today()}
        (options.out / f"checkpoint_{options.model}.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
