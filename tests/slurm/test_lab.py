"""The lab: its texts and refusals anywhere, its life on the real programs (marker `slurm`)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE

from jobs.core.errors import LabError
from slurm.devcluster import config_files, host_info, lab, proc, slurm_conf
from slurm.devcluster import prefix as lab_prefix
from slurm.devcluster.lab import Lab, LabConfig

REPO = Path(lab.__file__).resolve().parents[1]
NOBODY = 65534
TWO = LabConfig(nodes=2, kill_wait_s=3)


def real(accounting: bool = False) -> Callable[[object], object]:
    missing = lab.missing_programs(accounting)
    skip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; {lab.how_to_install()}")
    return lambda test: pytest.mark.slurm(skip(test))


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a short path, unlike tmp_path; labs in it are stopped whatever happened."""
    path = Path(tempfile.mkdtemp(prefix="hf-")).resolve()
    path.chmod(0o755)
    try:
        yield path
    finally:
        for saved in path.rglob("lab.json"):
            with suppress(ValueError, KeyError):
                saved_lab(saved.parent).stop()
        shutil.rmtree(path)


def saved_lab(root: Path) -> Lab:
    """The lab in `root` whoever owns it: `lab.load` refuses that of another user, and these tests are several users."""
    saved = json.loads((root / "lab.json").read_text())
    return Lab(root, LabConfig(**saved["config"]), int(saved["base_port"]), str(saved["isolation"]))


