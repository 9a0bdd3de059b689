"""Slurm's commands as holdfast reads them: recorded answers, refusals, silence, and programs that are not there."""

import os
from pathlib import Path

import pytest

from jobs.core.errors import SubmitError
from slurm import allocation, client
from slurm.client import Slurm, expand_nodelist, job_info, parse_config, parse_json_state, parse_sacct, parse_scontrol, parse_squeue
from slurm.environment import clean_environment
from slurm.job_queue import Queue

GONE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
DEAF = "echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def programs(folder: Path, **scripts: str) -> Slurm:
    """A Slurm whose commands are these shell scripts, and no other command."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return Slurm({"PATH": f"{folder}:/usr/bin:/bin"})


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, in case this machine has a Slurm."""
    for name in ("sh", "sleep", "cat"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("node[1-3,07],gpu5", ["node1", "node2", "node3", "node07", "gpu5"]),
        ("n[008-010]", ["n008", "n009", "n010"]),
        ("r[1-2]c[3,5-6]", ["r1c3", "r1c5", "r1c6", "r2c3", "r2c5", "r2c6"]),
        ("n[1]-ib,x", ["n1-ib", "x"]),
    ],
)
def test_a_list_of_nodes_is_written_out_as_slurm_does(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


def test_a_record_of_scontrol_keeps_values_with_spaces_and_a_task_of_an_array_its_own_name() -> None:
    line = (
        "JobId=12 ArrayJobId=10 ArrayTaskId=3 JobName=two words JobState=RUNNING Reason=None Restarts=2 NodeList=node[1-2]"
        " PreemptTime=2026-11-22T10:00:00 EndTime=2026-11-23T00:00:00 TimeLimit=01:00:00 ExitCode=0:9 Comment=(null)\n\nnothing here\n"
    )
    (record,) = parse_scontrol(line)
    info = job_info(record)
    assert (info.job_id, info.name, info.restarts, info.nodes, info.comment) == ("10_3", "two words", 2, "node[1-2]", "")
    assert info.preempted_at == "2026-11-22T10:00:00" and info.exit_code == "0:9"
    # Before it is split, an array has a range for its task, and one id.
    waiting = job_info({**record, "ArrayTaskId": "4-9%2", "PreemptTime": "None", "Restarts": ""})
    assert (waiting.job_id, waiting.preempted_at, waiting.restarts) == ("12", None, 0)


def test_the_state_behind_completing_is_that_of_the_task_asked_for() -> None:
    """Asked for one task, scontrol --json of 26.05 answers with the whole array."""
    text = '{"jobs": [{"job_id": 1, "job_state": ["RUNNING"]}, {"job_id": 2, "job_state": ["CANCELLED", "COMPLETING"]}, {"job_id": 3, "job_state": "PENDING"}]}'
    assert [parse_json_state(text, number) for number in ("1", "2", "3", "4")] == ["RUNNING", "CANCELLED", "PENDING", ""]
    assert parse_json_state("scontrol: unrecognized option", "1") == "" and parse_json_state("[]", "1") == ""


def test_lines_that_are_none_of_the_answer_are_passed_over() -> None:
    assert parse_squeue("slurm is busy\n7|PENDING|Priority|\n8_1|RUNNING|None|node[1,2]|x\n") == {
        "7": ("PENDING", "Priority", ""),
        "8_1": ("RUNNING", "None", "node[1,2]|x"),
    }
    (row,) = parse_sacct("sacct: a remark\n7|PREEMPTED|0:0|2026-11-22T10:00:00|2026-11-22T11:00:00\n")
    assert (row.job_id, row.state, row.end) == ("7", "PREEMPTED", "2026-11-22T11:00:00")
    assert parse_config("Configuration data as of 2026\nPreemptMode             = REQUEUE\nProlog = (null)\n\nA remark = x\n") == {
        "PreemptMode": "REQUEUE",
        "Prolog": "",
    }


def test_what_a_surrounding_job_set_is_not_handed_to_slurm() -> None:
    outer = {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "SRUN_CPUS_PER_TASK": "4", "MASTER_PORT": "1", "RANK": "0", "HOLDFAST_ATTEMPT": "3"}
    own = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "HOLDFAST_SITE": "lab", "RANKING": "1"}
    assert clean_environment({**outer, **own}) == own


