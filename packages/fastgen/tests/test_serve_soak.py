"""A thousand requests of all kinds at once, many of them bad: nothing leaks, and nothing fails but what should."""

from __future__ import annotations

import collections
import contextlib
import gc
import http.client
import json
import random
import socket
import statistics
import threading
import time

import pytest
import torch
from fake_engine import FakeEngine, tiny_tokenizer
from fastgen import CachePolicy, EngineConfig, SchedulePolicy, build_engine
from fastgen.engine import Engine
from server_lab import Served, serving, wait_until
from transformers import LlamaConfig, LlamaForCausalLM

NUM_REQUESTS = 1000
NUM_CLIENTS = 12
ALLOWED = {200, 400, 401, 404, 405, 408, 413, 429, 503, "gone"}


def plain(served: Served, dice: random.Random) -> object:
    return served.complete(max_tokens=dice.randint(1, 40), n=dice.randint(1, 3), ignore_eos=True).status


def streamed(served: Served, dice: random.Random) -> object:
    reply = served.chat(max_tokens=dice.randint(1, 40), stream=True)
    if reply.status == 200:
        assert reply.events
    return reply.status


def cancelled(served: Served, dice: random.Random) -> object:
    """Leaves before, while or after the first bytes come."""
    body = {
        "prompt": "x" * dice.randint(1, 200),
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": dice.random() < 0.5,
    }
    with served.send("/v1/completions", body) as connection:
        time.sleep(dice.choice([0.0, 0.001, 0.01, 0.05]))
        if dice.random() < 0.3:
            connection.settimeout(0.05)
            with contextlib.suppress(OSError):
                connection.recv(100)
    return "gone"


def slow(served: Served, dice: random.Random) -> object:
    """Reads a little at a time."""
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": 5}
    with served.send("/v1/completions", body) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        for _ in range(10):
            time.sleep(0.005)
            response.read1(500)
        response.read()
        return response.status


def malformed(served: Served, dice: random.Random) -> object:
    raw = bytearray(
        json.dumps({"prompt": "Hello", "max_tokens": 5, "temperature": 0.5, "stop": ["x"]}).encode()
    )
    for _ in range(dice.randint(1, 6)):
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    return served.ask("POST", dice.choice(["/v1/completions", "/v1/chat/completions"]), bytes(raw)).status


def oversize(served: Served, dice: random.Random) -> object:
    size = dice.choice([3000, 100_000, 400_000])
    return served.complete(prompt="x" * size, max_tokens=5).status


def broken_http(served: Served, dice: random.Random) -> object:
    with socket.create_connection(served.address) as connection:
        connection.sendall(
            dice.choice(
                [
                    b"\x16\x03\x01\x02\x00\x01\x00",
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
                    b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
                ]
            )
        )
    return "gone"


KINDS = {plain: 30, streamed: 25, cancelled: 20, slow: 5, malformed: 10, oversize: 5, broken_http: 5}


def small_engine() -> Engine:
    """A real one, whose cache holds one of the longest requests and little more: others often give way."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    block_bytes = 4 * 2 * 16 * 4  # tokens, keys and values, head size, float32
    cache = CachePolicy(block_size=4, max_bytes=110 * block_bytes, swap_bytes=30 * block_bytes)
    config = EngineConfig(cache=cache, schedule=SchedulePolicy(token_budget=64), device=torch.device("cpu"))
    return build_engine(model.eval(), config, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_soak(kind: str) -> None:
    engine = FakeEngine(step_s=0.0005) if kind == "fake" else small_engine()
    seen: collections.Counter[tuple[str, object]] = collections.Counter()
    times: list[tuple[float, float]] = []
    problems: list[BaseException] = []
    lock = threading.Lock()
    work = iter(range(NUM_REQUESTS))

    with serving(engine, body_bytes=200_000, concurrent=10, queued=8) as served:

        def client(number: int) -> None:
            dice = random.Random(number)
            while True:
                with lock:
                    if next(work, None) is None:
                        return
                kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
                started_s = time.perf_counter()
                try:
                    status = kind(served, dice)
                except BaseException as error:
                    problems.append(error)
                    return
                with lock:
                    seen[kind.__name__, status] += 1
                    if kind is plain and status == 200:
                        times.append((started_s, time.perf_counter() - started_s))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not problems
        wait_until(served.is_idle)
        assert served.complete().status == 200
        assert sum(seen.values()) == NUM_REQUESTS
        assert {status for _, status in seen} <= ALLOWED, seen
        # It was not all refused, and something was: the limits took part.
        assert seen["plain", 200] > 50
        assert seen["oversize", 413] > 0
        assert seen["malformed", 400] > 10
        assert sum(count for (_, status), count in seen.items() if status in (429, 503)) > 0
        if isinstance(engine, FakeEngine):
            assert engine.num_aborted > 10
        else:
            stats = engine.stats()
            assert stats.prefix_hit_tokens_total > 0
            assert (
                stats.running,
                stats.waiting,
                stats.swapped,
                engine.scheduler.stats().host_blocks_used,
            ) == (0, 0, 0, 0)
        assert served.metric("fastgen_blocks_used") == 0
        assert served.server.service.metrics._times == {}
        check_steady(times)
    gc.collect()


def check_steady(times: list[tuple[float, float]]) -> None:
    """The slowest of the second half are not slower than those of the first by much."""
    spans = [span for _, span in sorted(times)]
    half = len(spans) // 2
    first, second = (statistics.quantiles(part, n=100)[98] for part in (spans[:half], spans[half:]))
    assert second < 3 * first + 0.5, (first, second)
