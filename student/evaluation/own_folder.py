"""A run is written into a folder of its own, and never over a finished one: the refusals."""

from pathlib import Path

from mmkd.cache_tools.tasks.folder_lock import in_use, newest_holder
from mmkd.cache_tools.tasks.heartbeat import surely_dead
from mmkd.data_manifests.errors import InputError, VerificationError
from mmkd.student.evaluation.run_files import EVALUATION_FILE, MODEL_FILE, RUN_FILE, read_run
from mmkd.student.training.checkpoint import latest_checkpoint
from mmkd.student.training.epoch_metrics import METRICS_FILE
from mmkd.student.training.step_log import STEPS_FILE
from mmkd.student.training.watch import TRACE_FILE

OTHER_CONTENTS = {"expert.json": "an expert", "targets.zarr": "a cache"}
"""What a run is never written into, by a file or folder that it has."""


def refuse_other_contents(out: Path) -> None:
    """Raise InputError for a folder of an expert, a cache or another run, and for one within these."""
    parent = out.absolute().parent
    for name, what in OTHER_CONTENTS.items():
        if (out / name).exists():
            raise InputError(f"{out} holds {what}; name another folder with -o")
        if (parent / name).exists():
            raise InputError(f"{out} lies in a folder that holds {what}; name another folder with -o")
    holder = newest_holder(parent) if parent.is_dir() else None
    if holder is not None and not surely_dead(holder.id):
        raise InputError(in_use(parent, holder))
    if out.is_dir() and latest_checkpoint(out) is None:  # a checkpoint tells by itself whose it is
        refuse_other_run(out)


def refuse_other_run(out: Path) -> None:
    """Raise InputError where a folder without a checkpoint holds a finished run, or files of a run unnamed."""
    if (out / RUN_FILE).exists():
        refuse_finished(out)
        return
    for name in (METRICS_FILE, STEPS_FILE, TRACE_FILE, MODEL_FILE, EVALUATION_FILE):
        if (out / name).exists():
            raise InputError(
                f"{out} holds {name}, but no {RUN_FILE} that would tell whose it is; name another folder with -o"
            )


def refuse_finished(out: Path) -> None:
    """Raise InputError for a finished run: to train it again would overwrite its model."""
    try:
        record = read_run(out)
    except VerificationError as error:
        raise InputError(
            f"{out / RUN_FILE} is damaged, or not of `mmkd-student train`; name another folder, or delete it"
        ) from error
    if record.model_sha256 is not None or (out / MODEL_FILE).exists():
        raise InputError(
            f"{out} holds a finished run whose checkpoint is gone: `mmkd-student evaluate {out} --cache CACHE` "
            "evaluates it; to train again name another folder with -o"
        )
