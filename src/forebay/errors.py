"""Everything that can go wrong, and whose fault it is.

ForebayError
├── CallerError                 the request is wrong; sending it again will not help
│   ├── InvalidRequest          400
│   ├── Unauthorized            401
│   ├── PermissionDenied        403
│   ├── NotFound                404
│   │   └── ModelNotFound       404
│   ├── Conflict                409  something else is there already
│   ├── PayloadTooLarge         413
│   ├── QuotaExceeded           429  the project has used up what it may use in a day, in a month or at all
│   └── Quarantined             422  this input was in flight at two engine deaths
├── Overloaded                  429  the line for the model is full, or the wait in it too long
│   └── RateLimited             429  the key has used up its rate
├── ServerError                 our fault, or an engine's
│   ├── EngineCrashed           502  the engine process died under this request
│   ├── EngineGarbled           502  the engine answered with something that is not an answer
│   ├── UpstreamError           502  the provider behind a model failed, or refuses this server
│   ├── Unreachable             502  an address that a user supplied does not answer
│   ├── EngineUnavailable       503  no engine for the model is up, and none could be started
│   │   ├── ModelTooLarge       503  there will be no memory for the model, whoever leaves
│   │   └── CircuitOpen         503  the provider behind a model failed too often, and is left alone for a while
│   ├── ModelNotReady           503  the model is still being pulled
│   ├── Preempted               503  batch work gave its place to an online request; inside, it is run again
│   ├── ShuttingDown            503  the server is stopping
│   ├── StoreUnavailable        503  the database or the blob store cannot be reached
│   ├── EngineTimeout           504  the engine did not answer in time
│   ├── InsufficientStorage     507  there is no space left to keep it
│   └── LeaseLost               500  another worker has the job; nothing of this attempt may be written
├── RequestCancelled            499  somebody cancelled it, or its caller has gone
└── SetupError                  ---  the server cannot start or a command cannot go on; the message says what to do

The gateway turns one of these into one HTTP answer, and the command line turns a SetupError into one sentence.
Nothing else looks at the type of an error. The docstring of a class is its default message.
"""

from collections.abc import Mapping


class ForebayError(Exception):
    """Something went wrong."""

    status = 500
    code = "internal_error"
    type = "server_error"
    retryable = False

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message or self.__doc__)
        self.param = param
        self.code = code or self.code
        self.retry_after_seconds = retry_after_seconds


class CallerError(ForebayError):
    """The request cannot be served as it is."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidRequest(CallerError):
    """The request is not valid."""

    index: int | None = None  # of the content that an engine refused, in what that engine was sent


class Unauthorized(CallerError):
    """The API key is missing, unknown, expired or revoked. Send it as `Authorization: Bearer <key>`."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDenied(CallerError):
    """This API key may not do that."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class NotFound(CallerError):
    """There is nothing here by that name."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model is configured. GET /v1/models lists the ones that are."""

    code = "model_not_found"


class Conflict(CallerError):
    """This clashes with what is there already."""

    status = 409
    code = "conflict"


class PayloadTooLarge(CallerError):
    """The request body is larger than this server accepts."""

    status = 413
    code = "payload_too_large"


class Quarantined(CallerError):
    """An engine died twice while it was working on this input, so it is refused for a while. Change the input."""

    status = 422
    code = "quarantined"


class QuotaExceeded(CallerError):
    """This project has used up its quota."""

    status = 429
    code = "insufficient_quota"
    type = "insufficient_quota"
    headers: Mapping[str, str] = {}  # what is left of each quota


class Overloaded(ForebayError):
    """The line for this model is full. Try again later."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"
    retryable = True


class RateLimited(Overloaded):
    """This API key has used up its rate. Try again later."""

    code = "rate_limit_exceeded"


class ServerError(ForebayError):
    """The server failed."""

    retryable = True


class EngineCrashed(ServerError):
    """The engine died while it was working on this request. It is being restarted; try again."""

    status = 502
    code = "engine_crashed"


class EngineGarbled(ServerError):
    """The engine answered with something that is not an answer."""

    status = 502
    code = "engine_garbled"


class UpstreamError(ServerError):
    """The provider behind this model failed on this request."""

    status = 502
    code = "upstream_error"


class Unreachable(ServerError):
    """The address cannot be reached."""

    status = 502
    code = "url_unreachable"


class EngineUnavailable(ServerError):
    """No engine for this model is available right now."""

    status = 503
    code = "engine_unavailable"


class ModelTooLarge(EngineUnavailable):
    """This server has no memory for the model. Choose another one."""

    code = "model_too_large"
    retryable = False


class CircuitOpen(EngineUnavailable):
    """The provider behind this model has failed several times in a row and is left alone. Try again later."""


class ModelNotReady(ServerError):
    """The model is still being pulled. Try again later."""

    status = 503
    code = "model_not_ready"


class Preempted(ServerError):
    """This batch work gave its place to an online request. It is run again."""

    status = 503
    code = "preempted"


class ShuttingDown(ServerError):
    """The server is shutting down. Try again on another one, or in a moment."""

    status = 503
    code = "shutting_down"


class StoreUnavailable(ServerError):
    """The store cannot be reached right now. Try again later."""

    status = 503
    code = "store_unavailable"


class EngineTimeout(ServerError):
    """The engine did not answer in time."""

    status = 504
    code = "request_timeout"


class InsufficientStorage(ServerError):
    """There is no space left on this server to keep that. Delete files, or ask its operator for more."""

    status = 507
    code = "insufficient_storage"


class LeaseLost(ServerError):
    """Another worker has taken this job over."""

    code = "lease_lost"


class RequestCancelled(ForebayError):
    """The request was cancelled."""

    status = 499
    code = "client_closed_request"
    type = "request_cancelled"


class SetupError(ForebayError):
    """The server cannot start as it is configured."""

    code = "setup_error"