def test_a_program_that_is_not_there_is_named(alone: Path) -> None:
    slurm = Slurm()
    assert not Slurm.available()
    with pytest.raises(SubmitError, match=r"scontrol is not on this machine"):
        slurm.partitions()
    with pytest.raises(SubmitError, match=r"submit --local` needs no Slurm"):
        slurm.test_only("#!/bin/sh\n")


def test_silence_is_an_error_and_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.2)
    slurm = programs(tmp_path / "bin", squeue="exec sleep 60", sbatch="exec sleep 60")
    monkeypatch.setenv("PATH", slurm.environ["PATH"])
    with pytest.raises(SubmitError, match=r"squeue did not answer within 0 s; is slurmctld running") as err:
        slurm.queue()
    assert Slurm.unsure(err.value)
    with pytest.raises(SubmitError, match=r"sbatch did not answer"):
        slurm.test_only("")


def test_an_estimate_is_read_from_standard_error_and_a_refusal_in_slurms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    slurm = programs(tmp_path, sbatch="cat >/dev/null; echo 'sbatch: Job 7 to start at  2026-11-22T10:00:00' >&2")
    assert slurm.test_only("#!/bin/sh\n") == "sbatch: Job 7 to start at 2026-11-22T10:00:00"
    slurm = programs(tmp_path, sbatch="cat >/dev/null; echo 'error: invalid partition' >&2; exit 1")
    with pytest.raises(SubmitError, match=r"^sbatch: error: invalid partition$"):
        slurm.test_only("")
    slurm = programs(tmp_path, sbatch=f"cat >/dev/null; {DEAF}")
    with pytest.raises(SubmitError, match=r"slurmctld cannot be reached; `scontrol ping`"):
        slurm.test_only("")


def test_a_job_that_is_gone_is_none_and_a_controller_that_is_gone_is_an_error(tmp_path: Path) -> None:
    gone = programs(tmp_path / "gone", scontrol=GONE, squeue=GONE)
    assert gone.job("7") is None and gone.queue(["7"]) == {} and not gone.is_live("7")
    deaf = programs(tmp_path / "deaf", scontrol=DEAF, squeue=DEAF, sacct=DEAF)
    for ask in (lambda: deaf.job("7"), lambda: deaf.queue(["7"]), deaf.queue, lambda: deaf.is_live("7")):
        with pytest.raises(SubmitError, match="cannot be reached"):
            ask()
    assert deaf.accounting("7") == []
    assert programs(tmp_path / "empty", scontrol="true").job("7") is None


def test_where_a_node_has_no_scontrol_squeue_says_whether_a_job_lives(tmp_path: Path) -> None:
    refused = "echo 'Access denied' >&2; exit 1"
    assert programs(tmp_path / "a", scontrol=refused, squeue="echo '7|RUNNING|None|node1'").is_live("7")
    assert not programs(tmp_path / "b", scontrol=refused, squeue="echo '7|COMPLETED|None|node1'").is_live("7")


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_is_held_lives_whatever_it_is_held_for(tmp_path: Path, state: str) -> None:
    assert programs(tmp_path / "a", scontrol=f"echo 'JobId=7 JobState={state}'").is_live("7")


def test_a_refusal_without_a_word_has_at_least_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match=r"^scancel: exit code 3$"):
        programs(tmp_path / "a", scancel="exit 3").cancel("7")
    with pytest.raises(SubmitError, match=r"^scancel: said on stdout$"):
        programs(tmp_path / "b", scancel="echo said on stdout; exit 3").cancel("7")


