"""Which arrays a cache has, and of which form, by its init record alone: what is stored must be of that form."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmkd.cache_tools.cache.arrays import ArrayForm, split_arrays, static_arrays, static_chunks
from mmkd.cache_tools.cache.logit_formats import StorageFormat
from mmkd.cache_tools.layout import SplitLayout
from mmkd.cache_tools.views.canonical import THUMBNAIL_SIZE

TEXT = np.dtype(str)


def static_forms(split: SplitLayout, heads: Sequence[str], *, frames: int) -> dict[str, ArrayForm]:
    """Return name -> form of the arrays of a split that are written when a cache starts."""
    rows, views = split.rows, split.views
    values = {
        "clip_id": ((rows,), "str"),
        "video_identity": ((rows,), "str"),
        "facts": ((rows, 4), "int32"),
        "frame_index": ((rows, views, frames), "int32"),
        "crop_xywh": ((rows, views, 4), "int32"),
        "flip": ((rows, views), "bool"),
    }
    named = static_arrays(split.name, values, dict.fromkeys(heads, ((rows,), "int64")))
    blocks = {split.name: split.shard_views}
    return {
        name: ArrayForm(name, shape, static_chunks(name, shape, blocks), np.dtype(kind), fill=None)
        for name, (shape, kind) in named.items()
    }


def split_forms(
    split: SplitLayout, experts: Mapping[str, StorageFormat], heads: Mapping[str, int], *, frames: int
) -> dict[str, ArrayForm]:
    """Return name -> form of all arrays of a split; `heads` is name -> number of classes."""
    sharded = {
        spec.name: ArrayForm(
            spec.name,
            spec.shape,
            (split.shard_rows, split.shard_views, *spec.shape[2:]),
            np.dtype(spec.dtype),
            spec.fill,
        )
        for spec in split_arrays(split, experts, heads, thumbnail_size=THUMBNAIL_SIZE)
    }
    return static_forms(split, list(heads), frames=frames) | sharded


def static_keys(split: SplitLayout, heads: Sequence[str], *, frames: int) -> Iterator[str]:
    """Yield the keys, within the group, of what is written of a split when a cache starts."""
    for form in static_forms(split, heads, frames=frames).values():
        yield f"{form.name}/zarr.json"
        yield from form.keys()


def require_form(found: ArrayForm, expected: ArrayForm) -> None:
    """Raise ValueError unless a stored array is of the form that the cache's init record gives it."""
    for what in ("shape", "block", "dtype"):
        stored, wanted = getattr(found, what), getattr(expected, what)
        # Texts have several types, by the version of Zarr.
        same = stored.kind in "OTU" if what == "dtype" and wanted == TEXT else stored == wanted
        if not same:
            raise ValueError(f"its {what} is {stored}, and {wanted} by the cache's init.json")
