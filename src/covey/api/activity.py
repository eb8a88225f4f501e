"""`GET /events`: what happened lately, in words, page by page from a cursor on. Pure.

A cursor is `<life>-<number>`: the number of the last event that the client has, in one life of one node. Another life's
cursor starts from the oldest event there is, and the page says that something may have been missed.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct

from covey.api.errors import RequestError
from covey.schema.activity import ActivityEvent, ActivityPage

LIMIT_DEFAULT: Final = 100
LIMIT_MAX: Final = 1000
DIGITS_MAX: Final = 15


class EventsQuery(Struct, frozen=True):
    """`after`: the number of the last event that the client has; 0 is none. `is_foreign`: its cursor is not of here."""

    after: int
    limit: int
    is_foreign: bool


def parse_events(parameters: Mapping[str, str], life: str) -> EventsQuery:
    """Raises `RequestError`."""
    limit = _number(parameters.get("limit") or str(LIMIT_DEFAULT))
    if limit is None or not 1 <= limit <= LIMIT_MAX:
        raise RequestError(f"The parameter 'limit' must be a whole number from 1 to {LIMIT_MAX}.", param="limit")
    cursor = parameters.get("after")
    if not cursor:
        return EventsQuery(0, limit, is_foreign=False)
    written_in, separator, digits = cursor.rpartition("-")
    number = _number(digits)
    if not separator or number is None:
        raise RequestError("The parameter 'after' must be a 'cursor' that GET /events gave out.", param="after")
    return (
        EventsQuery(number, limit, is_foreign=False) if written_in == life else EventsQuery(0, limit, is_foreign=True)
    )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX else None


def render_page(page: ActivityPage, query: EventsQuery, life: str) -> dict[str, Any]:
    last = page.events[-1].number if page.events else max(query.after, page.first_number - 1)
    return {
        "events": [render_event(event, life) for event in page.events],
        "cursor": f"{life}-{last}",
        "missed": query.is_foreign or (query.after > 0 and query.after + 1 < page.first_number),
    }


def render_event(event: ActivityEvent, life: str) -> dict[str, Any]:
    when = datetime.fromtimestamp(event.at_ms / 1000, UTC)
    return {
        "id": f"{life}-{event.number}",
        "at": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "kind": event.kind,
        "subject": event.subject,
        "text": event.text,
    }