def test_submissions_of_a_run_are_found_by_name_or_comment_and_told_apart_by_folder(tmp_path: Path) -> None:
    squeue = "printf '%s\\n' '1|PENDING|a-1|' '2|RUNNING|site.a-1|holdfast:a-1' '3|RUNNING|other|' '4|PENDING|a-1|' '5|RUNNING|a-1|'"
    scontrol = f"""case $4 in
        4) echo 'JobId=4 StdOut=/elsewhere/a-1/logs/4.out' ;;
        5) {GONE} ;;
        *) echo "JobId=$4 StdOut=/runs/a-1/logs/$4.out" ;;
    esac"""
    folder = Path("/runs/a-1")
    assert programs(tmp_path / "a", squeue=squeue, scontrol=scontrol).named("a-1", "holdfast:a-1", folder) == [("1", "PENDING"), ("2", "RUNNING")]
    # Tasks of an array are asked about once.
    array = programs(tmp_path / "c", squeue="printf '%s\\n' '6_1|RUNNING|a-1|' '6_2|PENDING|a-1|'", scontrol=f'echo "$4" >> {tmp_path}/asked; {scontrol}')
    assert array.named("a-1", "holdfast:a-1", folder) == [("6_1", "RUNNING"), ("6_2", "PENDING")] and (tmp_path / "asked").read_text() == "6_1\n"
    denied = programs(tmp_path / "b", squeue=squeue, scontrol="echo denied >&2; exit 1")
    assert [number for number, _ in denied.named("a-1", "holdfast:a-1", folder)] == ["1", "2", "4", "5"]


@pytest.mark.parametrize("name", ["runs", "my lr=3 runs", "a Power= b/runs", "r50%a", "ünï x"])
def test_a_submission_is_found_through_links_and_under_odd_names(tmp_path: Path, name: str) -> None:
    folder, link = tmp_path / name / "a-1", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to(folder.parent)
    squeue = "printf '%s\\n' '1|PENDING|a-1|' '2|PENDING|a-1|' '3|PENDING|a-1|'"
    scontrol = f"""case $4 in 1) log='{folder}' ;; 2) log='{link}/a-1' ;; 3) log='{folder}b' ;; esac
        echo "JobId=$4 WorkDir=/x StdErr=$log/logs/$4.batch.out StdIn=/dev/null StdOut=$log/logs/$4.batch.out Power= TresPerNode=gres/gpu:4"
    """
    slurm = programs(tmp_path / "bin", squeue=squeue, scontrol=scontrol)
    for asked in (folder, link / "a-1"):
        assert [number for number, _ in slurm.named("a-1", "holdfast:a-1", asked)] == ["1", "2"]


def test_a_job_that_slurm_requeued_itself_is_not_thrown_out_again(tmp_path: Path) -> None:
    shown = "[ $2 = show ] && echo 'JobId=7 JobState=RUNNING Restarts=2' && exit 0"
    refuse = "echo 'Job is pending execution' >&2; exit 1"
    slurm = programs(tmp_path / "a", scontrol=f"{shown}; {refuse}")
    assert slurm.requeue("7", restarts=1) == "Slurm had requeued it already"
    assert programs(tmp_path / "b", scontrol=refuse).requeue("7") == "Slurm had requeued it already"
    assert programs(tmp_path / "c", scontrol=f"{shown}; true").requeue("7", restarts=2) == "requeued by holdfast"
    with pytest.raises(SubmitError, match="disabled"):
        programs(tmp_path / "d", scontrol="echo 'Requested operation is presently disabled' >&2; exit 1").requeue("7")


@pytest.mark.parametrize("message", ["Unexpected message received for job 7", "Unable to contact slurm controller (send failure)", "Message receive failure"])
def test_a_requeue_whose_answer_was_lost_is_asked_for_again(tmp_path: Path, message: str) -> None:
    """slurmctld was killed while it answered: it may have requeued the job, and a successor would be a second way back."""
    shown = "[ $2 = show ] && echo 'JobId=7 JobState=RUNNING Restarts=0' && exit 0"
    first = f"[ ! -e {tmp_path}/asked ] && touch {tmp_path}/asked && echo '{message}' >&2 && exit 1"
    assert programs(tmp_path / "a", scontrol=f"{shown}; {first}; true").requeue("7", restarts=0) == "requeued by holdfast"


