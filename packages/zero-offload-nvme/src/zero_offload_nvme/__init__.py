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
- `maps` -> `host_store`, `nvme_store`: where shards of zero-core rest.
- `tiers`, `forecast` (pure), `free_bytes`, `speeds` -> `preflight`: what all that will take, before it does.
- `blocks` (pure) -> `window` -> `store_stepper` -> `offloaded`: the step of an optimizer whose state rests there.
- `shadow` -> `early` -> `speculation`, `last_backward`: the same, begun during backward; `tail` (pure): how much of it
  backward hides.
- `zenflow`, `zenflow_schedule`, `importance` (pure) -> `row_set` -> `compact_rows`, `waiting_rows` -> `zenflow_unit` ->
  `zenflow_choice`, `row_publisher` -> `zenflow_units`, `background` -> `late_work` -> `zenflow_stepper`: the same,
  with what matters least stepped later.
"""

from .adagrad import CPUAdagrad
from .adam import CPUAdam, CPUAdamW
from .binding import BoundCores, bind_rank
from .early import EarlyCount
from .errors import (
    BindingError,
    OffloadConfigError,
    OffloadDiskError,
    OffloadError,
    OffloadMemoryError,
    OffloadStateError,
)
from .forecast import Forecast, Speeds, forecast
from .free_bytes import Free
from .host_store import HostStore
from .lion import CPULion
from .nvme_store import NvmeStore
from .offloaded import OffloadedOptimizer
from .preflight import Preflight, preflight
from .store_stepper import StoreStepper
from .tail import hidden_ratio
from .tier_plan import plan_tiers
from .tiers import Tier, TierPlan, Tiers, Traffic
from .topology import CoreSet
from .version import __version__
from .zenflow import ZenFlow

__all__ = [
    "BindingError",
    "BoundCores",
    "CPUAdagrad",
    "CPUAdam",
    "CPUAdamW",
    "CPULion",
    "CoreSet",
    "EarlyCount",
    "Forecast",
    "Free",
    "HostStore",
    "NvmeStore",
    "OffloadConfigError",
    "OffloadDiskError",
    "OffloadError",
    "OffloadMemoryError",
    "OffloadStateError",
    "OffloadedOptimizer",
    "Preflight",
    "Speeds",
    "StoreStepper",
    "Tier",
    "TierPlan",
    "Tiers",
    "Traffic",
    "ZenFlow",
    "__version__",
    "bind_rank",
    "forecast",
    "hidden_ratio",
    "plan_tiers",
    "preflight",
]
