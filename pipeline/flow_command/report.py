"""What a run of `mmkd-cache flow` did."""

from dataclasses import dataclass, field
from pathlib import Path

from mmkd.data_manifests.counted import counted


@dataclass
class FlowReport:
    """What a run did."""

    videos: int = 0
    """Videos whose flow this run wrote."""
    fields: int = 0
    """Flow fields in them."""
    skipped: int = 0
    """Videos whose flow was there."""
    failed: dict[str, str] = field(default_factory=dict)
    """Video file -> why it has no flow."""
    faults: list[str] = field(default_factory=list)
    """Those of them that failed by a fault of the machine, and may not when it is well."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds, decode, flow and encode summed over processes; `total` of the clock."""

    def lines(self, out: Path) -> list[str]:
        """Return the report for people."""
        total = self.seconds["total"]
        rate = f"{self.fields / total:.1f} frames/s" if self.fields else "nothing left to do"
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items() if name != "total")
        return [
            f"{out}: flow of {counted(self.videos, 'video')} written, {self.skipped} there "
            f"already; {counted(self.fields, 'frame')} in "
            f"{total:.1f} s, {rate}; {len(self.failed)} failed",
            *([f"time: {stages} (summed over processes)"] if stages else []),
        ]
