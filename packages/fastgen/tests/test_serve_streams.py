"""Readers that are slow or leave, and an engine that fails: nothing leaks, nobody else waits, everybody is told."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable

import pytest
from fake_engine import FakeEngine
from fastgen.errors import FastgenError, OverloadedError, RequestError
from fastgen.output import Output, TokenLogprobs
from fastgen.request import FinishReason, SamplingParams
from fastgen.serve import EngineLoop
from fastgen.serve.interface import EngineError, Job, StepError
from fastgen.serve.loop import MOST_FAILED_STEPS
from fastgen.serve.stream import Stream
from hypothesis import given
from hypothesis import strategies as st
from server_lab import serving, wait_until

ENDLESS = {"prompt": "Hello", "max_tokens": 1500, "ignore_eos": True}


# -- one stream -------------------------------------------------------------------------------------------


def output(index: int, text: str, *, last: bool = False) -> Output:
    ids = [ord(letter) for letter in text]
    finish = FinishReason.STOP if last else None
    return Output("r-0", index, ids, text, finish, 3, logprobs=[TokenLogprobs(each, -1.0) for each in ids])


@given(st.lists(st.tuples(st.integers(0, 2), st.text("abc", max_size=3), st.booleans()), max_size=40))
def test_merging_loses_and_reorders_nothing(steps: list[tuple[int, str, bool]]) -> None:
    async def run() -> None:
        stream = Stream(["r-0"], 3, lambda _: None)
        read: dict[int, list[Output]] = {0: [], 1: [], 2: []}
        for index, text, reads in steps:
            stream.push(output(index, text))
            if reads:
                for piece in await stream.read():
                    read[piece.output.index].append(piece.output)
        for index in range(3):
            stream.push(output(index, "z", last=True))
        pieces = await stream.read()
        assert len(pieces) == 3  # whatever was not read, it is one output a sequence
        assert await stream.read() == []
        for index in range(3):
            made = [*read[index], next(piece.output for piece in pieces if piece.output.index == index)]
            said = "".join(text for at, text, _ in steps if at == index) + "z"
            assert "".join(each.text for each in made) == said
            assert [token for each in made for token in each.new_token_ids] == [
                ord(letter) for letter in said
            ]
            assert [scored.token_id for each in made for scored in each.logprobs or ()] == list(
                map(ord, said)
            )
            assert [each.finish_reason for each in made if each.finish_reason] == [FinishReason.STOP]

    asyncio.run(run())


def test_silence_errors_and_closing() -> None:
    async def run() -> None:
        closed: list[Stream] = []
        stream = Stream(["r-0"], 1, closed.append)
        assert not await stream.wait(0.01)
        stream.push(output(0, "a"))
        assert await stream.wait(0.01)
        stream.fail(RequestError("first"))
        stream.fail(RequestError("second"))
        with pytest.raises(RequestError, match="first"):
            await stream.read()
        stream.close()
        stream.close()
        assert closed == [stream]

    asyncio.run(run())


# -- the loop ---------------------------------------------------------------------------------------------


def with_loop(engine: FakeEngine, use: Callable[[EngineLoop], object], *, max_queued: int = 10) -> None:
    async def run() -> None:
        loop = EngineLoop(engine, max_queued=max_queued)
        loop.start()
        try:
            await use(loop)  # type: ignore[misc]
        finally:
            await loop.close()
        assert loop.num_open == 0
        assert not [thread for thread in threading.enumerate() if thread.name == "fastgen-engine"]

    asyncio.run(run())


def test_who_leaves_while_the_engine_takes_the_request_frees_it() -> None:
    engine = FakeEngine(step_s=0.05)

    async def use(loop: EngineLoop) -> None:
        running = await loop.open("busy", [Job([1, 2], SamplingParams(max_tokens=1000, ignore_eos=True))])
        await running.read()
        cancelled = 0
        for delay_s in (0.0, 0.01, 0.03):
            opening = asyncio.ensure_future(loop.open(f"gone {delay_s}", [Job([1], SamplingParams())]))
            await asyncio.sleep(delay_s)
            opening.cancel()
            try:
                (await opening).close()  # it was quicker
            except asyncio.CancelledError:
                cancelled += 1
        assert cancelled
        for _ in range(5):
            await running.read()
        assert list(engine.requests) == ["busy-0"]
        running.close()

    with_loop(engine, use)
    assert not engine.requests


def test_refusals_reach_the_caller_and_leave_nothing() -> None:
    engine = FakeEngine(max_model_len=20)

    async def use(loop: EngineLoop) -> None:
        with pytest.raises(RequestError, match="at most 20 tokens"):
            await loop.open("long", [Job([1] * 30, SamplingParams())])
        with pytest.raises(OverloadedError, match="at most 2 prompts"):
            await loop.open("many", [Job([1], SamplingParams())] * 3)
        assert loop.num_open == 0

    with_loop(engine, use, max_queued=2)


def test_embeddings_and_steps_take_turns() -> None:
    engine = FakeEngine(step_s=0.005)
    engine.embed_forwards = 3

    async def use(loop: EngineLoop) -> None:
        stream = await loop.open("r", [Job([1], SamplingParams(max_tokens=1000, ignore_eos=True))])
        await stream.read()
        vectors = await asyncio.gather(*(loop.embed([[1] * size, [2]]) for size in (3, 4, 5)))
        assert [[vector[0] for vector in each] for each in vectors] == [[3.0, 1.0], [4.0, 1.0], [5.0, 1.0]]
        stream.close()

    with_loop(engine, use)
    assert engine.did.count("embed") == 18
    assert not any(pair == ("embed", "embed") for pair in itertools.pairwise(engine.did))


def test_a_step_that_fails_ends_what_runs_and_no_more() -> None:
    engine = FakeEngine(step_s=0.01)
    jobs = [Job([1], SamplingParams(max_tokens=20, ignore_eos=True))]

    async def use(loop: EngineLoop) -> None:
        streams = [await loop.open(name, jobs) for name in "ab"]
        await streams[0].read()
        engine.fail_next, engine.num_failures = RuntimeError("out of paper"), MOST_FAILED_STEPS - 1
        for stream in streams:
            with pytest.raises(StepError, match="out of paper"):
                await stream.read_all()
            stream.close()
        with pytest.raises(StepError):
            await (await loop.open("c", jobs)).read_all()
        pieces = await (await loop.open("d", jobs)).read_all()
        assert sum(len(piece.output.new_token_ids) for piece in pieces) == 20
        engine.num_failures = MOST_FAILED_STEPS - 1  # steps between them start the count anew
        for name in "ef":
            with pytest.raises(StepError):
                await (await loop.open(name, jobs)).read_all()
        await (await loop.open("g", jobs)).read_all()
        assert loop.failure is None

    with_loop(engine, use)


def test_an_engine_that_fails_ends_everything() -> None:
    engine = FakeEngine(step_s=0.01)
    jobs = [Job([1], SamplingParams(max_tokens=1000, ignore_eos=True))]

    async def use(loop: EngineLoop) -> None:
        engine.fail_next = RuntimeError("out of paper")
        for number in range(MOST_FAILED_STEPS - 1):
            with pytest.raises(StepError):
                await (await loop.open(f"r{number}", jobs)).read_all()
        stream = await loop.open("last", jobs)
        with pytest.raises(EngineError, match="out of paper"):
            await stream.read_all()
        stream.close()
        with pytest.raises(EngineError):
            await loop.open("next", [Job([1], SamplingParams())])
        with pytest.raises(EngineError):
            await loop.embed([[1]])

    with_loop(engine, use)


def test_an_engine_that_processes_share_fails_at_once() -> None:
    class Shared(FakeEngine):
        def watch(self, lost: Callable[[FastgenError], None]) -> None:
            return

    engine = Shared()

    async def use(loop: EngineLoop) -> None:
        engine.fail_next, engine.num_failures = RuntimeError("out of paper"), 1
        with pytest.raises(EngineError, match="out of paper"):
            await (await loop.open("r", [Job([1], SamplingParams())])).read_all()
        assert loop.failure is not None

    with_loop(engine, use)


def test_a_failed_step_over_http() -> None:
    with serving(FakeEngine(step_s=0.01)) as served:
        answers = []
        asking = [
            threading.Thread(
                target=lambda stream=stream: answers.append(served.complete(**ENDLESS, stream=stream))
            )  # type: ignore[misc]
            for stream in (False, True)
        ]
        for thread in asking:
            thread.start()
        wait_until(lambda: len(served.engine.requests) == 2)
        served.engine.fail_next, served.engine.num_failures = RuntimeError("out of paper"), 1
        for thread in asking:
            thread.join()
        whole, streamed = sorted(answers, key=lambda reply: -reply.status)
        assert (whole.status, whole.error["code"]) == (500, "step_failed")
        assert streamed.status == 200
        last = json.loads(streamed.body.decode().strip().split("\n\n")[-1].removeprefix("data: "))
        assert (last["error"]["code"], "out of paper" in last["error"]["message"]) == ("step_failed", True)
        assert served.get("/health").json["status"] == "ok"
        assert served.complete().status == 200
        wait_until(served.is_idle)


def test_a_failed_engine_over_http() -> None:
    with serving() as served:
        assert served.get("/health").json["status"] == "ok"
        served.engine.fail_next = RuntimeError("out of paper")
        refused = [served.complete() for _ in range(MOST_FAILED_STEPS)]
        assert [each.status for each in refused] == [500] * MOST_FAILED_STEPS
        assert [each.error["code"] for each in refused[-2:]] == ["step_failed", "engine_failed"]
        health = served.get("/health")
        assert (health.status, health.json["status"]) == (503, "failed")
        assert "out of paper" in health.json["detail"]
        assert served.complete().status == 503
        assert served.server.service.loop.num_open == 0


# -- over sockets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(stream: bool) -> None:
    with serving(FakeEngine(step_s=0.01)) as served:
        connection = served.send("/v1/completions", {**ENDLESS, "stream": stream, "n": 2})
        wait_until(lambda: served.metric("fastgen_blocks_used") > 0)
        if stream:
            assert connection.recv(100)
        assert served.metric("fastgen_running") == 1
        connection.close()
        wait_until(served.is_idle)
        assert served.engine.num_aborted == 1
        wait_until(lambda: served.metric("fastgen_blocks_used") == 0)


def test_a_reader_that_stands_still_delays_nobody_and_costs_little() -> None:
    # Long tokens: far more text than sockets buffer, so that the server really has to wait for the reader.
    engine = FakeEngine(max_model_len=40_000)
    with serving(engine, write_timeout_s=60.0) as served:
        logprobs = {**ENDLESS, "max_tokens": 12_000, "stream": True, "logprobs": 20}
        connection = served.send("/v1/completions", logprobs)
        wait_until(lambda: served.metric("fastgen_generated_tokens_total") >= 12_000, 20)
        assert not engine.requests  # the engine is done with it, and its blocks are free
        started_s = time.perf_counter()
        assert served.complete(max_tokens=20).status == 200
        assert time.perf_counter() - started_s < 5.0
        assert served.server.service.admission.num_inside == 1
        # At last it reads: nothing is missing, and what waited came in a few pieces.
        connection.settimeout(20)
        received = b""
        while b"data: [DONE]" not in received[-100:]:
            received += connection.recv(2**20)
        assert received.count(b'"text_offset"') < 12_000
        texts = [
            json.loads(line[6:])["choices"][0]["text"]
            for line in received.decode().replace("\r\n", "\n").split("\n")
            if line.startswith("data: {") and line.endswith("}")
        ]
        # Lines that an HTTP chunk's border cuts are no JSON here; the long ones are whole.
        assert sum(map(len, texts)) > 10_000
        connection.close()
        wait_until(served.is_idle)


def test_a_reader_that_never_reads_is_dropped() -> None:
    with serving(FakeEngine(step_s=0.0001, max_model_len=40_000), write_timeout_s=0.5) as served:
        connection = served.send(
            "/v1/completions", {**ENDLESS, "max_tokens": 23_000, "stream": True, "logprobs": 20}
        )
        wait_until(lambda: bool(served.engine.requests))
        wait_until(served.is_idle, 30)
        assert served.engine.num_aborted == 1
        connection.close()
