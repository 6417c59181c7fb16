"""`fastgen serve` over several processes as a user starts it: one process's tokens, and none without the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_lab import TOKENIZER, expected, tiny_llama
from fastgen.serve.cli import main
from server_lab import Reply, Served, wait_until

TEXT = "Once upon a time"
EXPECTED = TOKENIZER.decode(expected(tuple(TOKENIZER.encode(TEXT)), 12), skip_special_tokens=True)

GREEDY: dict[str, Any] = {"prompt": TEXT, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@dataclass
class Command:
    """A running `fastgen serve`."""

    served: Served
    popen: subprocess.Popen[str]

    def complete(self, **body: object) -> Reply:
        return self.served.complete(**{**GREEDY, **body})

    def stat(self, name: str) -> int:
        return int(self.served.get("/stats").json[name])

    def children(self) -> list[psutil.Process]:
        """Of it and of them, those that run a model."""
        return _models_of(self.popen.pid)


def _models_of(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [each for each in found if "spawn_main" in " ".join(each.cmdline())]


def _words(folder: Path, *options: str) -> list[str]:
    """A command that serves the tiny model."""
    tiny_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    given = ["--port", "0", "--device", "cpu", "--cache-gib", "0.02", "--token-budget", "64"]
    return ["serve", str(folder), *given, *options]


@contextlib.contextmanager
def command(folder: Path, *options: str) -> Iterator[Command]:
    with subprocess.Popen(
        [sys.executable, "-m", "fastgen.serve.cli", *_words(folder, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as popen:
        assert popen.stdout is not None
        assert popen.stderr is not None
        try:
            line = popen.stdout.readline()
            found = re.search(r"http://[\w.:]+", line)
            assert found, popen.stderr.read()
            started = Command(Served(found[0].rstrip("/"), None, None), popen)  # type: ignore[arg-type]
            children = started.children()
            yield started
            wait_until(lambda: not any(child.is_running() for child in children))
        finally:
            popen.kill()


def in_thread(running: Command, **body: object) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(running.complete(**body)))
    thread.start()
    return thread, replies


@dataclass
class Main:
    """The command in this process, which has imported everything already; `act` runs in a thread beside it."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    others: frozenset[psutil.Process]
    """Processes that were there before: ranks of other tests, waiting for their next."""

    def models(self) -> list[psutil.Process]:
        return [each for each in _models_of(os.getpid()) if each not in self.others]

    def run(self, act: Callable[[Served], None], *options: str) -> tuple[int, str]:
        """Its exit code and what it wrote to standard error."""
        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(self._beside, act)
            code = main(_words(self.folder, *options))
            acting.result()
        assert not self.models()
        assert not torch.distributed.is_initialized()
        return code, self.capsys.readouterr().err

    def _beside(self, act: Callable[[Served], None]) -> None:
        shown = ""
        while "http://" not in shown:
            time.sleep(0.05)
            shown += self.capsys.readouterr().out
        found = re.search(r"http://[\w.:]+", shown)
        assert found
        try:
            act(Served(found[0], None, None))  # type: ignore[arg-type]
        except BaseException:
            for each in self.models():  # the server ends, too, and the test
                each.kill()
            raise


@pytest.fixture
def here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Main(tmp_path, capsys, frozenset(_models_of(os.getpid())))


def test_two_ranks_serve_as_one_and_stop_in_order(here: Main) -> None:
    def act(served: Served) -> None:
        def stat(name: str) -> int:
            return int(served.get("/stats").json[name])

        assert served.complete(**GREEDY).json["choices"][0]["text"] == EXPECTED
        streamed = served.complete(**GREEDY, stream=True).events
        assert "".join(choice["text"] for event in streamed for choice in event["choices"]) == EXPECTED
        with served.send("/v1/completions", {"prompt": TEXT, "max_tokens": 450, "ignore_eos": True, "n": 4}):
            wait_until(lambda: stat("blocks_used") > 0)
        wait_until(lambda: stat("blocks_used") == 0)
        assert served.complete(**GREEDY).json["choices"][0]["text"] == EXPECTED
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(served.complete, max_tokens=200, ignore_eos=True)
            wait_until(lambda: stat("running") == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: served.get("/health").status == 503)
            assert running.result().json["usage"]["completion_tokens"] == 200

    assert here.run(act, "--tensor-parallel", "2", "--speculate", "ngram") == (0, "")


def test_a_killed_follower_ends_the_server_and_says_so(here: Main) -> None:
    replies: list[Reply] = []

    def act(served: Served) -> None:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(served.complete, max_tokens=450, ignore_eos=True, stream=True)
            wait_until(lambda: bool(served.get("/stats").json["running"]))
            (follower,) = here.models()
            follower.kill()
            replies.append(asked.result())

    code, shown = here.run(act, "--tensor-parallel", "2")
    assert code == 2
    last = json.loads(replies[0].body.decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert "rank 1 of 2 has ended (killed by SIGKILL)" in last["error"]["message"]
    assert re.search(r"^fastgen serve: error: the engine has failed .*rank 1 of 2", shown, re.MULTILINE)


@pytest.mark.slow
def test_replicas_of_ranks_serve_as_one_and_stop_in_order(tmp_path: Path) -> None:
    with command(tmp_path, "--replicas", "2", "--tensor-parallel", "2") as running:
        assert len(running.children()) == 4
        threads = [in_thread(running) for _ in range(4)]
        for thread, replies in threads:
            thread.join()
            assert replies[0].json["choices"][0]["text"] == EXPECTED
        thread, replies = in_thread(running, max_tokens=60, temperature=1.0, stream=True)
        wait_until(lambda: running.stat("running") == 1)
        running.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: running.served.get("/health").status == 503)
        assert running.complete().status == 503
        thread.join()
        assert replies[0].events[-1]["choices"][0]["finish_reason"] == "length"
        assert running.popen.wait(20) == 0
        assert running.popen.stderr is not None
        assert running.popen.stderr.read() == ""
