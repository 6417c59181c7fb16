"""Rank 0: starts the other ranks, makes every call itself and has them make it, too.

Calls that need no forward are told with the next forward: one message a step. A rank that ends, ends the engine.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..config import EngineConfig
from ..errors import ConfigError, FastgenError, RankError
from ..llm import build_engine
from ..output import Output, Stats
from ..request import SamplingParams
from . import processes
from .calls import Abort, Add, Call, Digest, Embed, LoadAdapter, Step, UnloadAdapter, checked, packed
from .follower import HERE, READY, follow
from .places import Place, share_cores, shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..engine import Engine

_MOST_UNTOLD = 64
_NEWS_S = 2.0  # from a failed collective to the news that a rank has ended

Lost = Callable[[FastgenError], None]


@dataclass(frozen=True)
class Follower:
    """Another rank."""

    rank: int
    process: BaseProcess
    connection: Connection

    def wait(self, wanted: bytes) -> None:
        """Until it has said `wanted`.

        Raises:
            RankError: it said why it cannot, or has ended.
        """
        multiprocessing.connection.wait([self.connection, self.process.sentinel])
        said = self.last_words()
        if said != wanted:
            raise RankError(f"rank {self.rank}: {(said or self._end()).decode(errors='replace')}")

    def last_words(self) -> bytes:
        """What it said and nobody has heard yet."""
        try:
            return self.connection.recv_bytes() if self.connection.poll() else b""
        except (EOFError, OSError):
            return b""

    def lost(self, ranks: int) -> RankError:
        """The error that it has ended."""
        why = f"{self._end().decode()} {self.last_words().decode(errors='replace')}".rstrip()
        return RankError(f"rank {self.rank} of {ranks} has ended ({why}); start the engine again")

    def _end(self) -> bytes:
        return processes.how_it_ended(self.process).encode()


class Leader:
    """An engine that other ranks share: fits `serve.interface.Engine`. Made by `lead`.

    Args:
        engine: rank 0's.
        followers: the other ranks, which are ready.
    """

    def __init__(self, engine: Engine, followers: Sequence[Follower]) -> None:
        self._engine = engine
        self._followers = followers
        self.model_name = engine.model_name
        self.max_model_len = engine.max_model_len
        self._untold: list[Call] = []
        self._digest = Digest()
        self._told_digest = 0
        self._loss: RankError | None = None
        self._has_loss = threading.Event()
        self._watchers: list[Lost] = []
        self._lock = threading.Lock()
        self._wake, self._woken = os.pipe()
        self._watching = threading.Thread(target=self._watch_ranks, name="fastgen-ranks", daemon=True)
        self._watching.start()

    # -- what an engine does ------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self._engine.tokenizer

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._engine.has_work

    def is_prepared(self, params: SamplingParams) -> bool:
        """See `Engine`."""
        return self._engine.is_prepared(params)

    def prepare(self, params: SamplingParams) -> None:
        """See `Engine.prepare`; the other ranks do it when the request comes."""
        self._engine.prepare(params)

    def room(self, num_prompt_tokens: int, num_sequences: int) -> int:
        """See `Engine.room`; the same on every rank."""
        return self._engine.room(num_prompt_tokens, num_sequences)

    def stats(self) -> Stats:
        """What it is busy with."""
        return self._engine.stats()

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> None:
        """See `Engine.add`."""
        call = checked(Add(request_id, list(prompt_ids), params, priority, adapter))
        with self._same_everywhere(call):
            call.make(self._engine)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        call = Abort(request_id)
        with self._same_everywhere(call):
            call.make(self._engine)

    def load_adapter(self, name: str, directory: str) -> None:
        """See `Engine.load_adapter`; the other ranks read the same files, once they are known to be whole."""
        call = LoadAdapter(name, directory)
        call.make(self._engine)
        with self._same_everywhere(call, at_once=True):
            pass

    def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        call = UnloadAdapter(name)
        with self._same_everywhere(call):
            call.make(self._engine)

    def embed(self, prompt_ids: list[int]) -> list[float] | None:
        """See `Engine.embed`."""
        call = checked(Embed(list(prompt_ids)))
        with self._same_everywhere(call, at_once=True):
            return call.make(self._engine)

    def step(self) -> list[Output]:
        """One forward on every rank.

        Raises:
            RankError: one of them has ended.
        """
        call = Step(self._engine.prompt_tokens)
        with self._same_everywhere(call, at_once=True):
            outputs = call.make(self._engine)
        self._digest.outputs(outputs)
        return outputs

    # -- the other ranks ------------------------------------------------------------------------------------

    def watch(self, lost: Lost) -> None:
        """Call `lost` (in a thread of its own) when a rank ends that was not asked to."""
        with self._lock:
            self._watchers.append(lost)
            loss = self._loss
        if loss is not None:
            lost(loss)

    def close(self) -> None:
        """End the other ranks; calling it again does nothing."""
        if not self._watching.is_alive() and not self._followers:
            return
        os.write(self._woken, b"x")
        self._watching.join()
        os.close(self._wake)
        os.close(self._woken)
        _end(self._followers)
        self._followers = ()
        # A collective of NCCL may still wait for the one that has ended.
        if self._loss is None or self._engine.runner.device.type == "cpu":
            dist.destroy_process_group()

    def __enter__(self) -> Leader:
        """Closes it at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _same_everywhere(self, call: Call, *, at_once: bool = False) -> Iterator[None]:
        """Around a call: tells it, and finds out why it failed."""
        if not self._untold:
            self._told_digest = self._digest.value
        self._untold.append(call)
        try:
            if at_once or len(self._untold) >= _MOST_UNTOLD:
                self._tell()
            yield
        except Exception as error:
            forward = isinstance(call, (Step, Embed)) and not isinstance(error, FastgenError)
            if (forward or isinstance(error, OSError)) and self._has_loss.wait(_NEWS_S):
                assert self._loss is not None
                raise self._loss from error
            self._digest.refused(error)
            raise

    def _tell(self) -> None:
        message = packed(self._untold, self._told_digest)
        self._untold = []
        for follower in self._followers:
            follower.connection.send_bytes(message)

    def _watch_ranks(self) -> None:
        by_sentinel = {each.process.sentinel: each for each in self._followers}
        ended = multiprocessing.connection.wait([self._wake, *by_sentinel])
        if self._wake in ended:
            return
        loss = by_sentinel[ended[0]].lost(len(by_sentinel) + 1)  # type: ignore[index]
        with self._lock:
            self._loss = loss
            watchers = list(self._watchers)
        self._has_loss.set()
        for each in watchers:
            each(loss)


