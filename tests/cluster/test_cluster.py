"""The cluster is one: hosts are apart, reach each other, can be lost, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .cluster import Cluster, obstacle
from .hosts import SCRATCH, SCRATCH_MIB, ClusterError, Host, wait_for

pytestmark = [pytest.mark.process, pytest.mark.cluster]

ROOT = Path(__file__).resolve().parents[2]
SEEN = ["sh", "-c", "cat /proc/[0-9]*/cmdline"]


def test_hosts_have_names_addresses_processes_and_memory_of_their_own(cluster: Cluster) -> None:
    a, b = cluster.hosts
    assert [host.run(["hostname"]).strip() for host in (a, b)] == ["nodeA", "nodeB"]
    for host, address in ((a, "10.77.0.1"), (b, "10.77.0.2")):
        assert f" {address}/24" in host.run(["ip", "-brief", "-4", "address"])
    for folder in ("/dev/shm", "/run", SCRATCH):
        a.run(["touch", f"{folder}/of_a"])
        assert "of_a" in a.run(["ls", folder])
        assert "of_a" not in b.run(["ls", folder])
        assert not Path(folder, "of_a").exists()
    sleep = a.start(["sleep", "4321"])
    wait_for(lambda: a.processes("sleep 4321"), "sleep runs")
    assert not b.processes("sleep 4321")
    assert "4321" in a.run(SEEN)
    assert "4321" not in b.run(SEEN)
    sleep.terminate()
    assert sleep.wait() == -signal.SIGTERM
    assert not a.processes("sleep 4321")


def test_the_rest_of_the_file_system_is_shared(cluster: Cluster, tmp_path: Path) -> None:
    a, b = cluster.hosts
    a.run(["bash", "-c", "hostname >said"], cwd=tmp_path)
    assert b.run(["cat", tmp_path / "said"]) == "nodeA\n"


def test_a_disk_of_a_host_can_be_filled(cluster: Cluster) -> None:
    a, b = cluster.hosts
    write = ["dd", "if=/dev/zero", f"of={SCRATCH}/block", "bs=1M", f"count={SCRATCH_MIB}"]
    with pytest.raises(ClusterError, match="No space left"):
        a.run([*write[:-1], f"count={SCRATCH_MIB + 1}"])
    b.run(write)


def test_hosts_inherit_no_zombies(cluster: Cluster) -> None:
    host = cluster.hosts[0]
    host.run(["bash", "-c", "(sleep 0.1 & sleep 0.1 & true)"])
    states = ["sh", "-c", "cat /proc/[0-9]*/stat"]
    wait_for(lambda: "(sleep)" not in host.run(states), "the orphans are reaped")


def test_ssh_and_pdsh_take_a_host_by_name_and_address(cluster: Cluster) -> None:
    a, b = cluster.hosts
    assert a.run(["ssh", "nodeB", "hostname"]) == "nodeB\n"
    assert b.run(["ssh", "10.77.0.1", "hostname"]) == "nodeA\n"
    # what a launcher does not carry is not there
    assert "GLOO_SOCKET_IFNAME" not in a.run(["ssh", "nodeB", "env"])
    said = a.run(["pdsh", "-w", "nodeA,nodeB", "hostname"])
    assert sorted(said.splitlines()) == ["nodeA: nodeA", "nodeB: nodeB"]
    with pytest.raises(ClusterError, match="Could not resolve hostname nodec"):
        a.run(["ssh", "nodeC", "hostname"])


def test_slurm_runs_a_step_on_both_hosts(cluster: Cluster, tmp_path: Path) -> None:
    a, _ = cluster.hosts
    words = ["srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=1", "--label", "hostname"]
    assert sorted(a.run(words).split("\n")[:-1]) == [
        "0: nodeA",
        "1: nodeA",
        "2: nodeB",
        "3: nodeB",
    ]
    script = tmp_path / "job"
    script.write_text("#!/bin/sh\nsrun hostname\necho $GLOO_SOCKET_IFNAME\n")
    a.run(["sbatch", "--wait", "--nodes=2", f"--output={tmp_path}/said", script])
    assert sorted((tmp_path / "said").read_text().split()) == ["eth0", "nodeA", "nodeB"]


def test_a_slurm_job_is_requeued_and_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    a, _ = cluster.hosts
    script, log = tmp_path / "job", tmp_path / "said"
    script.write_text(
        "#!/bin/bash\necho start ${SLURM_RESTART_COUNT:-0}\n"
        '[ "$SLURM_RESTART_COUNT" = 1 ] || srun sleep 4321\n'
    )
    words = ["sbatch", "--parsable", "--requeue", "--open-mode=append", "--nodes=2"]
    job = a.run([*words, f"--output={log}", script]).strip()
    wait_for(lambda: cluster.hosts[1].processes("sleep 4321"), "the step runs")
    a.run(["scontrol", "requeue", job])
    wait_for(lambda: not a.run(["squeue", "--noheader", f"--jobs={job}"]), "the job ends", 60)
    assert [x for x in log.read_text().splitlines() if x.startswith("start")] == [
        "start 0",
        "start 1",
    ]


@pytest.mark.long  # test_slurm.py has a job that is warned
def test_slurm_warns_of_a_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    a, _ = cluster.hosts
    script, log = tmp_path / "job", tmp_path / "said"
    wait = "trap 'echo $SLURM_PROCID told; exit' USR1; while :; do read -t 0.1 <> <(:); done"
    script.write_text(f'#!/bin/bash\nsrun bash -c "{wait}"\n'.replace("$", "\\$"))
    limit = ["--time=1", "--signal=USR1@60"]
    a.run(["sbatch", *limit, "--nodes=2", f"--output={log}", script])
    wait_for(lambda: log.exists() and log.read_text().count("told") == 2, "both are told", 60)


@pytest.mark.long
def test_slurm_gives_up_a_lost_host_and_starts_its_job_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    a, b = cluster.hosts
    script, log = tmp_path / "job", tmp_path / "said"
    script.write_text("#!/bin/bash\nhostname >>said\n[ $SLURM_RESTART_COUNT ] || sleep 4321\n")
    words = ["sbatch", "--requeue", "--output=/dev/null", f"--chdir={tmp_path}", str(script)]
    occupied = a.start(["srun", "--nodelist=nodeA", "--exclusive", "sleep", "4321"])
    wait_for(lambda: a.processes("sleep 4321"), "nodeA is occupied")
    a.run(words)
    wait_for(lambda: b.processes("sleep 4321"), "the job runs on nodeB")
    occupied.terminate()
    occupied.communicate(timeout=30)
    cluster.kill(b)
    wait_for(lambda: log.read_text() == "nodeB\nnodeA\n", "the job runs on the other host", 60)


def test_a_signal_reaches_the_process_on_the_host(cluster: Cluster) -> None:
    host = cluster.hosts[1]
    trap = 'trap "echo told; exit 7" TERM; echo set; while true; do read -t 0.1 <> <(:); done'
    process = host.start(["bash", "-c", trap])
    assert process.stdout is not None
    assert process.stdout.readline() == "set\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "told\n"
    assert process.returncode == 7


def test_a_killed_host_is_gone_at_once_and_comes_back_empty(cluster: Cluster) -> None:
    a, b = cluster.hosts
    b.run(["touch", SCRATCH / "kept"])
    over_ssh = a.start(["ssh", "nodeB", "sleep 4321"])
    direct = b.start(["sleep", "4321"])
    wait_for(lambda: len(b.processes("sleep 4321")) >= 2, "both run")
    pids = b.processes()
    cluster.kill(b)
    assert not b.alive
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert direct.wait(timeout=30) == -signal.SIGKILL
    assert over_ssh.wait(timeout=30) == 255
    assert a.run(["hostname"]) == "nodeA\n"
    cluster.restart(b)
    assert "kept" not in b.run(["ls", SCRATCH])
    assert a.run(["ssh", "nodeB", "hostname"]) == "nodeB\n"
    assert a.run(["srun", "--nodes=2", "true"]) == ""


def test_the_first_host_comes_back_with_slurm(cluster: Cluster) -> None:
    a, b = cluster.hosts
    cluster.kill(a)
    cluster.restart(a)
    assert b.run(["srun", "--quiet", "--nodes=2", "true"]) == ""


def test_a_cut_link_loses_what_is_sent_and_keeps_connections(cluster: Cluster) -> None:
    a, b = cluster.hosts
    say = f"if [ -e {SCRATCH}/joined ]; then echo joined; else echo cut; fi"
    over_ssh = f"bash -c 'while {say}; do read -t 0.1 <> <(:); done'"
    process = a.start(["ssh", "nodeB", over_ssh])
    assert process.stdout is not None
    assert process.stdout.readline() == "cut\n"
    cluster.cut(b)
    with pytest.raises(ClusterError, match="ended with 255"):
        a.run(["ssh", "-o", "ConnectTimeout=1", "nodeB", "hostname"])
    cluster.join(b)
    b.run(["touch", SCRATCH / "joined"])
    while (line := process.stdout.readline()) == "cut\n":
        pass
    assert line == "joined\n"
    assert a.run(["ssh", "nodeB", "hostname"]) == "nodeB\n"
    process.kill()
    process.communicate()


def test_what_a_test_breaks_is_mended(cluster: Cluster) -> None:
    a, b = cluster.hosts
    left = a.start(["sleep", "4321"])
    a.run(["sbatch", "--nodes=2", "--wrap", "sleep 4321", "--output=/dev/null"])
    cluster.kill(b)
    cluster.cut(a)
    cluster.mend()
    assert left.wait(timeout=30) == -signal.SIGKILL
    assert a.run(["srun", "--nodes=2", "hostname"]) != ""
    assert not [host.name for host in (a, b) if host.processes("sleep 4321")]


def test_down_leaves_no_trace() -> None:
    before = _machine()
    with Cluster(hosts=3) as cluster:
        assert cluster.hosts[2].run(["ssh", "nodeA", "hostname"]) == "nodeA\n"
        assert cluster.hosts[0].run(["srun", "--nodes=3", "true"]) == ""
        left = cluster.hosts[1].start(["bash", "-c", "trap '' TERM HUP INT; sleep 4321; true"])
        wait_for(lambda: cluster.hosts[1].processes("sleep 4321"), "it runs")
        namespaces = {n for host in cluster.hosts for n in _namespaces(host.init)}
        namespaces -= _namespaces(os.getpid())
        assert len(namespaces) == 3 * len(("ipc", "mnt", "net", "pid", "uts"))
        pids = [pid for host in cluster.hosts for pid in host.processes()]
        assert len(pids) >= 3 * len(("sshd", "munged", "slurmd")) + 1
    assert left.wait(timeout=30) == -signal.SIGKILL
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    everyone = (int(p.name) for p in Path("/proc").glob("[0-9]*"))
    assert not namespaces & {n for pid in everyone for n in _namespaces(pid)}
    assert not cluster.folder.exists()
    assert _machine() == before


def test_a_cluster_that_cannot_be_built_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before, hosts = _machine(), []

    def fail(folder: Path, host: Host) -> None:
        hosts.append(host)
        if host.name == "nodeB":
            raise ClusterError("planted")

    monkeypatch.setattr("tests.cluster.services.start_ssh", fail)
    with pytest.raises(ClusterError, match="planted"), Cluster(hosts=2, slurm=False):
        pass
    assert len(hosts) == 2
    assert not [host for host in hosts if Path(f"/proc/{host.init}").exists()]
    assert _machine() == before


def test_missing_programs_are_named_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    ssh = "iproute2 openssh-client openssh-server pdsh"
    assert f"apt-get install {ssh} util-linux)" in obstacle(slurm=False)
    assert f"apt-get install iproute2 munge {ssh[9:]} slurm-client slurmctld slurmd" in obstacle()
    with pytest.raises(ClusterError, match="apt-get install"):
        Cluster()


@pytest.mark.parametrize("end", ["down", "kill"])
def test_the_command_builds_enters_and_takes_down(end: str, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.cluster", *words],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )

    assert "no cluster is up" in command("down").stderr
    up = command("up", "--hosts", "2", "--no-slurm")
    assert up.returncode == 0, up.stderr
    assert up.stdout.startswith("10.77.0.1 nodeA\n10.77.0.2 nodeB\n")
    try:
        again = command("up")
        assert again.returncode == 1
        assert "take that cluster down first" in again.stderr
        assert command("shell", "10.77.0.2", "hostname").stdout == "nodeB\n"
        assert command("shell", "nodeA", "ssh", "nodeB", "hostname").stdout == "nodeB\n"
        assert "no host nodeC" in command("shell", "nodeC").stderr
        folder = tmp_path / "convnext-yolo-cluster"
        init = Path("/proc", (folder / "nodeA.pid").read_text())
        holder = int((folder / "holder.pid").read_text())
        if end == "kill":
            os.kill(holder, signal.SIGKILL)
            wait_for(lambda: not init.exists(), "the hosts end with what holds them")
            assert "nodeA is dead" in command("shell", "nodeA", "hostname").stderr
    finally:
        down = command("down")
    assert (down.returncode, down.stderr) == (0, "")
    assert not init.exists()
    # its zombie may stay: nobody but the machine's init could reap it
    assert not Path(f"/proc/{holder}").exists() or not Path(f"/proc/{holder}/cmdline").read_bytes()
    assert not list(tmp_path.iterdir())


def _namespaces(pid: int) -> set[str]:
    kinds = ("ipc", "mnt", "net", "pid", "uts")
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds}
    except OSError:  # it has ended
        return set()


def _machine() -> tuple[str, list[str], list[str]]:
    """Mounts, interfaces and control groups of this machine."""
    interfaces = sorted(os.listdir("/sys/class/net"))
    groups = sorted(str(path) for path in Path("/sys/fs/cgroup").rglob("*") if path.is_dir())
    return Path("/proc/self/mounts").read_text(), interfaces, groups
