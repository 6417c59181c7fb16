"""What goes wrong is said, with file and bytes, and the engine goes on; what cannot run here is replaced or refused."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import traceback
from pathlib import Path

import accel_kernels as ak
import numpy as np
import pytest
import torch
from accel_kernels import native
from accel_kernels.transfers.drivers import why_not
from transfer_lab import (
    ENGINES,
    REFUSE_URING,
    becomes,
    command,
    noise,
    num_descriptors,
    run_python,
    small_disk,
)

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

MIB = 1 << 20


def still_works(moves: ak.TransferEngine, folder: Path) -> None:
    data, out = noise(100_000), torch.empty(100_000, dtype=torch.uint8)
    with moves.open(folder / "after", nbytes=100_000) as file:
        moves.write(file, 0, data).wait()
        moves.read(file, 0, out).wait()
    assert torch.equal(out, data)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [0, 1, 4096, 3 * 4096 + 5])
def test_short_file(engine: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * size)
    with ak.TransferEngine(engine=engine, block_bytes=4096) as moves, moves.open(path) as file:
        for offset, nbytes in (
            (0, size + 1),
            (0, 20 * 4096),
            (size, 1),
            (max(0, size - 1), 4096),
            (10**12, 4096),
        ):
            with pytest.raises(ak.TransferError) as caught:
                moves.read(file, offset, ak.aligned_empty(nbytes)).wait()
            said = str(caught.value)
            assert f"{path}: reading {nbytes} bytes at offset {offset}" in said
            assert f"of {size}: the file is shorter" in said
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
        moves.read(file, 0, bytearray(size)).wait()
        still_works(moves, tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_is_told_to_everyone_who_waits(engine: str, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    with ak.TransferEngine(engine=engine) as moves, moves.open(tmp_path / "short") as file:
        transfer = moves.read(file, 0, bytearray(2))
        for _ in range(2):
            with pytest.raises(OSError, match="shorter"):
                transfer.wait()
        assert transfer.is_done()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with ak.TransferEngine() as moves:
        for path, nbytes in ((tmp_path / "missing", None), (tmp_path / "no" / "folder", 10)):
            with pytest.raises(ak.TransferError, match=f"{path}.*No such file") as caught:
                moves.open(path, nbytes=nbytes)
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(ak.TransferError, match="directory"):
            moves.open(tmp_path, write=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_read_only(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with ak.TransferEngine(engine=engine) as moves, moves.open(path, write=False) as file:
        with pytest.raises(ak.AccelValueError, match="write=False"):
            moves.write(file, 0, b"lost")
        moves.read(file, 0, bytearray(4)).wait()
        with pytest.raises(ak.AccelValueError, match="nbytes"):
            moves.open(path, nbytes=10, write=False)
        if os.geteuid() != 0:
            path.chmod(0o400)
            with pytest.raises(ak.TransferError, match="choose a path"):
                moves.open(path)
    assert path.read_bytes() == b"kept"


@pytest.mark.parametrize("engine", ENGINES)
def test_full_disk(engine: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk, ak.TransferEngine(engine=engine) as moves:
        with pytest.raises(
            ak.TransferError, match=r"room for 4194304 bytes.*No space left.*\d+ bytes are free"
        ):
            moves.open(disk / "reserved", nbytes=4 * MIB)
        assert list(disk.iterdir()) == []
        with moves.open(disk / "growing", nbytes=1) as file:
            transfer = moves.write(file, 0, noise(4 * MIB))
            with pytest.raises(
                ak.TransferError, match=r"growing: writing 4194304 bytes.*\d+ bytes are free"
            ) as caught:
                transfer.wait()
            assert caught.value.errno == errno.ENOSPC
            os.truncate(disk / "growing", 0)
            moves.write(file, 0, noise(MIB)).wait()
        assert (disk / "growing").read_bytes() == noise(MIB).numpy().tobytes()
        with pytest.raises(ak.TransferError, match="No space"):  # a file that was there keeps its size
            moves.open(disk / "growing", nbytes=4 * MIB)
        assert (disk / "growing").stat().st_size == MIB


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem")
@pytest.mark.parametrize("engine", ENGINES)
def test_errors_of_the_device(engine: str, tmp_path: Path) -> None:
    """Two files of the system that fail as broken disks do, at every read and at every write."""
    with ak.TransferEngine(engine=engine, block_bytes=4096) as moves:
        with (
            moves.open("/proc/self/mem", write=False) as file,
            pytest.raises(
                ak.TransferError, match=r"mem: reading 100000 bytes at offset 0.*0 done.*error"
            ) as caught,
        ):
            moves.read(file, 0, bytearray(100_000)).wait()
        assert caught.value.errno == errno.EIO
        with (
            moves.open("/dev/full") as file,
            pytest.raises(ak.TransferError, match=r"/dev/full: writing 100000 bytes.*0 done.*No space"),
        ):
            moves.write(file, 0, bytearray(100_000)).wait()
        still_works(moves, tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_with_a_bad_region(engine: str, tmp_path: Path) -> None:
    """Device-mapper's error target behind a loop device; whole pages, so past the page cache."""
    name = f"transfer-test-{os.getpid()}"
    command("dmsetup", "version")
    backing = tmp_path / "backing"
    backing.write_bytes(noise(MIB).numpy().tobytes())
    loop = command("losetup", "--show", "--find", str(backing))
    try:
        command("dmsetup", "create", name, "--table", f"0 1024 linear {loop} 0\n1024 1024 error")
        try:
            with (
                ak.TransferEngine(engine=engine, block_bytes=64 << 10) as moves,
                moves.open(f"/dev/mapper/{name}") as file,
            ):
                assert file.direct
                with pytest.raises(ak.TransferError, match="Input/output error"):
                    moves.read(file, 0, ak.aligned_empty(MIB)).wait()
                out = ak.aligned_empty(MIB // 2)
                moves.read(file, 0, out).wait()
                assert torch.equal(out, noise(MIB)[: MIB // 2])
        finally:
            command("dmsetup", "remove", name)
    finally:
        command("losetup", "--detach", loop)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_striped_error_names_the_file(engine: str, tmp_path: Path) -> None:
    with ak.TransferEngine(engine=engine) as moves:
        with moves.open_striped([tmp_path / "a", tmp_path / "b"], stripe_bytes=4096, nbytes=1 << 20) as file:
            os.truncate(tmp_path / "b", 4096 * 3)
            moves.read(file, 0, bytearray(4096 * 7)).wait()
            with pytest.raises(ak.TransferError, match=f"{tmp_path / 'b'}: reading .* byte 12288 of 12288"):
                moves.read(file, 0, bytearray(4096 * 8)).wait()
        with pytest.raises(ak.AccelValueError, match="stripe_bytes"):
            moves.open_striped([tmp_path / "a"], stripe_bytes=100)
        with pytest.raises(ak.AccelValueError, match="different files"):
            moves.open_striped([tmp_path / "a", tmp_path / "." / "a"])
        with pytest.raises(ak.TransferError, match="nope"):
            moves.open_striped([tmp_path / "a", tmp_path / "nope"])


@pytest.mark.parametrize("engine", ENGINES)
def test_closed_file_and_engine(engine: str, tmp_path: Path) -> None:
    moves = ak.TransferEngine(engine=engine)
    closed, other = moves.open(tmp_path / "a", nbytes=10), moves.open(tmp_path / "b", nbytes=10)
    closed.close()
    closed.close()
    with pytest.raises(ValueError, match="a: is closed"):
        moves.read(closed, 0, bytearray(10))
    moves.close()
    moves.close()
    assert (closed.closed, other.closed, moves.closed) == (True, True, True)
    for attempt in (lambda: moves.read(other, 0, bytearray(10)), lambda: moves.open(tmp_path / "a")):
        with pytest.raises(ValueError, match="engine is closed"):
            attempt()
    with pytest.raises(ValueError, match="engine is closed"):
        ak.aligned_empty(4096, register=moves)


@pytest.mark.parametrize("engine", ENGINES)
def test_closing_under_the_feet_of_other_threads(engine: str, tmp_path: Path) -> None:
    """Every transfer that was accepted is whole, every other one is refused, and nobody hangs."""
    data = noise(100_000)
    moves = ak.TransferEngine(engine=engine, block_bytes=4096)
    file = moves.open(tmp_path / "file", nbytes=10 * 100_000)
    surprises: list[str] = []

    def work(k: int) -> None:
        try:
            while True:
                moves.write(file, k * 100_000, data).wait()
        except ak.AccelValueError:
            return
        except BaseException:
            surprises.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    assert becomes(lambda: (tmp_path / "file").read_bytes()[:100_000] == data.numpy().tobytes())
    moves.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert surprises == []


def test_wrong_arguments(tmp_path: Path) -> None:
    wrong = ({"queue_depth": 0}, {"block_bytes": 512}, {"num_threads": 0}, {"engine": "libaio"})
    for arguments in wrong:
        with pytest.raises(ak.AccelValueError, match=next(iter(arguments))):
            ak.TransferEngine(**arguments)
    with pytest.raises(ak.AccelValueError, match="nbytes"):
        ak.aligned_empty(-1)
    with (
        ak.TransferEngine() as moves,
        ak.TransferEngine() as others,
        moves.open(tmp_path / "f", nbytes=10) as file,
    ):
        with pytest.raises(ak.AccelValueError, match="offset"):
            moves.read(file, -1, bytearray(10))
        with pytest.raises(ak.AccelValueError, match="another engine"):
            others.read(file, 0, bytearray(10))
        with pytest.raises(ak.AccelTypeError, match="file: expected a file"):
            moves.read(tmp_path / "f", 0, bytearray(10))
        with pytest.raises(ak.AccelTypeError, match=r"out: expected a torch\.Tensor or a buffer, got list"):
            moves.read(file, 0, [1, 2])
        with pytest.raises(ak.AccelValueError, match="read-only"):
            moves.read(file, 0, b"constant")
        with pytest.raises(ak.AccelValueError, match="contiguous"):
            moves.read(file, 0, torch.zeros(5, 4).t())
        with pytest.raises(ak.AccelValueError, match="contiguous"):
            moves.write(file, 0, memoryview(bytearray(10))[::2])
        with pytest.raises(ak.AccelValueError, match="CPU"):
            moves.read(file, 0, torch.zeros(5, device="meta"))


@pytest.mark.skipif(not ak.available_cpu_isas(), reason="the C++ back end is not built")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_memory_mapped_for_reading(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(8192))
    (tmp_path / "source").write_bytes(bytes(8192))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=8192, dtype=torch.uint8)
    with (tmp_path / "weights").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ)
    read_only = torch.frombuffer(pages, dtype=torch.uint8)
    with ak.TransferEngine() as moves, moves.open(tmp_path / "source") as source:
        moves.read(source, 0, mapped).wait()
        with pytest.raises(ak.AccelValueError, match="read-only mapping"):
            moves.read(source, 0, read_only)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failure_nobody_waited_for_is_logged(
    engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short").write_bytes(b"x")
    with caplog.at_level(logging.ERROR), ak.TransferEngine(engine=engine) as moves:
        file = moves.open(tmp_path / "short")
        moves.read(file, 0, bytearray(2))
    assert "nobody waited" in caplog.text
    assert "shorter" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_is_told_and_ends(engine: str, tmp_path: Path) -> None:
    """While the parent has transfers under way; the child ends as Python does, finalizers and all."""
    code = f"""
import os, sys, accel_kernels as ak
moves = ak.TransferEngine(engine={engine!r}, block_bytes=4096, queue_depth=2, num_threads=1)
file = moves.open({str(tmp_path / "file")!r}, nbytes=8 << 20)
memory = ak.aligned_empty(8 << 20, register=moves)
memory.fill_(5)
transfer = moves.write(file, 0, memory)
child = os.fork()
if child == 0:
    for attempt in (lambda: moves.read(file, 0, bytearray(1)), transfer.wait, lambda: moves.open("x")):
        try:
            attempt()
        except ak.BackendUnavailableError as error:
            assert "make another engine" in str(error)
        else:
            os._exit(3)
    moves.close()
    with ak.TransferEngine(engine={engine!r}) as own, own.open({str(tmp_path / "file2")!r}, nbytes=10) as its:
        own.write(its, 0, b"child").wait()
    del moves, file, memory, transfer
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
transfer.wait()
moves.close()
print("parent", len(open({str(tmp_path / "file")!r}, "rb").read().strip(bytes([5]))))
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "parent 0\n"
    assert (tmp_path / "file2").read_bytes().startswith(b"child")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_ends_finishes_its_writes(engine: str, tmp_path: Path) -> None:
    run = run_python(
        f"""
import torch, accel_kernels as ak
moves = ak.TransferEngine(engine={engine!r}, block_bytes=4096)
moves.write(moves.open({str(tmp_path / "file")!r}, nbytes=1), 0, torch.full((4 << 20,), 9, dtype=torch.uint8))
"""
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "file").read_bytes() == bytes([9]) * (4 << 20)


@pytest.mark.skipif(why_not("io_uring") is not None, reason="no io_uring to refuse")
def test_where_io_uring_is_refused_threads_do_it(tmp_path: Path) -> None:
    run = run_python(
        REFUSE_URING
        + f"""
import accel_kernels as ak
with ak.TransferEngine() as moves, moves.open({str(tmp_path / "file")!r}, nbytes=5) as file:
    print(moves.name, "|", moves.why)
    moves.write(file, 0, b"bytes").wait()
print(ak.report())
try:
    ak.TransferEngine(engine="io_uring")
except ak.BackendUnavailableError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("threads | io_uring is not allowed here (a seccomp filter")
    assert "transfers  threads: io_uring is not allowed" in run.stdout
    assert "engine 'io_uring': io_uring is not allowed" in run.stdout
    assert (tmp_path / "file").read_bytes() == b"bytes"


def test_without_the_extension(tmp_path: Path) -> None:
    run = run_python(
        f"""
import sys
sys.modules["accel_kernels._cpu"] = None
import accel_kernels as ak
with ak.TransferEngine() as moves, moves.open({str(tmp_path / "file")!r}, nbytes=5) as file:
    print(moves.name, "|", moves.why)
    moves.write(file, 0, b"bytes").wait()
try:
    ak.TransferEngine(engine="threads")
except ak.BackendUnavailableError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("portable | extension not built")
    assert "engine 'threads': extension not built" in run.stdout
    assert (tmp_path / "file").read_bytes() == b"bytes"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_offset_is_an_integer(engine: str, tmp_path: Path) -> None:
    with ak.TransferEngine(engine=engine) as moves, moves.open(tmp_path / "file", nbytes=4096) as file:
        with pytest.raises(
            ak.AccelTypeError, match=r"read: .*file: offset: expected an integer, got 2048\.0"
        ):
            moves.read(file, 4096 / 2, bytearray(8))  # type: ignore[arg-type]
        moves.read(file, np.int64(8), bytearray(8)).wait()


def test_a_thread_that_fails_ends_its_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise MemoryError

    with ak.TransferEngine(engine="portable") as moves, moves.open(tmp_path / "file", nbytes=1 << 20) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(ak.TransferError, match="reading 1048576 bytes at offset 0: 0 done"):
                moves.read(file, 0, bytearray(1 << 20)).wait()
        still_works(moves, tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_end_of_the_process_tells_what_has_failed(engine: str, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    code = f"""
import accel_kernels as ak
engine = ak.TransferEngine(engine={engine!r})
file = engine.open({str(tmp_path / "short")!r})
for _ in range(50):
    engine.read(file, 0, bytearray(1 << 16))
"""
    found = run_python(code)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("a transfer that nobody waited for has failed") == 50


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_while_a_file_closes_loses_no_descriptor(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ak.TransferEngine(engine=engine) as moves:
        before = num_descriptors()
        file = moves.open(tmp_path / "file", nbytes=4096)

        class Interrupted:
            def detach(self, _: object) -> None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(file, "_driver", Interrupted())
            with pytest.raises(KeyboardInterrupt):
                file.close()
        assert not file.closed
        file.close()
        assert num_descriptors() == before


@pytest.mark.skipif(resource is None, reason="needs limits on processes")
@pytest.mark.parametrize("engine", ENGINES)
def test_without_another_thread_it_says_so_and_signals_still_come(engine: str) -> None:
    code = f"""
import os, resource, signal, threading
import accel_kernels as ak
os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None  # root has no limit
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=lambda: None).start()
    print("no limit")
except RuntimeError:
    before = len(os.listdir("/proc/self/fd"))
    try:
        ak.TransferEngine(engine={engine!r})
    except ak.BackendUnavailableError as error:
        print("unavailable:", error)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert len(os.listdir("/proc/self/fd")) == before
"""
    found = run_python(code)
    assert found.returncode == 0, found.stderr
    if "no limit" in found.stdout:
        pytest.skip("this system does not count threads")
    assert f"unavailable: TransferEngine: engine {engine!r}" in found.stdout


@pytest.mark.skipif(native.cpu is None, reason=str(native.why_not))
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_files_of_different_page_sizes_share_an_engine(engine: str, tmp_path: Path) -> None:
    if reason := why_not(engine):
        pytest.skip(reason)
    data = noise(1 << 20)
    (tmp_path / "file").write_bytes(data.numpy().tobytes())
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    driver = native.cpu.TransferEngine(engine, 1, 4096, 1)
    try:
        for align in (4096, 65536):  # the second one's blocks are larger than any before
            file = driver.attach(descriptor, descriptor, align, 4096)
            out = torch.zeros((1 << 20) + 1, dtype=torch.uint8)[1:]
            handle = driver.submit([(file, 0, out.data_ptr(), out.numel())], False)
            handle.wait()
            assert handle.failure() is None
            assert torch.equal(out, data)
            driver.detach(file)
    finally:
        driver.close()
        os.close(descriptor)
