"""What looks on while a network trains, as a command asks for it: a profile, event files, or nothing."""

from pathlib import Path

from mmkd.cache_tools.tasks.folder_lock import FolderLock
from mmkd.student.looking.event_files import EventFiles, check_tensorboard
from mmkd.student.looking.step_profile import StepProfile
from mmkd.student.recipes.student import Looking
from mmkd.student.training.watch import TRACE_FILE, Watch


def check_looking(looking: Looking) -> None:
    """Raise InputError for what cannot look on here; before anything is begun."""
    if looking.tensorboard is not None:
        check_tensorboard()


def watches_of(looking: Looking, folder: Path, lock: FolderLock | None) -> list[Watch]:
    """Return what looks on in the process that holds the folder, where it leaves its files; nothing in others."""
    found: list[Watch] = []
    if lock is not None and looking.profile_steps is not None:
        found.append(StepProfile(folder / TRACE_FILE, looking.profile_steps, lock.check))
    if lock is not None and looking.tensorboard is not None:
        found.append(EventFiles(looking.tensorboard))
    return found
