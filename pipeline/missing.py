"""What a clip may lack for one expert alone: the build records it with its status, and goes on for the others."""

from typing import ClassVar

from mmkd.cache_tools.layout import Status
from mmkd.data_manifests.errors import VideoError


class InputMissingError(VideoError):
    """A clip lacks what an expert sees; the text is the reason that is stored with the status."""

    status: ClassVar[Status]
    """What the build records."""


class BoxesMissingError(InputMissingError):
    """The video has no usable boxes."""

    status = Status.BOXES_MISSING


class FlowMissingError(InputMissingError):
    """The video has no usable flow among the files that were given."""

    status = Status.FLOW_FAILED


class SoundMissingError(InputMissingError):
    """The video has no usable sound."""

    status = Status.SOUND_MISSING
