"""Secrets appear nowhere in what a run leaves behind, and nobody but the owner of a run can change it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePath

import pytest
from conftest import REPOSITORY, SMALL, Cluster, until
from written_runs import written_run

from jobs.config import secrets_scan
from jobs.core.errors import SettingError
from jobs.run import event_log, permissions
from jobs.run.rundir import RunDir
from launcher.report.collect import figures_of
from launcher.report.render import page
from launcher.submission import snapshot

HOLDFAST = Path(sys.executable).with_name("holdfast")
# Put together here, so that this very file, which is frozen with every run of the repository, holds none of them.
PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "HF_TOKEN": "hf_" + "PlantedPlantedPlanted42",
    "AWS_SECRET_ACCESS_KEY": "wJalr" + "XUtnFEMI/K7MDENG/bPxRfi",
    "DB_PASSWORD": "correct" + "-horse-7",
}
IN_FILES = {
    name: f"only-in-{name.strip('.').replace('.', '-').replace('/', '-')}-" + "9f8e7d"
    for name in (".env", ".env.local", "conf/server.pem", "id_ed25519", "gone.key")
}
QUICK = {
    **SMALL,
    "NODES": "1",
    "GPUS_PER_NODE": "1",
    "DEVICE": "cpu",
    "MAX_STEPS": "12",
    "EVAL_EVERY": "6",
    "EVAL_SAMPLES": "8",
    "CHECKPOINT_EVERY": "6",
    "LOG_EVERY": "1",
    "BATCH_SIZE": "4",
}


def git(cwd: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=cwd, check=True, capture_output=True)


def project(folder: Path) -> Path:
    """A repository with key files: tracked, untracked, changed and deleted ones."""
    (folder / "conf").mkdir(parents=True)
    (folder / "train_it.py").write_text("print('ordinary code')\n")
    for name, value in IN_FILES.items():
        (folder / name).write_text(f"KEY={value}\n")
    git(folder, "init", "-q")
    git(folder, "add", "train_it.py", ".env.local", "gone.key")
    git(folder, "commit", "-q", "-m", "begin")
    (folder / "gone.key").unlink()
    (folder / ".env.local").write_text(f"KEY=changed\nOLD={IN_FILES['.env.local']}\n")
    (folder / "train_it.py").write_text("print('changed code')\n")
    return folder


def outside(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOLDFAST_", "WANDB_"))} | more


def holdfast(*words: str, cwd: Path, umask: int = 0o022, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HOLDFAST, *words], cwd=cwd, env=outside(**env), capture_output=True, text=True, timeout=170, umask=umask)


def found_in(folder: Path, values: dict[str, str]) -> list[str]:
    """`FILE: NAME` for each file below a folder that holds one of these values, names of files included."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    return [
        f"{path.relative_to(folder)}: {name}"
        for path, content in files.items()
        for name, value in values.items()
        if value.encode() in content or value in str(path)
    ]


def writable_by_others(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)} {oct(path.lstat().st_mode)}"
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink() and path.lstat().st_mode & 0o022
    ]


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """A real run from such a project under a umask of 0, with every tracker that is installed here; and all that was said."""
    here = project(tmp_path_factory.mktemp("project") / "p")
    for path in here.rglob("*"):
        if ".git" not in path.parts:
            path.chmod(path.stat().st_mode | 0o666)  # as a umask of 0 leaves a checkout
    trackers = ",".join(name for name in ("tensorboard", "wandb") if shutil.which(sys.executable) and _installed(name)) or "none"
    words = [f"{key}={value}" for key, value in {**QUICK, "TRACKERS": trackers, "RUN_ID": "a2b3", "GPUS_PER_NODE": "2", "NOTE": "an ordinary note"}.items()]
    done = holdfast("run", *words, cwd=here, umask=0, **PLANTED)
    assert done.returncode == 0, done.stdout + done.stderr
    told = holdfast("report", cwd=here, umask=0, **PLANTED)
    assert told.returncode == 0, told.stderr
    return RunDir(here / "runs" / "quickstart-a2b3"), done.stdout + done.stderr + told.stdout + told.stderr


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.trains
def test_planted_secrets_appear_nowhere_in_a_local_run(local_run: tuple[RunDir, str]) -> None:
    run, said = local_run
    assert found_in(run.path, PLANTED | IN_FILES) == []
    assert not [name for name, value in (PLANTED | IN_FILES).items() if value in said]
    # What was looked at is all there: code, diff, logs, report.
    assert "changed code" in (run.code / "train_it.py").read_text() and b"changed code" in run.diff.read_bytes()
    assert run.report.exists() and list(run.logs.glob("*.0.out"))
    assert not [path for path in run.code.rglob("*") if path.name in {PurePath(name).name for name in IN_FILES}]
    # Tracked files that were left out are named, with the way to have them all the same.
    assert "not copied with the code" in said and ".env.local" in said and "CODE_INCLUDE=" in said


