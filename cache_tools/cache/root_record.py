"""`root.json`: written last, it vouches for `init.json` and `index.jsonl`; readers start here."""

from collections.abc import Mapping
from dataclasses import dataclass

from mmkd.cache_tools.cache.fingerprints import canonical_json, fingerprint
from mmkd.cache_tools.cache.init_record import check_schema
from mmkd.cache_tools.cache.sealed import damaged, open_seal, seal
from mmkd.cache_tools.layout import INDEX, INIT, SCHEMA
from mmkd.data_manifests.typed_json import STRICT, typed


@dataclass(frozen=True)
class RootRecord:
    """What `root.json` says."""

    __pydantic_config__ = STRICT
    objects: Mapping[str, str]
    """Key of init.json and of index.jsonl -> SHA-256 of its bytes."""
    schema: str = SCHEMA
    """Schema of the cache."""

    def __post_init__(self) -> None:
        """Raise ValueError unless it names just init and index."""
        if self.objects.keys() != {INIT, INDEX}:
            raise ValueError(f"objects: must be {INIT} and {INDEX}")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "RootRecord":
        """Parse `root.json`; raise InputError for another schema, VerificationError, with `where`, when damaged."""
        check_schema(data, where)
        try:
            fields = open_seal(data)
            if "schema" not in fields:
                raise ValueError("it has no schema")
            return typed(cls, fields)
        except ValueError as error:
            raise damaged(where, error) from error

    def to_bytes(self) -> bytes:
        """Return the contents of `root.json`."""
        return (canonical_json(seal(self._fields())) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        """Over everything that the cache holds."""
        return fingerprint(self._fields())

    def _fields(self) -> dict[str, object]:
        return {"schema": self.schema, "objects": dict(self.objects)}
