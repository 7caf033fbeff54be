"""The application: a page at /, `POST /predict`, and its description at /openapi.json.

It is meant for the person at this machine, whose browser also visits other sites. Such a site must not reach it: a
request is answered only if its Host header is a name that the server was told it has (else a site whose own name is
made to point here could read the answers), and a page of another origin is refused. Nothing is sent that would allow
another origin to read.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probe.images import ImageError
from probe.serving.batching import BusyError
from probe.serving.service import Service

_BODY_SECONDS = 30.0  # in which a request must be all there: a place is taken meanwhile
_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def make_app(
    service: Service,
    *,
    page: bytes,
    policy: str,
    openapi: Mapping[str, Any],
    hosts: frozenset[str],
    max_bytes: int,
) -> ASGIApp:
    """The ASGI application.

    Args:
      page: the HTML at /; policy: its content-security policy.
      hosts: names and addresses that the server may be called by, without ports.
      max_bytes: of a request's body.
    """

    async def show_page(_: Request) -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": policy})

    async def show_openapi(_: Request) -> Response:
        return _json(openapi)

    async def predict(request: Request) -> Response:
        thumbnails = request.query_params.get("thumbnails", "").lower() in ("1", "true")
        try:
            with service.place():
                data = await _read_image(request, max_bytes)
                return _json(await service.classify(data, thumbnails=thumbnails))
        except BusyError as err:
            detail = f"as many images are under way as may be, which is {service.room.limit}"
            return _error(503, "busy", detail, {"retry-after": str(err.retry_after_s)})
        except ImageError as err:
            return _error(422, err.reason, str(err))

    async def refuse(_: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        reason = {404: "not-found", 405: "method", 408: "timeout", 413: "too-large"}.get(err.status_code, "request")
        return _error(err.status_code, reason, err.detail, err.headers)

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/openapi.json", show_openapi),
            Route("/predict", predict, methods=["POST"]),
        ],
        exception_handlers={HTTPException: refuse},
    )
    return _Guard(app, hosts)


class _Guard:
    """Lets through what the person at this machine asks, and puts the headers on every answer that keep it theirs."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks nothing else"

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            detail = f"this server is not called {', '.join(hosts) or 'nothing'}: see --allow-host"
            return _error(421, "host", detail)
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != hosts[0]
        # "none" is a person who typed the address; browsers that know the header send it with each request.
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _error(403, "origin", "asked by the page of another site")
        return None


def host_name(host: str) -> str:
    """The name in a Host header: without its port, in lower case, an IPv6 address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _read_image(request: Request, max_bytes: int) -> bytes:
    """The bytes of the one image in a request, raw or in a form. Raises: HTTPException."""
    too_large = HTTPException(413, f"more than {max_bytes:,} bytes (--max-bytes)")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise too_large
        return message

    bounded = Request(request.scope, receive)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if not request.headers.get("content-type", "").lower().startswith("multipart/"):
                return await bounded.body()
            return await _file_of_form(bounded)
    except TimeoutError:
        raise HTTPException(408, f"not all there within {_BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the client has left") from None  # which nobody reads


async def _file_of_form(request: Request) -> bytes:
    try:
        async with request.form(max_files=1, max_fields=16) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise HTTPException(400, "the form has no file: send one, under any name")
            return await files[0].read()
    except (MultiPartException, HTTPException) as err:
        if isinstance(err, HTTPException) and err.status_code != 400:
            raise
        detail = err.detail if isinstance(err, HTTPException) else err.message
        if "many files" in detail.lower():
            detail = "a form has one file: send the others in requests of their own, which are answered together"
        raise HTTPException(400, detail) from err


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: a path may hold bytes that are no text
    return Response(text.encode(), status, headers, media_type="application/json")


def _error(status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json({"error": {"reason": reason, "detail": detail}}, status, headers)