def client(of: Lab, *command: str, timeout_s: float = 90) -> str:
    done = subprocess.run(command, env={**os.environ, **of.env()}, cwd=of.root, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(of: Lab, script: str, *options: str) -> str:
    log = of.root / "job-%j.out"
    return client(of, "sbatch", "--parsable", f"--output={log}", *options, "--wrap", script).strip()


def job(of: Lab, number: str) -> dict[str, str]:
    shown = client(of, "scontrol", "--oneliner", "show", "job", number).split()
    return dict(pair.split("=", 1) for pair in shown if "=" in pair)


def until(done: Callable[[], bool], timeout_s: float = 15) -> None:
    assert proc.wait_until(done, PATIENCE * timeout_s, 0.05), "did not happen in time"


def jobs_of(of: Lab) -> list[proc.Process]:
    return [p for group in proc.of_lab(of.root).jobs.values() for p in group]


def command_of(process: proc.Process) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return b""


def with_slurm_conf(conf: Path) -> list[int]:
    pids = (int(e) for e in os.listdir("/proc") if e.isdigit())
    return [p for p in pids if proc.look_up(p) and proc.environment(p).get("SLURM_CONF") == str(conf)]


def owners_of(processes: list[proc.Process]) -> set[int]:
    """User ids of the processes that are still there when we look."""
    found = set()
    for process in processes:
        with suppress(OSError):
            found.add(os.stat(f"/proc/{process.pid}").st_uid)
    return found


def listening_addresses(of: Lab) -> dict[str, set[str]]:
    """Hexadecimal local addresses on which processes of the lab listen, by name of the process."""
    address_of = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                address_of[fields[9]] = fields[1].partition(":")[0]
    found: dict[str, set[str]] = {}
    for process in proc.of_lab(of.root).all():
        # Daemons open and close files, and job steps end, while we look: what is gone does not listen.
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{process.pid}/fd"):
                with suppress(OSError):
                    inode = os.readlink(f"/proc/{process.pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]")
                    if inode in address_of:
                        found.setdefault(process.name, set()).add(address_of[inode])
    return found


LOOPBACK = "0100007F"


# -- without Slurm -----------------------------------------------------------------------------------------------------


def test_all_wrong_values_of_a_config_are_named_at_once() -> None:
    with pytest.raises(LabError) as err:
        LabConfig(nodes=0, preempt_mode="SUSPEND", kill_wait_s=-1)
    assert all(word in str(err.value) for word in ("nodes: 0", "'SUSPEND'", "REQUEUE, CANCEL", "kill_wait_s: -1"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": 201}, "nodes: 201 is not within 1..200"),
        ({"cpus": 0}, "cpus: 0 is not within 1..4096"),
        ({"gpus": 65}, "gpus: 65 is not within 0..64"),
        ({"gpu_type": "h 100"}, "gpu_type: 'h 100' is not letters and digits only"),
        ({"grace_s": 86401}, "grace_s: 86401 is not within 0..86400 seconds"),
        ({"base_port": 80}, "base_port: 80 is not within 1024.."),
    ],
)
def test_a_value_that_slurm_would_choke_on_is_refused_with_its_bounds(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(LabError, match=re.escape(said)):
        LabConfig(**wrong)  # type: ignore[arg-type]


def test_a_lab_of_one_node_without_gpus_and_with_accounting_says_so(tmp_path: Path) -> None:
    config = LabConfig(nodes=1, gpus=0, accounting=True)
    text = slurm_conf.slurm_conf(config, tmp_path, 12000, "ada", "box")
    assert "NodeName=node1 " in text and "Port=12002 " in text and "gpu" not in text.lower().replace(str(tmp_path).lower(), "")
    assert "AccountingStoragePort=12001\n" in text and slurm_conf.gres_conf(config, tmp_path) == ""
    with_gpus = slurm_conf.slurm_conf(LabConfig(nodes=1, gpus=2, accounting=True), tmp_path, 12000, "ada", "box")
    assert "AccountingStorageTRES=gres/gpu\n" in with_gpus


def test_configuration_says_what_was_asked_for(tmp_path: Path) -> None:
    config = LabConfig(nodes=3, gpus=2, grace_s=7, preempt_mode="CANCEL", user_signal=True, extra_conf="DebugFlags=Gres")
    text = slurm_conf.slurm_conf(config, tmp_path, 12000, "ada", "box")
    assert "SlurmUser=ada\n" in text
    assert "NodeName=node[1-3] NodeHostname=box NodeAddr=127.0.0.1 Port=[12002-12004]" in text
    assert "Gres=gpu:h100:2" in text
    assert "PreemptMode=CANCEL GraceTime=7" in text
    assert "SlurmctldParameters=preempt_send_user_signal\n" in text
    assert text.endswith("DebugFlags=Gres\n")
    assert "slurmdbd" not in text


def test_real_gpus_are_dealt_out_to_the_nodes(tmp_path: Path) -> None:
    text = slurm_conf.gres_conf(LabConfig(nodes=2, gpus=2, real_gpus=True), tmp_path)
    assert text.splitlines() == [
        f"NodeName=node1 Name=gpu Type=h100 File={tmp_path}/dev/gpu[0-1]",
        f"NodeName=node2 Name=gpu Type=h100 File={tmp_path}/dev/gpu[2-3]",
    ]


def test_host_name_of_the_machine_means_loopback_inside() -> None:
    text = slurm_conf.hosts("127.0.0.1 localhost\n10.1.2.3 box.site box other # me\n::1 box\n", ("box.site", "box"), ("node1",))
    assert text == "127.0.0.1 box.site box\n127.0.0.11 node1\n127.0.0.1 localhost\n10.1.2.3 other\n"


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_info, "search_path", lambda: str(tmp_path))
    monkeypatch.delenv(lab_prefix.VARIABLE, raising=False)
    assert {"slurmctld", "munged", "sbatch"} <= set(lab.missing_programs())
    assert "mariadbd" in lab.missing_programs(accounting=True)
    with pytest.raises(LabError, match=r"slurmctld.*apt-get install slurm-wlm"):
        lab.start(tmp_path / "lab")
    assert not (tmp_path / "lab").exists()


def test_a_prefix_without_slurm_is_refused_and_one_with_packages_names_its_plugins(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"HOLDFAST_SLURM_PREFIX: .* has no slurmctld in shims/, sbin/ or bin/"):
        lab_prefix.SlurmPrefix.of({lab_prefix.VARIABLE: str(tmp_path)})
    plugins = tmp_path / "usr" / "lib" / "x86_64-linux-gnu" / "slurm-wlm"
    for folder in (tmp_path / "shims", plugins):
        folder.mkdir(parents=True)
    for name in ("slurmctld", "slurmstepd"):
        (tmp_path / "shims" / name).write_text("#!/bin/sh\necho slurm-wlm 26.05.3\n")
        (tmp_path / "shims" / name).chmod(0o755)
    prefix = lab_prefix.SlurmPrefix.of({lab_prefix.VARIABLE: str(tmp_path)})
    assert (prefix.plugins, prefix.version, prefix.can_do_without_cgroups) == (plugins, (26, 5), True)
    assert prefix.slurmd_options == ("-d", f"{tmp_path}/shims/slurmstepd")
    assert prefix.before("/bin") == prefix.before(prefix.before("/bin")) == f"{tmp_path}/shims:/bin"
    assert f"PluginDir={plugins}\n" in slurm_conf.slurm_conf(LabConfig(nodes=1), tmp_path, 12000, "ada", "box", prefix.plugins)
    assert slurm_conf.cgroup_conf(LabConfig(), True) == "CgroupPlugin=disabled\n"
    nothing = lab_prefix.SlurmPrefix.of({})
    assert (nothing.plugins, nothing.slurmd_options, nothing.before("/bin")) == (None, (), "/bin")


@pytest.mark.skipif(not os.environ.get(lab_prefix.VARIABLE), reason=f"{lab_prefix.VARIABLE} names no other Slurm than the machine's")
@real()
def test_a_lab_runs_the_slurm_of_the_prefix(room: Path) -> None:
    one = lab.start(room / "lab", TWO)
    wanted = lab_prefix.SlurmPrefix.of(os.environ).version
    assert wanted is not None
    version = re.search(r"SLURM_VERSION\s*=\s*(\d+)\.(\d+)", client(one, "scontrol", "show", "config"))
    assert version is not None and (int(version[1]), int(version[2])) == wanted
    assert {name: state for name, state in one.status().nodes} == {"node1": "idle", "node2": "idle"}
    assert lab.load(one.root) == one
    assert client(one, "srun", "-N2", "hostname").count("\n") == 2


@pytest.fixture
def all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "missing_programs", lambda accounting=False: [])


