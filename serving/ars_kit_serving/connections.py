"""Connections that do not wait for ever: uvicorn's protocol with a limit for headers."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEADER_SECONDS = 15.0
"""In which a request's headers must have arrived; uvicorn itself sets no such limit."""

STALLED_SECONDS = 60.0
"""In which a client must take some of what waits for it, once the buffers between are full."""


class PatientProtocol(H11Protocol):
    """Closes a connection whose headers do not come, or whose answer nobody takes.

    Both are attacks: slowloris, and slow read, which would hold an answer in memory past any
    deadline, since it cannot even be told that its time is up.
    """

    header_seconds = HEADER_SECONDS
    stalled_seconds = STALLED_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_clock: asyncio.TimerHandle | None = None
        self._stalled_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # its own
        """Start the clock, and let what is sent go at once.

        Asyncio sees to that only for sockets that name their protocol, which those handed to
        uvicorn do not. The first token would wait for the headers to be acknowledged, 40 ms.
        """
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._header_clock = self.loop.call_later(self.header_seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Stop the clock once a request has begun; start it when another one begins to arrive."""
        super().data_received(data)
        cycle: RequestResponseCycle | None = self.cycle
        idle = cycle is None or cycle.response_complete
        if not idle:
            self._stop_clock()
        elif self._header_clock is None:
            self._header_clock = self.loop.call_later(self.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks."""
        self._stop_clock()
        self._stop_stalled_clock()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the clock: the buffers are full, and what is being sent waits."""
        super().pause_writing()
        self._stop_stalled_clock()
        # A close would wait for the buffers to empty.
        self._stalled_clock = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock."""
        super().resume_writing()
        self._stop_stalled_clock()

    def _stop_stalled_clock(self) -> None:
        if self._stalled_clock is not None:
            self._stalled_clock.cancel()
            self._stalled_clock = None

    def _stop_clock(self) -> None:
        if self._header_clock is not None:
            self._header_clock.cancel()
            self._header_clock = None

    def _too_slow(self) -> None:
        self._header_clock = None
        self.transport.close()
