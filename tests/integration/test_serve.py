"""The server as a person starts it, uses it and stops it."""

import signal

from tests.support.server import serving


async def test_a_chat_is_answered_whole_and_streamed() -> None:
    async with serving() as server:
        client = server.client()
        whole = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hello [[fake tokens=3]]"}]
        )
        assert whole.choices[0].message.content == "tok0 tok1 tok2 "
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        stream = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hello [[fake tokens=3]]"}], stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "tok0 tok1 tok2 "
        assert await server.stop(signal.SIGTERM) == 0
        assert "server.stopped" in server.log
