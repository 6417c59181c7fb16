"""An OpenAI-compatible server in front of an engine, and the `fastgen` command.

A request's way, in order: `heads` (its first lines, in time) -> `guard` (host, key, size) -> `app` (routes) +
`schemas` (what JSON may say) -> `prompts` (to token ids and sampling parameters) with `adapter_names` -> `admission`
-> `loop` (the thread that drives the engine) -> `stream` (outputs, merged while nobody reads) -> `answers` (back to
OpenAI's shapes) -> `sse`. Around them: `limits`, `threads`, `errors`, `metrics`, `run` (sockets and signals),
`chat.html` (a page to try it), `cli` and `commands`, `bench` (load and its measurement); `replicas` (several servers
behind one address), `ray` (the same by Ray Serve).
"""

from .app import create_app
from .interface import Engine
from .limits import Limits, ServerConfig
from .loop import EngineLoop
from .run import Server

__all__ = ["Engine", "EngineLoop", "Limits", "Server", "ServerConfig", "create_app"]
