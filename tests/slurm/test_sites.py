"""Modules and containers of a site, on a real Slurm. The `module` and the `apptainer` here are FAKE: they show that the script calls
them as their documentation says, that the ranks inside see what they must, and that signals reach them. They show nothing about images."""

import json
import sys
from pathlib import Path

import pytest
from conftest import Cluster, until

from jobs.run import event_log
from jobs.run.rundir import RunDir

FAKE_APPTAINER = """#!/bin/bash
# fake: writes its words down, takes options until the image, and becomes the command behind it
printf '%s\\n' "$@" > "{notes}.$RANK"
[ "$1" = exec ] || exit 9
shift
while [ "$1" != /images/fake.sif ]; do shift; done
shift
if [ -n "${{APPTAINERENV_GREETING:-}}" ]; then export GREETING=$APPTAINERENV_GREETING; else export GREETING="of the image"; fi
exec "$@"
"""
# As the real ones are: a function, made by a file that profiles source, in which not every command succeeds.
FAKE_MODULES = """false
module() { [ "$1" = load ] && export LOADED="${LOADED:+$LOADED:}$2"; }
"""
INSIDE = """import json, os, time
import holdfast
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HOLDFAST_RUN_DIR", "HOLDFAST_ATTEMPT", "GREETING", "LOADED")
print(json.dumps({name: os.environ.get(name) for name in names} | {"cwd": os.getcwd(), "helper": holdfast.__file__}), flush=True)
while holdfast.attempt == 1 and not holdfast.stop_requested():
    time.sleep(0.05)
if holdfast.attempt == 1:
    holdfast.exit_requeue()
"""


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_modules_are_loaded_and_ranks_in_a_container_see_and_hear_everything(cluster: Cluster, tmp_path: Path) -> None:
    bin_, notes = tmp_path / "bin", tmp_path / "notes"
    for path, text in (
        (bin_ / "apptainer", FAKE_APPTAINER.format(notes=notes)),
        (tmp_path / "modules/init/bash", FAKE_MODULES),
        (tmp_path / "own/inside.py", INSIDE),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    words = [f"ENTRY={tmp_path}/own/inside.py", "NODES=1", "GPUS_PER_NODE=2", f"RUNS_DIR={cluster.runs}", "CONTAINER_IMAGE=/images/fake.sif", "CONTAINER_MOUNTS=/data,/scratch/me:/scratch",
             f"CONTAINER_PYTHON={sys.executable}", "MODULES=cuda/13.0,nccl/2.28", "NODE_ENV=GREETING=of the site"]  # fmt: skip
    env = {"PATH": f"{bin_}:{cluster.env['PATH']}", "MODULESHOME": f"{tmp_path}/modules"}
    run = RunDir(Path(json.loads(cluster.holdfast("submit", "--json", *words, **env).stdout)["path"]))
    job_id = cluster.job_id(run)
    logs = [run.log(job_id, rank) for rank in (0, 1)]
    until(lambda: all(log.exists() and log.read_text().count("\n") for log in logs), 120, lambda: f"the first words of both ranks\n{cluster.logs(run)}")
    for rank, log in enumerate(logs):
        seen = json.loads(log.read_text().splitlines()[0])
        assert seen["RANK"] == seen["LOCAL_RANK"] == str(rank) and seen["WORLD_SIZE"] == seen["LOCAL_WORLD_SIZE"] == "2"
        assert seen["HOLDFAST_RUN_DIR"] == str(run.path) and seen["HOLDFAST_ATTEMPT"] == "1" and seen["MASTER_ADDR"] and seen["MASTER_PORT"]
        assert seen["LOADED"] == "cuda/13.0:nccl/2.28" and seen["GREETING"] == "of the site"
        assert seen["cwd"] == str(run.code) and seen["helper"] == str(run.code / "holdfast.py")
        said = Path(f"{notes}.{rank}").read_text().splitlines()
        assert said[:2] == ["exec", "--bind"] and said[2] == f"{run.path}:{run.path}", "on a CPU without --nv; the run and its code first"
        assert {f"{tmp_path}/own:{tmp_path}/own", "/data:/data", "/scratch/me:/scratch"} <= set(said)
    cluster.slurm("scontrol", "requeue", job_id)
    attempts = cluster.finished(run, 150)
    assert [str(attempt.cause) for attempt in attempts] == ["requeued", "finished"]
    markers = [json.loads(run.attempt(1).marker(rank).read_text()) for rank in (0, 1)]
    assert [(marker["reason"], marker["signal"]) for marker in markers] == [("stopped", "TERM")] * 2
    assert event_log.attempts(event_log.read(run.ledger))[0].lost_steps == 0
