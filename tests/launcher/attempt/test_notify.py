"""Who hears of the end of a run, and what nobody may hear: by webhook on the lab and beside it, by Slurm's mail on a lab of its own."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Cluster, until

from jobs.config.settings import Job
from jobs.core.contract import Cause, Event, Exit
from jobs.core.errors import SettingError
from jobs.run import event_log
from jobs.run.retry_policy import Verdict
from jobs.run.rundir import RunDir
from launcher.attempt import notify
from launcher.local.executor import run_attempts
from launcher.submission.create_run import prepare, resolve_here
from slurm.devcluster import lab

OVER = Verdict(False, "finished")
# Made anew each time: this file itself is part of what a run freezes.
SECRET = secrets.token_hex(12)


class Hook:
    """A server on this machine that keeps what is posted to it."""

    def __init__(self, status: int = 200):
        self.got: list[tuple[str, dict[str, Any]]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.got.append((self.path, json.loads(body)))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/{SECRET}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    here = Hook()
    yield here
    here.close()


def ended(tmp_path: Path, cause: Cause = Cause.FINISHED) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    event_log.append(run.ledger, Event.START, attempt=1, job_id="7", world=1)
    event_log.append(run.ledger, Event.END, attempt=1, job_id="7", cause=cause, step=1200, saved_step=1200, lost_steps=3)
    return run


def hurry(run: RunDir) -> None:
    """Once the first attempt is over, the second one need not dawdle."""
    until(lambda: any(attempt.cause for attempt in event_log.attempts(event_log.read(run.ledger))), 90, "the end of the first attempt")
    (run.path / "hurry").touch()


def files_with(folder: Path, text: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_end_of_a_run_is_posted_once_with_what_a_person_wants_to_know(tmp_path: Path, hook: Hook, capsys: pytest.CaptureFixture[str]) -> None:
    run = ended(tmp_path)
    notify.tell(run, Job(job_name="x", note="for the paper"), OVER, Cause.FINISHED, "every rank finished", {notify.VARIABLE: hook.url})
    ((path, body),) = hook.got
    assert path.endswith(SECRET)
    assert body["event"] == "finished" and body["run"] == "run" and body["step"] == 1200 and body["lost_steps"] == 3 and body["note"] == "for the paper"
    assert body["text"] == "holdfast: run run finished at step 1,200; 1 attempt, 3 steps lost" == body["content"]
    said = capsys.readouterr().out
    assert said == "holdfast: notified http://127.0.0.1/***\n"


@pytest.mark.parametrize(
    ("verdict", "cause", "event"),
    [
        (Verdict(False, "code_error for the 1st time, 0 allowed (max_code_error)"), Cause.CODE_ERROR, "failed"),
        (Verdict(False, "3 attempts in a row made no progress (max_no_progress 3); last cause: killed"), Cause.KILLED, "crash_loop"),
        (Verdict(True, "preempted, and the run makes progress"), Cause.PREEMPTED, None),
        (Verdict(False, "cancelled"), Cause.CANCELLED, None),
    ],
)
def test_failures_and_crash_loops_are_posted_and_requeues_and_cancellations_are_not(
    tmp_path: Path, hook: Hook, verdict: Verdict, cause: Cause, event: str | None
) -> None:
    notify.tell(ended(tmp_path, cause), Job(job_name="x"), verdict, cause, "why it was", {notify.VARIABLE: hook.url})
    assert [body["event"] for _, body in hook.got] == ([event] if event else [])
    assert all(verdict.reason in body["text"] and "why it was" in body["text"] for _, body in hook.got)


def test_the_address_comes_from_a_file_and_no_setting_can_hold_it(tmp_path: Path, hook: Hook) -> None:
    (tmp_path / "address").write_text(f"{hook.url}\n")
    job = resolve_here([f"NOTIFY_WEBHOOK_FILE={tmp_path}/address", "DEVICE=cpu"], {notify.VARIABLE: "http://never"}, REPOSITORY).job
    notify.tell(ended(tmp_path), job, OVER, Cause.FINISHED, "", {})
    assert len(hook.got) == 1
    with pytest.raises(SettingError, match="is an address") as err:
        resolve_here([f"NOTIFY_WEBHOOK_FILE={hook.url}"], {}, REPOSITORY)
    assert SECRET not in str(err.value)
    with pytest.raises(SettingError, match="NOTIFY_WEBHOOK is not a setting"):
        resolve_here(["NOTIFY_WEBHOOK=http://x"], {}, REPOSITORY)


def test_whatever_goes_wrong_is_one_line_without_the_address_and_soon_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.5)
    run, job, refusing = ended(tmp_path), Job(job_name="x"), Hook(status=404)
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    port = silent.getsockname()[1]
    cases = {
        refusing.url: "answered 404",
        f"http://127.0.0.1:{port}/{SECRET}": "nobody was notified: http://127.0.0.1/***",
        f"http://127.0.0.1:1/{SECRET}": "Connection refused",
        f"ftp://127.0.0.1/{SECRET}": "is no http or https address",
        f"http://127.0.0.1:{port}/{SECRET} x\x01": "nobody was notified",
        f"http://[::{SECRET}": "nobody could be notified: ValueError",
    }
    for url, said in cases.items():
        begun = time.monotonic()
        notify.tell(run, job, OVER, Cause.FINISHED, "", {notify.VARIABLE: url})
        assert time.monotonic() - begun < 5
        out = capsys.readouterr().out
        assert said in out and out.count("\n") == 1 and SECRET not in out, (url, out)
    notify.tell(run, Job(job_name="x", notify_webhook_file="/nowhere"), OVER, Cause.FINISHED, "", {})
    assert capsys.readouterr().out == "holdfast: nobody could be notified: FileNotFoundError\n"
    silent.close(), refusing.close()


def test_a_run_without_slurm_tells_too(tmp_path: Path, hook: Hook) -> None:
    (tmp_path / "x.py").write_text("raise RuntimeError('planted')\n")
    run, _ = prepare(
        resolve_here([f"ENTRY={tmp_path}/x.py", "DEVICE=cpu", "NODES=1", "GPUS_PER_NODE=1", f"RUNS_DIR={tmp_path}/runs"], {}, REPOSITORY),
        REPOSITORY,
        sys.executable,
    )
    assert run_attempts(run, {"PATH": os.environ["PATH"], notify.VARIABLE: hook.url}) == Exit.FAILED
    assert [body["event"] for _, body in hook.got] == ["failed"]
    assert not files_with(run.path, SECRET)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_on_a_cluster_a_requeue_is_silent_the_end_is_told_and_the_address_is_written_nowhere(cluster: Cluster, hook: Hook) -> None:
    own = {"NODES": "1", "GPUS_PER_NODE": "1", "ENTRY": "tests/support/scripts/helped_script.py"}
    words = [*(f"{key}={value}" for key, value in own.items()), "ENTRY_ARGS=2000,1000,0.05", f"RUNS_DIR={cluster.runs}"]
    run = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words, HOLDFAST_NOTIFY_WEBHOOK=hook.url).stdout)["path"]))
    cluster.at_step(run, 5)
    cluster.slurm("scontrol", "requeue", cluster.job_id(run))
    hurry(run)
    attempts = cluster.finished(run)
    assert [str(attempt.cause) for attempt in attempts] == ["requeued", "finished"]
    until(lambda: hook.got, 90, "the post")
    assert [(body["event"], body["attempts"], body["lost_steps"]) for _, body in hook.got] == [("finished", 2, 0)]
    log = run.log(cluster.job_id(run), "batch")
    until(lambda: "notified http://127.0.0.1/***" in log.read_text(), 90, "the word in the log")
    assert not files_with(run.path, SECRET)


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_mails_the_end_and_not_the_requeue() -> None:
    missing = lab.missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    root = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    root.chmod(0o755)
    (root / "runs").mkdir()
    mailer, box = root / "mailer", root / "box"
    mailer.write_text(f'#!/bin/sh\necho "$@" >> {box}\n')
    mailer.chmod(0o755)
    here = lab.start(root / "lab", lab.LabConfig(nodes=1, extra_conf=f"MailProg={mailer}"))
    try:
        cluster = Cluster(here, root / "runs")
        words = [
            "NODES=1",
            "GPUS_PER_NODE=1",
            "ENTRY=tests/support/scripts/helped_script.py",
            "ENTRY_ARGS=2000,1000,0.05",
            f"RUNS_DIR={root}/runs",
            "NOTIFY_EMAIL=me@example.org",
        ]
        run = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words).stdout)["path"]))
        cluster.at_step(run, 5)
        cluster.slurm("scontrol", "requeue", cluster.job_id(run))
        hurry(run)
        cluster.finished(run)
        # slurmctld hands its mail out every few seconds.
        until(lambda: box.exists() and "Ended" in box.read_text(), 120, f"the mail; so far: {box.read_text() if box.exists() else None}")
        mails = box.read_text().splitlines()
        assert len(mails) == 1 and "COMPLETED" in mails[0] and "me@example.org" in mails[0], mails
    finally:
        here.stop()
        shutil.rmtree(root, ignore_errors=True)


def test_the_script_asks_slurm_for_its_mail_only_when_told_to() -> None:
    shown = [
        subprocess.run([sys.executable, "-m", "launcher.cli.app", "render", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120).stdout
        for words in ([], ["NOTIFY_EMAIL=a@b.org"])
    ]
    assert "mail" not in shown[0]
    assert "#SBATCH --mail-user=a@b.org\n#SBATCH --mail-type=END,FAIL\n" in shown[1]
