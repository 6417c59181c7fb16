"""Optimizers that keep their state and arithmetic on the host, as plain torch optimizers; and the cores they run on.

The modules, in the order in which data flows:

- `errors`, `version`: what a user meets.
- `adam`, `adagrad`, `lion`: the optimizers and their options.
- `optimizer`: the step of a plain torch optimizer; its state dict.
- `rules`: how each maps to a kernel of accel-kernels.
- `rows`: one parameter as a kernel meets it: master, states, low-precision copy.
- `steppers` -> `host_steps`: parameters on the CPU, one call for all of them.
- `steppers`, `chunks` (pure), `copies` -> `device_steps`: parameters on a device, chunk by chunk.
- `topology` (pure) -> `binding`: a rank's cores.
"""

from .adagrad import CPUAdagrad
from .adam import CPUAdam, CPUAdamW
from .binding import BoundCores, bind_rank
from .errors import BindingError, OffloadConfigError, OffloadError, OffloadStateError
from .lion import CPULion
from .topology import CoreSet
from .version import __version__

__all__ = [
    "BindingError",
    "BoundCores",
    "CPUAdagrad",
    "CPUAdam",
    "CPUAdamW",
    "CPULion",
    "CoreSet",
    "OffloadConfigError",
    "OffloadError",
    "OffloadStateError",
    "__version__",
    "bind_rank",
]
