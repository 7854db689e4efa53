"""The check that the student sees what the teacher saw: stored thumbprints against fresh pixels, on a sample."""

from dataclasses import dataclass

import numpy as np

from mmkd.cache_tools.cache.reader import CacheReader
from mmkd.cache_tools.cache.split_table import SplitTable
from mmkd.cache_tools.frames.records import IntArray
from mmkd.cache_tools.views.canonical import pixel_hash, thumbnail
from mmkd.cache_tools.views.keyed_words import KeyedWords
from mmkd.data_manifests.errors import VerificationError
from mmkd.student.data.batches import read_item
from mmkd.student.data.rgb_views import RGBViews

MEAN_DIFFERENCE_LIMIT = 3.0
"""Grey levels: colour conversion and resizing of other processors differ by less, another frame or crop by more."""


@dataclass(frozen=True)
class ThumbprintReport:
    """What the sample showed."""

    checked: int
    """Views compared."""
    rounded: int
    """Views whose pixels differ by rounding alone."""


def check_thumbprints(
    reader: CacheReader, table: SplitTable, data: RGBViews, *, rows: IntArray, sample: int
) -> ThumbprintReport:
    """Compare `sample` views of `data` (whose row i is the table's `rows[i]`) with the stored thumbprints.

    Raises VerificationError, naming clip and view, when a view shows another frame or crop than the teacher saw.
    """
    hashes, thumbnails = reader.thumbprints(table.name)
    words = KeyedWords("thumbprints", reader.fingerprint, table.name)
    rounded = 0
    for _ in range(sample):
        position, view = words.below(len(rows)), words.below(table.views)
        row = int(rows[position])
        pixels = read_item(data, position, view)["rgb"]
        if pixel_hash(pixels) == int(hashes[row, view]):
            continue
        difference = float(np.abs(thumbnail(pixels).astype(np.int16) - thumbnails[row, view]).mean())
        if difference > MEAN_DIFFERENCE_LIMIT:
            raise VerificationError(
                f"clip {table.clip_ids[row]!r}, view {view}: these are not the pixels that the teacher saw (mean "
                f"difference {difference:.1f} grey levels); the videos have changed, or --videos names others"
            )
        rounded += 1
    return ThumbprintReport(sample, rounded)
