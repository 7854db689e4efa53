"""How a process was started, from the variables that torchrun and Slurm set."""

import pytest

from mmkd.data_manifests.errors import InputError
from mmkd.student.training.launcher import first_host, launched, refuse_several_processes
from mmkd.student.training.ranks import own_device

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
ARRAY = {**BATCH, "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "node3", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**TORCHRUN, "RANK": "0"}, "one of 2 processes that were started by torchrun"),
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
    assert launched(environ) is None


def test_what_torchrun_and_srun_say():
    found = launched(TORCHRUN)
    assert (found.rank, found.count, found.local_rank) == (1, 2, 1)
    assert (found.address, found.port, found.by) == ("node3", 29500, "torchrun")
    found = launched(SRUN)
    assert (found.rank, found.count, found.local_rank, found.address) == (5, 8, 1, "gpu07")
    assert found.port == launched(SRUN | {"SLURM_PROCID": "0"}).port
    assert found.port != launched(SRUN | {"SLURM_STEP_ID": "1"}).port  # two steps of a job, side by side
    assert launched(SRUN | {"MASTER_PORT": "1234", "MASTER_ADDR": "x"}).port == 1234


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a1,a2", "a1"),
        ("gpu[01-04,07],cpu3", "gpu01"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[2-3]-ib", "rack2-ib"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({**TORCHRUN, "RANK": "2"}, "WORLD_SIZE is 2, and RANK is 2"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environ, said):
    with pytest.raises(InputError, match=said):
        launched(environ)


def test_a_process_of_several_uses_its_own_gpu(monkeypatch):
    launch = launched(SRUN)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert own_device("auto", launch) == "auto"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [own_device(name, launch) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # Slurm shows each task its own alone
    assert own_device("auto", launch) == "cuda:0"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="this node has 2 GPUs, and 3 or more processes"):
        own_device("auto", launched(SRUN | {"SLURM_LOCALID": "2"}))
    with pytest.raises(InputError, match="--device cuda:0 is one GPU, and 8 processes were started"):
        own_device("cuda:0", launch)
    assert own_device("cuda:3", None) == "cuda:3"
