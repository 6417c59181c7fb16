"""Several servers of one model behind one address (data parallelism), each in processes of its own.

A request's way: `app` (routes; the key and the limits once, for all) -> `route` (which replica: pure) -> `forward` (to
it, and its answer back as it comes). Under them: `pool` (starts workers, again when they end), `worker` (one whole
server on a Unix socket), `totals` (numbers of all, added up).
"""

from .app import ReplicaServer

__all__ = ["ReplicaServer"]
