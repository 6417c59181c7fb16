"""One engine over several processes of this machine (tensor parallelism), driven by one of them.

Modules, in the order in which a call passes through them: `leader` (starts the processes; makes each call, and tells
the others of it before the next forward), `calls` (the calls as bytes), `follower` (repeats them). Under them: `places`
(which rank has which device), `processes` (children that end with their parent).
"""

from .leader import Leader, lead

__all__ = ["Leader", "lead"]
