"""The batch script: golden files, what bash and shellcheck say to them, and what a real sbatch makes of hostile values."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import until
from pydantic import ValidationError

from jobs.config.resolver import resolve
from jobs.config.settings import Job
from jobs.core.errors import RenderError
from jobs.run.rundir import RunDir
from slurm import site_file
from slurm.devcluster import lab
from slurm.devcluster.lab import LabConfig
from slurm.environment import clean_environment
from slurm.script import render
from slurm.script.render import OURS, Script, render_script
from tools import generate_docs as docs

REPO = docs.ROOT
GOLDEN = sorted((REPO / docs.GOLDEN).glob("*.sbatch"))
SCRIPTS = [*GOLDEN, REPO / "slurm/train.sbatch"]
TEMPLATES = sorted((REPO / "slurm/script/templates").glob("*.j2"))
RUN = RunDir(Path("/shared/runs/x-abcd"))

# Values that a shell, sbatch or Slurm's file name patterns would each like to read their own way.
HOSTILE = (
    "two words",
    'it\'s "quoted"',
    "back\\slash \\\\ \\n",
    "$(touch x) `touch x` ${HOME}",
    "; touch x & | > x",
    "# not a remark",
    "%j %% %A_%a",
    "naïve 日本 😀",
    "'",
    '"',
    "\\",
    "-leading --dashes",
    "{a,b} [1-3] * ? ~",
    " spaces around ",
    "tab\there",
)


def by_name(path: Path) -> str:
    return path.name


def script(text_of: Job, run: RunDir = RUN, array_size: int | None = None) -> str:
    return render_script(text_of, Script(run, "/opt/python", array_size))


# -- golden files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(docs.golden_scripts()))
def test_a_rendered_script_equals_its_golden_file(name: str) -> None:
    golden = REPO / docs.GOLDEN / name
    assert golden.exists(), f"{golden} is missing; `make golden` writes it"
    assert golden.read_text() == docs.golden_scripts()[name], f"{name} changed; if that is meant, accept it with `make golden` and review the diff"


def test_every_golden_file_has_something_that_it_is_rendered_from() -> None:
    assert [path.name for path in GOLDEN] == sorted(docs.golden_scripts())


def test_every_shipped_job_file_has_a_golden_script() -> None:
    shipped = {f"{path.stem}.sbatch" for path in (REPO / "jobs").glob("*.yaml")}
    assert shipped and shipped <= {path.name for path in GOLDEN}


def test_golden_scripts_do_not_depend_on_where_or_by_whom_they_are_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = docs.golden_scripts()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARTITION", "elsewhere")
    monkeypatch.setenv("HOLDFAST_NODES", "7")
    assert docs.golden_scripts() == before
    assert not any(str(REPO) in text or str(Path.home()) + "/" in text for text in before.values())


@pytest.mark.parametrize("path", SCRIPTS, ids=by_name)
def test_bash_can_read_every_checked_in_script(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say_about_any_checked_in_script() -> None:
    done = subprocess.run(["shellcheck", "--norc", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES, ids=by_name)
def test_every_value_in_a_directive_line_goes_through_the_sbatch_filter(template: Path) -> None:
    directives = [line for line in template.read_text().splitlines() if line.startswith("#SBATCH")]
    assert directives
    for line in directives:
        name, _, value = line.partition("=")
        for expression in re.findall(r"\{\{(.*?)\}\}", name):
            assert expression.rstrip().endswith("| word"), line
        for expression in re.findall(r"\{\{(.*?)\}\}", value):
            ours = expression.strip().startswith("contract.") and expression.rstrip().endswith("| word")
            assert ours or expression.rstrip().endswith("| sbatch"), line


@pytest.mark.parametrize("template", TEMPLATES, ids=by_name)
def test_no_value_stands_between_quotes_of_the_template(template: Path) -> None:
    """A quoted value between quotes would end them. Only a checked word of our own may stand there."""
    for line in template.read_text().splitlines():
        if line.startswith("#"):
            continue
        for found in re.finditer(r"\{\{(.*?)\}\}", line):
            before = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", line[: found.start()])
            between_quotes = before.count("'") % 2 or before.count('"') % 2
            assert not between_quotes or found[1].rstrip().endswith(("| word", "| words")), line


def test_a_value_that_the_template_does_not_know_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render.environment().from_string("{{ nothing }}").render()


def test_a_plain_value_in_a_template_is_quoted_without_asking_for_it() -> None:
    shown = render.environment().from_string("echo {{ value }}").render(value="a b; $(touch x)")
    assert shown == "echo 'a b; $(touch x)'"


def test_a_word_of_ours_in_a_template_is_refused_where_it_is_not_one() -> None:
    for filtered in ("word", "words"):
        with pytest.raises(RenderError, match=r"'x;' cannot be the name of an option or variable"):
            render.environment().from_string("{{ value | " + filtered + " }}").render(value="x;")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", sorted(OURS))
def test_an_option_that_holdfast_sets_itself_cannot_be_given_however_it_is_spelt(option: str) -> None:
    for spelt in (option, f"--{option}", option.replace("-", "_"), option[:-1]):
        with pytest.raises(RenderError, match=r"SBATCH_OPTIONS: --[a-z-]+ is set by holdfast itself"):
            script(Job(sbatch_options={spelt: "1"}))


def test_the_options_that_are_set_here_are_these() -> None:
    names = "job-name nodes ntasks ntasks-per-node requeue no-requeue open-mode signal output error array time chdir export wrap comment clusters"
    assert {*names.split(), "wait", "test-only", "parsable"} == OURS


@pytest.mark.parametrize("name", ["", "N", "a b", "x\n#SBATCH --y", "x=y", "X", "é", "-"])
def test_what_cannot_be_an_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot be the long name of an sbatch option"):
        Job(sbatch_options={name: "1"})


def test_other_options_are_passed_on_with_and_without_a_value() -> None:
    text = script(Job(sbatch_options={"mail_type": "END,FAIL", "--exclusive": "", "licenses": "a b"}))
    assert '#SBATCH --mail-type=END,FAIL\n#SBATCH --exclusive\n#SBATCH --licenses="a b"\n' in text


@pytest.mark.parametrize("path", ["/shared/a\nb", "/shared/a\rb", "/shared/a\0b"])
def test_a_run_directory_that_no_script_can_name_is_refused(path: str) -> None:
    with pytest.raises(RenderError, match="line break or NUL"):
        script(Job(), RunDir(Path(path)))


def test_a_backslash_in_the_run_directory_is_refused_because_slurm_would_expand_nothing() -> None:
    with pytest.raises(RenderError, match="choose another RUNS_DIR"):
        script(Job(), RunDir(Path("/shared/a\\b/x-abcd")))


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
@pytest.mark.parametrize(("path", "mounts"), [("/shared/a,b/x", ()), ("/shared/a:b/x", ()), ("/shared/x", ("/a,/b",))])
def test_a_mount_that_the_container_would_cut_in_two_is_refused(runtime: str, path: str, mounts: tuple[str, ...]) -> None:
    with pytest.raises(RenderError, match="cuts a mount in two"):
        script(Job(container_image="i", container_runtime=runtime, container_mounts=mounts), RunDir(Path(path)))


@pytest.mark.parametrize("entry", ["/home/a,b/train.py", "/home/a:b/train.py"])
def test_a_script_whose_folder_the_container_would_cut_in_two_is_refused(entry: str) -> None:
    with pytest.raises(RenderError, match="ENTRY: .* cuts a mount in two; move the script"):
        script(Job(container_image="i", container_runtime="pyxis", entry=entry), RunDir(Path("/shared/x")))
    assert entry in script(Job(entry=entry), RunDir(Path("/shared/x")))


def test_a_run_directory_with_a_comma_is_fine_where_nothing_is_mounted() -> None:
    assert "export HOLDFAST_RUN_DIR=/shared/a,b/x\n" in script(Job(), RunDir(Path("/shared/a,b/x")))


def test_an_array_never_runs_more_tasks_at_once_than_it_has() -> None:
    assert "#SBATCH --array=0-2%3\n" in script(Job(), array_size=3)
    assert "#SBATCH --array=0-499%256\n" in script(Job(), array_size=500)
    assert "#SBATCH --array=0-499%4\n" in script(Job(array_parallel=4), array_size=500)


@pytest.mark.parametrize(("how", "expected"), [("gpus-per-node", "#SBATCH --gpus-per-node=a100:4\n"), ("gres", "#SBATCH --gres=gpu:a100:4\n"), ("none", None)])
def test_gpus_are_asked_for_in_the_way_the_site_wants(how: str, expected: str | None) -> None:
    text = script(Job(gpu_request=how, gpu_type="a100", gpus_per_node=4))
    assert expected in text if expected else "gpu" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))


def test_each_setting_of_the_queue_is_its_directive() -> None:
    asked = {"partition": "P", "account": "A", "qos": "Q", "constraint": "C", "reservation": "R", "exclude": ("n1", "n[3-4]"), "nodes": 2}
    text = script(Job(gpus_per_node=4, cpus_per_gpu=8, mem_gb=64, gpu_type="X", time_limit=90, stop_lead_s=45, **asked))
    assert [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")] == [
        "job-name=x-abcd",
        "comment=holdfast:x-abcd",
        "partition=P",
        "account=A",
        "qos=Q",
        "constraint=C",
        "reservation=R",
        'exclude="n1,n[3-4]"',
        "nodes=2",
        "ntasks-per-node=4",
        "cpus-per-task=8",
        "gpus-per-node=X:4",
        "mem=64G",
        "time=01:30:00",
        "requeue",
        "open-mode=append",
        "signal=USR2@45",
        "output=/shared/runs/x-abcd/logs/%j.batch.out",
    ]


def test_a_container_without_gpus_is_not_given_any_and_a_script_from_elsewhere_gets_its_folder() -> None:
    asked = {"container_image": "/i.sif", "container_runtime": "apptainer"}
    own = "--bind /shared/runs/x-abcd:/shared/runs/x-abcd"
    assert f"apptainer exec {own} --bind /home/me:/home/me /i.sif python3 -u /home/me/fit.py " in script(Job(device="cpu", entry="/home/me/fit.py", **asked))
    assert f"apptainer exec --nv {own} /i.sif python3 -u -m my.fit a " in script(Job(entry="-m  my.fit", entry_args=("a",), **asked))


def test_a_container_keeps_what_a_job_sets_over_what_its_image_sets() -> None:
    asked = {"container_image": "i", "container_runtime": "pyxis", "node_env": {"A": "1"}}
    assert " --container-env=A,PYTHONPATH " in script(Job(entry="fit.py", **asked))
    assert " --container-env=A " in script(Job(**asked))


def test_the_python_of_the_site_goes_before_the_one_that_submits() -> None:
    assert "\n  /site/python -u " in render.script_for(Job(node_python="/site/python"), RUN, "/here/python")
    assert "\n  /here/python -u " in render.script_for(Job(), RUN, "/here/python")


# -- quoting, as text; what Slurm makes of it is asked below --------------------------------------------------------------


@pytest.mark.parametrize("value", HOSTILE)
def test_bash_reads_a_quoted_value_back(value: str) -> None:
    done = subprocess.run(["bash", "-c", f"printf %s {render.shell(value)}"], capture_output=True, text=True, check=True)
    assert done.stdout == value


def test_a_directive_is_bare_where_it_can_be_and_else_in_double_quotes_with_both_characters_escaped() -> None:
    assert render.sbatch("gpu:h100:4_-./@%,=+") == "gpu:h100:4_-./@%,=+"
    assert render.sbatch('a\\b "c" $d') == '"a\\\\b \\"c\\" $d"'
    assert render.sbatch("") == '""' and render.sbatch(7) == "7"
    assert render.pattern("/runs/50%/%j") == "/runs/50%%/%%j"
    with pytest.raises(RenderError, match="has a backslash"):
        render.pattern("a\\b")
    for quote in (render.shell, render.sbatch, render.pattern):
        for char in "\n\r\0":
            with pytest.raises(RenderError, match="line break or NUL"):
                quote(f"a{char}b")
    assert render.shell(render.Quoted("$HOME")) == "$HOME"


def test_the_script_for_submitting_by_hand_is_warned_in_time_too() -> None:
    assert f"#SBATCH --signal=USR2@{Job().stop_lead_s}\n" in render.render_by_hand(Job())


def test_mail_is_asked_for_at_the_end_alone() -> None:
    assert "#SBATCH --mail-user=ada@x.org\n#SBATCH --mail-type=END,FAIL\n" in script(Job(notify_email="ada@x.org"))
    assert "--mail" not in script(Job())


def test_a_job_without_an_id_is_shown_in_a_folder_that_says_so(tmp_path: Path) -> None:
    assert render.run_dir_of(Job(job_name="a", runs_dir="r"), tmp_path).path == tmp_path / "r" / "a-0000"
    assert render.run_dir_of(Job(job_name="a", runs_dir="r", run_id="ab12"), tmp_path).path == tmp_path / "r" / "a-ab12"


# -- a real Slurm ------------------------------------------------------------------------------------------------------


class Small:
    """A two-node cluster with the partition of the h100 example, and its clients."""

    def __init__(self, here: lab.Lab, room: Path):
        self.lab, self.room = here, room
        self.env = {**clean_environment(os.environ), **here.env()}

    def sbatch(self, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sbatch", *options], input=text, env=self.env, cwd=self.room, capture_output=True, text=True, timeout=90)

    def submit(self, text: str, *options: str) -> str:
        done = self.sbatch(text, "--parsable", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def shown(self, job_id: str, field: str) -> str:
        """What stands behind `field=`, to the byte; scontrol itself ends these lines with a space."""
        text = subprocess.run(["scontrol", "show", "job", job_id], env=self.env, capture_output=True, timeout=30, check=True).stdout.decode()
        return next(line for line in text.split("\n") if line.startswith(f"   {field}=")).removeprefix(f"   {field}=").removesuffix(" ")


@pytest.fixture(scope="module")
def small() -> Iterator[Small]:
    missing = lab.missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}. {lab.how_to_install()}")
    room = Path(tempfile.mkdtemp(prefix="hf-")).resolve()
    room.chmod(0o755)
    try:
        extra = "PartitionName=preempt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1"
        yield Small(lab.start(room / "lab", LabConfig(nodes=2, cpus=96, extra_conf=extra)), room)
    finally:
        found = lab.load(room / "lab")
        if found:
            found.stop()
        shutil.rmtree(room, ignore_errors=True)


@pytest.mark.slurm
def test_sbatch_accepts_every_golden_script(small: Small) -> None:
    refused = {}
    for path in GOLDEN:
        done = small.sbatch(path.read_text(), "--test-only")
        if done.returncode or "to start at" not in done.stderr:
            refused[path.name] = done.stderr
    assert GOLDEN and not refused


@pytest.mark.slurm
def test_sbatch_accepts_the_script_for_submitting_by_hand(small: Small) -> None:
    text = (REPO / "slurm/train.sbatch").read_text()
    done = small.sbatch(text, "--test-only", "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=24:00:00")
    assert done.returncode == 0 and "using 16 processors" in done.stderr, done.stderr


@pytest.mark.slurm
@pytest.mark.parametrize("value", HOSTILE)
def test_slurm_keeps_a_hostile_value_as_it_was_written(small: Small, value: str) -> None:
    job_id = small.submit(f"#!/bin/bash\n#SBATCH --comment={render.sbatch(value)}\n#SBATCH --output=/dev/null\n#SBATCH --hold\ntrue\n")
    assert small.shown(job_id, "Comment") == value


@pytest.mark.slurm
def test_a_directive_behind_a_hostile_value_is_still_read(small: Small) -> None:
    head = "#!/bin/bash\n" + "".join(f"#SBATCH --comment={render.sbatch(value)}\n" for value in HOSTILE)
    job_id = small.submit(head + "#SBATCH --comment=last\n#SBATCH --output=/dev/null\n#SBATCH --hold\ntrue\n")
    assert small.shown(job_id, "Comment") == "last"


@pytest.mark.slurm
def test_the_log_of_a_job_lies_where_it_was_asked_for_whatever_the_folder_is_called(small: Small) -> None:
    names = [name for name in HOSTILE if "\\" not in name]
    expected = {}
    for number, name in enumerate(names):
        run = RunDir(small.room / "runs" / name / f"x-{number:04d}")
        run.logs.mkdir(parents=True)
        text = render_script(Job(gpu_request="none"), Script(run, "/opt/python"))
        directives = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(("#!", "#SBATCH")))
        expected[run.logs / "{}.batch.out"] = small.submit(f"{directives}echo log {number}\n")
    for number, (where, job_id) in enumerate(expected.items()):
        log = Path(str(where).replace("{}", job_id))
        until(
            lambda log=log, number=number: log.exists() and log.read_text() == f"log {number}\n",
            20,
            f"{log}; there is {sorted(small.room.glob('runs/*/*/logs/*'))}",
        )


@pytest.mark.slurm
def test_logs_of_an_array_lie_with_its_members_whatever_the_folder_is_called(small: Small) -> None:
    run = RunDir(small.room / "runs" / '50 %a "done" $(touch x)' / "x-abcd")
    for index in range(2):
        run.member(index).logs.mkdir(parents=True)
    text = render_script(Job(gpu_request="none"), Script(run, "/opt/python", array_size=2))
    directives = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(("#!", "#SBATCH")))
    job_id = small.submit(directives + "echo task $SLURM_ARRAY_TASK_ID\n")
    for index in range(2):
        log = run.member(index).log(f"{job_id}_{index}", "batch")
        until(lambda log=log, index=index: log.exists() and log.read_text() == f"task {index}\n", 20, str(log))
    assert not (small.room / "x").exists()


def test_the_example_site_renders_what_its_file_says(tmp_path: Path) -> None:
    resolved = resolve(["SITE=h100"], {}, tmp_path, lambda word: site_file.find(word, tmp_path))
    text = script(resolved.job)
    assert "#SBATCH --gpus-per-node=h100:" in text and "module load cuda/13.0\n" in text and "export NCCL_IB_HCA=mlx5\n" in text