def lead(
    model: str | Path,
    config: EngineConfig | None = None,
    *,
    ranks: int,
    processes_here: int | None = None,
) -> Leader:
    """Start `ranks` - 1 processes that share a model with this one, and load it.

    Args:
        model: a local Hugging Face directory.
        config: how the engine runs; sizes of caches are each process's own.
        ranks: processes in all, 2 or more; each takes a GPU, or all share the CPU.
        processes_here: that run engines on this machine; None: these alone.

    Raises:
        ConfigError: there are not so many devices, this process is in a process group already, or a setting does not
            fit the model.
        ModelError: the model is incomplete, damaged or unknown.
        RankError: another rank could not start.
    """
    if ranks < 2:
        raise ConfigError(f"lead(ranks=...): expected >= 2, got {ranks}; use build_engine for one")
    if dist.is_initialized():
        raise ConfigError(
            "lead(): expected a process in no process group, got one; give its group to build_engine instead"
        )
    configs = shares(config or EngineConfig(), ranks, processes=processes_here)
    followers: list[Follower] = []
    with tempfile.TemporaryDirectory(prefix="fastgen-") as folder, contextlib.ExitStack() as undo:
        undo.callback(_end, followers)
        here = processes_here or ranks
        places = [
            Place(rank=rank, ranks=ranks, store=f"{folder}/store", processes=here) for rank in range(ranks)
        ]
        for place, own in zip(places[1:], configs[1:], strict=True):
            started = processes.start(follow, place, str(model), own, name=f"fastgen-rank-{place.rank}")
            followers.append(Follower(place.rank, *started))
        for follower in followers:
            follower.wait(HERE)
        device = configs[0].device
        assert device is not None
        if device.type == "cpu":
            share_cores(here)
        group = places[0].join(device)
        undo.callback(dist.destroy_process_group)
        engine = _build(model, configs[0], group, followers)
        for follower in followers:
            follower.wait(READY)
        undo.pop_all()
    return Leader(engine, followers)


def _build(
    model: str | Path, config: EngineConfig, group: dist.ProcessGroup, followers: Sequence[Follower]
) -> Engine:
    try:
        return build_engine(model, config, group=group)
    except FastgenError:
        raise
    except Exception:
        # A collective failed: another rank has given up, and knows why.
        for follower in followers:
            if follower.connection.poll(_NEWS_S) or follower.process.exitcode is not None:
                follower.wait(READY)
        raise


def _end(followers: Sequence[Follower]) -> None:
    """Have them end; each ends when its connection does."""
    for follower in followers:
        follower.connection.close()
    for follower in followers:
        processes.end(follower.process)
