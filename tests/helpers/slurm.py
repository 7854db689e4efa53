"""A real Slurm on this machine: one controller, two nodes of two processors, for as long as the tests need it.

Debian's packages: slurmctld slurmd slurm-client munge. No systemd, no cgroup, root or an ordinary user; all of it
lies in one folder and ends with the context.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import ENVIRONMENT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no Slurm here ({', '.join(MISSING)}): apt-get install slurmctld slurmd slurm-client munge",
)
CONFIGURATION = """\
ClusterName=mmkd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MinJobAge=3600
KillWait=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster at work."""

    def __init__(self, folder: Path) -> None:
        """Know where it lies."""
        self.folder = folder
        self.environment = {
            name: value for name, value in ENVIRONMENT.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"PATH": PLACES, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, code: int = 0, cwd: Path | None = None) -> str:
        """Run one of Slurm's programs, or one that calls them; return its stdout."""
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
            cwd=cwd,
            check=False,
        )
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol` says of a job, or of the task `17_3` of an array."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def states(self, number: str) -> list[str]:
        """Return the states of a job, or of all tasks of an array."""
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "-o", "show", "job", number))

    def wait(self, *numbers: str, states: tuple[str, ...] = ("COMPLETED",), seconds: float = 120) -> None:
        """Wait until all of the jobs are in one of the states; a requeued one is started soon.

        Not at once: what starts in the second of its end is refused for good ("Job credential revoked").
        """
        deadline = time.monotonic() + seconds
        begun: set[str] = set()
        while any(found not in states for number in numbers for found in self.states(number)):
            assert time.monotonic() < deadline, self.said(numbers)
            for number in numbers:
                waits = "Reason=BeginTime" in self.run("scontrol", "-o", "show", "job", number)
                if waits and number not in begun:
                    self.run("scontrol", "update", f"jobid={number}", "StartTime=now+2")
                    begun.add(number)
            time.sleep(0.2)

    def wait_until(self, reached: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait until a function says yes."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{what} never happened\n{self.said(())}"
            time.sleep(0.05)

    def said(self, numbers: tuple[str, ...]) -> str:
        """Return what the cluster says, for a failed test."""
        jobs = [self.run("scontrol", "-o", "show", "job", number) for number in numbers]
        logs = [f"{path.name}:\n{path.read_text()[-1000:]}" for path in sorted(self.folder.glob("*ctld.log"))]
        return "\n".join([*jobs, *logs])


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Start a cluster of two nodes, and end it."""
    with tempfile.TemporaryDirectory(prefix="mmkd-slurm-", ignore_cleanup_errors=True) as name:
        cluster = Slurm(Path(name))
        (cluster.folder / "munge").mkdir(mode=0o700)
        (cluster.folder / "state").mkdir()
        for node in ("n1", "n2"):
            (cluster.folder / f"spool-{node}").mkdir()
        key = cluster.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], user=getpass.getuser(), folder=name, ports=_free_ports(3)
        )
        (cluster.folder / "slurm.conf").write_text(text)
        files = [f"--socket={name}/munge/sock"]
        files += [f"--{part}-file={name}/munge/{part}" for part in ("pid", "log", "seed")]
        daemons = [("munged", "--force", "--foreground", f"--key-file={key}", *files)]
        configuration = str(cluster.folder / "slurm.conf")
        daemons.append(("slurmctld", "-D", "-f", configuration))
        daemons += [("slurmd", "-D", "-f", configuration, "-N", node) for node in ("n1", "n2")]
        with contextlib.ExitStack() as stack:
            for daemon in daemons:
                stack.enter_context(_at_work(cluster, daemon))
                if daemon[0] == "munged":
                    cluster.wait_until((cluster.folder / "munge" / "sock").exists, "munge")
            try:
                cluster.wait_until(
                    lambda: cluster.run("sinfo", "-h", "-N", "-o", "%T").split().count("idle") == 4, "nodes"
                )
                yield cluster
            finally:
                cluster.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
                cluster.run("scancel", "--user", getpass.getuser())
                cluster.wait_until(
                    lambda: not cluster.run("squeue", "-h", "-t", "R,CG").strip(), "the end of all jobs"
                )


@contextlib.contextmanager
def _at_work(cluster: Slurm, command: tuple[str, ...]) -> Iterator[None]:
    log = cluster.folder / f"{command[0]}{command[-1][-2:]}.out.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=cluster.environment
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
