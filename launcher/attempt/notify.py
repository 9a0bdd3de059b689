"""A word to somebody outside when a run is over: one JSON document, posted to a webhook. E-mail is Slurm's own affair.

The address is a secret, since whoever knows it can post. It comes from HOLDFAST_NOTIFY_WEBHOOK in the environment of the attempt,
or from the file that NOTIFY_WEBHOOK_FILE names; it is never written down and never printed whole. Nothing here delays or fails a
run: it is called when no requeue is due any more, ends after a few seconds, and says what went wrong in one line.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from jobs.config.settings import Job
from jobs.core.contract import Cause
from jobs.run import event_log
from jobs.run.retry_policy import Verdict
from jobs.run.rundir import RunDir

VARIABLE = "HOLDFAST_NOTIFY_WEBHOOK"
# For name service, connection and answer together.
TIMEOUT_S = 5.0


def tell(run: RunDir, job: Job, verdict: Verdict, cause: Cause, evidence: str, environ: Mapping[str, str]) -> None:
    """Posts that the run has finished or was given up. Does nothing for a run that goes on or that a person cancelled, nor where
    there is no address. Never raises."""
    if verdict.again or cause is Cause.CANCELLED:
        return
    try:
        url = address(job, environ)
        if url:
            print(f"holdfast: {_sent(url, document(run, job, verdict, cause, evidence))}", flush=True)
    except Exception as err:  # whatever it is, a run that is over must be allowed to end
        # The kind only: the text of some errors holds the address.
        print(f"holdfast: nobody could be notified: {type(err).__name__}", flush=True)


def address(job: Job, environ: Mapping[str, str]) -> str:
    """The address, or nothing. Raises OSError when the file cannot be read."""
    if environ.get(VARIABLE):
        return environ[VARIABLE].strip()
    if job.notify_webhook_file:
        lines = Path(job.notify_webhook_file).expanduser().read_text().split()
        return lines[0] if lines else ""
    return ""


def masked(url: str) -> str:
    """The host of an address, which says enough to find a mistake."""
    return f"{urlsplit(url).scheme}://{urlsplit(url).hostname}/***"


def document(run: RunDir, job: Job, verdict: Verdict, cause: Cause, evidence: str) -> dict[str, object]:
    """What is posted. `text` and `content` are what chat services show."""
    attempts = event_log.attempts(event_log.read(run.ledger))
    last = attempts[-1] if attempts else None
    event = "finished" if cause is Cause.FINISHED else "crash_loop" if "in a row" in verdict.reason else "failed"
    step = (last.step if last else 0) or 0
    lost = sum(attempt.lost_steps for attempt in attempts)
    many = f"{len(attempts)} attempt{'s' if len(attempts) != 1 else ''}, {lost} steps lost"
    said = f"finished at step {step:,}" if cause is Cause.FINISHED else f"was given up at step {step:,}: {evidence} ({verdict.reason})"
    text = f"holdfast: run {run.id} {said}; {many}"
    return {
        "event": event, "run": run.id, "path": str(run.path), "job_id": last.job_id if last else "", "cause": cause.value, "evidence": evidence, "reason": verdict.reason,
        "step": step, "attempts": len(attempts), "lost_steps": lost, "note": job.note, "text": text, "content": text[:1900],
    }  # fmt: skip


def _sent(url: str, content: Mapping[str, object]) -> str:
    """Posts, and says how that went. A thread, because name service knows no time limit."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        return f"nobody was notified: the address in {VARIABLE} or its file is no http or https address"
    answer: list[str] = []

    def post() -> None:
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen

        try:
            data = json.dumps(content).encode()
            with urlopen(Request(url, data, {"Content-Type": "application/json", "User-Agent": "holdfast"}, method="POST"), timeout=TIMEOUT_S):
                answer.append(f"notified {masked(url)}")
        except HTTPError as err:
            answer.append(f"nobody was notified: {masked(url)} answered {err.code}")
        except URLError as err:
            reason = err.reason
            answer.append(f"nobody was notified: {masked(url)}: {(getattr(reason, 'strerror', None) or type(reason).__name__)}")
        except Exception as err:
            answer.append(f"nobody was notified: {masked(url)}: {type(err).__name__}")

    thread = threading.Thread(target=post, name="notify", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answer[0] if answer else f"nobody was notified: {masked(url)} did not answer within {TIMEOUT_S:.0f} s"
