"""Every engine moves exactly the bytes that were asked for, whatever their alignment, from any number of threads."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accel_kernels as ak
import numpy as np
import pytest
import torch
from accel_kernels import native
from accel_kernels.transfers import files
from accel_kernels.transfers.files import share_bytes, stripes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_lab import ENGINES, becomes, command, noise, num_descriptors, small_disk

PAGE = 4096
FILE_BYTES = 40 * PAGE + 123

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example makes files and memory of its own out of the fixture's folder

near_pages = st.builds(
    lambda pages, more: max(0, pages * PAGE + more),
    st.integers(0, 12),
    st.sampled_from([-1, 0, 0, 1, 511, 512]),
)


@pytest.mark.parametrize("engine", ENGINES)
@given(
    offset=near_pages,
    nbytes=near_pages,
    shift=st.sampled_from([0, 0, 1, 64, 512]),
    block_pages=st.integers(1, 4),
    depth=st.integers(1, 8),
)
@QUICK
def test_any_offset_size_and_address(
    engine: str, tmp_path: Path, offset: int, nbytes: int, shift: int, block_pages: int, depth: int
) -> None:
    before = noise(FILE_BYTES, seed=offset).numpy().tobytes()
    path = tmp_path / "file"
    path.write_bytes(before)
    data = ak.aligned_empty(nbytes + shift)[shift:]
    data.copy_(noise(nbytes, seed=nbytes))
    wanted = bytearray(before)
    wanted[offset : offset + nbytes] = data.numpy().tobytes()
    with (
        ak.TransferEngine(engine=engine, block_bytes=block_pages * PAGE, queue_depth=depth) as moves,
        moves.open(path) as file,
    ):
        moves.write(file, offset, data).wait()
        assert path.read_bytes() == wanted
        frame = torch.full((nbytes + shift + 64,), 7, dtype=torch.uint8)
        moves.read(file, offset, frame[shift : shift + nbytes]).wait()
        assert torch.equal(frame[shift : shift + nbytes], data)
        assert bool((frame[:shift] == 7).all())
        assert bool((frame[shift + nbytes :] == 7).all())


@given(
    offset=st.integers(0, 10_000_000),
    nbytes=st.integers(0, 3_000_000),
    num_files=st.integers(1, 5),
    stripe=st.sampled_from([4096, 65_536, 1 << 20]),
)
def test_stripes_cover_every_byte_once(offset: int, nbytes: int, num_files: int, stripe: int) -> None:
    at = 0
    for file, where, start, length in stripes(offset, nbytes, num_files, stripe):
        assert (start, 0 < length <= stripe) == (at, True)
        number = (offset + start) // stripe
        assert (file, where) == (number % num_files, number // num_files * stripe + (offset + start) % stripe)
        assert where + length <= share_bytes(offset + nbytes, num_files, stripe)
        at += length
    assert at == nbytes


@pytest.mark.parametrize("engine", ENGINES)
def test_striped_files_read_as_one(engine: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"disk{k}" for k in range(3)]
    data = noise(1_000_003)
    with (
        ak.TransferEngine(engine=engine, block_bytes=32_768) as moves,
        moves.open_striped(paths, stripe_bytes=8192, nbytes=1_200_000) as file,
    ):
        moves.write(file, 100_001, data).wait()
        out = torch.empty(500_000, dtype=torch.uint8)
        moves.read(file, 300_001, out).wait()
        assert torch.equal(out, data[200_000:700_000])
    parts = [path.read_bytes() for path in paths]
    rows = [part[k : k + 8192] for k in range(0, len(parts[0]), 8192) for part in parts]
    assert b"".join(rows)[100_001:1_100_004] == data.numpy().tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_tensors_and_buffers(engine: str, tmp_path: Path) -> None:
    floats = torch.randn(1000, 3)
    kinds = [floats, floats.bfloat16(), floats.numpy(), bytearray(b"abc"), memoryview(bytearray(5000))]
    with ak.TransferEngine(engine=engine) as moves, moves.open(tmp_path / "file", nbytes=1) as file:
        for data in kinds:
            out = (
                torch.zeros_like(data) if isinstance(data, torch.Tensor) else np.zeros_like(np.asarray(data))
            )
            moves.write(file, 3, data).wait()
            moves.read(file, 3, out).wait()
            assert bytes(
                memoryview(out.view(torch.uint8).numpy() if isinstance(out, torch.Tensor) else out)
            ) == (
                bytes(memoryview(data.view(torch.uint8).numpy() if isinstance(data, torch.Tensor) else data))
            )
        moves.write(file, 0, b"read-only data may be written").wait()
        assert (tmp_path / "file").read_bytes().startswith(b"read-only data")


@pytest.mark.parametrize("engine", ENGINES)
def test_neighbours_on_one_page_from_several_threads(engine: str, tmp_path: Path) -> None:
    """Disjoint ranges that share pages, written at the same time: none undoes another's."""
    data = noise(3_000_000)
    random_numbers = random.Random(0)
    edges = sorted({0, data.numel(), *(random_numbers.randrange(data.numel()) for _ in range(300))})
    ranges = list(itertools.pairwise(edges))
    random_numbers.shuffle(ranges)
    with (
        ak.TransferEngine(engine=engine, block_bytes=8192, queue_depth=16) as moves,
        moves.open(tmp_path / "file", nbytes=data.numel()) as file,
        ThreadPoolExecutor(4) as pool,
    ):

        def copy(k: int) -> None:
            mine = ranges[k::4]
            under_way = [moves.write(file, begin, data[begin:end]) for begin, end in mine]
            for transfer in under_way:
                transfer.wait()
            outs = [torch.empty(end - begin, dtype=torch.uint8) for begin, end in mine]
            under_way = [moves.read(file, begin, out) for (begin, _), out in zip(mine, outs, strict=True)]
            for transfer, out, (begin, end) in zip(under_way, outs, mine, strict=True):
                transfer.wait()
                assert transfer.is_done()
                assert torch.equal(out, data[begin:end])

        list(pool.map(copy, range(4)))
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_transfer_waited_for_by_many(engine: str, tmp_path: Path) -> None:
    with ak.TransferEngine(engine=engine) as moves, moves.open(tmp_path / "file", nbytes=1) as file:
        transfer = moves.write(file, 0, noise(4 << 20))
        threads = [threading.Thread(target=transfer.wait) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_that_is_let_go_of_early(engine: str, tmp_path: Path) -> None:
    """The caller's names for memory, file and transfer are gone while bytes are on their way."""
    data = noise(8 << 20)
    with ak.TransferEngine(engine=engine, block_bytes=64 << 10) as moves:
        file = moves.open(tmp_path / "file", nbytes=data.numel())
        given = data.clone()
        holder = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        holder.data = given
        transfer = moves.write(file, 0, holder)
        del given
        holder.data = torch.empty(0, dtype=torch.uint8)  # as sharded engines do it
        junk = [torch.full((8 << 20,), 255, dtype=torch.uint8) for _ in range(4)]  # would take the same place
        del transfer, file
        gc.collect()
    del junk
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_the_callers_again_once_done(engine: str, tmp_path: Path) -> None:
    with ak.TransferEngine(engine=engine) as moves, moves.open(tmp_path / "file", nbytes=1) as file:
        buffer = bytearray(10_000)
        transfer = moves.write(file, 0, buffer)
        transfer.wait()
        buffer.clear()  # refused while anything still exports it
        other = bytearray(10_000)
        moves.write(file, 0, other)  # let go of without waiting

        def is_free() -> bool:
            moves.read(file, 0, bytearray(10)).wait()
            with contextlib.suppress(BufferError):
                other.clear()
            return not other

        assert becomes(is_free)


@pytest.mark.skipif(ENGINES[0].marks[0].args[0], reason="needs io_uring")
def test_registered_memory(tmp_path: Path) -> None:
    with ak.TransferEngine(engine="io_uring", block_bytes=64 << 10) as moves:
        with moves.open(tmp_path / "file", nbytes=8 << 20) as file:
            for round_number in range(20):  # the same address, most likely, with other pages each time
                memory = ak.aligned_empty(4 << 20, register=moves)
                assert moves.registered_bytes == 4 << 20
                memory.copy_(noise(4 << 20, seed=round_number))
                moves.write(file, 4096, memory[100:]).wait()
                moves.write(file, 4096, memory).wait()
                memory.zero_()
                moves.read(file, 4096, memory[: 3 << 20]).wait()
                assert torch.equal(memory[: 3 << 20], noise(4 << 20, seed=round_number)[: 3 << 20])
                view = memory[5:10]
                del memory
                assert moves.registered_bytes == 4 << 20
                del view
                assert moves.registered_bytes == 0
        kept = ak.aligned_empty(1 << 20, register=moves)
    kept.zero_()  # outlives the engine
    del kept


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_registering_is_a_hint(engine: str, tmp_path: Path) -> None:
    with ak.TransferEngine(engine=engine) as moves:
        memory = ak.aligned_empty(1 << 20, register=moves)
        assert (moves.registered_bytes, memory.numel()) == (0, 1 << 20)


def test_aligned_memory() -> None:
    for nbytes in (0, 1, 4097, 5 << 20):
        memory = ak.aligned_empty(nbytes)
        assert (memory.dtype, tuple(memory.shape)) == (torch.uint8, (nbytes,))
        assert memory.data_ptr() % (2 << 20 if nbytes >= 2 << 20 else 4096) == 0  # see Note [Huge pages]
        memory.fill_(3)


@pytest.mark.parametrize("engine", ENGINES)
def test_is_done_does_not_wait_and_close_does(engine: str, tmp_path: Path) -> None:
    data = noise(32 << 20)
    moves = ak.TransferEngine(engine=engine, block_bytes=64 << 10, queue_depth=2, num_threads=2)
    file = moves.open(tmp_path / "file", nbytes=data.numel())
    transfers = [moves.write(file, 0, data[: 16 << 20]), moves.write(file, 16 << 20, data[16 << 20 :])]
    began = time.perf_counter()
    seen = transfers[1].is_done()
    asked_s = time.perf_counter() - began
    file.close()
    assert all(transfer.is_done() for transfer in transfers)
    assert not seen
    assert asked_s < 0.1
    moves.close()
    for transfer in transfers:
        transfer.wait()
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_other_python_threads_run_during_a_wait(engine: str, tmp_path: Path) -> None:
    running = threading.Event()
    ticks = 0

    def count() -> None:
        nonlocal ticks
        while running.is_set():
            ticks += 1
            time.sleep(0.0005)

    data = noise(48 << 20)
    with ak.TransferEngine(engine=engine, block_bytes=16 << 10, queue_depth=1, num_threads=1) as moves:
        file = moves.open(tmp_path / "file", nbytes=data.numel())
        running.set()
        counter = threading.Thread(target=count)
        counter.start()
        before = ticks
        began = time.perf_counter()
        moves.write(file, 0, data).wait()
        took = time.perf_counter() - began
        during = ticks - before
        running.clear()
        counter.join()
    assert during > 20 * took  # of some 1500 a second


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's"
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_wait_can_be_interrupted(engine: str, tmp_path: Path) -> None:
    class InterruptedWaitError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptedWaitError

    data = noise(64 << 20)
    with ak.TransferEngine(engine=engine, block_bytes=4096, queue_depth=1, num_threads=1) as moves:
        file = moves.open(tmp_path / "file", nbytes=data.numel())
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            transfer = moves.write(file, 0, data)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(InterruptedWaitError):
                transfer.wait()
            assert not transfer.is_done()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        transfer.wait()
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_idle_engine_sleeps(engine: str) -> None:
    with ak.TransferEngine(engine=engine):
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_no_descriptor_and_no_thread_is_left(engine: str, tmp_path: Path) -> None:
    def once() -> None:
        with ak.TransferEngine(engine=engine) as moves:
            file = moves.open(tmp_path / "file", nbytes=100)
            moves.write(file, 0, b"x" * 100).wait()
            moves.open(tmp_path / "file").close()
            with pytest.raises(ak.TransferError):
                moves.open(tmp_path / "not there")
        forgotten = ak.TransferEngine(engine=engine)
        forgotten.write(forgotten.open(tmp_path / "file"), 0, b"y")

    def count() -> tuple[int, int]:
        gc.collect()
        return num_descriptors(), len(list(Path("/proc/self/task").iterdir()))

    once()
    before = count()
    for _ in range(5):
        once()
    # The kernel may take a moment to show that a thread is gone.
    assert becomes(lambda: count() == before)


def test_direct_where_the_file_system_can(tmp_path: Path) -> None:
    with ak.TransferEngine() as moves, moves.open(tmp_path / "file", nbytes=8192) as file:
        if native.cpu is not None and command("stat", "-f", "-c", "%T", str(tmp_path)) in (
            "ext2/ext3",
            "xfs",
        ):
            assert file.direct
        assert file.nbytes == 8192
        file.sync()
    with pytest.raises(ak.AccelValueError, match="is closed"):
        file.sync()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_system_without_o_direct(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    with ak.TransferEngine(engine=engine, block_bytes=4096) as moves:
        file = moves.open(tmp_path / "file", nbytes=100_000)
        assert not file.direct
        out = torch.empty(90_000, dtype=torch.uint8)
        moves.write(file, 7, noise(90_000)).wait()
        moves.read(file, 7, out).wait()
        assert torch.equal(out, noise(90_000))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_asks_for_more_alignment_than_it_said(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it refuses goes through the page cache."""
    opened = files._open_direct

    def too_generous(path: str, write: bool) -> tuple[int, int, int]:
        descriptor, align, _ = opened(path, write)
        return descriptor, align, 1

    monkeypatch.setattr(files, "_open_direct", too_generous)
    data, out = ak.aligned_empty(100_001)[1:], ak.aligned_empty(100_001)[1:]
    data.copy_(noise(100_000))
    with ak.TransferEngine(engine=engine, block_bytes=8192) as moves:
        file = moves.open(tmp_path / "file", nbytes=100_000)
        moves.write(file, 0, data).wait()
        moves.read(file, 0, out).wait()
    assert torch.equal(out, data)


def test_grows_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with ak.TransferEngine() as moves:
        moves.open(path, nbytes=2).close()
        assert path.read_bytes() == b"old"
        moves.open(path, nbytes=5).close()
        assert path.read_bytes() == b"old\0\0"
        with moves.open(path) as file:
            moves.write(file, 10_000, b"far").wait()
    assert path.read_bytes() == b"old\0\0" + bytes(9_995) + b"far"


@pytest.mark.parametrize("engine", ENGINES)
def test_tune_measures_within_its_time_and_cleans_up(engine: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    found = ak.tune(tmp_path, seconds=0.4, engine=engine)
    assert time.perf_counter() - began < 5
    assert list(tmp_path.iterdir()) == []
    assert found.read_gb_per_s > 0
    assert found.write_gb_per_s > 0
    with ak.TransferEngine(**found.arguments()) as moves:
        assert (moves.name, moves.block_bytes) == (engine, found.block_bytes)


def test_tune_cleans_up_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_kernels.transfers import tuning

    def fail(*_: object) -> None:
        assert list(tmp_path.iterdir())
        raise RuntimeError("in the middle")

    monkeypatch.setattr(tuning, "_measure", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        ak.tune(tmp_path, seconds=0.1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ak.TransferError, match="nowhere"):
        ak.tune(tmp_path / "nowhere")
    with pytest.raises(ak.AccelValueError, match="seconds"):
        ak.tune(tmp_path, seconds=0)
    with small_disk(tmp_path / "disk", 63) as disk:
        with pytest.raises(ak.TransferError, match=r"a quarter of what is free.*bytes are free there"):
            ak.tune(disk, seconds=0.1)
        assert list(disk.iterdir()) == []
