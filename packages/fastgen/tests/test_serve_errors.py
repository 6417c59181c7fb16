"""What is refused, with which status and in OpenAI's shape; limits, keys and names of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from fastgen.errors import ConfigError
from fastgen.serve import Limits, Server, ServerConfig, service
from fastgen.serve.chat_answers import ChatAnswers
from fastgen.serve.guard import without_port
from server_lab import Reply, Served, serving, wait_until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = {"sequences": 8, "inputs": 8, "logprobs": 1000, "body_bytes": 50_000}
    with serving(prompt_tokens=200, max_tokens=300, **limits) as served:
        yield served


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("completions", {"prompt": "x" * 201}, 400, "got 201"),
    ("completions", {"prompt": "x" * 10_000}, 400, "characters, got 10000"),
    ("chat/completions", {"n": 9}, 400, "at most 8 sequences"),
    ("completions", {"prompt": [1, -2]}, 400, "prompt"),
    ("completions", {"prompt": [1, 100_000]}, 400, "token ids below"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": {"a": 1}}, 400, "prompt"),
    ("completions", {}, 400, "prompt: Field required"),
    ("completions", {"prompt": "x", "max_tokens": 301}, 400, "at most 300"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "echo"),
    ("completions", {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens"),
    ("completions", {"prompt": "x", "max_tokens": 9.5}, 400, "max_tokens"),
    ("completions", {"prompt": "x", "n": 9}, 400, "at most 8 sequences"),
    ("completions", {"prompt": ["x"] * 5, "n": 2}, 400, "at most 8 sequences in all, got 10"),
    ("completions", {"prompt": "x", "best_of": 2, "n": 3}, 400, "best_of"),
    ("completions", {"prompt": "x", "best_of": 2, "beam_width": 2}, 400, "best_of"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("completions", {"prompt": "x", "seed": 10**30}, 400, "seed"),
    ("completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
    ("completions", {"prompt": "x", "min_tokens": 20, "max_tokens": 5}, 400, "min_tokens"),
    ("completions", {"prompt": "x", "model": "../../etc/passwd"}, 404, "expected one of tiny"),
    ("completions", {"prompt": "x", "temprature": 1}, 400, "temprature: is not a field of this request"),
    ("completions", {"prompt": "x", "logit_bias": {"5": 101}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"five": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"05": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream true"),
    ("completions", {"prompt": "x", "regex": "a+", "response_format": {"type": "json_object"}}, 400, "regex"),
    ("completions", {"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "json_schema"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "refuse"}]}, 400, "no such talk"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages",
    ),
    ("chat/completions", {"top_logprobs": 3}, 400, "logprobs true"),
    ("chat/completions", {"tool_choice": "required"}, 400, "tools"),
    ("chat/completions", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template"),
    (
        "chat/completions",
        {"add_generation_prompt": True, "continue_final_message": True},
        400,
        "false beside it",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x", "mood": "bad"}]},
        400,
        "messages.0.mood: is not a field of this request",
    ),
    ("completions", {"prompt": "x", "max_tokens": 60, "n": 4, "logprobs": 4}, 400, "at most 1000 log-prob"),
    ("completions", {"prompt": "x", "length_penalty": 11}, 400, "length_penalty"),
    ("embeddings", {"input": ["x"] * 9}, 400, "at most 8 texts"),
    ("embeddings", {"input": "x" * 201}, 400, "1 to 200 tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_refused(served: Served, path: str, body: dict[str, Any], status: int, message: str) -> None:
    if path == "chat/completions":
        body = {"messages": [{"role": "user", "content": "Hello"}], **body}
    reply = served.ask("POST", f"/v1/{path}", body)
    assert (reply.status, message in reply.error["message"]) == (status, True), reply.body
    assert reply.headers["content-type"] == "application/json"


def test_what_is_odd_but_right(served: Served) -> None:
    assert served.complete(prompt="").json["usage"]["prompt_tokens"] == 1  # the token that begins texts
    assert served.complete(max_tokens=5.0).json["usage"]["completion_tokens"] == 5
    assert (
        served.complete(user="me", metadata={"a": "b"}, logit_bias={}, store=False, suffix="").status == 200
    )
    assert served.engine.seen[-1]["params"].logit_bias is None
    assert served.complete(logit_bias={"7": -100, "12": 0.5}).status == 200
    assert served.engine.seen[-1]["params"].logit_bias == {7: -100.0, 12: 0.5}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert served.chat(messages=[{"role": "developer", "content": parts}]).status == 200
    said = served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"])
    assert said == "<|system|>one\ntwo<|end|>\n<|assistant|>"
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I sa"}]
    assert (
        served.chat(messages=begun, continue_final_message=True, chat_template_kwargs={"mood": ""}).status
        == 200
    )
    assert served.engine.tokenizer.decode(served.engine.seen[-1]["prompt_ids"]).endswith("<|assistant|>I sa")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "model": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "x"}',
        b'{"prompt": ' + b"[" * 20_000,
        b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_malformed_bodies(served: Served, raw: bytes) -> None:
    reply = served.ask("POST", "/v1/completions", raw)
    assert reply.status == 400, reply.body
    assert reply.error["type"] == "invalid_request_error"


def test_a_body_that_is_not_said_to_be_json_is_refused(served: Served) -> None:
    # Without this a page elsewhere could send "simple" requests past CORS.
    reply = served.ask("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "text/plain"})
    assert reply.status == 400


def test_paths_and_methods(served: Served) -> None:
    assert served.get("/v1/nothing").status == 404
    assert served.get("/v1/nothing").error["type"] == "not_found_error"
    assert served.get("/v1/models/absent").error["code"] == "model_not_found"
    assert served.get("/../../etc/passwd").status == 404
    reply = served.get("/v1/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_bodies_are_not_read_beyond_the_limit(served: Served) -> None:
    declared = served.ask("POST", "/v1/completions", {"prompt": "x" * 60_000})
    assert (declared.status, declared.error["code"]) == (413, "body_too_large")
    # In chunks nobody declares a length; the answer comes before the end, which never does.
    with socket.create_connection(served.address) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(60):
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
    assert served.is_idle()


def test_a_body_must_arrive_in_time() -> None:
    with serving(read_timeout_s=0.2) as served, socket.create_connection(served.address) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408


@pytest.mark.parametrize(
    ("head", "asked_before"),
    [(b"", False), (b"POST /v1/comple", False), (b"GET /health HTTP/1.1\r\nHost: local", True)],
)
def test_a_head_must_arrive_in_time(head: bytes, asked_before: bool) -> None:
    with serving(read_timeout_s=0.2) as served, socket.create_connection(served.address, 5) as connection:
        if asked_before:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert answer.read()
        with contextlib.suppress(ConnectionError):  # closed while we write
            for byte in head:  # each a sign of life, which must not buy time
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            assert connection.recv(1) == b""


def test_what_comes_after_the_head_is_not_hurried() -> None:
    with serving(FakeEngine(step_s=0.02), read_timeout_s=0.2) as served:
        connection = http.client.HTTPConnection(*served.address, timeout=5)
        body = json.dumps({"prompt": "Hello", "max_tokens": 30, "ignore_eos": True, "stream": True})
        for _ in range(2):
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.read().endswith(b"[DONE]\n\n")
            used = connection.sock
            time.sleep(0.4)
        assert connection.sock is used is not None
        connection.close()


def test_a_request_must_end_in_time() -> None:
    with serving(FakeEngine(step_s=0.02), request_timeout_s=0.3) as served:
        late = served.complete(max_tokens=1000, ignore_eos=True)
        assert (late.status, late.error["code"]) == (504, "timeout")
        stream = served.complete(max_tokens=1000, ignore_eos=True, stream=True)
        assert stream.status == 200
        *_, error, end = stream.body.decode().split("\n\n")
        assert (json.loads(error.removeprefix("data: "))["error"]["code"], end) == ("timeout", "")
        wait_until(served.is_idle)


def test_so_many_at_once() -> None:
    with serving(FakeEngine(step_s=0.01), concurrent=2) as served:
        body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
        held = [served.send("/v1/completions", body) for _ in range(2)]
        wait_until(lambda: len(served.engine.requests) == 2)
        refused = served.complete()
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert served.get("/health").status == 200  # what looks after the server is not counted
        for connection in held:
            connection.close()
        wait_until(served.is_idle)
        assert served.complete().status == 200


def test_queues_that_are_full() -> None:
    slow = FakeEngine(step_s=0.3)
    with serving(slow, queued=2) as served:
        held = served.send("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5})
        wait_until(lambda: served.server.service.loop.num_open == 2)
        refused = served.complete()
        assert (refused.status, refused.error["type"]) == (503, "overloaded_error")
        assert "retry-after" in refused.headers
        held.close()
    with serving(FakeEngine(max_waiting=0)) as served:
        refused = served.complete()
        assert (refused.status, refused.error["message"]) == (503, "the queue is full")


def test_a_prompt_that_the_engine_refuses_takes_its_neighbours_along() -> None:
    with serving(FakeEngine(step_s=0.01)) as served:
        reply = served.complete(prompt=[[1, 2], [100_000]], max_tokens=50)
        assert (reply.status, "token ids below" in reply.error["message"]) == (400, True)
        assert served.engine.num_aborted == 1
        wait_until(served.is_idle)


def test_models_without_a_chat_template() -> None:
    with serving(FakeEngine(chat_template=None)) as served:
        assert "no" in served.chat().error["message"]
        assert served.chat().status == 400
    with serving(FakeEngine(chat_template="{{ messages[0].content }}")) as served:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        assert "knows no tools" in served.chat(tools=tools).error["message"]


# -- keys, names, pages from elsewhere -------------------------------------------------------------------


def test_keys() -> None:
    with serving(api_keys=("first", "second")) as served:

        def with_key(value: str | None) -> Reply:
            headers = {} if value is None else {"Authorization": value}
            return served.ask("POST", "/v1/completions", {"prompt": "x"}, headers)

        assert [with_key(f"Bearer {key}").status for key in ("first", "second")] == [200, 200]
        for wrong in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer firs",
            "Bearer first2",
            "first",
            "Basic first",
            "Bearer ü",
        ):
            reply = with_key(wrong)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert [served.get(path).status for path in ("/", "/health")] == [200, 200]
        assert [
            served.get(path).status for path in ("/metrics", "/stats", "/v1/models", "/openapi.json")
        ] == [401] * 4
        # A body is not read for a stranger.
        assert served.ask("POST", "/v1/completions", b"x" * 10**7).status == 401


def test_the_name_it_is_called_by(served: Served) -> None:
    assert served.get("/health", Host="localhost:80").status == 200
    refused = served.get("/health", Host="evil.example")
    assert (refused.status, "--allowed-host" in refused.error["message"]) == (421, True)
    with serving(allowed_hosts=("models.example",)) as other:
        assert other.get("/health", Host="models.example").status == 200
    assert ServerConfig(host="0.0.0.0").hosts is None
    assert [without_port(host) for host in ("a:80", "a", "[::1]:80", "[::1]")] == ["a", "a", "[::1]", "[::1]"]


def test_pages_from_elsewhere(served: Served) -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in served.ask("GET", "/health", headers=origin).headers
    with serving(cors_origins=("https://page.example",), api_keys=("k",)) as open_to_it:
        preflight = {
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        reply = open_to_it.ask("OPTIONS", "/v1/completions", headers=preflight)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://page.example")
        other = open_to_it.ask("GET", "/health", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_headers_of_every_answer(served: Served) -> None:
    for path in ("/", "/health", "/nothing"):
        assert served.get(path).headers["x-content-type-options"] == "nosniff"
    policy = served.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize("wrong", [{"body_bytes": 0}, {"request_timeout_s": 0.0}, {"concurrent": -1}])
def test_limits_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
    with pytest.raises(ConfigError, match="api_keys"):
        ServerConfig(api_keys=("",))


@pytest.mark.parametrize("names", [{}, {"served_name": "mine"}])
def test_an_adapter_that_is_called_as_the_model(names: dict[str, str]) -> None:
    own = names.get("served_name", "tiny")
    with pytest.raises(ConfigError, match=f"expected names beside the model's own, got '{own}'"):
        Server(FakeEngine(), ServerConfig(adapters=("pirate", own), **names))


MANY = 1_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [0] * MANY}),
        ("chat/completions", {"messages": [{"role": "user"}] * (MANY // 4)}),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": [{"type": "text", "text": ""}] * (MANY // 5)}]},
        ),
        ("completions", {"prompt": [1] * MANY + ["a"]}),
        ("completions", {"prompt": "x", **{f"k{number}": 1 for number in range(MANY // 4)}}),
        ("completions", {"prompt": "x", "metadata": {f"k{number}": 1 for number in range(MANY // 4)}}),
    ],
)
def test_a_million_faults_are_told_as_one(path: str, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    with serving() as served:
        begun = time.monotonic()
        reply = served.ask("POST", f"/v1/{path}", raw)
        assert time.monotonic() - begun < 5.0
        assert reply.status == 400
        assert len(reply.body) < 2000
        assert served.complete(max_tokens=1).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ["x"] * 9}),
        ("chat/completions", {"n": 9}),
        ("embeddings", {"input": ["x"] * 9}),
    ],
)
def test_too_many_prompts_are_not_tokenized(
    served: Served, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*args: object, **kwargs: object) -> None:
        raise AssertionError("expected a refusal before")

    monkeypatch.setattr(type(served.engine.tokenizer), "encode", encode)
    reply = served.chat(**body) if path == "chat/completions" else served.ask("POST", f"/v1/{path}", body)
    assert (reply.status, "at most 8" in reply.error["message"]) == (400, True)


def test_schemas_that_take_long_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "COMPILE_TIMEOUT_S", 0.3)
    engine, done = FakeEngine(), threading.Event()
    monkeypatch.setattr(engine, "prepare", lambda params: done.wait(20))
    with serving(engine) as served:
        for _ in range(service.COMPILERS):
            refused = served.complete(regex="a")
            assert (refused.status, refused.error["code"]) == (400, "schema_too_complex")
            assert served.complete(max_tokens=1).status == 200
        assert served.complete(response_format={"type": "json_object"}).status == 503
        with monkeypatch.context() as kept:  # those that are kept need no thread
            kept.setattr(engine, "is_prepared", lambda params: True)
            assert served.complete(response_format={"type": "json_object"}).status == 200
        done.set()
        assert served.complete(regex="a").status == 200


def test_what_cannot_be_written_ends_a_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ChatAnswers, pieces: object) -> None:
        raise TypeError("nobody expected this")

    monkeypatch.setattr(ChatAnswers, "chunks", broken)
    with serving() as served:
        body = served.chat(stream=True).body.decode()
        (event,) = [line for line in body.split("\n\n") if line]
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "internal_error"
        wait_until(served.is_idle)
