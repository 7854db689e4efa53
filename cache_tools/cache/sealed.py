"""The seal: a JSON object that carries the hash of all that it says, so that no flipped bit changes a meaning."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from mmkd.cache_tools.cache.fingerprints import fingerprint
from mmkd.data_manifests.errors import InputError, VerificationError

log = logging.getLogger("mmkd")
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


def open_versions(data: bytes, where: str, *, schema: str, before: str | None, advice: str) -> dict[str, Any]:
    """Return the fields of a sealed object of `schema`, or, with a warning, of the form before the seal.

    The form `before` says that schema, or says none where that is None, and has no seal. Raises VerificationError
    for anything else: one flipped bit cannot make a sealed object look like one from before the seal.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and value.get("schema") == before and SEAL not in value:
        log.warning(
            "%s has no seal, by which a later change to it would be noticed: an earlier version made it", where
        )
        return value
    fields = unsealed(data, where, advice=advice)
    if fields.get("schema") != schema:
        raise InputError(f"{where} has schema {fields.get('schema')!r}; this version reads {schema!r}")
    return fields


def damaged(where: str, what: object, *, advice: str = BUILD_AGAIN) -> VerificationError:
    """Return the error for stored bytes that are not what was written."""
    return VerificationError(f"{where} is damaged ({what}); {advice}")
