"""Start a backbone from a weights file that the user has: checked, never downloaded, never run.

Understands every container of mmkd.student.checkpoints and every project's names in mmkd.student.key_maps.
"""

from pathlib import Path

from torch import Tensor, nn

from mmkd.data_manifests.errors import InputError
from mmkd.student.checkpoints.checkpoint_file import read_state
from mmkd.student.checkpoints.fit import fit_of
from mmkd.student.key_maps.key_maps import map_weights


def load_backbone(backbone: nn.Module, path: Path, *, first_conv: str) -> None:
    """Load all of the backbone's parameters from `path`; only the file's classifier is left aside.

    Where the backbone has another number of input channels than the file, the parameter `first_conv` takes
    the mean over the file's channels in each of its own (as in two-stream networks since TSN).
    """
    state = map_weights(read_state(path), path).backbone
    wanted = backbone.state_dict()
    if first_conv in state and first_conv in wanted:
        state[first_conv] = adapt_channels(state[first_conv], wanted[first_conv].shape[1])
    if problems := fit_of(state, wanted).problems:
        raise InputError(f"the weights {path} are not those of this network: {problems}")
    backbone.load_state_dict(state, strict=False)  # not strict: what the backbone computes may be absent


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a convolution weight (out, in, ...) for `channels` inputs: unchanged, or the mean repeated."""
    if weight.ndim < 2 or weight.shape[1] == channels:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, *[1] * (weight.ndim - 2))
