"""Reading the API server's objects: any part of them may be missing or null, and is then empty."""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

CONTAINER = "trainer"
ENDED = ("Succeeded", "Failed")
Object = dict[str, Any]


def child(object_: Object, *path: str) -> Object:
    """The object at the end of the path."""
    found: Any = object_
    for name in path:
        found = cast("Object", found).get(name)
        if not isinstance(found, dict):
            return {}
    return cast("Object", found)


def children(object_: Object, *path: str) -> list[Object]:
    """The objects of the list at the end of the path."""
    found: Any = child(object_, *path[:-1]).get(path[-1])
    return [cast("Object", item) for item in cast("list[Any]", found) if isinstance(item, dict)] if isinstance(found, list) else []


def word(object_: Object, *path: str) -> str:
    """The text at the end of the path."""
    found: Any = child(object_, *path[:-1]).get(path[-1])
    return "" if found is None else str(found)


def number(object_: Object, *path: str) -> int:
    return int(word(object_, *path) or 0)


def time_at(object_: Object, *path: str) -> datetime | None:
    text = word(object_, *path)
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def true_conditions(object_: Object) -> dict[str, Object]:
    """Those that hold, by type."""
    return {word(item, "type"): item for item in children(object_, "status", "conditions") if item.get("status") == "True"}


def condition(object_: Object, kind: str) -> Object:
    return next((item for item in children(object_, "status", "conditions") if item.get("type") == kind), Object())


def is_over(job: Object) -> bool:
    return not {"Complete", "Failed"}.isdisjoint(true_conditions(job))


def is_alive(pod: Object) -> bool:
    return word(pod, "status", "phase") not in ENDED


def container_state(pod: Object) -> Object:
    """What the trainer's container does: waiting, running or terminated."""
    return next((child(item, "state") for item in children(pod, "status", "containerStatuses") if item.get("name") == CONTAINER), Object())


def by_age(pods: list[Object]) -> list[Object]:
    return sorted(pods, key=lambda pod: (word(pod, "metadata", "creationTimestamp"), word(pod, "metadata", "name")))
