"""Training is refused to all but the one process that a user starts."""

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.student.training.one_process import refuse_several_processes

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
ARRAY = {**BATCH, "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "one of 2 processes that were started by torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "one of 3 processes that were started by mpirun"),
        (
            {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"},
            "one of 4 processes that were started by srun",
        ),
        ({**BATCH, "SLURM_STEP_ID": "0"}, "one of 4 processes that were started by srun"),
        ({"SLURM_PROCID": "1"}, "one of 2 processes that were started by srun"),
    ],
)
def test_a_process_of_several_is_refused_with_its_launcher(environ, said):
    with pytest.raises(InputError, match=said):
        refuse_several_processes("mmkd-student train", environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        BATCH,
        ARRAY,
        {**ARRAY, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"},
    ],
)
def test_one_process_of_a_batch_script_an_array_or_a_step_of_one_task_is_not_refused(environ):
    refuse_several_processes("mmkd-student train", environ)
