"""A real Slurm on this machine: munged, slurmctld and two slurmd, without systemd, cgroups or accounting.

As root each node has a host name, /dev/shm and /etc/hosts of its own; otherwise nodes differ by port alone, and
MASTER_ADDR must be set, since nobody resolves their names. Debian: apt-get install slurmctld slurmd slurm-client munge
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

NODES = ("n1", "n2")
CPUS = 4
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo", "unshare")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_LONGEST = 80  # characters of the folder: sockets below it may have 108
_START_SECONDS = 30
_UTS = (
    """hostname "$1"; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mount --bind "$2" /etc/hosts; shift 2; exec "$@" """
)


def missing() -> str | None:
    """The reason why there can be no Slurm here; None if there can."""
    absent = [program for program in _PROGRAMS if shutil.which(program, path=_PATH) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else None


class SlurmCluster:
    """Start with `start()`, end with `stop()`; commands run with `run`, jobs are read with `job` and `wait`."""

    def __init__(self, folder: Path) -> None:
        if len(str(folder)) > _LONGEST:
            raise ValueError(f"{folder}: too long a path for the sockets in it")
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._private = os.geteuid() == 0 and _quiet("unshare", "--uts", "--mount", "true") == 0
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH", "MASTER_")) and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        } | {"SLURM_CONF": str(self.conf), "PATH": _PATH}
        if not self._private:
            self.environment["MASTER_ADDR"] = "127.0.0.1"

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle; RuntimeError with their last words if they are not."""
        for name in ("log", "state", "spool", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        # Gpus that are no more than a device file: jobs are given numbers of them.
        (self.folder / "gres.conf").write_text("AutoDetect=off\nName=gpu Type=fake File=/dev/null,/dev/zero\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded even where nothing uses it
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
        self.conf.write_text(self._configuration())
        munge = self.folder / "munge"
        files = {"key-file": key, "socket": f"{munge}.sock", "pid-file": f"{munge}.pid", "seed-file": f"{munge}.seed"}
        options = [f"--{name}={value}" for name, value in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", f"--log-file={self.folder}/log/munged", *options)
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            names = ["unshare", "--uts", "--mount", "sh", "-c", _UTS, "sh", node, str(self.folder / "hosts")]
            self._daemon(f"slurmd.{node}", *(names if self._private else []), "slurmd", "-D", "-N", node)
        deadline = time.monotonic() + _START_SECONDS
        while self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split() != list(NODES):
            if time.monotonic() > deadline:
                words = "\n".join(path.read_text()[-500:] for path in (self.folder / "log").iterdir())
                self.stop()
                raise RuntimeError(f"Slurm did not start:\n{words}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancel what runs, then stop the daemons; slurmctld before the slurmds, or it would wait for them."""
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.run("scancel", *jobs, check=False)
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h", "-o", "%A", check=False).split() and time.monotonic() < deadline:
                time.sleep(0.2)
        munged, *slurm = self._daemons
        for daemon in [*slurm, munged]:
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def run(
        self, *command: str, check: bool = True, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            command, env={**self.environment, **(env or {})}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`: JobState, ExitCode, Restarts, Reason, ... of a job or an array's task."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "-o", "show", "job", number)))

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until the job is in one of the states, by default in a final one."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {' or '.join(states)}"
            time.sleep(0.2)
        return job

    def log(self, daemon: str) -> str:
        """A daemon's last words."""
        return (self.folder / "log" / f"{daemon}.out").read_text()[-3000:]

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _configuration(self) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        ports = _free_ports(1 + len(NODES))
        user = "root" if os.geteuid() == 0 else os.environ.get("USER", str(os.geteuid()))
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": user,
            "SlurmdUser": user,
            # A requeued job waits until the old credential has expired: two minutes if not said otherwise.
            "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "TmpFS": f"{folder}/tmp",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",  # nodes may have more CPUs than this machine
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=5",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "KillWait": 20,
            "ReturnToService": 2,
            "MinJobAge": 86400,
            "MailProg": "/bin/true",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node, port in zip(NODES, ports[1:], strict=True):
            names = f"NodeName={node} NodeHostname={node if self._private else host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"{names} CPUs={CPUS} RealMemory=8000 Gres=gpu:fake:2")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _quiet(*command: str) -> int:
    return subprocess.run(command, capture_output=True).returncode
