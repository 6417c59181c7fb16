"""What a server accepts and whom it serves: policies that a user sets.

Read by `guard`, `prompts`, `admission` and `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on. What goes beyond is refused with a status that says why.

    Attributes:
        body_bytes: of a request; more: 413.
        prompt_tokens: of one prompt; None: as many as the model takes; more: 400.
        max_tokens: that a request may ask for; None: as many as the model takes; more: 400.
        sequences: of one request, prompts times `n` (or `best_of`); more: 400.
        logprobs: log-probabilities of one request, sequences times tokens times (top + 1); more: 400.
        inputs: texts of one request for embeddings; more: 400.
        concurrent: requests at once; more: 429.
        queued: prompts without a first token yet; more: 503.
        request_timeout_s: from the request's arrival to its last token; later: 504.
        read_timeout_s: for a request's body to arrive; later: 408. Before, as long for its head; later the connection
            is closed.
        write_timeout_s: that a reader of a stream may stand still; later its request is dropped.
        drain_timeout_s: for running requests to finish after SIGTERM.
    """

    body_bytes: int = 8 * 2**20
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    sequences: int = 128
    logprobs: int = 500_000
    inputs: int = 2048
    concurrent: int = 512
    queued: int = 1024
    request_timeout_s: float = 600.0
    read_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        counts = ("body_bytes", "prompt_tokens", "max_tokens", "sequences", "logprobs", "inputs")
        for name in (*counts, "concurrent", "queued"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Limits({name}=...): expected >= 1, got {value!r}")
        for name in ("request_timeout_s", "read_timeout_s", "write_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"Limits({name}=...): expected above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens and to whom it answers.

    Attributes:
        host: address to listen on; only this machine by default.
        port: 0 takes a free one.
        api_keys: any of them opens the API; none: no key is asked for.
        served_name: the model's name in the API; None: the engine's.
        adapters: names of LoRA adapters that the engine has; each is a model of its own in the API.
        adapter_folder: each directory in it that is a LoRA adapter is one, too, also those that come while the server
            runs; it is loaded when it is first asked for, and anew when its files are others. None: no more than those.
        cors_origins: web pages from elsewhere that may call the API.
        allowed_hosts: names under which the server may be called, against DNS rebinding: a web page whose name suddenly
            points to this machine. None: on a loopback address those of the loopback, else all.
        socket_path: of a Unix socket to listen on instead of `host` and `port`.
        end_on_failure: end with an error when the engine has failed; else stay, and say so at /health.
        limits: see `Limits`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    served_name: str | None = None
    adapters: tuple[str, ...] = ()
    adapter_folder: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    socket_path: str | None = None
    end_on_failure: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"ServerConfig(port=...): expected 0 to 65535, got {self.port!r}")
        if not all(key.isascii() and key.strip() == key and key for key in self.api_keys):
            raise ConfigError("ServerConfig(api_keys=...): expected ASCII without spaces around, got another")

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names under which the server may be called, or None for all."""
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        if self.socket_path is not None:
            return None
        return LOOPBACK if self.host in {"localhost", "127.0.0.1", "::1"} else None
