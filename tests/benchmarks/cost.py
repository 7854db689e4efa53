"""What the caches of real data sets would take, calculated: `python tests/benchmarks/cost.py` prints the table.

Clips are the publishers' counts, a clip's frames and rates what one H200 with 16 cores showed
(Something-Something's recipe end to end; TV-L1 at its default; Swin-T in fp32). Where a data set was never built,
hours are those of flow and experts one after the other on the device, without decoding. Bytes are the arrays of
logits, maxima, status and thumbprints before compression, as `mmkd-cache plan` counts them; objects are neither
compressed nor counted here.
"""

from dataclasses import dataclass

THUMBPRINT_BYTES = 8 + 144
MAXIMUM_BYTES, STATUS_BYTES, FP16_BYTES = 4, 1, 2
FLOW_PAIRS_PER_SECOND = 2000
VIEWS_PER_SECOND = 228
"""Swin-T, 16 frames of 224 x 224, fp32."""
SOMETHING_CLIPS_PER_SECOND = 5.8
SCRATCH_BYTES_PER_PAIR = 2 * 256 * 427
"""A field of 8-bit codes at short side 256 of a 16:9 video."""


@dataclass(frozen=True)
class DataSet:
    """One data set with the recipe that `config example` prints."""

    name: str
    train: int
    """Clips with `views` random views."""
    evaluation: int
    """Clips with one view."""
    views: int
    frames: int
    """T, frames of a view."""
    clip_frames: int
    """Native frames of a clip that a build decodes, on the mean."""
    pairs: int
    """Flow pairs of a training clip that its views need, at most all of the clip's."""
    heads: tuple[int, ...]
    """Classes of each head."""
    experts: int
    video_experts: int
    """Of them those that run Swin-T."""
    clips_per_second: float | None = None
    """Measured end to end, where it was."""

    def rows(self) -> list[str]:
        """Return the cells of its line."""
        clips = self.train + self.evaluation
        looks = self.train * self.views + self.evaluation
        pairs = self.train * self.pairs + self.evaluation * min(self.pairs, self.frames)
        if self.clips_per_second:
            hours = clips / self.clips_per_second / 3600
        else:
            experts = looks * self.video_experts * self.frames / 16 / VIEWS_PER_SECOND
            hours = (pairs / FLOW_PAIRS_PER_SECOND + experts) / 3600
        logits = sum(FP16_BYTES * classes + MAXIMUM_BYTES for classes in self.heads) + STATUS_BYTES
        size = looks * (self.experts * logits + THUMBPRINT_BYTES)
        scratch = self.train * (self.clip_frames - 1) * SCRATCH_BYTES_PER_PAIR
        return [
            self.name,
            f"{self.train:,} + {self.evaluation:,}",
            f"{clips * self.clip_frames / 1e6:.1f} M",
            f"{pairs / 1e6:.1f} M",
            f"{hours:.1f}" + ("" if self.clips_per_second else " and decoding"),
            f"{size / 1e9:.2f} GB",
            f"{scratch / 1e12:.1f} TB",
        ]


DATA_SETS = (
    DataSet("Something-Something V2", 168_913, 24_777, 8, 16, 45, 45, (174,), 3, 2, SOMETHING_CLIPS_PER_SECOND),
    DataSet(
        "Something-Else, compositional", 54_919, 57_876, 8, 16, 45, 45, (174,), 3, 2, SOMETHING_CLIPS_PER_SECOND
    ),
    DataSet("EPIC-KITCHENS-100", 67_217, 9_668, 8, 8, 150, 64, (97, 300), 4, 3),
)
"""EPIC's clips are taken for 2.5 s at 60 frames a second: only `plan` on the real files knows."""
TITLES = ("data set", "clips", "frames", "flow pairs", "hours on one H200", "cache", "flow scratch, 8 bit")


def main() -> None:
    """Print the table."""
    print("| " + " | ".join(TITLES) + " |")
    print("|" + "---|" * len(TITLES))
    for data_set in DATA_SETS:
        print("| " + " | ".join(data_set.rows()) + " |")


if __name__ == "__main__":
    main()
