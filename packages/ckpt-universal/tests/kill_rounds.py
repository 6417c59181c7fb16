"""Round after round: a process that saves as fast as it can, killed at a random instant, and a look at what is left.

    python kill_rounds.py ROOT sync|async ROUNDS SEED

A fresh process is forked for each round from this one, which has no threads and has imported everything. Every second
round is killed only after it has said that a step is committed, so that the rounds get on however slow the machine is.
After every round the latest step must load, whole, and be no older than what the saver had said was committed. Prints
a line of JSON: rounds, the newest step, and how many died while a save was under way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import ckpt_universal as ckpt
import torch
from ckpt_universal.places import open_directory
from ckpt_universal.steps import list_steps

SHAPES = {"a": (300, 211), "b": (65_000,), "c": (), "d": (3, 5, 7)}
POLICY = ckpt.SavePolicy(retention=ckpt.Retention(keep_last=3), chunk_bytes=50_000)


def state(step: int) -> dict:
    return {**{name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}, "step": step}


def save_for_ever(root: Path, mode: str, first: int) -> None:
    """Steps one after another; every third one replaces the step "best"."""
    said = root / "said"
    saver = ckpt.AsyncSaver(root, policy=POLICY) if mode == "async" else None
    for step in range(first, first + 100_000):
        name = "best" if step % 3 == 0 else None
        if saver is not None:
            saver.save(state(step), step=step, name=name)
            done = saver.committed
        else:
            done = ckpt.save(root, state(step), step=step, name=name, policy=POLICY)
        if done is not None:
            said.write_text(f"{step if saver is None else max(first - 1, step - 3)}\n")


def look(root: Path, at_least: int) -> int:
    """Load the latest step, and check every step that is there."""
    steps = list_steps(open_directory(root))
    newest = -1
    for name in [None, *(step.name for step in steps)]:
        into = {**{each: torch.zeros(shape) for each, shape in SHAPES.items()}, "step": -1}
        loaded = ckpt.load(root, into=into, name=name)
        for each in SHAPES:
            assert (into[each] == loaded.step).all(), f"{name}: {each} is of another step than {loaded.step}"
        assert into["step"] == loaded.step
        assert len(os.listdir(loaded.path)) >= 3
        newest = max(newest, loaded.step)
    assert newest >= at_least, f"step {at_least} was said to be committed, and {newest} is the newest"
    return newest


def wait_for_word(said: Path, before: str) -> None:
    """Until `said` is another than `before`, two minutes at most."""
    end = time.monotonic() + 120
    while said.read_text() in (before, ""):
        assert time.monotonic() < end, "the saver has committed nothing in two minutes"
        time.sleep(0.001)


def main() -> None:
    root, mode, rounds, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    said = root / "said"
    said.write_text("-1\n")
    newest, under_way = -1, 0
    for turn in range(rounds):
        before = said.read_text()
        child = os.fork()
        if child == 0:
            save_for_ever(root, mode, newest + 1)
            os._exit(1)
        if turn % 2:
            wait_for_word(said, before)
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the saver failed by itself: {status}"
        under_way += any(root.glob("*/.writing-*"))
        text = said.read_text().strip()
        if list_steps(open_directory(root)):
            newest = look(root, int(text or -1))
        else:
            assert int(text or -1) < 0
    left = [name for name in os.listdir(root) if name.startswith("step-")]
    assert len(left) <= 3 + rounds
    sys.stdout.write(json.dumps({"rounds": rounds, "under_way": under_way, "newest": newest}) + "\n")


if __name__ == "__main__":
    main()
