"""Turns a wire body into a call: the one way for requests at the front door and for the lines of a batch.

It refuses a model that is not in the catalogue, one that does not serve the endpoint, and images for one that sees none;
it runs nothing. Images are looked at here, so that no door can forget it.
"""

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from forebay.dialects import rerank, tokens
from forebay.dialects.anthropic import messages
from forebay.dialects.images import ImageRef
from forebay.dialects.imaging import ImageRules
from forebay.dialects.items import ItemRules
from forebay.dialects.openai import audio, embeddings, images
from forebay.dialects.openai.call import Call, Context, Otherwise, Thread, Wire, parse
from forebay.dialects.openai.chat import ChatBody, chat_call, images_of
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.dialects.openai.responses import ResponseBody, response_call, response_images
from forebay.errors import ForebayError, InvalidRequest, ModelNotFound
from forebay.inference import Capability, Priority
from forebay.media.images import Images
from forebay.model_config import Model, Trouble, UpstreamModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import Traits, capabilities_of, picture_rules, traits_of
from forebay.replicas.fallbacks import trouble_of

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
TRANSCRIPTIONS = audio.TRANSCRIPTIONS
TRANSLATIONS = audio.TRANSLATIONS
ALIGNMENTS = audio.ALIGNMENTS
DIARIZATIONS = audio.DIARIZATIONS
IMAGE_EDITS = images.EDITS
IMAGE_GENERATIONS = images.GENERATIONS


def _without_images(_body: Wire) -> Sequence[ImageRef]:
    return ()


def _alone(_body: Wire, _diarization_model: str) -> Sequence[tuple[str, str, Capability]]:
    return ()


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[BodyT]):
    """What a path asks of a model, the body that it takes, and how that becomes a call.

    `images` finds the images of a body; `build` gets what became of them as `Context.images`, in the same order.
    `needs` says what the model must be able to do where the body decides it; `others` finds the further models that it
    takes, each with the field that names it and what it has to serve.
    """

    capability: Capability
    body: type[BodyT]
    build: Callable[[BodyT, Context], Call]
    images: Callable[[BodyT], Sequence[ImageRef]] = _without_images
    needs: Callable[[BodyT], Capability] | None = None
    others: Callable[[BodyT, str], Sequence[tuple[str, str, Capability]]] = _alone


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
    TRANSCRIPTIONS: Endpoint(
        Capability.TRANSCRIPTION, audio.TranscriptionBody, audio.transcription_call, others=audio.other_models
    ),
    TRANSLATIONS: Endpoint(
        Capability.TRANSLATION, audio.TranslationBody, audio.translation_call, others=audio.other_models
    ),
    ALIGNMENTS: Endpoint(Capability.ALIGNMENT, audio.AlignmentBody, audio.alignment_call),
    DIARIZATIONS: Endpoint(Capability.DIARIZATION, audio.DiarizationBody, audio.diarization_call),
    IMAGE_EDITS: Endpoint(Capability.IMAGE_EDIT, images.EditBody, images.edit_call),
    IMAGE_GENERATIONS: Endpoint(Capability.IMAGE_GENERATION, images.GenerationBody, images.generation_call),
}
# Lines of batches go to these: whoever counts wants to know it now.
BATCH_ENDPOINTS = tuple(path for path in ENDPOINTS if path not in {COUNT_TOKENS, TOKENIZE, DETOKENIZE})


@dataclass(frozen=True, slots=True)
class _Asked:
    """A parsed body, who sent it, and its pictures once they are checked."""

    endpoint: Endpoint[Any]
    body: Any
    request_id: str
    project: str
    traceparent: str | None
    priority: Priority | None
    thread: Thread | None
    caller_key: str | None = field(repr=False)
    images: tuple[str, ...] = ()
    with_recording: bool = False
    pictures: int = 0
    with_mask: bool = False


# Waits for pictures as long as somebody is there to have them.
Watch = Callable[[Coroutine[Any, Any, tuple[str, ...]]], Awaitable[tuple[str, ...]]]

_OF_ITEMS = frozenset({Capability.EMBEDDING, Capability.RERANK})
_OF_PICTURES = frozenset({Capability.IMAGE_EDIT, Capability.IMAGE_GENERATION})
_NO_RULES, _NO_PICTURES = ItemRules(), ImageRules()


