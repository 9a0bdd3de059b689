"""The house: which package may import which, what a command must not load, and what the repository must not contain."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("jobs", "slurm", "launcher", "train")
# The module that a person's own script imports, beside the packages.
HELPER = "holdfast"
ARROWS = {"jobs": set(), "slurm": {"jobs"}, "launcher": {"jobs", "slurm"}, "train": {"jobs"}, HELPER: {"jobs"}}
# Third-party modules that a package may import when it is loaded, and those only inside a function.
ALWAYS = {
    "jobs": {"pydantic", "yaml"},
    "slurm": {"jinja2"},
    "launcher": {"typer", "rich"},
    "train": {"torch", "accelerate", "numpy", "safetensors"},
    HELPER: set(),
}
LAZILY = {
    "jobs": set(),
    "slurm": set(),
    "launcher": {"jinja2", "matplotlib", "optuna"},
    "train": {"transformers", "tokenizers", "datasets", "pyarrow", "sklearn", "transformer_engine", "torchao", "wandb"},
    HELPER: set(),
}
# The one module that imports submitit; the command line imports it inside functions only.
SUBMITIT_HOME = "launcher/submission/submitit_executor.py"
# A kernel is a function in Triton's language, so these modules need it at once; all others import them inside functions only.
KERNELS = "train/kernels/"
# Modules in one folder, without __init__ and __main__: more than a reader takes in at once asks for another folder.
MOST_MODULES = 17


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    package: str  # of the file
    top: str  # of the name that is imported
    name: str
    lazy: bool  # inside a function, or for the type checker only

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}{' inside a function' if self.lazy else ''}"


def imports_of(path: Path) -> Iterator[Import]:
    file = path.relative_to(REPO).as_posix()
    package = file.partition("/")[0].removesuffix(".py")

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, package, alias.name.partition(".")[0], alias.name, lazy)
            elif isinstance(child, ast.ImportFrom):
                name = "." * child.level + (child.module or "")
                yield Import(file, child.lineno, package, name.partition(".")[0], name, lazy)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func) in ("importlib.import_module", "import_module", "__import__")
                and isinstance(child.args[0], ast.Constant)
            ):
                name = str(child.args[0].value)
                yield Import(file, child.lineno, package, name.partition(".")[0], name, lazy)
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(), file), False)


MODULES = sorted([REPO / f"{HELPER}.py", *(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))])
IMPORTS = [found for path in MODULES for found in imports_of(path)]
FOREIGN = [
    found
    for found in IMPORTS
    if found.top not in sys.stdlib_module_names and found.top not in PACKAGES and not (found.top == "triton" and found.file.startswith(KERNELS))
]


def faults(wrong: list[Import]) -> str:
    return "\n".join(map(str, wrong))


# -- imports -----------------------------------------------------------------------------------------------------------


def test_there_is_something_to_look_at() -> None:
    assert {path.parts[len(REPO.parts)] for path in MODULES} == {*PACKAGES, f"{HELPER}.py"}
    assert {"submitit", "torch", "pydantic", "jinja2", "typer"} <= {found.top for found in FOREIGN}


def test_packages_import_each_other_along_the_arrows_only() -> None:
    wrong = [found for found in IMPORTS if found.top in PACKAGES and found.top != found.package and found.top not in ARROWS[found.package]]
    assert not wrong, faults(wrong)


def test_imports_are_absolute() -> None:
    wrong = [found for found in IMPORTS if found.name.startswith(".")]
    assert not wrong, faults(wrong)


@pytest.mark.parametrize("package", [*PACKAGES, HELPER])
def test_a_package_imports_no_more_than_it_may_when_it_is_loaded(package: str) -> None:
    wrong = [found for found in FOREIGN if found.package == package and not found.lazy and found.file != SUBMITIT_HOME and found.top not in ALWAYS[package]]
    assert not wrong, faults(wrong)


@pytest.mark.parametrize("package", [*PACKAGES, HELPER])
def test_a_package_imports_no_more_than_it_may_inside_a_function(package: str) -> None:
    wrong = [found for found in FOREIGN if found.package == package and found.lazy and found.top not in ALWAYS[package] | LAZILY[package]]
    assert not wrong, faults(wrong)


def test_submitit_has_one_home_and_nobody_loads_it_without_need() -> None:
    assert {found.file for found in IMPORTS if found.top == "submitit"} == {SUBMITIT_HOME}
    assert {found.top for found in FOREIGN if found.file == SUBMITIT_HOME} == {"submitit"}
    # A program of its own may load it at once; nothing that others import may.
    imported = {found.name for found in IMPORTS}
    wrong = [
        found
        for found in IMPORTS
        if found.name == "launcher.submission.submitit_executor" and not found.lazy and found.file.removesuffix(".py").replace("/", ".") in imported
    ]
    assert not wrong, faults(wrong)


def test_triton_is_loaded_only_by_kernels_and_kernels_only_where_they_run() -> None:
    assert {found.file.startswith(KERNELS) for found in IMPORTS if found.top == "triton"} == {True}
    wrong = [found for found in IMPORTS if found.name.startswith("train.kernels.") and not found.lazy]
    assert not wrong, faults(wrong)


def test_training_knows_nothing_of_slurm() -> None:
    wrong = [found for found in IMPORTS if found.package == "train" and found.top in ("launcher", "slurm", "submitit")]
    assert not wrong, faults(wrong)


def test_every_module_that_is_imported_from_us_exists() -> None:
    ours = {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    wrong = [found for found in IMPORTS if found.top in PACKAGES and found.name not in ours]
    assert not wrong, faults(wrong)


def private_uses(path: Path) -> Iterator[str]:
    """Where a file takes a name of another of our modules that begins with an underscore: `from m import _x`, or `m._x`."""
    tree = ast.parse(path.read_text(), path.name)
    ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in (*PACKAGES, HELPER):
            yield from (f"{path.name}:{node.lineno} imports {alias.name} of {node.module}" for alias in node.names if alias.name.startswith("_"))
            ours |= {alias.asname or alias.name for alias in node.names if Path(REPO / str(node.module).replace(".", "/") / f"{alias.name}.py").exists()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Name) and node.value.id in ours:
            yield f"{path.name}:{node.lineno} uses {node.value.id}.{node.attr}"


def test_no_module_takes_a_private_name_of_another() -> None:
    wrong = [found for path in MODULES for found in private_uses(path)]
    wrong += [found for path in sorted((REPO / "tests").rglob("*.py")) for found in private_uses(path) if " imports " in found]
    assert not wrong, "\n".join(wrong)


def test_the_search_for_private_names_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "def f():\n    from launcher.status import run_status as show\n    from jobs.core.imports import _near\n    return show._pace, show.ago, _near\n"
    )
    assert list(private_uses(file)) == ["bad.py:3 imports _near of jobs.core.imports", "bad.py:4 uses show._pace"]


# Past this, ask what second concept has moved in. These have one and are long all the same.
MOST_LINES = 330
LONGER = {
    "holdfast.py": 420,  # one file, since a person's script imports it alone
    "jobs/config/settings.py": 360,
    "launcher/attempt/lifecycle.py": 340,
    "launcher/commands/clean.py": 370,
    "launcher/cluster/doctor.py": 380,
    "launcher/commands/precision.py": 380,
    "launcher/attempt/watchdog.py": 370,
    "launcher/commands/sweep.py": 380,
    "launcher/status/sweep_status.py": 360,
    "launcher/sweeps/study.py": 350,
    "slurm/client.py": 400,
}


# The training loop is read as an algorithm: each of its functions fits a screen, and none changes the variables of another.
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_THE_LOOP = {"train": 20, "train_step": 40, "next_batches": 25, "shut_down": 25, "save": 20}
LOOP_MODULES = ("train/trainer.py", "train/startup.py", "train/train_step.py", "train/train_state.py", "train/validation.py", "train/overflow_policy.py")


@pytest.mark.parametrize("file", LOOP_MODULES)
def test_the_training_loop_is_short_and_has_no_nonlocal(file: str) -> None:
    tree = ast.parse((REPO / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    limits = MOST_LINES_OF_THE_LOOP if file == "train/trainer.py" else {}
    assert set(limits) <= set(lengths)
    assert not {name: length for name, length in lengths.items() if length > limits.get(name, MOST_LINES_OF_A_FUNCTION)}
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Nonlocal)]


def test_a_module_is_short_enough_to_read() -> None:
    lines = {path.relative_to(REPO).as_posix(): path.read_text().count("\n") for path in MODULES}
    assert not {name: count for name, count in lines.items() if count > LONGER.get(name, MOST_LINES)}
    assert not {name for name in LONGER if lines.get(name, 0) <= MOST_LINES}, "no longer long: take it out"


def test_no_folder_holds_more_modules_than_a_reader_takes_in() -> None:
    folders = Counter(path.parent.relative_to(REPO).as_posix() for path in MODULES if path.stem not in ("__init__", "__main__"))
    assert not {folder: count for folder, count in folders.items() if count > MOST_MODULES}


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of this repository that it imports, those inside functions included."""
    ours = {".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    graph: dict[str, set[str]] = {name: set() for name in ours}
    for name, path in ours.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            graph[name] |= {target for target in targets if target in ours and target != name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph.get(name, ())):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not cycles(import_graph())


def test_the_search_for_cycles_finds_them() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_scan_sees_imports_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "bad.py"
    file.write_text(
        "import torch.nn as nn\nif 1:\n  from slurm import site\ndef f():\n  import importlib, optuna\n  importlib.import_module('sklearn.datasets')\nclass C:\n  import yaml\n"
    )
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    seen = {(found.name, found.lazy) for found in imports_of(file)}
    assert seen == {("torch.nn", False), ("slurm", False), ("importlib", True), ("optuna", True), ("sklearn.datasets", True), ("yaml", False)}


# What reads or writes the batch script of a run; everything else gets it from `permissions.script_to_submit`, which checks who controls it.
USES_SCRIPT = {
    "jobs/run/permissions.py",
    "launcher/attempt/requeue.py",  # its folder's name
    "launcher/commands/clean.py",
    "launcher/commands/rerun.py",  # the Python in it, of a run that was checked
    "launcher/submission/create_run.py",
    "launcher/submission/reconfigure.py",
}


def test_only_checked_scripts_are_submitted() -> None:
    uses = set()
    for package in ("jobs", "launcher", "slurm", "train"):
        for file in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and node.attr == "script" and isinstance(node.value, ast.Name | ast.Attribute):
                    names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)} | {
                        part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)
                    }
                    if names & {"run", "staging", "source", "array", "member", "known", "final"}:
                        uses.add(file.relative_to(REPO).as_posix())
    assert uses == USES_SCRIPT


