"""What computing a sample of a cache again showed, for people and for programs."""

from dataclasses import dataclass, field
from pathlib import Path

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import VerificationError

LISTED = 5


@dataclass
class PixelDrift:
    """What the canonical views of the sample look like now."""

    views: int = 0
    """Views compared."""
    rounded: list[str] = field(default_factory=list)
    """Views whose pixels differ by rounding: another decoder, colour conversion or resizing."""
    exchanged: list[str] = field(default_factory=list)
    """Views that show another frame or crop."""


@dataclass(frozen=True)
class HeadDrift:
    """What one head of one expert says now."""

    views: int
    """Views compared: those with stored logits."""
    max_kl_nats: float
    """Largest KL(stored || fresh) at T = 1; infinite for logits that are not finite."""
    mean_kl_nats: float
    """Its mean."""
    same_pixels_max_kl_nats: float
    """The largest of views whose pixels are the stored ones: drift of the network (or of flow or boxes) alone."""
    argmax_changes: int
    """Views whose largest class is another one."""
    worst: str
    """The view with the largest."""


@dataclass
class DriftReport:
    """What the sample showed."""

    max_kl_nats: float
    """Tolerance."""
    sample: int = 0
    """Views drawn."""
    pixels: PixelDrift = field(default_factory=PixelDrift)
    """Decoding."""
    experts: dict[str, dict[str, HeadDrift]] = field(default_factory=dict)
    """Expert -> head -> its drift."""

    def lines(self, cache: Path | str) -> list[str]:
        """Return the report for people."""
        pixels = self.pixels
        lines = [
            f"{cache}: {counted(self.sample, 'view')} computed again, tolerance {self.max_kl_nats:.0e} nats",
            f"pixels    {len(pixels.rounded)} of {counted(pixels.views, 'view')} rounded differently, "
            f"{len(pixels.exchanged)} show another picture",
        ]
        lines += [f"  {name}" for name in (*pixels.exchanged, *pixels.rounded)[:LISTED]]
        for expert, heads in self.experts.items():
            for head, found in heads.items():
                lines.append(
                    f"{expert:9} {head}: KL max {found.max_kl_nats:.1e}, mean {found.mean_kl_nats:.1e} nats over "
                    f"{counted(found.views, 'view')} ({found.same_pixels_max_kl_nats:.1e} where pixels are equal); "
                    f"{found.argmax_changes} argmax changes; worst {found.worst}"
                )
        return lines

    def check(self, cache: Path | str) -> None:
        """Raise VerificationError when a view shows another picture, or a head is above the tolerance."""
        if self.pixels.exchanged:
            raise VerificationError(
                f"{cache}: {len(self.pixels.exchanged)} of {counted(self.pixels.views, 'view')} "
                f"show another frame or crop "
                f"than the teacher saw, first {self.pixels.exchanged[0]}; the videos have changed, or a decoder "
                "errs"
            )
        for expert, heads in self.experts.items():
            for head, found in heads.items():
                if found.max_kl_nats > self.max_kl_nats:
                    raise VerificationError(
                        f"{cache}: expert {expert}, head {head}, drifted by {found.max_kl_nats:.1e} nats in "
                        f"{found.worst} and by {found.same_pixels_max_kl_nats:.1e} where pixels are the stored "
                        f"ones; --max-kl is {self.max_kl_nats:.0e}. Compare versions and device with the build's "
                        "(`mmkd-cache inspect --json`), and build again if these are right"
                    )
