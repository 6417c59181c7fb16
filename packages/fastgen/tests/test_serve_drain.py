"""SIGTERM to a real process: 503 for the new, an end for the running, exit code 0."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fastgen.serve
import httpx2
import pytest
from fake_engine import FakeEngine
from fastgen.serve import Server, ServerConfig
from fastgen.serve.interface import EngineError
from fastgen.serve.loop import MOST_FAILED_STEPS
from fastgen.serve.run import ListenError
from server_lab import Reply, Served, serving, wait_until

PROGRAM = """
import sys
import time
from fake_engine import FakeEngine
from fastgen.serve import Limits, Server, ServerConfig
config = ServerConfig(port=0, limits=Limits(drain_timeout_s=float(sys.argv[1])))
engine = FakeEngine(step_s=0.02)
engine.prepare = lambda params: time.sleep(60) if params.json_schema else None
Server(engine, config).run(lambda url: print(url, flush=True))
"""


@dataclass
class Process:
    served: Served
    popen: subprocess.Popen[str]


@contextlib.contextmanager
def process(drain_timeout_s: float) -> Iterator[Process]:
    source = Path(fastgen.serve.__file__).parents[2]
    paths = [str(source), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(drain_timeout_s)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stdout is not None
            url = popen.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            yield Process(Served(url, None, None), popen)  # type: ignore[arg-type]
        finally:
            popen.kill()


def ask_in_thread(served: Served, max_tokens: int, *, stream: bool) -> tuple[threading.Thread, list[Reply]]:
    replies: list[Reply] = []
    body = {"max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    thread = threading.Thread(target=lambda: replies.append(served.complete(**body)))
    thread.start()
    return thread, replies


def test_running_requests_finish_and_new_ones_are_refused() -> None:
    with process(drain_timeout_s=20.0) as running:
        asked = [ask_in_thread(running.served, 60, stream=stream) for stream in (False, True)]
        wait_until(lambda: running.served.get("/stats").json["running"] == 2)
        running.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: running.served.get("/health").status == 503)
        assert running.served.get("/health").json["status"] == "stopping"
        refused = running.served.complete()
        assert (refused.status, int(refused.headers["retry-after"]) > 0) == (503, True)
        for thread, _ in asked:
            thread.join()
        whole, streamed = (replies[0] for _, replies in asked)
        assert whole.json["usage"]["completion_tokens"] == 60
        assert streamed.events[-1]["choices"][0]["finish_reason"] == "length"
        assert running.popen.wait(10) == 0


def test_what_does_not_finish_in_time_is_told_so() -> None:
    with process(drain_timeout_s=0.3) as running:
        asked = [ask_in_thread(running.served, 2000, stream=stream) for stream in (False, True)]
        wait_until(lambda: running.served.get("/stats").json["running"] == 2)
        running.popen.send_signal(signal.SIGTERM)
        for thread, _ in asked:
            thread.join()
        whole, streamed = (replies[0] for _, replies in asked)
        assert (whole.status, "shutting down" in whole.error["message"]) == (503, True)
        last = json.loads(streamed.body.decode().strip().split("\n\n")[-1].removeprefix("data: "))
        assert "shutting down" in last["error"]["message"]
        assert running.popen.wait(10) == 0


def test_what_is_not_begun_in_time_is_told_so_and_keeps_nobody() -> None:
    with process(drain_timeout_s=0.3) as running:
        replies: list[Reply] = []
        asking = threading.Thread(
            target=lambda: replies.append(running.served.complete(response_format={"type": "json_object"}))
        )
        asking.start()
        wait_until(lambda: running.served.get("/stats").json["requests"] == 1)
        running.popen.send_signal(signal.SIGTERM)
        asking.join()
        assert (replies[0].status, "shutting down" in replies[0].error["message"]) == (503, True)
        assert running.popen.wait(10) == 0


def test_a_second_signal_does_not_wait() -> None:
    with process(drain_timeout_s=60.0) as running:
        thread, _ = ask_in_thread(running.served, 2000, stream=True)
        wait_until(lambda: running.served.get("/stats").json["running"] == 1)
        started_s = time.monotonic()
        running.popen.send_signal(signal.SIGINT)
        wait_until(lambda: running.served.get("/health").status == 503)
        running.popen.send_signal(signal.SIGINT)
        assert running.popen.wait(20) == 0
        assert time.monotonic() - started_s < 15
        thread.join()


def test_two_servers_in_one_process_and_no_threads_afterwards() -> None:
    before = set(threading.enumerate())
    with serving() as one, serving() as other:
        assert one.url != other.url
        assert one.complete().status == other.complete().status == 200
        assert one.metric("fastgen_prompt_tokens_total") == 5.0
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_port_that_is_taken() -> None:
    with serving() as served:
        taken = Server(FakeEngine(), ServerConfig(port=served.address[1]))
        with pytest.raises(ListenError, match="expected a free port"):
            taken.run(lambda url: None)
    with pytest.raises(ListenError, match="address of this machine"):
        Server(FakeEngine(), ServerConfig(host="no.such.host.invalid", port=0)).run(lambda url: None)


def test_a_failed_engine_ends_the_server_where_that_is_asked_for() -> None:
    engine = FakeEngine()
    server = Server(engine, ServerConfig(port=0, end_on_failure=True))

    def serve_until_it_fails() -> None:
        with server.background() as url:
            engine.fail_next = RuntimeError("out of order")
            for _ in range(MOST_FAILED_STEPS):
                reply = Served(url, server, engine).complete()
                assert (reply.status, "out of order" in reply.error["message"]) == (500, True)

    with pytest.raises(EngineError, match="out of order"):
        serve_until_it_fails()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "here")
    server = Server(FakeEngine(), ServerConfig(socket_path=path))
    with server.background() as url:
        assert url == f"unix:{path}"
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=path), base_url="http://any.name") as client:
            assert client.get("/health").json() == {"status": "ok"}
        with pytest.raises(ListenError, match="where nothing is yet"):
            Server(FakeEngine(), ServerConfig(socket_path=path)).run(lambda url: None)
    assert not Path(path).exists()