class Calls:
    """Makes calls for the models of a catalogue."""

    def __init__(self, catalog: Catalog, images: Images, diarization_model: str) -> None:
        self._catalog = catalog
        self._images = images
        self._diarization_model = diarization_model

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
        caller_key: str | None = None,
        watch: Watch | None = None,
        with_recording: bool = False,
        pictures: int = 0,
        with_mask: bool = False,
    ) -> Call:
        """The call that `raw` asks for at `path`, which is one of ENDPOINTS. `priority` overrides that of the tier.

        `caller_key` is the caller's own key for an upstream, if there is one; `watch` may end the wait for images;
        `with_recording` tells that a recording came beside the body, `pictures` how many images did, and `with_mask` a mask.
        Raises InvalidRequest and ModelNotFound; where the body has images also what `Images.inline` raises.
        """
        endpoint = ENDPOINTS[path]
        body = parse(endpoint.body, raw)
        del raw  # with images it is large, and its turn to be looked at may be long in coming
        asked = _Asked(
            endpoint,
            body,
            request_id,
            project,
            traceparent,
            priority,
            thread,
            caller_key,
            with_recording=with_recording,
            pictures=pictures,
            with_mask=with_mask,
        )
        self._check(asked, body.model)
        if refs := endpoint.images(body):
            looked_at = self._images.inline(refs, project, patient=priority is Priority.BATCH)
            asked = replace(asked, images=await (looked_at if watch is None else watch(looked_at)))
        call = self._make(asked, body.model)
        model = self._catalog.get(body.model)
        others = self._catalog.fallbacks(body.model)
        return replace(call, otherwise=self._otherwise(asked, others, model.fallback_on)) if others else call

    def _otherwise(self, asked: "_Asked", names: tuple[str, ...], on: tuple[Trouble, ...]) -> Otherwise:
        """What gives the call for the first of `names` that can take it, where the trouble is one of `on`."""

        def otherwise(error: ForebayError) -> Call | None:
            if trouble_of(error) not in on:
                return None
            for place, name in enumerate(names, 1):
                try:
                    self._check(asked, name)
                    call = self._make(asked, name)
                except InvalidRequest:
                    continue
                return replace(call, otherwise=self._otherwise(asked, names[place:], on))
            return None

        return otherwise

    def _check(self, asked: "_Asked", name: str) -> None:
        """Refuse what the model by this name cannot do at all."""
        model, endpoint = self._catalog.get(name), asked.endpoint
        needed = endpoint.capability if endpoint.needs is None else endpoint.needs(asked.body)
        _check_capability(name, model, needed)
        refs = endpoint.images(asked.body)
        if refs and not traits_of(model).sees_images:
            raise InvalidRequest(
                f"The model {name} does not take images.", param=refs[0].param, code="capability_not_supported"
            )
        if _wants_key(model) and asked.caller_key is None:
            raise InvalidRequest(
                f"The model {name} takes your own key of its provider, in the header X-Upstream-Authorization. Lines of "
                "batches and responses in the background cannot bring one.",
                param="model",
                code="upstream_key_required",
            )
        for param, other, needed in endpoint.others(asked.body, self._diarization_model):
            self._check_other(param, other, needed)

    def _check_other(self, param: str, name: str, needed: Capability) -> None:
        """Refuse a further model that is not there, or does something else."""
        try:
            _check_capability(name, self._catalog.get(name), needed)
        except (InvalidRequest, ModelNotFound) as error:
            error.param = param
            raise

    def _make(self, asked: "_Asked", name: str) -> Call:
        """The call for the model by this name, which may be another than that of the body."""
        model = self._catalog.get(name)
        traits = traits_of(model)
        body = asked.body if name == asked.body.model else asked.body.model_copy(update={"model": name})
        key = asked.caller_key if _wants_key(model) else None
        items, paints = asked.endpoint.capability in _OF_ITEMS, asked.endpoint.capability in _OF_PICTURES
        context = Context(
            request_id=asked.request_id,
            project=asked.project,
            traceparent=asked.traceparent,
            max_tokens=model.max_tokens,
            slots=model.slots,
            remote_model=traits.remote_model,
            enforces_tool_choice=traits.enforces_tool_choice,
            extensions=traits.extensions,
            items=self._rules(name, model, traits, key) if items else _NO_RULES,
            images=asked.images,
            thread=asked.thread,
            with_recording=asked.with_recording,
            diarization_model=self._diarization_model,
            pictures=asked.pictures,
            with_mask=asked.with_mask,
            picture_rules=picture_rules(model, self._catalog.fingerprint(name)) if paints else _NO_PICTURES,
        )
        call = asked.endpoint.build(body, context)
        priority = call.request.priority if asked.priority is None else asked.priority
        if key is None and priority is call.request.priority:
            return call
        return replace(call, request=replace(call.request, priority=priority, caller_key=key))

    def _rules(self, name: str, model: Model, traits: Traits, key: str | None) -> ItemRules:
        # What somebody's own key has paid for is for that key alone.
        own = "" if key is None else hashlib.sha256(key.encode()).hexdigest()
        return ItemRules(
            fingerprint=self._catalog.fingerprint(name) + own,
            counted=traits.counts_items,
            truncation=traits.truncation,
            logits=traits.logits,
            inputs_max=model.inputs_max,
            input_tokens_max=model.input_tokens_max,
            documents_max=model.documents_max,
            input_types=traits.input_types,
        )


def _wants_key(model: Model) -> bool:
    """Whether its provider is asked with the caller's own key."""
    return isinstance(model, UpstreamModel) and model.options.caller_key


def _check_capability(name: str, model: Model, needed: Capability) -> None:
    """Refuse what the model does not serve; where something else comes close, say what."""
    served = capabilities_of(model)
    if needed in served:
        return
    message = f"The model {name} does not serve {needed.value}."
    if needed is Capability.RERANK and Capability.EMBEDDING in served:
        message += ' To compare embeddings instead, send `"mode": "bi-encoder"`.'
    raise InvalidRequest(message, param="model", code="capability_not_supported")
