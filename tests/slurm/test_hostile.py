"""Hostile text in every setting: it is refused in one clear line, or it arrives unchanged, and it is never executed."""

import contextlib
import json
import os
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cluster, examples
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.config.resolver import load, resolve
from jobs.config.settings import Job, bare_type, names
from jobs.config.yaml_io import dump_yaml
from jobs.core.errors import HoldfastError, NotFoundError, SettingError
from jobs.run.rundir import RunDir
from launcher.attempt.lifecycle import begin
from slurm import site_file
from slurm.script.render import Script, render_script

_MANY = typing.get_origin(bare_type("modules")), typing.get_origin(bare_type("node_env"))
TEXTS = [name for name in names() if bare_type(name) is str]
LISTS = [name for name in names() if typing.get_origin(bare_type(name)) is _MANY[0] and name != "trackers"]  # whose names are a closed set
MAPPINGS = ["node_env", "sbatch_options", "model_options"]

PIECES = (
    "$(touch x)", "`touch x`", ";touch x;", "&&touch x&", "|touch x", ">x", "'", '"', "\\", "\\\\", "' ;touch x; '", '" ;touch x; "', "\\';touch x;",
    "$'", "$", "${x:-`touch x`}", "{a,b}", "{{ 1 + 1 }}", "{% raw %}", "#", " # ", "!", "~", "*", "%j", "%%", " ", "  ", "-", "--x=", "=", "word", "é", "日本", "😀",
    "\u00a0", "\u202e", "EOF", "#SBATCH --wrap=x", "]]", "))", "<<x",
)  # fmt: skip
ENDS_A_LINE = ("\n", "\r\n", "\ntouch x\n", "\n#SBATCH --wrap=x\n", "\x00", "\x85", "\u2028", "\x1b[31m", "\t", "\x7f")
UNENCODABLE = ("\ud800", "\udcff")

# One line of text that a file name, an argument and a variable can all have.
line = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40
)
anything = (
    line
    | st.lists(st.sampled_from((*PIECES, *ENDS_A_LINE, *UNENCODABLE)), max_size=6).map("".join)
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=30)
    | st.sampled_from(PIECES + ENDS_A_LINE).map(lambda piece: (piece * 10_000)[:10_000])
)


def test_the_lists_of_text_settings_are_whole() -> None:
    assert {"job_name", "runs_dir", "note", "entry", "data", "partition", "container_python"} <= set(TEXTS)
    assert set(LISTS) == {"entry_args", "code_include", "exclude", "modules", "container_mounts"}


# -- into the run directory --------------------------------------------------------------------------------------------


# What a setting has no meaning without.
NEEDS = {"accelerate_config": {"launch": "accelerate", "entry": "a.py"}}


def carried(folder: Path, name: str, value: object) -> object:
    """The value of a setting as a node reads it, from a job file that gave it. Raises HoldfastError."""
    (folder / "given.yaml").write_text(dump_yaml({**NEEDS.get(name, {}), name: value}), "ascii")
    resolved = resolve(["given.yaml"], {}, folder, lambda word: site_file.find(word, folder))
    (folder / "job.yaml").write_text(dump_yaml(resolved.job.model_dump(mode="json")))
    return getattr(load(folder / "job.yaml"), name)