@pytest.mark.usefixtures("all_programs")
def test_too_long_directory_is_refused_before_anything_exists(room: Path) -> None:
    root = room / ("x" * 90)
    with pytest.raises(LabError, match=r"\d+ characters too long .* Unix socket"):
        lab.start(root)
    assert list(room.iterdir()) == []


@pytest.mark.usefixtures("all_programs")
@pytest.mark.parametrize("name", ["a b", "a\nb", "50%", "a,b", "a#b", "a[1]", "é"])
def test_path_that_slurm_conf_cannot_carry_is_refused(room: Path, name: str) -> None:
    with pytest.raises(LabError, match="cannot carry"):
        lab.start(room / name)
    assert list(room.iterdir()) == []


@pytest.mark.usefixtures("all_programs")
def test_folder_with_other_things_in_it_is_left_alone(room: Path) -> None:
    (room / "thesis.tex").touch(mode=0o600)
    with pytest.raises(LabError, match="other things in it"):
        lab.start(room)
    assert [p.name for p in room.iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("all_programs")
def test_parent_that_everybody_may_write_is_refused(room: Path) -> None:
    (room / "open").mkdir()
    (room / "open").chmod(0o777)
    with pytest.raises(LabError, match="chmod go-w"):
        lab.start(room / "open" / "lab")


def test_port_in_use_is_passed_over_and_refused_when_asked_for(room: Path) -> None:
    with host_info.reserved_ports(room, LabConfig(nodes=1), None) as first:
        with host_info.reserved_ports(room, LabConfig(nodes=1), None) as second:
            assert second != first
        with (
            pytest.raises(LabError, match="in use"),
            host_info.reserved_ports(room, LabConfig(base_port=first - 2), None),
        ):
            pass
    with socket.create_server(("127.0.0.1", first + 2)):
        with host_info.reserved_ports(room, LabConfig(nodes=1), None) as third:
            assert third != first
    with host_info.reserved_ports(room, LabConfig(nodes=1), None) as again:
        assert again == first


def test_without_private_hosts_a_public_host_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_info, "isolate", lambda how, hosts: ["false"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.1.2.3", 0))])
    with pytest.raises(LabError, match=r"10\.1\.2\.3.*/etc/hosts"):
        host_info.pick_isolation()


def test_a_host_name_that_means_nothing_is_refused_and_loopback_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> object:
        raise OSError("Name or service not known")

    monkeypatch.setattr(host_info, "isolate", lambda how, hosts: ["false"])
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(LabError, match="means nothing"):
        host_info.pick_isolation()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    assert host_info.pick_isolation() == "none"


def test_a_user_without_a_name_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    with pytest.raises(LabError, match="uid 4000000000 has none"):
        host_info.user_name()


@pytest.mark.usefixtures("all_programs")
def test_a_directory_of_another_user_and_one_that_cannot_be_made_are_refused(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (room / "file").write_text("")
    with pytest.raises(LabError, match="cannot be a lab's directory: Not a directory"):
        lab.start(room / "file" / "lab")
    (room / "theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LabError, match="belongs to root, not to you"):
        lab.start(room / "theirs")


def test_a_second_start_waits_for_the_first_and_says_whom_it_waits_for(room: Path) -> None:
    with host_info.exclusive(room / "none"):
        pass  # nothing there: nothing to wait for, and nothing is made
    assert not (room / "none").exists()
    with host_info.exclusive(room):
        with pytest.raises(LabError, match=r"at work for 0.2 s.*lab\.lock"):
            with host_info.exclusive(room, 0.2):
                pass
    with host_info.exclusive(room, 0.2):
        pass


def test_no_free_block_of_ports_is_an_error_that_names_the_range(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_info, "_reserve", lambda port, held: False)
    with pytest.raises(LabError, match="no 3 ports in a row are free"):
        with host_info.reserved_ports(room, LabConfig(nodes=1), 12000):
            pass


def test_more_real_gpus_than_there_are_is_refused(room: Path) -> None:
    wanted = LabConfig(nodes=3, gpus=64, real_gpus=True)
    with pytest.raises(LabError, match="need 192, this machine has"):
        config_files.write_files(lab.Lab(room, wanted, 12000, "none"))


def test_another_shape_than_the_running_lab_has_is_refused_and_what_differs_is_said(room: Path) -> None:
    running = lab.Lab(room, LabConfig(nodes=2), 12000, "none")
    lab._check_same_shape(running, LabConfig(nodes=2))
    lab._check_same_shape(running, LabConfig(nodes=2, base_port=12000))
    with pytest.raises(LabError, match="nodes is 2, asked for 3"):
        lab._check_same_shape(running, LabConfig(nodes=3))


def test_what_is_no_saved_lab_is_none(room: Path) -> None:
    for text in ("", "{}", '{"config": {"nodes": 0}, "base_port": 1, "isolation": "none"}', '{"config": [], "base_port": 1}'):
        (room / "lab.json").write_text(text)
        assert lab.load(room) is None and lab.find(room) is None
    (room / "lab.json").unlink()


def test_recycled_pid_is_not_signalled() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        found = proc.look_up(child.pid)
        assert found and proc.alive(found)
        stale = proc.Process(found.pid, found.started - 1, found.parent, found.name)
        proc.terminate([stale], 0.1)
        assert child.poll() is None
        proc.terminate([found], 5)
    assert proc.look_up(child.pid) is None


# -- with Slurm --------------------------------------------------------------------------------------------------------


@real()
def test_two_node_step_runs_with_gpus_on_loopback_only(room: Path) -> None:
    (room / "closed").mkdir(mode=0o700)  # as pytest's own folders are, which munged does not like
    cluster = lab.start(room / "closed" / "lab", TWO)
    assert lab.start(cluster.root, TWO) == cluster == lab.find(cluster.root)
    with pytest.raises(LabError, match="cpus is 16, asked for 8"):
        lab.start(cluster.root, LabConfig(nodes=2, kill_wait_s=3, cpus=8))

    told = client(
        cluster, "srun", "--nodes=2", "--gpus-per-node=8", "--cpus-per-task=16", "--mem=60000",
        "sh", "-c", 'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"',
    )  # fmt: skip
    assert sorted(told.split("\n")[:2]) == ["node1 0,1,2,3,4,5,6,7", "node2 0,1,2,3,4,5,6,7"]

    running = submit(cluster, "srun --nodes=2 sleep 600", "--nodes=2")
    until(lambda: len(proc.of_lab(cluster.root).jobs) == 2)
    until(lambda: "srun" in listening_addresses(cluster))
    listening = listening_addresses(cluster)
    assert {"slurmctld", "slurmd"} <= set(listening)
    assert set().union(*listening.values()) == {LOOPBACK}

    status = cluster.status()
    assert status.running and status.jobs_running == 1 and running
    text = status.describe()
    assert "2 mixed: node1 node2" in text and "1 running, 0 pending" in text
    if cluster.names_resolve:
        assert client(cluster, "srun", "-N1", "--overlap", "getent", "hosts", "node2").split()[0] == "127.0.0.12"


@real()
def test_two_labs_start_at_once_and_know_nothing_of_each_other(room: Path) -> None:
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda name: lab.start(room / name, TWO), ["one", "two"])
    assert one.base_port != two.base_port
    assert submit(one, "sleep 600") == submit(two, "sleep 600") == "1"
    until(lambda: {p.name for p in jobs_of(two)} == {"slurmstepd", "slurm_script", "sleep"})
    of_two = proc.of_lab(two.root)
    one.stop()
    assert lab.find(one.root) is None and with_slurm_conf(one.conf) == []
    assert proc.of_lab(two.root) == of_two
    assert job(two, "1")["JobState"] == "RUNNING"


@real()
@pytest.mark.parametrize("controller", ["alive", "dead"])
def test_stop_leaves_no_process_but_those_it_did_not_start(room: Path, controller: str) -> None:
    cluster = lab.start(room / "lab", TWO)
    # A batch script that ignores its end, and a child of it that no environment gives away.
    number = submit(cluster, "trap '' TERM; env -i sleep 86399 & while :; do sleep 0.1; done")
    until(lambda: job(cluster, number)["JobState"] == "RUNNING")
    sleepers: list[proc.Process] = []

    def is_stripped() -> bool:
        # Between fork and exec it still has the environment of its shell.
        sleepers[:] = [p for p in jobs_of(cluster) if b"86399" in command_of(p) and p.name == "sleep" and not proc.environment(p.pid)]
        return bool(sleepers)

    until(is_stripped)
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **cluster.env()}) as shell:  # somebody's own terminal
        if controller == "dead":
            cluster.kill_controller()
            assert lab.find(cluster.root) is None and lab.load(cluster.root) == cluster
        cluster.stop()
        assert with_slurm_conf(cluster.conf) == [shell.pid]
        shell.terminate()
    assert sleepers and not any(map(proc.alive, sleepers))
    assert (cluster.root / "log" / "slurmctld.log").stat().st_size
    assert "not running" in cluster.status().describe()
    cluster.stop()


@real()
def test_low_job_is_preempted_by_a_high_one_and_comes_back(room: Path) -> None:
    cluster = lab.start(room / "lab", TWO)
    low = submit(cluster, "echo attempt ${SLURM_RESTART_COUNT:-0}; srun sleep 600", "--nodes=2", "--exclusive")
    until(lambda: job(cluster, low)["JobState"] == "RUNNING")
    submit(cluster, "sleep 0.5", "--nodes=2", "--exclusive", "--partition=high")
    until(lambda: job(cluster, low)["Restarts"] == "1")
    until(lambda: job(cluster, low)["JobState"] == "RUNNING")
    until(lambda: "attempt 1" in (cluster.root / f"job-{low}.out").read_text())


@real()
def test_lost_node_loses_its_tasks_and_comes_back_usable(room: Path) -> None:
    cluster = lab.start(room / "lab", TWO)
    number = submit(cluster, "srun --nodes=2 --no-kill sleep 600", "--nodes=2", "--no-kill")
    until(lambda: len(proc.of_lab(cluster.root).jobs) == 2)
    cluster.kill_node("node2")
    assert "node2" not in proc.of_lab(cluster.root).jobs
    assert [d.name for d in cluster.status().daemons if not d.alive] == ["node2"]
    client(cluster, "scancel", number)
    cluster.restart_node("node2")
    until(lambda: cluster.node_states()["node2"] == "idle")
    assert client(cluster, "srun", "--nodelist=node2", "printenv", "SLURMD_NODENAME") == "node2\n"
    with pytest.raises(LabError, match="it has node1, node2"):
        cluster.kill_node("node9")


@real()
def test_jobs_outlive_their_controller(room: Path) -> None:
    cluster = lab.start(room / "lab", TWO)
    number = submit(cluster, "sleep 600")
    until(lambda: job(cluster, number)["JobState"] == "RUNNING")
    time.sleep(0.2)
    cluster.kill_controller()
    assert "slurmctld" not in proc.of_lab(cluster.root).daemons
    cluster.start_controller()
    assert lab.find(cluster.root) == cluster
    # What slurmctld had not yet written to disk is lost with it; the job itself goes on either way.
    assert proc.of_lab(cluster.root).jobs


@real()
def test_failed_start_shows_the_reason_and_leaves_nothing(room: Path) -> None:
    root = room / "lab"
    with pytest.raises(LabError, match=r"(?s)slurmctld .*NoSuchKey"):
        lab.start(root, LabConfig(nodes=2, extra_conf="NoSuchKey=1"))
    assert with_slurm_conf(root / "slurm.conf") == []
    assert lab.start(root, TWO).status().running


@real()
def test_daemons_let_go_of_the_callers_output_and_outlive_it(room: Path) -> None:
    code = "import sys; from pathlib import Path; from slurm.devcluster import lab; lab.start(Path(sys.argv[1])); print('up')"
    done = subprocess.run([sys.executable, "-c", code, str(room / "lab")], cwd=REPO, capture_output=True, text=True, timeout=20)
    assert done.stdout == "up\n", done.stderr
    cluster = lab.find(room / "lab")
    assert cluster and cluster.config == LabConfig()
    assert {os.getsid(p.pid) for p in proc.of_lab(cluster.root).all()}.isdisjoint({os.getsid(0)})


@real(accounting=True)
def test_accounting_keeps_every_attempt(room: Path) -> None:
    cluster = lab.start(room / "lab", LabConfig(nodes=2, accounting=True))
    number = submit(cluster, "true")

    def rows() -> str:
        return client(cluster, "sacct", "-D", "-X", "--noheader", "--parsable2", "-j", number, "-o", "jobid,state")

    until(lambda: rows() == f"{number}|COMPLETED\n")
    listening = listening_addresses(cluster)
    assert "slurmdbd" in listening and set().union(*listening.values()) == {LOOPBACK}
    assert (cluster.root / "db").stat().st_mode & 0o077 == 0  # its root account has no password


AS_SOMEBODY = """
import json, sys
from pathlib import Path
from slurm.devcluster import host_info, lab
if sys.argv[2] == "none":
    host_info.pick_isolation = lambda: "none"
cluster = lab.start(Path(sys.argv[1]), lab.LabConfig(nodes=2, kill_wait_s=3))
print(json.dumps([cluster.isolation, lab.find(cluster.root) == cluster]))
"""


@real()
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("isolation", ["best", "none"])
def test_plain_user_has_a_lab_too(room: Path, isolation: str) -> None:
    os.chown(room, NOBODY, NOBODY)
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", f"HOME={room}"]
    become.append("PYTHONDONTWRITEBYTECODE=1")
    for python in (sys.executable, "/usr/bin/python3"):
        trial = [*become, python, "-c", "import slurm.devcluster.lab"]
        if subprocess.run(trial, cwd=REPO, capture_output=True, timeout=20).returncode == 0:
            break
    else:
        pytest.skip("no Python that an unprivileged user may run and that can import slurm.devcluster.lab")
    done = subprocess.run(
        [*become, python, "-c", AS_SOMEBODY, str(room / "lab"), isolation],
        cwd=REPO, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    how, found = json.loads(done.stdout)
    assert found and how in (("none",) if isolation == "none" else ("user", "none"))
    cluster = saved_lab(room / "lab")
    assert owners_of(proc.of_lab(cluster.root).all()) == {NOBODY}

    def call(*command: str) -> str:
        return client(cluster, *become, *command)

    told = call("srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", 'echo "$(id -u) $CUDA_VISIBLE_DEVICES"')
    assert told == f"{NOBODY} 0,1\n" * 2
    script = ("--parsable", "--output=/dev/null", "--nodes=2", "--exclusive", "--wrap")
    low = call("sbatch", *script, "srun sleep 600").strip()
    until(lambda: job(cluster, low)["JobState"] == "RUNNING")
    call("sbatch", "--partition=high", *script, "true")
    until(lambda: job(cluster, low)["Restarts"] == "1")
    assert set().union(*listening_addresses(cluster).values()) == {LOOPBACK}
