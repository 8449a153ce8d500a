"""The official client learns of the end of a batch: from an endpoint of the project, and from the batch's own address."""

import json

from openai.types.webhooks import BatchCompletedWebhookEvent

from tests.support.receiver import receiving
from tests.support.server import FAKE, chat_body, serving

CONFIG = FAKE + '\n[outbound]\nallowed_networks = ["127.0.0.2/32"]\n'
ENDPOINT = "/v1/chat/completions"


async def test_a_batch_tells_of_its_end_and_the_client_believes_it() -> None:
    line = {"custom_id": "a", "method": "POST", "url": ENDPOINT, "body": chat_body("[[fake tokens=1]]")}
    line["body"].pop("stream")
    async with receiving("127.0.0.2") as receiver, serving(CONFIG) as server:
        hook = {"url": f"{receiver.url}/project", "events": ["batch.completed"]}
        async with server.session.post(f"{server.url}/v1/webhooks", json=hook, headers=server.headers) as response:
            secrets = {"/project": (await response.json())["secret"]}
        async with server.client() as client:
            file = await client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint=ENDPOINT,
                completion_window="24h",
                extra_body={"webhook_url": f"{receiver.url}/own"},
            )
            secrets["/own"] = str((batch.model_extra or {})["webhook_secret"])
            await receiver.until(2, within_seconds=30)
            assert {request.path for request in receiver.received} == {"/project", "/own"}
            for request in receiver.received:
                event = client.webhooks.unwrap(request.body, request.headers, secret=secrets[request.path])
                assert isinstance(event, BatchCompletedWebhookEvent)
                ended = await client.batches.retrieve(event.data.id)
                assert (ended.id, ended.status) == (batch.id, "completed")  # the event comes with the end, not before
            assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
