"""What ran once, again: calls of inference ops and of torch, with the same tensors, without the Python between them.

In: a block of code that computes on the CPU. Out: `Recording.replay`, which makes the same calls with the same tensors
in the same memory; new input is written into the old input tensors, and results are read from the old results. What
CUDA graphs are for a device. A decode of a small model is some hundred calls of a few microseconds each: made from
Python, the calls cost more than what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import native
from .errors import AccelKernelsError, AccelValueError

if TYPE_CHECKING:
    from ._cpu import Tape

_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_MASKS = (torch.bool, torch.uint8)
_under_way = threading.local()


def keep(*tensors: Tensor | None) -> None:
    """Keep what a native call of this thread was given the addresses of, if it is being recorded."""
    recording: Recording | None = getattr(_under_way, "recording", None)
    if recording is not None:
        recording.keep(each for each in tensors if each is not None)


class Recording(TorchDispatchMode):
    """Records what its ``with`` block computes, on this thread, while it computes it.

    Recorded are the inference ops of this package on the CPU (``paged_attention``, ``rotary`` and ``write_kv``, which
    look at values, by the ``cpu`` back end alone), and every op of torch that is not a view. The block must compute the
    same things whatever the values in its tensors: Python's own branches, and numbers that were taken out of tensors
    (``tolist``), stay as they were. So does the memory: a tensor that is given other memory afterwards (``.data =``)
    has left the recording, which holds on to the old one.

    Attributes:
        kept: every tensor that the calls read or write; they and their memory live as long as the recording.

    Raises:
        AccelValueError: in the block: another recording is under way, or an op of torch whose result's shape depends on
            values, that gives a number to Python, that is random or that turns a tensor in place (``t_``). The block
            may go on without a recording.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []
        self._memory: list[torch.UntypedStorage] = []
        self._made: dict[int, int] = {}  # bytes at an address
        self._replays: list[Callable[[], object]] = []
        self._tape: Tape | None = None

    @property
    def num_calls(self) -> int:
        """Calls from Python that a replay makes: one for all of this package's between two of torch's."""
        return len(self._replays)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that the block made, which would be free without the recording."""
        return sum(self._made.values())

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Have tensors, and the memory that they have now, live as long as the recording."""
        for each in tensors:
            self.kept.append(each)
            self._memory.append(each.untyped_storage())

    def replay(self) -> None:
        """Make the calls again, with as many threads as torch has now.

        Raises:
            AccelValueError: a value leads outside a tensor (a slot, a position, a block), as in the first calls.
            AccelKernelsError: another recording is under way in this thread.
        """
        refuse_while_recording("Recording.replay", "its calls would be missing there")
        try:
            for call in self._replays:
                call()
        except ValueError as error:
            raise AccelValueError(f"replay: {error}") from None

    def __enter__(self) -> Recording:
        if getattr(_under_way, "recording", None) is not None or self._replays:
            raise AccelValueError("Recording: expected to be entered once, and none under way in this thread")
        super().__enter__()  # type: ignore[no-untyped-call]
        _under_way.recording = self
        self._begin_tape()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_tape()
        _under_way.recording = None
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op of torch, and note it."""
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _UNFIT) and not _picks_by_numbers(func, args):
            raise AccelValueError(f"Recording: expected no op that depends on values or chance, got {func}")
        if torch.Tag.inplace_view in func.tags:
            raise AccelValueError(
                f"Recording: expected tensors that keep their shape, got {func}; make a view"
            )
        result = func(*args, **kwargs)
        found = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        if any(each.device.type != "cpu" for each in found):
            raise AccelValueError(f"Recording: expected tensors on the CPU, got {func} of others")
        self.keep(found)
        if not (_is_view(func) or func._schema.is_mutable):
            new = (each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor))
            self._made.update((each.data_ptr(), each.nbytes()) for each in new)
        if not (_is_view(func) or _only_allocates(func)):
            self._end_tape()
            self._replays.append(_again(func, args, kwargs, result))
            self._begin_tape()
        return result

    def _begin_tape(self) -> None:
        if native.cpu is not None:
            self._tape = native.cpu.Tape()
            self._tape.record()

    def _end_tape(self) -> None:
        if native.cpu is not None and self._tape is not None:
            native.cpu.stop_recording()
            if len(self._tape):
                self._replays.append(partial(_replay, self._tape))
            self._tape = None


def _replay(tape: Tape) -> None:
    tape.replay(torch.get_num_threads())


def refuse_while_recording(op: str, why: str = "it holds inference ops alone") -> None:
    """Demand that this thread records nothing: a replay would not do what the op does.

    Raises:
        AccelKernelsError: it does.
    """
    if getattr(_under_way, "recording", None) is not None:
        raise AccelKernelsError(f"{op}: expected to be called outside of a Recording: {why}")


def _picks_by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op is indexing whose result's shape depends on no value: not by a mask."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(each is None or each.dtype not in _MASKS for each in args[1])


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _only_allocates(func: Any) -> bool:
    name: str = func._schema.name.split("::")[1]
    return name.startswith(("empty", "new_empty"))


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], object]:
    """The same call; a result that it makes goes to where the first one is."""
    if func._schema.is_mutable:
        return lambda: func(*args, **kwargs)
    if func is torch.ops.aten._to_copy.default:
        return lambda: result.copy_(args[0])
    if isinstance(result, Tensor):
        return lambda: result.copy_(func(*args, **kwargs))
    firsts = [each for each in tree_leaves(result) if isinstance(each, Tensor)]

    def again() -> None:
        for first, new in zip(firsts, tree_leaves(func(*args, **kwargs)), strict=True):
            first.copy_(new)

    return again
