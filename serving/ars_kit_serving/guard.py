"""What stands before the application: request ids, logs, hosts, origins, keys, bodies."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ars_kit_serving.failures import ApiError
from ars_kit_serving.logs import LOGGER
from ars_kit_serving.measures import Measures

OPEN = frozenset({"/", "/health"})
"""Paths that need no key: the chat page holds nothing, and asks its reader for the key."""

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may ask, and how much.

    Attributes:
        key: what a client must present; None where nobody but this machine can ask.
        hosts: names that the server may be called by; None for any. A web page that lets its own
            name point here (DNS rebinding) is stopped by it.
        origins: web pages that may ask, beside the server's own.
        body_bytes: of a request.
        body_seconds: in which a body must have arrived.
    """

    key: str | None = None
    hosts: Collection[str] | None = LOCAL_HOSTS
    origins: Collection[str] = ()
    body_bytes: int = 1 << 20
    body_seconds: float = 15.0


class Journal:
    """Gives each request an id, logs it, counts it, and answers for what nobody caught."""

    def __init__(self, app: ASGIApp, *, measures: Measures) -> None:
        self.app, self.measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        facts: dict[str, Any] = scope.setdefault("state", {}).setdefault("facts", {})
        begun, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:  # noqa: BLE001 -- the last to hear of it
            LOGGER.exception("unexpected", extra={"facts": {"id": request_id}})
            if not status:
                error = ApiError(500, f"Something went wrong; the log has it under {request_id}.")
                await error.response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.measures.requests.labels(route, str(status)).inc()
            line = {
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - begun, 4),
                **facts,
            }
            LOGGER.info("request", extra={"facts": line})


class Gate:
    """Refuses what the rules do not allow, before the application sees any of it."""

    def __init__(self, app: ASGIApp, *, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body read, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(scope, headers)
            if scope["method"] in {"POST", "PUT", "PATCH"}:
                receive = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        hosts = self.rules.hosts
        if hosts is not None and _hostname(f"//{headers.get('host', '')}") not in hosts:
            raise ApiError(
                403, "This server answers to the names of its own machine only.", code="wrong_host"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self.rules.origins or "*" in self.rules.origins:
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise ApiError(
                403,
                "Pages of other origins may not ask; to allow one: --cors-origin ORIGIN",
                code="wrong_origin",
            )

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        key = self.rules.key
        if key is None or scope["path"] in OPEN:
            return
        if compare_digest(_presented(headers).encode(), key.encode()):
            return
        raise ApiError(
            401,
            "Incorrect API key provided. Send it as Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": 'Bearer realm="arskit"'},
        )

    async def _read(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body within its limits; returns what gives it out again."""
        limit = self.rules.body_bytes
        whole = bytearray()
        announced = headers.get("content-length", "0")
        large = ApiError(
            413,
            f"The body is larger than {limit} bytes.",
            code="body_too_large",
            headers={"connection": "close"},
        )
        if announced.isdecimal() and int(announced) > limit:
            raise large
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    whole += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(whole) > limit:
                        raise large
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not arrive within {self.rules.body_seconds:g} seconds.",
                code="body_too_slow",
                headers={"connection": "close"},
            ) from None
        waiting = [{"type": "http.request", "body": bytes(whole), "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _presented(headers: Headers) -> str:
    """Return the key of a request."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else ""
