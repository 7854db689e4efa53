"""JSON values into named types, at the edge: what is not of its type is refused before anything is made of it."""

import json
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True)
"""For a dataclass that is read from JSON, as its `__pydantic_config__`: no other fields, and no other types."""
PART = ConfigDict(strict=True)
"""For a dataclass that has those fields of a JSON object which are used: others are passed over."""


def typed(kind: type[T], value: Any) -> T:
    """Return a JSON value as a dataclass (or any type), checked to the last leaf.

    Raises ValueError that names the first field which is missing, unknown or of another type, in one line.
    """
    try:
        # Through text, since only there pydantic takes lists for tuples and is strict about all the rest.
        found: T = _adapter(cast(Hashable, kind)).validate_json(json.dumps(value, allow_nan=False))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in fault["loc"])
        what = fault["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("\n", " ")
        raise ValueError(f"{name}: {what}" if name else what) from None
    return found


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
