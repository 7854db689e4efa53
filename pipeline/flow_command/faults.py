"""What anything raised in work on one video amounts to: a fault of the video, of the machine, or of all of them."""

import errno

import torch

from mmkd.data_manifests.errors import StorageError, VideoError
from mmkd.data_manifests.system_errors import FULL

OF_ONE_NAME = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.EILSEQ,
        errno.EINVAL,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EEXIST,
        errno.ENOTEMPTY,
    }
)
"""What the system says of a name that cannot be, or is taken: a fault of one result, whatever the disk is like."""


def fault_of(error: Exception, size: tuple[int, int]) -> VideoError | StorageError:
    """Return what anything raised in work on one video amounts to: a fault of the video, or of the machine."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(cause, OSError) and cause.errno in OF_ONE_NAME:
        return VideoError(str(error))
    if isinstance(error, VideoError | StorageError):
        return error
    text = (str(error).strip().splitlines() or [""])[0]
    fault: VideoError | StorageError
    if isinstance(error, OSError):
        fault = StorageError(f"cannot read or write: {text}; fix that and run again")
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        asked = f"frames of {size[0]} x {size[1]} pixels"
        fault = StorageError(f"not enough memory for {asked}; give --workers or --short-side a smaller number")
    else:
        fault = VideoError(f"its flow cannot be computed: {type(error).__name__}: {text}")
    fault.__cause__ = error
    return fault


def is_of_all(fault: VideoError | StorageError) -> bool:
    """Return whether a fault would befall every other video, too: a disk that is full, or may not be written."""
    return isinstance(fault.__cause__, OSError) and fault.__cause__.errno in FULL | {errno.EROFS}