def assert_refused_clearly(err: HoldfastError, name: str) -> None:
    said = str(err).splitlines()
    assert isinstance(err, SettingError | NotFoundError) or name == "gpu_arch"
    assert 1 <= len(said) <= 2 and name in said[-1].lower(), said
    assert "Traceback" not in str(err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("name", TEXTS)
@given(value=anything)
@example(value="\x00")
@example(value="a\nb")
@example(value="\ud800")
@example(value="😀 " * 3000)
@examples(30)
def test_a_text_is_refused_in_a_clear_line_or_arrives_unchanged(folder: Path, name: str, value: str) -> None:
    try:
        arrived = carried(folder, name, value)
    except HoldfastError as err:
        assert_refused_clearly(err, name)
        return
    cleared = value.lower() in ("", "none", "null") and arrived is None
    assert arrived == value or cleared


@pytest.mark.parametrize("name", LISTS)
@given(value=st.lists(anything, max_size=3))
@examples(30)
def test_a_list_is_refused_in_a_clear_line_or_arrives_unchanged(folder: Path, name: str, value: list[str]) -> None:
    try:
        arrived = carried(folder, name, value)
    except SettingError as err:
        assert all(said.startswith(f"{name.upper()}.") for said in str(err).splitlines())
        return
    assert arrived == tuple(value)


@pytest.mark.parametrize("name", MAPPINGS)
@given(value=st.dictionaries(st.sampled_from(["A", "B_2"]) | anything, anything, max_size=3))
@examples(30)
def test_a_mapping_is_refused_in_a_clear_line_or_arrives_unchanged(folder: Path, name: str, value: dict[str, str]) -> None:
    try:
        arrived = carried(folder, name, value)
    except SettingError as err:
        assert all(said.startswith(name.upper()) for said in str(err).splitlines()), str(err)
        return
    assert arrived == value


@given(value=anything)
@examples(100)
def test_text_that_an_environment_can_hold_arrives_from_there_unchanged(folder: Path, value: str) -> None:
    environ = {"NOTE": value, "HOLDFAST_DATA": f"text:{value}"}
    try:
        job = resolve([], environ, folder, lambda word: site_file.find(word, folder)).job
    except SettingError as err:
        assert {said.partition(":")[0] for said in str(err).splitlines()} == {"NOTE", "DATA"}
        return
    assert (job.note, job.data) == (value, f"text:{value}")


# -- through the script ------------------------------------------------------------------------------------------------

STUBS = {
    # Records its words, then does what srun does with them: starts the command.
    "srun": 'printf "%s\\0" "$@" > "$RECORD/srun"; env -0 > "$RECORD/env"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "apptainer": 'printf "%s\\0" "$@" > "$RECORD/apptainer"',
    "module": 'printf "%s\\0" "$@" >> "$RECORD/module"',
    "python": """case "$*" in
"-m launcher.attempt begin") echo "$RECORD/env.sh"; printf %s "$HOLDFAST_LOG_OFFSET" > "$RECORD/offset" ;;
"-m launcher.attempt end "*) printf "%s\\0" "$@" > "$RECORD/end" ;;
"-m launcher.attempt.watchdog "*|"-m launcher.attempt.step_guard "*) ;;  # they run beside the ranks, and may be called after them
*) printf "%s\\0" "$0" "$@" > "$RECORD/python" ;;
esac""",
}


class Stage:
    """An empty folder with stub programs first on PATH; what they are called with is recorded."""

    def __init__(self, room: Path):
        self.room, self.record, self.bin, self.here = room, room / "record", room / "bin", room / "here"
        for made in (self.record, self.bin, self.here):
            made.mkdir(parents=True)
        for name, body in STUBS.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.bin / name).chmod(0o755)
        (self.record / "env.sh").write_text("export HOLDFAST_RANK_LOG=/log\n")

    def run(self, text: str, log: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """`log`: a file that both outputs are appended to, as Slurm does it."""
        environ = {"PATH": f"{self.bin}:/usr/bin:/bin", "RECORD": str(self.record), "SLURM_JOB_NUM_NODES": "1", "LANG": "C.UTF-8", **environ}
        with log.open("a") if log else contextlib.nullcontext() as file:
            out = file or subprocess.PIPE
            return subprocess.run(["bash"], input=text, cwd=self.here, env=environ, stdout=out, stderr=out, text=True, timeout=90)

    def words(self, program: str) -> list[str]:
        path = self.record / program
        return path.read_bytes().decode().split("\0")[:-1] if path.exists() else []

    @property
    def executed(self) -> list[Path]:
        return [Path(at) / name for at, _, files in os.walk(self.room) for name in files if name == "x"]


# Refused as folders, and not here but in tests of their own: a backslash, and around a container a comma or colon.
folder_name = line.map(lambda text: text.translate(str.maketrans("/\\,:", "----")).encode()[:100].decode(errors="ignore")).filter(
    lambda text: text.strip(".") != ""
)


@given(
    values=st.fixed_dictionaries(
        {
            # A script outside of the working tree is mounted into a container, by its folder.
            "entry": st.none() | line.filter(lambda text: not text.startswith("-m ") and not (text.startswith("/") and set(",:") & set(text))), "entry_args": st.lists(line, max_size=3),
            "container_image": st.none() | line, "container_runtime": st.sampled_from(["apptainer", "pyxis"]), "container_python": line,
            "container_mounts": st.lists(line.map(lambda text: text.replace(",", "-")), max_size=2), "modules": st.lists(line, max_size=2),
            "node_env": st.dictionaries(st.from_regex(r"V_[A-Z]{1,4}", fullmatch=True), line, max_size=2),
            "sbatch_options": st.dictionaries(st.sampled_from(["mail-user", "licenses"]), line, max_size=2),
            "partition": line, "account": line, "qos": line, "constraint": line, "reservation": line, "gpu_type": line,
            "exclude": st.lists(line, max_size=2), "gpu_request": st.sampled_from(["gpus-per-node", "gres"]), "note": anything.filter(lambda text: text.isprintable()),
        }
    ),
    parent=folder_name, tools=folder_name, array=st.booleans(),
)  # fmt: skip
@examples(80)
def test_nothing_in_a_script_is_executed_and_every_value_arrives(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], parent: str, tools: str, array: bool
) -> None:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    run = RunDir(stage.room / "runs" / parent / "a-b")
    run.code.mkdir(parents=True)
    home = stage.room / "tools" / tools
    home.mkdir(parents=True)
    python, setup = home / "python", home / "set up.sh"
    python.symlink_to(stage.bin / "python")
    setup.write_text('export SET_UP="from the file"\n')
    job = Job(**values, setup_script=str(setup), node_python=str(python))
    text = render_script(job, Script(run, str(python), 2 if array else None))

    done = stage.run(text, **({"SLURM_ARRAY_TASK_ID": "1"} if array else {}))
    assert done.returncode == 0, done.stderr
    assert not stage.executed

    environment = dict(pair.split("=", 1) for pair in stage.words("env"))
    assert environment["HOLDFAST_RUN_DIR"] == str(run.member(1).path if array else run.path)
    assert environment["PWD"] == str(run.code) and environment["SET_UP"] == "from the file"
    assert {name: environment[name] for name in job.node_env} == job.node_env
    assert stage.words("module") == [word for name in job.modules for word in ("load", name)]
    assert stage.words("end")[:3] == ["-m", "launcher.attempt", "end"]

    outside = [str(Path(job.entry).parent)] if job.entry and job.entry.startswith("/") else []
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (str(run.path), *outside, *job.container_mounts)]
    task = ["-u", job.entry, *job.entry_args] if job.entry else ["-u", "-m", "train", "--run-dir", environment["HOLDFAST_RUN_DIR"]]
    srun = stage.words("srun")
    assert srun[srun.index("rank") - 3 : srun.index("rank") - 1] == ["bash", "-c"]
    if job.container_image and job.container_runtime == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        expected = ["exec", "--nv", *binds, job.container_image, job.container_python, *task]
        assert stage.words("apptainer") == expected and srun[srun.index("rank") + 1 :] == ["apptainer", *expected]
    elif job.container_image:
        kept = [*job.node_env, *(["PYTHONPATH"] if job.entry else [])]
        assert [word for word in srun if word.startswith("--container-")] == [
            f"--container-image={job.container_image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={run.code}",
            *([f"--container-env={','.join(kept)}"] if kept else []),
        ]  # fmt: skip
        assert srun[srun.index("rank") + 1 :] == [job.container_python, *task]
    else:
        assert stage.words("python") == [str(python), *task] and srun[srun.index("rank") + 1 :] == [str(python), *task]


