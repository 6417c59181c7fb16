"""Two servers behind one address: they answer as one, and stand in for each other."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastgen.serve import Limits, ServerConfig
from fastgen.serve.replicas import ReplicaServer, pool
from fastgen.serve.replicas.front import Front
from fastgen.serve.replicas.pool import WorkerError
from replica_lab import BrokenSpec, FakeSpec
from server_lab import Reply, Served, serving, wait_until

KEY = {"Authorization": "Bearer secret"}


@dataclass
class Replicas(Served):
    """Two of them; asks with the key."""

    front: Front

    def ask(self, method, path, body=None, headers=None, timeout_s=20):  # type: ignore[no-untyped-def]
        return super().ask(
            method, path, body, KEY if headers is None or headers == {} else headers, timeout_s
        )

    def status(self) -> list[str]:
        return [each["status"] for each in self.get("/health").json["replicas"]]

    def stat(self, name: str) -> int:
        return int(self.get("/stats").json[name])

    def send(self, path, body):  # type: ignore[no-untyped-def]
        """Send a request and leave its answer unread."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection = socket.create_connection(self.address, timeout=20)
        connection.sendall(head.encode() + raw)
        return connection


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    config = ServerConfig(port=0, api_keys=("secret",), limits=Limits(concurrent=6, body_bytes=20_000))
    server = ReplicaServer(FakeSpec(), config, replicas=2).server(str(tmp_path_factory.mktemp("sockets")))
    with server.background() as url:
        front = server._house
        assert isinstance(front, Front)
        yield Replicas(url, server, None, front)  # type: ignore[arg-type]


