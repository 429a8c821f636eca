"""The chat page: one HTML file, and a policy that lets a browser run that file and no more."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def chat_page() -> HTMLResponse:
    """Return the page. It holds no secret: what it shows, it asks the API for.

    Its Content-Security-Policy names its script and its style by their hashes, lets it talk to its
    own server only, and forbids what could turn text into markup
    (https://www.w3.org/TR/CSP3/, https://w3c.github.io/trusted-types/).
    """
    page = files("ars_kit_serving").joinpath("chat.html").read_text(encoding="utf-8")
    hashes = {kind: _hash(text) for kind, text in _INLINE.findall(page)}
    policy = (
        "default-src 'none'",
        f"script-src '{hashes['script']}'",
        f"style-src '{hashes['style']}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "content-security-policy": "; ".join(policy),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(page, headers=headers)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
