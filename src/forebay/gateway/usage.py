"""The route of usage: what was used by day, as OpenAI's usage pages tell it, grouped as is asked for.

It refuses to show a project what another one has used, and pages without an end.
"""

import datetime as dt
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic_core import from_json, to_json
from starlette.responses import Response

from forebay.errors import InvalidRequest
from forebay.gateway.answers import json_answer
from forebay.gateway.auth import Principal, principal
from forebay.quotas import Use, day_of
from forebay.store.key_format import Role
from forebay.store.usage import GROUPS, UsageRow, UsageStore

router = APIRouter(prefix="/v1", dependencies=[Depends(principal)])

Caller = Annotated[Principal, Depends(principal)]

_DAYS_MAX = 31
_ROWS_MAX = 1000
_DAY_SECONDS = 86_400
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FIRST_DAY, _LAST_DAY = "1970-01-01", "9998-12-31"  # there is always a day after
_NAMES = {
    "project_id": "project_id",
    "project": "project_id",
    "api_key_id": "key_id",
    "key": "key_id",
    "model": "model",
    "capability": "capability",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page begins: at a day, or behind a group of it."""

    day: str
    group: tuple[str, ...] | None = None

    def written(self) -> str:
        return urlsafe_b64encode(to_json([self.day, self.group])).decode()

    @classmethod
    def read(cls, token: str, groups: Sequence[str]) -> "_Place":
        """The same again. Raises InvalidRequest."""
        try:
            day, group = from_json(urlsafe_b64decode(token))
            place = cls(_day(day, "page"), None if group is None else tuple(map(str, group)))
        except (ValueError, TypeError):
            raise _no_page() from None
        if place.group is not None and len(place.group) != len(groups):
            raise _no_page()
        return place


@router.get("/usage")
async def show_usage(
    request: Request,
    caller: Caller,
    start_time: Annotated[str | None, Query(max_length=32)] = None,
    end_time: Annotated[str | None, Query(max_length=32)] = None,
    bucket_width: Annotated[str, Query(max_length=8)] = "1d",
    limit: Annotated[int, Query(ge=1, le=_DAYS_MAX)] = 7,
    page: Annotated[str | None, Query(max_length=2048)] = None,
) -> Response:
    """What was used from `start_time` to `end_time`, `limit` days a page, by `group_by`; a project sees its own."""
    if bucket_width != "1d":
        raise InvalidRequest("Usage is kept by day: `bucket_width` is 1d.", param="bucket_width")
    store: UsageStore = request.app.state.usage
    now = request.app.state.clock.now()
    groups = _groups(_listed(request, "group_by"))
    last = _last_day(end_time, now)
    first = day_of(now - (limit - 1) * _DAY_SECONDS) if start_time is None else _day(start_time, "start_time")
    place = _Place(first) if page is None else _Place.read(page, groups)
    until = min(last, _after(place.day, limit - 1))
    rows, more = await store.report(
        first=place.day,
        last=until,
        groups=groups,
        limit=_ROWS_MAX,
        project=None if caller.role is Role.ADMIN else caller.project_id,
        after=None if place.group is None else (place.day, *place.group),
        only=_only(request),
    )
    following = None
    if more:
        following, until = _Place(rows[-1].day, rows[-1].group), rows[-1].day
    elif until < last:
        following = _Place(_after(until, 1))
    names = await store.project_names({row.group[0] for row in rows}) if groups[:1] == ("project_id",) else {}
    return json_answer(
        {
            "object": "page",
            "data": _buckets(place.day, until, rows, groups, names),
            "has_more": following is not None,
            "next_page": None if following is None else following.written(),
        }
    )


def _buckets(
    first: str, last: str, rows: Sequence[UsageRow], groups: Sequence[str], names: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One for each day, also for those of which there is nothing to tell."""
    found = {day: list(of_day) for day, of_day in groupby(rows, key=lambda row: row.day)}
    buckets, day = [], first
    while day <= last:
        starts = int(_moment(day).timestamp())
        results = [_result(row.use, dict(zip(groups, row.group, strict=True)), names) for row in found.get(day, ())]
        ends = starts + _DAY_SECONDS
        buckets.append({"object": "bucket", "start_time": starts, "end_time": ends, "day": day, "results": results})
        day = _after(day, 1)
    return buckets


def _result(use: Use, group: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    project = group.get("project_id")
    return {
        "object": "usage.result",
        "num_model_requests": use.requests,
        "input_tokens": use.prompt_tokens,
        "input_cached_tokens": use.cached_tokens,
        "output_tokens": use.completion_tokens,
        "audio_seconds": use.audio_ms / 1000,
        "megapixel_steps": use.pixel_steps / 1_000_000,
        "images": use.images,
        "project_id": project,
        "project": names.get(project) if project else None,
        "api_key_id": group.get("key_id") or None,
        "model": group.get("model"),
        "capability": group.get("capability"),
    }


def _groups(asked: Sequence[str]) -> tuple[str, ...]:
    """The columns that are asked for, in one order. Raises InvalidRequest."""
    if unknown := [name for name in asked if name not in _NAMES]:
        raise InvalidRequest(f"`group_by` is of {', '.join(_NAMES)}, and not {unknown[0][:64]}.", param="group_by")
    chosen = {_NAMES[name] for name in asked}
    return tuple(name for name in GROUPS if name in chosen)


def _only(request: Request) -> dict[str, list[str]]:
    asked = (("project_ids", "project_id"), ("api_key_ids", "key_id"), ("models", "model"))
    return {column: values for name, column in asked if (values := _listed(request, name))}


def _listed(request: Request, name: str) -> list[str]:
    """A list in any of the forms that clients write it in. Raises InvalidRequest."""
    given = request.query_params.getlist(name) + request.query_params.getlist(f"{name}[]")
    values = [value for each in given for value in each.split(",") if value]
    if len(values) > 100 or any(len(value) > 128 for value in values):
        raise InvalidRequest(f"`{name}` has at most 100 values of at most 128 characters.", param=name)
    return values


def _last_day(end_time: str | None, now: float) -> str:
    """The day of the last moment before `end_time`, or that day itself."""
    if end_time is None:
        return day_of(now)
    if end_time.isascii() and end_time.isdigit():
        return _day(str(int(end_time) - 1), "end_time")
    return _day(end_time, "end_time")


def _day(value: Any, param: str) -> str:
    """A day as it is written, or that of a moment in seconds. Raises InvalidRequest."""
    text, day = str(value), ""
    with suppress(ValueError, OverflowError, OSError):
        if text.isascii() and text.isdigit() and len(text) <= 12:
            day = day_of(float(text))
        elif _DAY.fullmatch(text):
            _moment(text)
            day = text
    if _FIRST_DAY <= day <= _LAST_DAY:
        return day
    raise InvalidRequest(f"`{param}` is a day such as 2026-11-21, or a time in seconds since 1970.", param=param)


def _moment(day: str) -> dt.datetime:
    return dt.datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=dt.UTC)


def _after(day: str, days: int) -> str:
    return (_moment(day) + dt.timedelta(days=days)).strftime("%Y-%m-%d")


def _no_page() -> InvalidRequest:
    return InvalidRequest("`page` is the `next_page` of the page before, with the same `group_by`.", param="page")