def test_a_python_in_a_container_whose_name_begins_with_a_dash_is_started(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (stage.bin / "-a").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$RECORD/dash"\n')
    (stage.bin / "-a").chmod(0o755)
    run = RunDir(tmp_path / "runs" / "a-b")
    run.code.mkdir(parents=True)
    job = Job(container_image="image", container_runtime="pyxis", container_python="-a")
    done = stage.run(render_script(job, Script(run, str(stage.bin / "python"), None)))
    assert done.returncode == 0 and stage.words("dash") == ["-u", "-m", "train", "--run-dir", str(run.path)], done.stderr


# What a setup script meets, the exit code, and the signals that the end of the attempt is told; "" where no attempt begins.
EARLY = {
    "a stop between two commands": ("kill -TERM $$; touch late", 0, "TERM,"),
    "the warning": ("kill -USR2 $$; touch late", 0, "USR2,"),
    "a stop that kills a command first": ("(sleep 0.3; kill -TERM $$) & bash -c 'kill -TERM $$'; touch late", 0, "TERM,"),
    "a second one while it ends": ("(sleep 0.2; kill -TERM $$) & kill -TERM $$; touch late", 0, "TERM,"),
    "traps of its own": ("trap 'touch mine' EXIT TERM; kill -TERM $$", 0, "none"),
    "a command that somebody else killed": ("bash -c 'kill -TERM $$'; touch late", 143, ""),
    "a command that fails": ("false; touch late", 1, ""),
    "its own end": ("exit 5", 5, ""),
    "nothing": ("python=/no/such/python; set +e", 0, "none"),
}


@pytest.mark.parametrize("met", EARLY)
def test_a_stop_before_the_ranks_have_begun_starts_none_and_comes_to_the_end_of_an_attempt(tmp_path: Path, met: str) -> None:
    setup, code, signals = EARLY[met]
    stage = Stage(tmp_path)
    run = RunDir(tmp_path / "runs" / "a-b")
    run.code.mkdir(parents=True)
    (tmp_path / "setup.sh").write_text(setup + "\n")
    done = stage.run(render_script(Job(setup_script=str(tmp_path / "setup.sh")), Script(run, str(stage.bin / "python"), None)))
    assert done.returncode == code, done.stderr
    assert not (stage.here / "late").exists() and bool(stage.words("srun")) is (signals == "none")
    wanted = {"": [], "none": ["--code", "0", "--signals", ""]}.get(signals, ["--code", "75", "--signals", signals])
    assert stage.words("end")[3:] == wanted


def test_what_the_log_holds_from_earlier_attempts_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """Such as Slurm's own words about why it stopped the one before."""
    stage = Stage(tmp_path)
    run = RunDir(tmp_path / "runs" / "a-b")
    run.code.mkdir(parents=True)
    (tmp_path / "log").write_text("slurmstepd: error: *** JOB 2 ON node1 CANCELLED AT 2026-11-28T09:21:13 DUE TO JOB REQUEUE ***\n")
    before = (tmp_path / "log").stat().st_size
    (tmp_path / "setup.sh").write_text("echo some words of the setup script\n")
    stage.run(render_script(Job(setup_script=str(tmp_path / "setup.sh")), Script(run, str(stage.bin / "python"), None)), log=tmp_path / "log")
    assert (stage.record / "offset").read_text() == str(before) and (tmp_path / "log").stat().st_size > before


@pytest.mark.parametrize("name", ["TERM", "USR2"])
def test_a_stop_while_an_attempt_begins_leaves_it_whole_and_ends_it(tmp_path: Path, name: str) -> None:
    stage = Stage(tmp_path)
    run = RunDir(tmp_path / "runs" / "a-b")
    run.code.mkdir(parents=True)
    begins = (
        (stage.bin / "python")
        .read_text()
        .replace(") echo", f") kill -{name} $PPID $$; sleep 0.2; printf '%s\\0' $HOLDFAST_LOG_OFFSET $BATCH_SECONDS > \"$RECORD/begin\"; echo")
    )
    (stage.bin / "python").write_text(begins)
    done = stage.run(render_script(Job(), Script(run, str(stage.bin / "python"), None)))
    assert done.returncode == 0 and not stage.words("srun"), done.stderr
    assert stage.words("end")[3:] == ["--code", "75", "--signals", f"{name},"] and stage.words("begin") == ["0", "0"]


def test_the_recording_stage_would_notice_a_payload(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage")
    stage.run("echo $(touch x)")
    assert stage.executed == [stage.here / "x"]


@given(text=anything)
@examples(150)
def test_a_directive_is_one_line_whatever_stands_in_it(text: str) -> None:
    try:
        job = Job(partition=text, account=text, sbatch_options={"licenses": text})
    except ValidationError:
        return
    lines = render_script(job, Script(RunDir(Path("/r/x-a")), "/p")).split("\n")
    head = lines[1 : lines.index("")]
    assert all(given.startswith("#SBATCH --") for given in head) and sum("--licenses" in given.partition("=")[0] for given in head) == 1
    assert not any("#SBATCH" in given for given in lines[len(head) + 1 :])


@given(parent=folder_name)
@examples(40)
def test_variables_of_an_attempt_are_sourced_as_they_are(tmp_path_factory: pytest.TempPathFactory, parent: str) -> None:
    run = RunDir(tmp_path_factory.mktemp("begin") / parent / "a-b")
    run.path.mkdir(parents=True)
    run.job_yaml.write_text(dump_yaml(Job(job_name="a").model_dump(mode="json")))
    values = begin(run, {}, None)
    shown = subprocess.run(["bash", "-c", f". {shlex.quote(str(run.attempt(1).env))}; env -0"], capture_output=True, check=True, env={}).stdout.decode()
    environment = dict(pair.split("=", 1) for pair in shown.split("\0") if pair)
    assert environment["HOLDFAST_RANK_LOG"] == values["HOLDFAST_RANK_LOG"]
    assert environment["HOLDFAST_RANK_LOG"].replace("%%", "%").startswith(str(run.logs))


# -- all the way -------------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_hostile_text_reaches_the_training_process_of_a_real_job_unchanged(cluster: Cluster) -> None:
    room = cluster.runs.parent / 'it\'s "all" $(touch x); mine'
    corpus = room / "50 % of `touch x` 日本" / "corpus one.txt"
    corpus.parent.mkdir(parents=True)
    for index in range(2):
        corpus.with_stem(f"corpus {index}").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    note = "two words, 'single' \"double\" \\ $(touch x) ; `touch x` # ${HOME} 😀 %j"
    runs = room / "the runs"
    settings = {
        "NOTE": note, "RUNS_DIR": str(runs), "DATA": f"text:{corpus.parent}", "MODEL": "nano", "MAX_STEPS": "2", "NODES": "1", "GPUS_PER_NODE": "1",
        "MODEL_OPTIONS": "n_layers=1,d_model=32,n_heads=2,d_ff=64", "SEQ_LEN": "32", "BATCH_SIZE": "4", "EVAL_SAMPLES": "4", "PRECISION": "fp32", "SITE": "lab",
    }  # fmt: skip
    done = cluster.holdfast("submit", "--wait", *(f"{key}={value}" for key, value in settings.items()), check=False)
    (run,) = [RunDir(path) for path in runs.glob("quickstart-*")]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cluster.logs(run)}"
    job = load(run.job_yaml)
    assert (job.note, job.data, job.runs_dir) == (note, f"text:{corpus.parent}", str(runs))
    state = json.loads((max(run.checkpoints.glob("step-*")) / "manifest.json").read_text())["state"]
    assert state["step"] == 2 and corpus.parent.name in state["data"], state["data"]
    assert list(run.logs.glob("*.0.out")) and list(run.logs.glob("*.batch.out"))
    assert not [path for at in (cluster.runs.parent, REPOSITORY, Path.cwd()) for path in at.rglob("x") if ".venv" not in path.parts]


def test_a_site_file_that_is_a_link_to_itself_is_none(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotFoundError, match=r"site file './loop' does not exist"):
        site_file.find("./loop", tmp_path)