@pytest.mark.trains
def test_no_file_of_a_run_is_writable_by_others_whatever_the_umask(local_run: tuple[RunDir, str]) -> None:
    run, _ = local_run
    assert len(list(run.path.rglob("*"))) > 60
    assert writable_by_others(run.path) == []


@pytest.mark.slurm
def test_on_slurm_a_secret_reaches_the_process_and_no_file(cluster: Cluster) -> None:
    values = {**QUICK, "ENTRY": "tests/support/scripts/telling_script.py", "ENTRY_ARGS": "HF_TOKEN,WANDB_API_KEY"}
    command = [sys.executable, "-m", "launcher.cli.app", "submit", "--json", *(f"{key}={value}" for key, value in values.items())]
    done = subprocess.run(command, cwd=REPOSITORY, env={**cluster.env, **PLANTED}, capture_output=True, text=True, timeout=120, umask=0)
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(json.loads(done.stdout)["path"]))
    cluster.finished(run)
    log = until(lambda: next(iter(run.logs.glob("*.0.out")), None), 10, "the log of rank 0").read_text()
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        assert f"{name} {hashlib.sha256(PLANTED[name].encode()).hexdigest()}" in log
    assert found_in(run.path, PLANTED) == []
    assert writable_by_others(run.path) == [] and list(run.logs.glob("*.batch.out"))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("NODE_ENV=HF_TOKEN=x1y2z3", "NODE_ENV: HF_TOKEN looks like a secret (command line)"),
        ("NODE_ENV=NCCL_DEBUG=INFO,WANDB_API_KEY=1", "WANDB_API_KEY"),
        ("NODE_ENV=ADDRESS=postgres://ada:l0ve@db/x", "ADDRESS looks like a secret"),
        ("NODE_ENV=WHERE=hf_" + "a1" * 15, "WHERE looks like a secret"),
        ("ENTRY_ARGS=--key," + PLANTED["HF_TOKEN"], "ENTRY_ARGS holds the value of HF_TOKEN"),
        ("NOTE=with " + PLANTED["DB_PASSWORD"], "NOTE holds the value of DB_PASSWORD"),
    ],
)
def test_a_setting_that_would_write_a_secret_down_is_refused(tmp_path: Path, word: str, said: str) -> None:
    done = holdfast("submit", word, f"RUNS_DIR={tmp_path}/runs", cwd=REPOSITORY, **PLANTED)
    assert done.returncode == 2 and said in done.stderr and "Export it in the shell" in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
    assert not [value for value in PLANTED.values() if value in done.stderr + done.stdout]


def test_a_secret_in_a_site_file_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("node_env: {HF_TOKEN: abc}\n")
    done = holdfast("render", f"SITE={tmp_path}/site.yaml", cwd=REPOSITORY)
    assert done.returncode == 2 and f"({tmp_path}/site.yaml)" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "GITHUB_PAT",
        "MLFLOW_TRACKING_PASSWORD",
        "OPENAI_APIKEY",
        "KAGGLE_KEY",
        "TOKEN",
        "api_key",
        "TOKEN2",
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert secrets_scan.is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "MAX_TOKENS", "NCCL_IB_PKEY", "NCCL_IB_HCA", "PATH", "MONKEY", "KEYBOARD", "PYTHONPATH"]
)
def test_names_of_ordinary_variables_are_no_secrets(name: str) -> None:
    assert not secrets_scan.is_secret_name(name)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".env", True),
        ("a/.env.local", True),
        ("prod.env", True),
        (".env.example", False),
        ("x.pem", True),
        ("keys/id_rsa", True),
        (".netrc", True),
        ("environment.py", False),
        ("env.py", False),
        ("key.py", False),
    ],
)
def test_files_that_keep_secrets_are_known(path: str, expected: bool) -> None:
    assert secrets_scan.is_secret_file(PurePath(path)) is expected