# Renames that replace no file through a temporary one, each with what it is instead. Only jobs/core/atomic_write.py writes a temporary file.
RENAMES = {
    "jobs/core/atomic_write.py": 3,
    "jobs/checkpoint/directory.py": 2,  # a damaged checkpoint is set aside; a folder goes to the trash
    "jobs/checkpoint/commit.py": 5,  # the commit: one folder takes its final name; folders go to the trash or are set aside
    "jobs/core/remove_tree.py": 2,  # what is deleted goes to the trash, and back
    "jobs/run/claim.py": 1,  # an attempt: the rename of a folder fails where the name is taken
    "jobs/run/store.py": 2,  # a staged run directory gets its name; a run goes to the trash
    "launcher/sweeps/study.py": 1,  # a damaged journal is set aside
    "train/checkpoint/export.py": 1,  # a folder of random name takes its final one
    "train/data/build.py": 1,  # the same
    "benchmarks/hardware.py": 1,  # checkpoints of one run as those of another
}


def renames_in(text: str) -> int:
    """Calls that rename a path, or link a file to a second name."""
    found = 0
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        name = node.func.attr
        # str.replace takes two arguments or more, dataclasses.replace and datetime.replace take names.
        is_path_method = module not in ("os", "shutil", "dataclasses") and name in ("rename", "replace") and len(node.args) == 1 and not node.keywords
        is_two_paths = name == "rename" and len(node.args) == 2
        found += is_path_method or is_two_paths or (module, name) in (("os", "replace"), ("os", "renames"), ("os", "link"), ("shutil", "move"))
    return found