def test_jobs_that_are_over_are_not_in_the_queue(tmp_path: Path) -> None:
    lines = "printf '%s\\n' '7|RUNNING|None|node1' '8|FAILED|NonZeroExitCode|node1' '9|CANCELLED|None|' '10|COMPLETING|None|node2' '11|NEW_STATE|None|'"
    queue = programs(tmp_path / "a", squeue=lines).queue()
    assert isinstance(queue, Queue) and sorted(queue) == ["10", "11", "7"]
    assert dict(queue.ended) == {"8": "FAILED", "9": "CANCELLED"}


def test_a_successor_that_waits_already_is_taken_and_otherwise_one_is_submitted(tmp_path: Path) -> None:
    script = tmp_path / "submit.sbatch"
    waiting = programs(tmp_path / "a", squeue="printf '%s\\n' '7|7' '9|9'")
    assert waiting.successor(script, "7", "a-1") == ("9", False)
    task = programs(tmp_path / "b", squeue="printf '%s\\n' '9_1|11' '9_2|12'", sbatch='echo "$@" >&2; echo 20')
    assert task.successor(script, "7_2", "a-1", array_index="2") == ("9_2", False)
    none = programs(tmp_path / "c", squeue="echo '7|7'", sbatch=f'echo "$@" > {tmp_path}/asked; echo "20;cluster"')
    assert none.successor(script, "7", "a-1") == ("20", True)
    assert (tmp_path / "asked").read_text() == f"--parsable --dependency=afterany:7 {script}\n"
    assert none.successor(script, "7", "a-1", array_index="4") == ("20_4", True)
    assert "--array=4" in (tmp_path / "asked").read_text()


def test_nodes_and_their_partition_are_asked_for_once_and_none_needs_no_question(tmp_path: Path) -> None:
    assert Slurm({"PATH": os.devnull}).node_states([]) == {}
    scontrol = """case "$3" in
        node) echo "NodeName=node1 State=IDLE"; echo "NodeName=node2 State=DOWN+NOT_RESPONDING" ;;
        job) echo "JobId=7 Partition=low,high" ;;
        partition) [ "$4" = low ] && echo "PartitionName=low TotalNodes=12" ;;
        *) echo "$@" > "$0.asked" ;;
    esac"""
    slurm = programs(tmp_path, scontrol=scontrol)
    assert slurm.node_states(["node1", "node2"]) == {"node1": "IDLE", "node2": "DOWN+NOT_RESPONDING"}
    assert slurm.partition_nodes("7") == 12
    slurm.exclude("7", ["node1", "node2"])
    assert (tmp_path / "scontrol.asked").read_text() == "update JobId=7 ExcNodeList=node1,node2\n"


def test_what_slurm_tells_a_job_is_read_leniently() -> None:
    assert allocation.job_id_of({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}) == "10_3"
    assert allocation.job_id_of({"SLURM_JOB_ID": "12"}) == "12" and allocation.job_id_of({}) == f"local-{os.getpid()}"
    assert [allocation.restarts_of({"SLURM_RESTART_COUNT": text}) for text in ("2", "", "many")] == [2, 0, 0] and allocation.restarts_of({}) == 0
    assert allocation.local_time("Unknown") == float("inf")
    assert allocation.local_time("2026-11-21T23:42:34") - allocation.local_time("2026-11-21T23:42:33") == 1


def test_commands_without_a_cluster_say_so_in_one_sentence_and_nothing_is_known(tmp_path: Path) -> None:
    said = "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\nsqueue: error: fetch_config: DNS SRV lookup failed\nsqueue: fatal: Could not establish a configuration source"
    slurm = programs(tmp_path / "bin", squeue=f"printf '%s\\n' '{said}' >&2; exit 1")
    with pytest.raises(SubmitError, match="no cluster is configured") as raised:
        slurm.run("squeue", "--me")
    assert "\n" not in str(raised.value) and "DNS" not in str(raised.value) and client.unreachable(raised.value)


def test_what_is_wrong_in_a_configuration_is_said_in_slurms_words(tmp_path: Path) -> None:
    slurm = programs(
        tmp_path / "bin",
        squeue="echo 'squeue: error: ClusterName needs to be specified' >&2; echo 'squeue: fatal: Unable to process configuration file' >&2; exit 1",
    )
    with pytest.raises(SubmitError, match="ClusterName needs to be specified"):
        slurm.run("squeue", "--me")
