"""Turns a wire body into a call: the one way for requests at the front door and for the lines of a batch.

It refuses a model that is not in the catalogue, and one that does not serve the endpoint; it runs nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from forebay.dialects.openai.call import Call, Context, Sampling, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Priority
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import capabilities_of, traits_of

BodyT = TypeVar("BodyT", bound=Sampling)

CHAT_COMPLETIONS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[BodyT]):
    """What a path asks of a model, the body that it takes, and how that becomes a call."""

    capability: Capability
    body: type[BodyT]
    build: Callable[[BodyT, Context], Call]


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    CHAT_COMPLETIONS: Endpoint(Capability.CHAT, ChatBody, chat_call),
    COMPLETIONS: Endpoint(Capability.COMPLETION, CompletionBody, completion_call),
}


class Calls:
    """Makes calls for the models of a catalogue."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def prepare(
        self,
        path: str,
        raw: bytes,
        *,
        request_id: str,
        project: str,
        traceparent: str | None = None,
        priority: Priority | None = None,
    ) -> Call:
        """The call that `raw` asks for at `path`, which is one of ENDPOINTS. `priority` overrides that of the tier.

        Raises InvalidRequest and ModelNotFound.
        """
        endpoint = ENDPOINTS[path]
        body = parse(endpoint.body, raw)
        model = self._catalog.get(body.model)
        if endpoint.capability not in capabilities_of(model):
            raise InvalidRequest(
                f"The model {body.model} does not serve {endpoint.capability.value}.",
                param="model",
                code="capability_not_supported",
            )
        traits = traits_of(model)
        context = Context(
            request_id=request_id,
            project=project,
            traceparent=traceparent,
            max_tokens=model.max_tokens,
            slots=model.slots,
            remote_model=traits.remote_model,
            enforces_tool_choice=traits.enforces_tool_choice,
        )
        call = endpoint.build(body, context)
        return call if priority is None else replace(call, request=replace(call.request, priority=priority))
