import asyncio
import socket
import threading
import time

import uvicorn

from mptbook.serve.protocol import PatientProtocol


class Impatient(PatientProtocol):
    patience = 0.8


async def endless(scope, receive, send):
    """More than any buffer holds, until nobody takes it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not scope["state"]["over"].is_set():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


def test_who_stops_taking_is_hung_up_on_and_who_takes_slowly_is_not():
    over = threading.Event()

    async def app(scope, receive, send):
        await endless(scope | {"state": {"over": over}}, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=Impatient, ws="none", lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        stalled, slow = (socket.create_connection(listener.getsockname()) for _ in range(2))
        for one in (stalled, slow):
            one.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        end = time.monotonic() + 2.5
        while time.monotonic() < end:  # a buffer at a time, with pauses
            for _ in range(64):
                assert slow.recv(65536)
            time.sleep(0.05)
        assert len(server.server_state.connections) == 1
        over.set()
        slow.settimeout(5)
        while slow.recv(65536):
            if not server.server_state.tasks:
                break
    finally:
        over.set()
        stalled.close()
        slow.close()
        server.should_exit = True
        thread.join()
