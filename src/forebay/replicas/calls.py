"""Turns a wire body into a call: the one way for requests at the front door and for the lines of a batch.

It refuses a model that is not in the catalogue, one that does not serve the endpoint, and images for one that sees none;
it runs nothing. Images are looked at here, so that no door can forget it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from forebay.dialects import rerank, tokens
from forebay.dialects.anthropic import messages
from forebay.dialects.images import ImageRef
from forebay.dialects.items import ItemRules
from forebay.dialects.openai import embeddings
from forebay.dialects.openai.call import Call, Context, Thread, Wire, parse
from forebay.dialects.openai.chat import ChatBody, chat_call, images_of
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.dialects.openai.responses import ResponseBody, response_call, response_images
from forebay.errors import InvalidRequest
from forebay.inference import Capability, Priority
from forebay.media.images import Images
from forebay.model_config import Model
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import Traits, capabilities_of, traits_of

BodyT = TypeVar("BodyT", bound=Wire)

CHAT_COMPLETIONS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = embeddings.PATH
RERANK = rerank.PATH
COHERE_RERANK = rerank.COHERE_PATH
RESPONSES = "/v1/responses"
MESSAGES = messages.PATH
COUNT_TOKENS = messages.COUNT_PATH
TOKENIZE = tokens.TOKENIZE_PATH
DETOKENIZE = tokens.DETOKENIZE_PATH


def _without_images(_body: Wire) -> Sequence[ImageRef]:
    return ()


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[BodyT]):
    """What a path asks of a model, the body that it takes, and how that becomes a call.

    `images` finds the images of a body; `build` gets what became of them as `Context.images`, in the same order.
    `needs` says what the model must be able to do where the body decides it.
    """

    capability: Capability
    body: type[BodyT]
    build: Callable[[BodyT, Context], Call]
    images: Callable[[BodyT], Sequence[ImageRef]] = _without_images
    needs: Callable[[BodyT], Capability] | None = None


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    CHAT_COMPLETIONS: Endpoint(Capability.CHAT, ChatBody, chat_call, images_of),
    COMPLETIONS: Endpoint(Capability.COMPLETION, CompletionBody, completion_call),
    EMBEDDINGS: Endpoint(Capability.EMBEDDING, embeddings.EmbeddingBody, embeddings.embedding_call),
    RERANK: Endpoint(Capability.RERANK, rerank.RerankBody, rerank.rerank_call, needs=rerank.capability_for),
    COHERE_RERANK: Endpoint(Capability.RERANK, rerank.CohereBody, rerank.cohere_call, needs=rerank.capability_for),
    RESPONSES: Endpoint(Capability.CHAT, ResponseBody, response_call, response_images),
    MESSAGES: Endpoint(Capability.CHAT, messages.MessagesBody, messages.messages_call, messages.message_images),
    COUNT_TOKENS: Endpoint(Capability.CHAT, messages.CountBody, messages.count_call, messages.message_images),
    TOKENIZE: Endpoint(Capability.COMPLETION, tokens.TokenizeBody, tokens.tokenize_call),
    DETOKENIZE: Endpoint(Capability.COMPLETION, tokens.DetokenizeBody, tokens.detokenize_call),
}

_OF_ITEMS = frozenset({Capability.EMBEDDING, Capability.RERANK})
_NO_RULES = ItemRules()


class Calls:
    """Makes calls for the models of a catalogue."""

    def __init__(self, catalog: Catalog, images: Images) -> None:
        self._catalog = catalog
        self._images = images

    async def prepare(
        self,
        path: str,
        raw: bytes,
        *,
        request_id: str,
        project: str,
        traceparent: str | None = None,
        priority: Priority | None = None,
        thread: Thread | None = None,
    ) -> Call:
        """The call that `raw` asks for at `path`, which is one of ENDPOINTS. `priority` overrides that of the tier.

        Raises InvalidRequest and ModelNotFound; where the body has images also what `Images.inline` raises.
        """
        endpoint = ENDPOINTS[path]
        body = parse(endpoint.body, raw)
        del raw  # with images it is large, and its turn to be looked at may be long in coming
        model = self._catalog.get(body.model)
        needed = endpoint.capability if endpoint.needs is None else endpoint.needs(body)
        _check_capability(body.model, model, needed)
        traits = traits_of(model)
        refs = endpoint.images(body)
        if refs and not traits.sees_images:
            raise InvalidRequest(
                f"The model {body.model} does not take images.", param=refs[0].param, code="capability_not_supported"
            )
        images = await self._images.inline(refs, project, patient=priority is Priority.BATCH)
        context = Context(
            request_id=request_id,
            project=project,
            traceparent=traceparent,
            max_tokens=model.max_tokens,
            slots=model.slots,
            remote_model=traits.remote_model,
            enforces_tool_choice=traits.enforces_tool_choice,
            extensions=traits.extensions,
            items=self._rules(body.model, model, traits) if endpoint.capability in _OF_ITEMS else _NO_RULES,
            images=images,
            thread=thread,
        )
        call = endpoint.build(body, context)
        return call if priority is None else replace(call, request=replace(call.request, priority=priority))

    def _rules(self, name: str, model: Model, traits: Traits) -> ItemRules:
        return ItemRules(
            fingerprint=self._catalog.fingerprint(name),
            counted=traits.counts_items,
            truncation=traits.truncation,
            logits=traits.logits,
            inputs_max=model.inputs_max,
            input_tokens_max=model.input_tokens_max,
            documents_max=model.documents_max,
            input_types=traits.input_types,
        )


def _check_capability(name: str, model: Model, needed: Capability) -> None:
    """Refuse what the model does not serve; where something else comes close, say what."""
    served = capabilities_of(model)
    if needed in served:
        return
    message = f"The model {name} does not serve {needed.value}."
    if needed is Capability.RERANK and Capability.EMBEDDING in served:
        message += ' To compare embeddings instead, send `"mode": "bi-encoder"`.'
    raise InvalidRequest(message, param="model", code="capability_not_supported")
