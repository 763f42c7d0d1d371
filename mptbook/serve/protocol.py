"""HTTP/1.1 of uvicorn, less patient: who sends or takes too slowly is hung up on."""

import asyncio
import json
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mptbook.serve.errors import Refused

UNFINISHED = h11.IDLE, h11.SEND_BODY


class PatientProtocol(H11Protocol):
    """A connection that has `patience` seconds for each request, and for each full buffer.

    uvicorn waits for headers, and for a client that stopped reading, without end. Slow bodies
    are refused by `mptbook.serve.gate` first, with an answer.
    """

    patience = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        own = transport.get_extra_info("socket")
        if own is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            # For who is gone without a word, and for the last bytes of an answer.
            milliseconds = int(self.patience * 1000)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered with the error object, too."""
        body = json.dumps(Refused(400, msg).body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _watch(self) -> None:
        """Time a request from its first byte to its last; more bytes do not prolong it."""
        if self.conn.their_state not in UNFINISHED:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None
        elif self._reading is None:
            # Later than the gate, which refuses a slow body with an answer.
            self._reading = self.loop.call_later(self.patience * 1.2, self.transport.abort)
