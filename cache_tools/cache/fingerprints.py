"""Fingerprints: content hashes of everything that could change a number, as a tree.

The base node covers manifest, views and decoding; each expert's node adds its weights and preprocessing. So an
expert can be added or replaced without invalidating the others. Contents go in, never paths, times or hosts.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkd.data_manifests.errors import FingerprintError
from mmkd.data_manifests.regular_file import open_regular

Fields = Mapping[str, Any]


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(fields: Fields) -> str:
    """Return the SHA-256 (64 hex digits) of the fields' canonical JSON."""
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(stored: Fields, current: Fields, prefix: str = "") -> Iterator[str]:
    """Yield one line for each field that differs, e.g. `views.size_px: cache 224, now 112`."""
    for key in sorted(set(stored) | set(current)):
        old, new, name = stored.get(key), current.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, prefix=f"{name}.")
        elif key not in stored or key not in current:
            yield f"{name}: only {'now' if key in current else 'in the cache'}"
        elif canonical_json(old) != canonical_json(new):
            yield f"{name}: cache {_short(old)}, now {_short(new)}"


def require_same(stored: Fields, current: Fields, *, what: str, advice: str) -> None:
    """Raise FingerprintError with a field-by-field difference unless both are equal."""
    refuse_differences(differences(stored, current), what=what, advice=advice)


def refuse_differences(lines: Iterable[str], *, what: str, advice: str) -> None:
    """Raise FingerprintError with these lines, where there is one."""
    if text := "; ".join(lines):
        raise FingerprintError(f"{what} differs: {text}. {advice}")


def _short(value: Any) -> str:
    text = canonical_json(value)
    # The hash tells long values apart that begin alike, such as class lists.
    return text if len(text) <= 60 else f"{text[:24]}… (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]}…)"
