"""llama.cpp with the weights of a folder: measures when told to, and otherwise sleeps. Runs in the peers' environment.

Started by `_llama_cpp.py`, which writes a JSON line for each command to standard input and reads a JSON line for each
answer. Answers leave by the original standard output; what llama.cpp says goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _llama_cpp_gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

Row = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


@dataclass
class Sequence:
    """A request under way in one of the context's places."""

    number: int
    place: int
    prompt: list[int]
    count: int
    computed: int = 0
    output: list[int] = field(default_factory=list)


class Context:
    """A model with a cache for some sequences, each of so many tokens at most."""

    def __init__(self, model: Any, *, sequences: int, tokens: int, batch: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * tokens, sequences
        params.n_batch = batch
        params.n_ubatch = min(batch, 512)
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.pointer = llama_cpp.llama_init_from_model(model, params)
        if self.pointer is None:
            raise RuntimeError(f"llama.cpp made no context of {sequences} x {tokens} tokens")
        self.batch_size = batch
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        # A batch over arrays of our own, so that Python fills it by columns and not token by token.
        self._tokens, self._positions, self._places = (np.zeros(batch, np.int32) for _ in range(3))
        self._one, self._wanted = np.ones(batch, np.int32), np.zeros(batch, np.int8)
        first = self._places.ctypes.data
        self._pointers = (ctypes.POINTER(ctypes.c_int32) * batch)(
            *(ctypes.cast(first + 4 * row, ctypes.POINTER(ctypes.c_int32)) for row in range(batch))
        )
        self._batch = llama_cpp.llama_batch(
            0,
            self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            None,
            self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._one.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._pointers,
            self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, rows: list[Row]) -> None:
        """One forward."""
        count = len(rows)
        columns: tuple[npt.NDArray[Any], ...] = (self._tokens, self._positions, self._places, self._wanted)
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column[:count] = values
        self._batch.n_tokens = count
        code = llama_cpp.llama_decode(self.pointer, self._batch)
        if code:
            raise RuntimeError(f"llama_decode of {count} tokens ended with {code}")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Those of a row that wanted them; valid until the next forward."""
        found = llama_cpp.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(found, (self.vocab,))

    def forget(self, place: int = -1) -> None:
        """Empty the cache of a sequence, or the whole."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.pointer), place, -1, -1)

    def compute(self, ids: list[int], *, every: bool = False) -> None:
        """A prompt in the first place; logits of its last token, or of all."""
        for begin in range(0, len(ids), self.batch_size):
            part = ids[begin : begin + self.batch_size]
            last = len(ids) - 1
            self.decode([(token, at, 0, every or at == last) for at, token in enumerate(part, begin)])


def generate(context: Context, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and seconds of each but the first."""
    context.forget()
    context.compute(ids)
    output = [int(context.logits((len(ids) - 1) % context.batch_size).argmax())]
    seconds = []
    while len(output) < count:
        begun = time.perf_counter()
        context.decode([(output[-1], len(ids) + len(output) - 1, 0, True)])
        output.append(int(context.logits(0).argmax()))
        seconds.append(time.perf_counter() - begun)
    return output, seconds


def prompt_seconds(context: Context, ids: list[int]) -> float:
    """Until the first token."""
    context.forget()
    begun = time.perf_counter()
    context.compute(ids)
    context.logits((len(ids) - 1) % context.batch_size).argmax()
    return time.perf_counter() - begun


def serve(context: Context, load: list[tuple[list[int], int]], places: int) -> list[list[int]]:
    """All requests at once, batched continuously: every forward has a token of each that decodes, then prompts."""
    context.forget()
    waiting = deque(enumerate(load))
    free, running = list(range(places)), list[Sequence]()
    outputs: list[list[int]] = [[] for _ in load]
    while waiting or running:
        while waiting and free:
            number, (ids, count) = waiting.popleft()
            running.append(Sequence(number, free.pop(), ids, count, output=outputs[number]))
        rows: list[Row] = []
        ends: list[tuple[Sequence, int]] = []
        for each in running:
            if each.output:
                ends.append((each, len(rows)))
                rows.append((each.output[-1], each.computed, each.place, True))
                each.computed += 1
        for each in running:
            left = len(each.prompt) - each.computed
            if each.output or not (now := min(left, context.batch_size - len(rows))):
                continue
            last, part = len(each.prompt) - 1, range(each.computed, each.computed + now)
            rows += [(each.prompt[at], at, each.place, at == last) for at in part]
            each.computed += now
            if now == left:
                ends.append((each, len(rows) - 1))
        context.decode(rows)
        for each, row in ends:
            each.output.append(int(context.logits(row).argmax()))
            if len(each.output) == each.count:
                context.forget(each.place)
                running.remove(each)
                free.append(each.place)
    return outputs


class Worker:
    """The models that were asked for, one for each dtype, and a context for each use."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.models: dict[str, Any] = {}
        self.contexts: dict[tuple[str, int, int], Context] = {}
        llama_cpp.llama_backend_init()

    def load(self, dtype: str) -> dict[str, Any]:
        """Write the model's file and map it into memory."""
        path = self.folder / f"{dtype}.gguf"
        _llama_cpp_gguf.write_gguf(self.folder, path, dtype)
        params = llama_cpp.llama_model_default_params()
        self.models[dtype] = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if self.models[dtype] is None:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        return {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "bytes": llama_cpp.llama_model_size(self.models[dtype]),
        }

    def context(self, dtype: str, tokens: int, sequences: int = 1, *, batch: int = 512) -> Context:
        """The context of one use; made once, as a server's is."""
        key = (dtype, sequences, tokens)
        if key not in self.contexts:
            self.contexts[key] = Context(
                self.models[dtype], sequences=sequences, tokens=tokens, batch=batch, threads=self.threads
            )
        return self.contexts[key]

    def logits(self, dtype: str, ids: list[int], out: str) -> dict[str, Any]:
        """Logits of every token, to a file of numpy's."""
        context = self.context(dtype, 512)
        context.forget()
        context.compute(ids, every=True)
        np.save(out, np.stack([context.logits(row) for row in range(len(ids))]))
        return {}

    def stream(self, dtype: str, ids: list[int], count: int) -> dict[str, Any]:
        """Greedy tokens after a prompt, and the median seconds of one."""
        output, seconds = generate(self.context(dtype, 512), ids, count)
        return {"output": output, "seconds": statistics.median(seconds)}

    def prompt(self, dtype: str, ids: list[int]) -> dict[str, Any]:
        """Seconds of a prompt."""
        return {"seconds": prompt_seconds(self.context(dtype, len(ids) + 8), ids)}

    def serve(self, dtype: str, load: list[tuple[list[int], int]], places: int) -> dict[str, Any]:
        """Tokens and seconds of a mixed load."""
        longest = max(len(ids) + count for ids, count in load)
        context = self.context(dtype, -(-longest // 256) * 256, places)
        begun = time.perf_counter()
        outputs = serve(context, load, places)
        return {"tokens": sum(map(len, outputs)), "outputs": outputs, "seconds": time.perf_counter() - begun}


def main() -> None:
    """Obey."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    worker = Worker(Path(order["folder"]), order["threads"])
    acts = {
        act.__name__: act for act in (worker.load, worker.logits, worker.stream, worker.prompt, worker.serve)
    }
    for line in sys.stdin:
        command = json.loads(line)
        answers.write(json.dumps(acts[command.pop("do")](**command)) + "\n")


if __name__ == "__main__":
    main()