# -- code --------------------------------------------------------------------------------------------------------------


def frozen(here: Path, tmp_path: Path, include: tuple[str, ...] = (), **environ: str) -> tuple[RunDir, list[Path]]:
    run = RunDir(tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}")
    run.path.mkdir()
    return run, snapshot.freeze(run, here, include, tmp_path / "runs", environ)[0]


def test_key_files_are_frozen_only_when_each_is_named(tmp_path: Path) -> None:
    here = project(tmp_path / "p")
    run, kept_back = frozen(here, tmp_path)
    assert {str(path) for path in kept_back} == {".env", ".env.local", "conf/server.pem", "id_ed25519"}
    run, _ = frozen(here, tmp_path, ("conf", ".env"))
    assert (run.code / ".env").exists() and not (run.code / "conf" / "server.pem").exists()


def test_code_with_the_value_of_a_secret_in_it_is_refused_by_name(tmp_path: Path) -> None:
    here = project(tmp_path / "p")
    (here / "login.py").write_text(f"login({PLANTED['HF_TOKEN']!r})\n")
    with pytest.raises(SettingError, match=r"login\.py holds the value of HF_TOKEN.*os\.environ\['HF_TOKEN'\]") as refused:
        frozen(here, tmp_path, **PLANTED)
    assert PLANTED["HF_TOKEN"] not in str(refused.value)


def test_a_secret_that_was_taken_out_of_the_code_is_masked_in_the_diff(tmp_path: Path) -> None:
    here = project(tmp_path / "p")
    (here / "login.py").write_text(f"login({PLANTED['HF_TOKEN']!r}, {PLANTED['DB_PASSWORD']!r})\n")
    git(here, "add", "login.py")
    git(here, "commit", "-q", "-m", "oops")
    (here / "login.py").write_text("login(os.environ['HF_TOKEN'])\n")
    run, _ = frozen(here, tmp_path, **PLANTED)
    assert "-login('***', '***')" in run.diff.read_text() and not found_in(run.path, PLANTED)


def test_the_report_of_a_run_that_was_frozen_with_a_secret_masks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.status.run_status.ask_queue", lambda: (None, ""))
    run = written_run(
        tmp_path,
        "old-a2b3",
        steps=100,
        causes=("finished",),
        node_env={"HF_TOKEN": "abc-old-value", "NCCL_DEBUG": "INFO"},
        diff=f"+x = '{PLANTED['HF_TOKEN']}'\n",
    )
    text = page(figures_of([run]))
    assert "abc-old-value" not in text and PLANTED["HF_TOKEN"] not in text and "HF_TOKEN=***" in text and "NCCL_DEBUG=INFO" in text


# -- whose run it is ---------------------------------------------------------------------------------------------------


def test_a_run_that_everybody_can_write_to_is_not_resumed(tmp_path: Path) -> None:
    run = written_run(tmp_path / "runs", "gpt-a2b3", steps=100, causes=("preempted",))
    run.path.chmod(0o777)
    before = event_log.read(run.ledger)
    done = holdfast("resume", "--local", "gpt-a2b3", f"RUNS_DIR={tmp_path}/runs", cwd=REPOSITORY)
    assert done.returncode == 2 and "can be written by everybody" in done.stderr and "chmod -R go-w" in done.stderr, done.stderr
    assert event_log.read(run.ledger) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_run_of_somebody_else_is_not_resumed(tmp_path: Path) -> None:
    run = written_run(tmp_path / "runs", "gpt-a2b3", steps=100, causes=("preempted",))
    os.chown(run.path, 54321, 54321)
    done = holdfast("resume", "--local", "gpt-a2b3", f"RUNS_DIR={tmp_path}/runs", cwd=REPOSITORY)
    assert done.returncode == 2 and "belongs to user 54321" in done.stderr, done.stderr


def test_modes_of_a_copied_tree_are_closed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o777)
    (tmp_path / "a").chmod(0o777)
    (tmp_path / "a" / "tool.sh").touch()
    (tmp_path / "a" / "tool.sh").chmod(0o775)
    (tmp_path / "a" / "link").symlink_to("/dev/null")
    permissions.close_to_others(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755 and (tmp_path / "a" / "tool.sh").stat().st_mode & 0o777 == 0o755
