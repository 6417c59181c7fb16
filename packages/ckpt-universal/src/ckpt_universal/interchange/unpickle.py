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
import torch._tensor
import torch._utils

from ..errors import CheckpointError, CorruptError

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("torch", "Size"): torch.Size,
    ("torch", "Tensor"): torch.Tensor,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): torch._tensor._rebuild_from_type_v2,
}


class Inert:
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
            dtype = getattr(torch, name, None) if module == "torch" else None
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
        module: Any = ModuleType("restricted_pickle")
        module.Unpickler, module.load = unpickler({}, str(path)), _refuse
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=module)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing") from None
    except Exception as error:  # whatever damaged bytes make torch say
        raise CorruptError(f"{path}: {type(error).__name__}: {error}") from error


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise CorruptError("a file of an old format of torch.save; load and save it again with a newer torch")


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
