"""The chat page: one file, sent with a policy that lets it load nothing and talk to this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.responses import Response


class ChatPage:
    """`chat.html`, read once; its own script and style are allowed by their hashes, nothing else is."""

    def __init__(self) -> None:
        self._html = (files(__package__) / "chat.html").read_text(encoding="utf-8")
        script, style = _hashes(self._html, "script"), _hashes(self._html, "style")
        self._policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def response(self) -> Response:
        """The page."""
        headers = {"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"}
        return Response(self._html, headers=headers, media_type="text/html; charset=utf-8")


def _hashes(html: str, tag: str) -> str:
    """The policy's sources for every inline element of this kind."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
