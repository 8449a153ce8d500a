"""Connections to engines: which of them may carry a second request."""

import asyncio

from forebay.replicas.connection import EngineStream, open_session

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
END = b"0\r\n\r\n"


async def test_a_connection_that_was_told_to_stop_carries_nothing_more() -> None:
    """Not even when the answer came to its end at the same moment, which looks like a connection in good order."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readline() not in (b"\r\n", b""):
            pass
        await reader.readexactly(2)
        writer.write(HEAD)
        if connections == 1:
            await reader.read()  # the stop has come, and finds the answer at its end
        writer.write(END)
        await writer.drain()
        await left.wait()
        writer.close()

    left = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with open_session(reuses_connections=True) as session:
        first = EngineStream(session, url, {}, b"{}")
        assert await first.open() == 200
        assert await first.read() == b"a"
        assert await first.stop(confirms_stop=True)
        second = EngineStream(session, url, {}, b"{}")
        async with asyncio.timeout(5):
            assert await second.open() == 200
            while await second.read():
                pass
        second.release()
    left.set()
    server.close()
    assert connections == 2
