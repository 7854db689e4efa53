"""TV-L1 optical flow for users: `from mmkd.pipeline.tvl1 import TVL1Params, tvl1_flow`.

Loaded when first asked for, since commands' help needs the parameters' names and must not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from mmkd.pipeline.tvl1.params import TVL1Params

if TYPE_CHECKING:
    from mmkd.pipeline.tvl1.dispatch import arithmetic, chosen_path, tvl1_clip_flow, tvl1_flow

__all__ = ["TVL1Params", "arithmetic", "chosen_path", "tvl1_clip_flow", "tvl1_flow"]


def __getattr__(name: str) -> Any:
    """Return one of the functions, which need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmkd.pipeline.tvl1 import dispatch

    return getattr(dispatch, name)
