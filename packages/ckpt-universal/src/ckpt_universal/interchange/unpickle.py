"""Files that torch.save wrote, without running what they say: tensors and plain containers, nothing else.

A pickle names the functions and classes it wants called. Here only those below are found; the few classes that
DeepSpeed puts beside tensors become `Inert` objects, which hold what they were given and do nothing; any other name is
refused, before it is even imported.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._utils

from ..errors import CheckpointError, CorruptError


class Sealed(type):
    """Of classes that are handed to a pickle: nothing about them can be changed."""

    def __setattr__(cls, name: str, value: Any) -> None:
        """Refuse."""
        raise AttributeError(f"{cls.__name__}.{name}: it cannot be set")

    def __delattr__(cls, name: str) -> None:
        """Refuse."""
        raise AttributeError(f"{cls.__name__}.{name}: it cannot be removed")


class Call:
    """A function as a pickle gets it: it can be called, and not changed. See Note [What a pickle is handed]."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse."""
        raise AttributeError(f"{name}: it cannot be set")


def _without_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor that had attributes: the tensor alone."""
    if not isinstance(function, Call):
        raise CorruptError("a tensor is made by a function that is not admitted")
    return function(*args)


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise CorruptError("a file of an old format of torch.save; load and save it again with a newer torch")


# Note [What a pickle is handed]
# A pickle's BUILD sets attributes on whatever lies on its stack, and that may be what it was handed by name: then a
# function's defaults, or a method of a class, would be changed for the whole process. So nothing is handed out but
# `Call`s, `Sealed` classes, and types and values of C that have no attributes to set.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): Call(_refuse),  # named only, beside `_rebuild_from_type_v2`
    ("torch._utils", "_rebuild_tensor_v2"): Call(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): Call(torch._utils._rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_without_attributes),
}


class Inert(metaclass=Sealed):
    """An object of a class that is known, and not wanted: what it was made from, and nothing that it could do."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep the state, do nothing with it."""
        self.state = state


INERT: frozenset[tuple[str, str]] = frozenset(
    {
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
    }
)


def unpickler(allowed: Mapping[tuple[str, str], Any], where: str) -> type[pickle.Unpickler]:
    """An unpickler that finds what is allowed here, and those classes; `where` is for the error."""

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            key = (module, name)
            if key in _ALLOWED:
                return _ALLOWED[key]
            if key in allowed:
                return allowed[key]
            if key in INERT:
                return Inert
            dtype = vars(torch).get(name) if module == "torch" else None
            if isinstance(dtype, torch.dtype):
                return dtype
            raise CheckpointError(
                f"{where}: it wants to make a {module}.{name}, and only tensors and plain containers are read; load it "
                "with the program that wrote it, and save what you need as tensors"
            )

    return Restricted


def load_tensors(path: Path) -> Any:
    """What a file of torch.save holds; tensors stay on the disk until they are touched.

    Raises:
        CheckpointError: it wants a class that is not admitted; names it.
        CorruptError: it is missing, no such file, or damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise CorruptError(f"{path}: not a file of torch.save (a zip archive)")
        _refuse_programs(path)
        module: Any = ModuleType("restricted_pickle")
        module.Unpickler, module.load = unpickler({}, str(path)), _refuse
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=module)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing") from None
    except Exception as error:  # whatever damaged bytes make torch say
        raise CorruptError(f"{path}: {type(error).__name__}: {error}") from error


def _refuse_programs(path: Path) -> None:
    """`torch.load` runs an archive of TorchScript, whatever unpickler it is given, and knows it by one of its names.

    Asked are torch's own reader, which decides, and Python's, since archives can be made that the two read differently.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    names += torch._C.PyTorchFileReader(str(path)).get_all_records()
    if any(name.rpartition("/")[2].lower() == "constants.pkl" for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which is a program, and only tensors and plain containers are read; load "
            "it with torch.jit.load if you trust it, and save what you need as tensors"
        )


def load_plain(data: bytes, allowed: Mapping[tuple[str, str], Callable[..., Any]], where: str) -> Any:
    """What a pickle without tensors holds, if it wants nothing but what is allowed.

    Raises:
        CheckpointError, CorruptError: as for `load_tensors`.
    """
    try:
        return unpickler(allowed, where)(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make pickle say
        raise CorruptError(f"{where}: {type(error).__name__}: {error}") from error