def several(replicas: Replicas, count: int, **body: object) -> list[Reply]:
    """Requests at the same time."""
    replies: list[Reply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(replicas.complete(**body))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def test_answers_are_those_of_one_server(replicas: Replicas) -> None:
    def told(reply: Reply) -> object:
        return {name: value for name, value in reply.json.items() if name not in {"id", "created"}}

    asked = {"max_tokens": 20, "seed": 4, "n": 2, "logprobs": 1}
    with serving() as one:
        assert told(replicas.complete(**asked)) == told(one.complete(**asked))
        assert told(replicas.chat(max_tokens=9)) == told(one.chat(max_tokens=9))
        streams = [
            [event["choices"] for event in each.complete(max_tokens=20, stream=True).events]
            for each in (one, replicas)
        ]
        texts = ["".join(choice["text"] for choices in each for choice in choices) for each in streams]
        assert texts[0] == texts[1] != ""
        for method, path, body in [
            ("POST", "/v1/embeddings", {"input": "a text"}),
            ("POST", "/v1/completions", {"prompt": "x", "n": 0}),
            ("POST", "/v1/completions", b"{"),
            ("GET", "/v1/models/none", None),
            ("GET", "/openapi.json", None),
            ("GET", "/", None),
            ("GET", "/nowhere", None),
        ]:
            ours, its = replicas.ask(method, path, body), one.ask(method, path, body)
            assert (ours.status, ours.body) == (its.status, its.body)
            assert ours.headers.get("content-security-policy") == its.headers.get("content-security-policy")


def test_the_key_and_limits_are_asked_for_once(replicas: Replicas) -> None:
    refused = replicas.ask("POST", "/v1/completions", {"prompt": "x"}, {"Authorization": "Bearer no"})
    assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
    assert replicas.complete(prompt="x" * 30_000).status == 413
    replies = several(replicas, 12, max_tokens=300, ignore_eos=True)
    assert {reply.status for reply in replies} == {200, 429}
    assert sum(reply.status == 200 for reply in replies) >= 6


def test_the_same_beginning_goes_to_the_same_replica_and_the_rest_is_spread(replicas: Replicas) -> None:
    loads = [replica.load for replica in replicas.front.pool.replicas]
    for _ in range(4):
        assert replicas.complete(prompt="An old story. " * 50, max_tokens=1).status == 200
    chosen = [load.last for load in loads]
    assert abs(chosen[0] - chosen[1]) >= 4 or max(chosen) == 4
    before = replicas.metric("fastgen_prompt_tokens_total")
    assert all(reply.status == 200 for reply in several(replicas, 4, max_tokens=100, ignore_eos=True))
    assert min(load.last for load in loads) > max(chosen)
    assert replicas.metric("fastgen_prompt_tokens_total") == before + 4 * len("Hello")
    assert replicas.metric("fastgen_blocks_total") == 2 * 4096 == replicas.stat("blocks_total")


def test_a_client_that_goes_away_is_noticed_by_the_replica(replicas: Replicas) -> None:
    for stream in (True, False):
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
        with replicas.send("/v1/completions", body):
            wait_until(lambda: replicas.stat("blocks_used") > 0)
        wait_until(lambda: replicas.stat("blocks_used") == 0 == replicas.stat("requests"))
    assert [each["requests"] for each in replicas.get("/health").json["replicas"]] == [0, 0]


def test_events_are_not_held_back(replicas: Replicas) -> None:
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with replicas.send("/v1/completions", body) as connection:
        seen = b""
        while seen.count(b"data: ") < 3:
            part = connection.recv(1000)
            assert part, seen
            seen += part
        assert replicas.stat("running") == 1
    wait_until(lambda: replicas.stat("running") == 0)


def test_a_killed_worker_is_out_and_comes_again(replicas: Replicas) -> None:
    tokens = replicas.metric("fastgen_generated_tokens_total")
    busy = {"max_tokens": 2000, "ignore_eos": True}
    replies: list[list[Reply]] = [[], []]

    def ask(number: int, **more: object) -> None:
        replies[number].append(replicas.complete(**busy, **more))

    threads = [threading.Thread(target=ask, args=(n,), kwargs={"stream": bool(n)}) for n in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: [each.load.running for each in replicas.front.pool.replicas] == [1, 1])
    wait_until(lambda: replicas.stat("running") == 2)
    for replica in replicas.front.pool.replicas:
        assert replica.process is not None
        replica.process.kill()
    for thread in threads:
        thread.join()
    whole, streamed = replies[0][0], replies[1][0]
    assert (whole.status, whole.error["code"]) == (503, "replica_ended")
    last = json.loads(streamed.body.decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "replica_ended"
    wait_until(lambda: replicas.get("/health").status == 503)
    refused = replicas.complete()
    assert (refused.status, refused.error["code"], int(refused.headers["retry-after"]) > 0) == (
        503,
        "no_replica",
        True,
    )
    assert replicas.get("/health").json["replicas"][0]["detail"] == "killed by SIGKILL"
    assert replicas.metric("fastgen_generated_tokens_total") >= tokens
    wait_until(lambda: replicas.status() == ["ready", "ready"], timeout_s=30)
    assert replicas.complete(max_tokens=3).status == 200
    assert replicas.metric('fastgen_replica_restarts{replica="0"}') == 1.0
    assert replicas.metric("fastgen_generated_tokens_total") >= tokens + 3


def test_a_worker_that_hangs_is_killed_and_comes_again(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ASK_S", 0.2)
    monkeypatch.setattr(pool, "SILENT_S", 3.0)
    wait_until(lambda: replicas.status() == ["ready", "ready"])
    stuck = replicas.front.pool.replicas[1]
    restarts, process = stuck.restarts, stuck.process
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: stuck.detail == "it did not answer for 3 s, and was killed", timeout_s=30)
    assert replicas.complete(max_tokens=3).status == 200  # by the other one
    wait_until(lambda: replicas.status() == ["ready", "ready"], timeout_s=30)
    assert stuck.restarts == restarts + 1


def test_what_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    server = ReplicaServer(BrokenSpec(), ServerConfig(port=0), replicas=2).server(str(tmp_path))
    with pytest.raises(WorkerError, match=r"replica \d: ModelError: config.json: expected a model"):
        server.run(lambda url: pytest.fail("it is not ready"))
