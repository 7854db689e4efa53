"""The seal: a JSON object that carries the hash of all that it says, so that no flipped bit changes a meaning."""

import json
from collections.abc import Mapping
from typing import Any

from mmkd.cache_tools.fingerprints import fingerprint
from mmkd.data_manifests.errors import VerificationError

SEAL = "seal"
BUILD_AGAIN = "delete it and run the build again"


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the hash that closes them."""
    return {**fields, SEAL: fingerprint(fields)}


def unsealed(data: bytes, where: str, *, advice: str = BUILD_AGAIN) -> dict[str, Any]:
    """Return the fields of a sealed JSON object; raise VerificationError, with `where` and advice, when damaged."""
    try:
        return open_seal(data)
    except ValueError as error:
        raise damaged(where, error, advice=advice) from error


def open_seal(data: bytes) -> dict[str, Any]:
    """Return the fields of a sealed JSON object; raise ValueError that says what is wrong with it."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or SEAL not in value:
            raise ValueError("it has no seal")
        if value.pop(SEAL) != fingerprint(value):
            raise ValueError("its hash differs")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def damaged(where: str, what: object, *, advice: str = BUILD_AGAIN) -> VerificationError:
    """Return the error for stored bytes that are not what was written."""
    return VerificationError(f"{where} is damaged ({what}); {advice}")