def test_one_module_writes_files_atomically() -> None:
    folders = ("jobs", "slurm", "launcher", "train", "tools", "benchmarks", "examples")
    files = [REPO / "holdfast.py", *(file for folder in folders for file in (REPO / folder).rglob("*.py"))]
    found = {file.relative_to(REPO).as_posix(): count for file in files if (count := renames_in(file.read_text()))}
    assert found == RENAMES
    made = {
        file.relative_to(REPO).as_posix()
        for file in files
        if any(isinstance(node, ast.Attribute) and node.attr in ("mkstemp", "NamedTemporaryFile") for node in ast.walk(ast.parse(file.read_text())))
    }
    assert made == set(), "temporary files are made by jobs/core/atomic_write.py"


def test_the_search_for_renames_finds_them() -> None:
    assert renames_in("import os, shutil\nos.replace(a, b)\nos.rename(a, b)\nshutil.move(a, b)\nPath(a).replace(b)\nx.rename(b)\ndisk.rename(a, b)\n") == 6
    assert renames_in("'a'.replace('b', 'c')\ndataclasses.replace(a, b=1)\nreplace(a)\nd.replace(year=1)\n") == 0


# -- what a command loads ----------------------------------------------------------------------------------------------

HEAVY = ("torch", "accelerate", "submitit", "numpy", "matplotlib", "optuna", "transformers", "safetensors")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["submit", "--help"], ["sweep", "--help"], ["render"], ["render", "SITE=h100"], ["explain"], ["explain", "--json"], ["status"]],
    ids=" ".join,
)
def test_a_command_that_only_reads_loads_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    program = f"import sys\nfrom launcher.cli.app import run_app\nsys.argv = ['holdfast', *{words!r}]\ncode = run_app()\nprint('loaded:', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stderr.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("module", ["launcher.attempt", "jobs.config.resolver", "jobs.rank.stop_flag", "holdfast"])
def test_what_runs_in_the_last_seconds_of_an_attempt_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}\nprint([m for m in {HEAVY!r} + ('jinja2', 'typer', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# -- files -------------------------------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout, or no git")
    return [path for name in done.stdout.decode().split("\0")[:-1] if (path := REPO / name).is_file()]


# Put together from parts, so that this file does not contain what it looks for.
MACHINE = re.compile(r"(?<![\w.~}*/-])/(?:" + "|".join(("ro" + "ot", "wo" + "rk")) + r")(?:/|\b(?![\w-]))")
INDEXES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted"),
        ("test", "pypi"),
        ("deb", "debian"),
        ("security", "debian"),
        ("archive", "ubuntu"),
        ("repo", "anaconda"),
        ("conda", "anaconda"),
    )
]
INDEXES.append(".".join(("download", "pytorch", "org")))


def test_no_file_holds_a_path_of_the_machine_it_was_written_on() -> None:
    wrong = []
    for path in repository_files():
        for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if MACHINE.search(text):
                wrong.append(f"{path.relative_to(REPO)}:{number}: {text.strip()[:120]}")
    assert not wrong, "\n".join(wrong)


def test_the_search_for_paths_finds_them() -> None:
    for text in ("cd /ro" + "ot/x", "'/wo" + "rk/main'", "PATH=/wo" + "rk", "(/ro" + "ot)"):
        assert MACHINE.search(text), text
    for text in ("/home/wo" + "rk/x", "a/wo" + "rk/b", "/ro" + "otfs", "/wo" + "rkdir", "~/wo" + "rk/x", "$HOME/wo" + "rk/x", "$x/ro" + "ot/"):
        assert not MACHINE.search(text), text


def test_no_file_names_a_package_index() -> None:
    """Where packages come from is the machine's choice: mirrors and offline clusters have their own."""
    wrong = [f"{path.relative_to(REPO)} names {host}" for path in repository_files() for host in INDEXES if host in path.read_text("utf-8", errors="replace")]
    assert not wrong, "\n".join(wrong)


def test_every_third_party_module_that_is_always_imported_is_a_dependency() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^a-zA-Z0-9_-]", entry)[0] for entry in project["dependencies"]}
    assert {{"yaml": "pyyaml"}.get(found.top, found.top) for found in FOREIGN if not found.lazy} == named


def test_what_is_not_python_lies_inside_the_packages_and_is_found_there() -> None:
    wheel = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": [*PACKAGES, f"{HELPER}.py"]}
    for package, pattern in (
        ("slurm", "script/templates/*.j2"),
        ("launcher", "report/templates/*.j2"),
        ("slurm", "sites/*.yaml"),
        ("jobs", "*.yaml"),
        ("slurm", "train.sbatch"),
    ):
        found = sorted(path.name for path in Path(str(resources.files(package))).glob(pattern))
        assert found and found == sorted(path.name for path in (REPO / package).glob(pattern)), (package, pattern)
    assert all((REPO / package / "__init__.py").is_file() for package in PACKAGES)


def test_nothing_that_the_wheel_needs_is_ignored_by_git() -> None:
    tracked = {path.relative_to(REPO).as_posix() for path in repository_files()}
    there = {
        path.relative_to(REPO).as_posix() for package in PACKAGES for path in (REPO / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert there <= tracked
