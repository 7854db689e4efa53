"""zarr-python with its defaults and nothing of the user's: what we write and read depends on no environment.

When it is imported, Zarr takes `ZARR_*` variables and the files of four folders (`~/.config/zarr` among them): an
order of axes, a codec's class, another format; a malformed line makes the import fail. So it is imported here, and
only here. The setting is that of the process, since an array cannot be given one of its own when it is opened.
"""

import donfig  # type: ignore[import-untyped]  # donfig has no types


def _without_configuration(*_: object, **__: object) -> dict[str, object]:
    return {}


_collect = donfig.Config.collect
donfig.Config.collect = _without_configuration
try:
    import zarr
    from zarr.codecs import ZstdCodec
    from zarr.core.buffer import Buffer, default_buffer_prototype
    from zarr.storage import MemoryStore
finally:
    donfig.Config.collect = _collect
zarr.config.refresh(paths=[], env={})  # where somebody else imported it before us
zarr.config.set({"array.write_empty_chunks": True})  # an absent chunk would read as fill values, unchecked

__all__ = ["Buffer", "MemoryStore", "ZstdCodec", "default_buffer_prototype", "zarr"]
