"""`GET /`: a page to talk to the model and to watch the server.

It is one file, `index.html`, with its style and script in it, and holds no secret: it asks the same
routes as everybody, with the key that its reader types. Its policy lets a browser run that script,
apply that style and talk to this server, and nothing else; what a model writes cannot become code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

POLICY = {
    "default-src": "'none'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
"""What a browser may do with the page, beside its own script and style."""
HEADERS = {
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> APIRouter:
    """The route of the page, read from its file once."""
    routes = APIRouter()
    html = resources.files("serving.server.page").joinpath("index.html").read_text(encoding="utf-8")
    headers = {**HEADERS, "content-security-policy": policy(html)}

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return routes


def policy(html: str) -> str:
    """The Content-Security-Policy of a page with one script and one style in it."""
    own = {f"{tag}-src": _hash(html, tag) for tag in ("script", "style")}
    return "; ".join(f"{name} {value}" for name, value in {**POLICY, **own}.items())


def _hash(html: str, tag: str) -> str:
    """What names the content of the page's only element of a kind, as CSP writes it."""
    (content,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
