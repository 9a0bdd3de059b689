"""Whether the tests notice a mistake: small ones are made in a module, one at a time, and its tests must fail for each.

    python -m tools.mutation                    every module of TARGETS; docs/evidence/mutation.json and docs/evidence/mutation.md
    python -m tools.mutation jobs/run/retry_policy.py    these modules alone
    python -m tools.mutation --list MODULE      the mistakes that would be made, without trying them
    python -m tools.mutation --only 12,31 MODULE   those of the list alone, and what the tests said; nothing is written

Works on a copy of the tree. A mistake inside a function is put into the code of a process that has the tests collected and
forks for each mutant, so that one costs what its tests take until the first fails. A mistake in a constant or a class needs
its imports anew: another process, with nothing but the large packages loaded, forks for those.
What is known to make no difference stands with its reason in tools/mutation_same.json.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT, SAME, PAGE = REPOSITORY / "docs/evidence/mutation.json", REPOSITORY / "tools/mutation_same.json", REPOSITORY / "docs/evidence/mutation.md"
_HEAD = """\
<!-- Written by `make mutation`; changes made here are lost. -->
# Mutation testing

Each mutant is one small change of a module. It is killed when a test of that module fails.
Mutants that cannot change the behaviour are listed with the reason.

"""

_RULES = ["tests/jobs/config/test_rules.py", "tests/jobs/config/test_settings.py", "-k", "rules or batch or near or hardware or architecture or contradict"]
_LAYERS = ["tests/jobs/config/test_sources.py", "-k", "not real_make"]
_COMMIT = [
    "tests/train/checkpoint/test_checkpoint_files.py",
    "tests/jobs/checkpoint/test_checkpoint_commit.py",
    "-k",
    "checkpoint_files or power_cut or zombie or pruning or verified or in_place",
]
# Module -> words for pytest: the tests that hold it, quickest first.
TARGETS: dict[str, list[str]] = {
    "jobs/core/contract.py": ["tests/jobs/core/test_contract.py", "tests/jobs/run/test_verdict.py", "-k", "not Histories"],
    "jobs/run/retry_policy.py": ["tests/jobs/run/test_verdict.py", "-k", "not Histories"],
    "jobs/run/event_log.py": ["tests/jobs/run/test_ledger.py"],
    "jobs/specs/lr_schedule.py": ["tests/jobs/config/test_schedule.py"],
    "jobs/config/validation.py": _RULES,
    "jobs/checkpoint/directory.py": _COMMIT,
    "jobs/checkpoint/commit.py": _COMMIT,
    "train/data/order.py": ["tests/train/data/test_data_order.py"],
    "train/compilation/kernel_cache.py": ["tests/train/compilation/test_compile_cache.py", "-k", "not another_node and not next_attempt"],
    "slurm/script/render.py": ["tests/slurm/test_render.py", "-m", "not slurm", "-k", "not shellcheck"],
    "jobs/config/layers.py": _LAYERS,
    "jobs/config/aliases.py": _LAYERS,
    "jobs/config/overrides.py": ["tests/jobs/config/test_sources.py"],
    "jobs/config/resolver.py": _LAYERS,
}
# Third-party packages that these tests import: loaded once, before the first fork.
_LARGE = (
    "pytest",
    "_pytest.assertion.rewrite",
    "hypothesis",
    "hypothesis.strategies",
    "hypothesis.stateful",
    "pydantic",
    "yaml",
    "jinja2",
    "numpy",
    "torch",
    "rich",
    "typer",
)

_PYTEST = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]

_SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
}


@dataclass(frozen=True)
class Mutant:
    """One mistake: where it is, the statement before and after, and the text of the whole module with it."""

    line: int
    place: str
    before: str
    after: str
    text: str
    in_function: bool

    def key(self, module: str) -> str:
        return f"{module}: {self.place}: {self.before} => {self.after}"


def mutants(source: str) -> list[Mutant]:
    """Every mistake that is made in a module, in the order of its lines; the text of messages and types stay as they are."""
    tree = ast.parse(source)
    found = []
    for place, statement, node, change, inside in _sites(tree, "module", False):
        before = _shown(statement)
        with _changed(node, change):
            after, text = _shown(statement), ast.unparse(tree)
        if after != before:
            found.append(Mutant(getattr(node, "lineno", statement.lineno), place, before, after, text, inside))
    return found


Change = Callable[[ast.AST], None]


def _sites(tree: ast.AST, place: str, inside: bool) -> Iterator[tuple[str, ast.stmt, ast.AST, Change, bool]]:
    """(function, statement, node, what to do to the node, whether a function is around it) of each possible mistake."""
    for name, field in ast.iter_fields(tree):
        if name not in ("body", "orelse", "finalbody", "handlers") or not isinstance(field, list):
            continue
        for statement in field:
            if isinstance(statement, ast.ExceptHandler):
                yield from _sites(statement, place, inside)
                continue
            inner = f"{place}.{statement.name}".removeprefix("module.") if isinstance(statement, ast.FunctionDef | ast.ClassDef) else place
            yield from ((inner, statement, node, change, inside) for node, change in _within(statement))
            if _may_go(statement):
                yield inner, statement, statement, _vanish, inside
            yield from _sites(statement, inner, inside or isinstance(statement, ast.FunctionDef))


def _may_go(statement: ast.stmt) -> bool:
    is_doc = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Expr | ast.Raise | ast.AugAssign | ast.Continue | ast.Break) and not is_doc


def _vanish(statement: ast.AST) -> None:
    statement.__class__ = ast.Pass  # type: ignore[assignment]


def _within(statement: ast.stmt) -> Iterator[tuple[ast.AST, Change]]:
    """The mistakes in the expressions of one statement, not of the statements inside it."""
    stack: list[tuple[ast.AST, bool]] = [(statement, True)]
    while stack:
        node, top = stack.pop()
        if not top and isinstance(node, ast.stmt | ast.ExceptHandler):
            continue
        if top and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        yield from ((node, change) for change in _changes(node))
        for name, value in ast.iter_fields(node):
            # A message says what it says; a type is checked by mypy; a decorator is no expression of this statement.
            if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(node, ast.JoinedStr):
                continue
            stack += [(child, False) for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            yield from (_put("ops", other(), index) for other in _SWAPS[type(op)])
    elif isinstance(node, ast.BoolOp):
        yield from (_put("op", other()) for other in _SWAPS[type(node.op)])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS:
        yield from (_put("op", other()) for other in _SWAPS[type(node.op)])
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield _put("value", not node.value)
        elif isinstance(node.value, int | float):
            yield _put("value", node.value + 1)
        elif isinstance(node.value, str | bytes) and len(node.value) < 40 and (b" " if isinstance(node.value, bytes) else " ") not in node.value:
            yield _put("value", node.value + (b"X" if isinstance(node.value, bytes) else "X"))
    elif isinstance(node, ast.Return) and node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield _put("value", None)
    if isinstance(node, ast.If | ast.While | ast.IfExp) and _worth_negating(node.test):
        yield _put("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        yield from (_put("ifs", ast.UnaryOp(ast.Not(), test), index) for index, test in enumerate(node.ifs) if _worth_negating(test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield _put("op", ast.UAdd()) if isinstance(node.op, ast.USub) else _put("op", ast.Not(), twice=True)


def _worth_negating(test: ast.expr) -> bool:
    """A comparison and a `not` are turned round where they stand; what only mypy reads never runs."""
    is_plain = isinstance(test, ast.Name | ast.Call | ast.Attribute | ast.BoolOp | ast.NamedExpr | ast.Subscript)
    return is_plain and not (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING")


def _put(name: str, value: object, index: int | None = None, twice: bool = False) -> Change:
    def change(node: ast.AST) -> None:
        if twice:
            node.operand = ast.UnaryOp(ast.Not(), node.operand)  # type: ignore[attr-defined]
        elif index is None:
            setattr(node, name, value)
        else:
            setattr(node, name, [value if at == index else old for at, old in enumerate(getattr(node, name))])

    return change


@contextlib.contextmanager
def _changed(node: ast.AST, change: Change) -> Iterator[None]:
    kept, kind = copy.copy(node.__dict__), type(node)
    change(node)
    ast.fix_missing_locations(node)
    yield
    node.__class__ = kind  # type: ignore[assignment]
    node.__dict__.clear()
    node.__dict__.update(kept)


def _shown(statement: ast.stmt) -> str:
    """The head of a statement, on one line."""
    text = ast.unparse(statement)
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        text = next(line for line in text.split("\n") if line.startswith(("def ", "class ")))
    elif hasattr(statement, "body"):
        text = text.split("\n")[0]
    return text


# -- trying them -------------------------------------------------------------------------------------------------------


def copy_of_tree(room: Path) -> Path:
    """The working tree without what git ignores."""
    tree = room / "tree"
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    subprocess.run("git init -q . && git add -A && git -c user.name=x -c user.email=x@x commit -qm x", shell=True, cwd=tree, check=True)  # noqa: S602
    return tree


def passes(tree: Path, words: list[str], limit_s: float, shown: bool = False) -> str:
    """`passed`, `failed` or `timeout` of these tests in a fork of this process, imports included."""

    def test() -> int:
        import pytest

        return int(pytest.main([*_PYTEST, f"--basetemp={tree.parent}/slow", *words]))

    return _in_a_fork(test, limit_s, shown)


def _in_a_fork(work: Callable[[], int], limit_s: float, shown: bool = False) -> str:
    """How `work` ended in a process group of its own; 0 is `passed`."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setsid()
            if not shown:
                quiet = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(quiet, fd)
            code = work()
        finally:
            os._exit(code)
    limit = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        if time.monotonic() > limit:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "timeout"
        time.sleep(0.01)


class Collected:
    """A plugin of pytest: when the tests are collected, each mutant is tried on them in a fork; `tell` hears (number, end)."""

    def __init__(self, path: Path, module: str, listed: list[tuple[int, Mutant]], tell: Callable[[int, str], None]):
        self.path, self.module, self.listed, self.tell = path, module, listed, tell

    def pytest_runtestloop(self, session: Any) -> bool:
        source = self.path.read_text()
        for item in session.items:
            _without_shrinking(item.obj)
        session.config._tmp_path_factory.getbasetemp()
        begun, clock = time.monotonic(), Path("durations.json").absolute()
        unharmed = _in_a_fork(lambda: self._tested(session, source, clock), 600)
        baseline = time.monotonic() - begun
        # The quickest first: most mistakes are found at once, and a slow test runs for those that are not.
        took = json.loads(clock.read_text()) if unharmed == "passed" else {}
        session.items.sort(key=lambda item: float(took[item.nodeid]) if took else 0.0)
        self.tell(-1, unharmed)
        for number, mutant in self.listed if unharmed == "passed" else ():
            write(self.path, mutant.text)
            self.tell(number, _in_a_fork(lambda text=mutant.text: self._tested(session, text), 5 + 3 * baseline))  # type: ignore[misc]
        write(self.path, source)
        return True

    def _tested(self, session: Any, text: str, clock: Path | None = None) -> int:
        put_code(sys.modules[self.module], text)
        took = {}
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            begun = time.monotonic()
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            took[item.nodeid] = time.monotonic() - begun
            if session.testsfailed:
                session._setupstate.teardown_exact(None)
                return 1
        if clock is not None:
            clock.write_text(json.dumps(took))
        return 0


def _without_shrinking(test: Any) -> None:
    """That an example fails is all that is asked; to find the smallest one takes seconds."""
    from hypothesis import Phase, is_hypothesis_test, settings

    if is_hypothesis_test(test):
        given = getattr(test, "_hypothesis_internal_use_settings", None) or settings.default
        test._hypothesis_internal_use_settings = settings(given, phases=[Phase.explicit, Phase.generate], database=None)


def put_code(module: ModuleType, text: str) -> None:
    """Gives every function and method of a loaded module the code that it has in `text`."""
    codes, stack = {}, [compile(text, module.__file__ or "", "exec")]
    while stack:
        for code in filter(lambda const: isinstance(const, CodeType), stack.pop().co_consts):
            codes[code.co_qualname] = code
            stack.append(code)
    holders = [module, *(value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)]
    for found in [value for holder in holders for value in vars(holder).values()]:
        if hasattr(found, "cache_clear"):
            found.cache_clear()
        function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", None) or found) if not isinstance(found, type) else None
        if (
            isinstance(function, FunctionType)
            and function.__module__ == module.__name__
            and function.__qualname__ in codes
            and not function.__code__.co_freevars
        ):
            function.__code__ = codes[function.__qualname__]


def write(path: Path, text: str) -> None:
    """The module with other text; the bytecode of the text before goes, since two mutants of one second look the same to Python."""
    path.write_text(text)
    for kept in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        kept.unlink()


def try_module(tree: Path, module: str, only: set[int], known: dict[str, str], every: int, left: set[int] | None) -> dict[str, Any]:
    """What became of the mutants of one module. `only`: numbers to show, empty for all; `every`: each N-th; `left`: these of all."""
    path, words, begun = tree / module, TARGETS[module], time.monotonic()
    source = path.read_text()
    listed = {number: mutant for number, mutant in enumerate(mutants(source)) if (number % every == 0 if left is None else number in left)}
    ends: dict[int, str] = {number: "passed" for number, mutant in listed.items() if mutant.key(module) in known and not only}
    survivors: list[dict[str, Any]] = []

    def tell(number: int, end: str) -> None:
        if number < 0:
            if end != "passed":
                raise SystemExit(f"the tests of {module} fail without any mistake: {' '.join(words)}")
            return
        ends[number], mutant = end, listed[number]
        if end == "passed":
            print(f"{module}:{mutant.line} [{number}] {mutant.place}: {mutant.before}\n    => {mutant.after}", flush=True)

    wanted = {number: mutant for number, mutant in listed.items() if number not in ends and (not only or number in only)}
    quick = [(number, mutant) for number, mutant in wanted.items() if mutant.in_function and not only]
    _try_collected(path, module, words, quick, tell)
    slow = [(number, mutant) for number, mutant in wanted.items() if number not in ends]
    if slow:
        before = time.monotonic()
        tell(-1, passes(tree, words, 600))
        baseline = time.monotonic() - before
        for number, mutant in slow:
            write(path, mutant.text)
            tell(number, passes(tree, words, 10 + 3 * baseline, shown=bool(only)))
    write(path, source)
    for number in sorted(number for number, end in ends.items() if end == "passed"):
        mutant = listed[number]
        survivors.append({"number": number, "place": mutant.place, "before": mutant.before, "after": mutant.after, "same": known.get(mutant.key(module), "")})
    killed, same = sum(end != "passed" for end in ends.values()), sum(bool(one["same"]) for one in survivors)
    took = time.monotonic() - begun
    print(f"{module}: {len(ends)} mutants, {killed} killed, {same} make no difference, {len(survivors) - same} survived; {took:.0f} s", flush=True)
    return {
        "mutants": len(ends),
        "killed": killed,
        "survivors": survivors,
        "date": str(date.today()),
        "seconds": round(took),
        "every": every,
        "source": _sum(source),
    }


def _sum(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def again(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The result of all mistakes, when only the survivors of `before` were tried once more."""
    gone = len(before["survivors"]) - len(after["survivors"])
    return {**before, "killed": before["killed"] + gone, "survivors": after["survivors"], "date": after["date"]}


def _try_collected(path: Path, module: str, words: list[str], listed: list[tuple[int, Mutant]], tell: Callable[[int, str], None]) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            quiet = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(quiet, fd)
            import pytest

            name = module.removesuffix(".py").replace("/", ".")
            plugin = Collected(path, name, listed, lambda number, end: os.write(writer, f"{number} {end}\n".encode()) and None)
            pytest.main([*_PYTEST, f"--basetemp={path.parents[module.count('/')].parent}/quick", *words], plugins=[plugin])
        finally:
            os._exit(0)
    os.close(writer)
    heard = False
    try:
        with open(reader) as lines:
            for line in lines:
                heard = True
                number, end = line.split()
                tell(int(number), end)
    finally:
        os.waitpid(pid, 0)
    if not heard:
        raise SystemExit(f"the tests of {module} cannot be collected: {' '.join(words)}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown, and each survivor below it."""
    lines = ["| module | mutants | killed | make no difference | survived |", "|---|---|---|---|---|"]
    for module, found in sorted(results.items()):
        same = sum(bool(one["same"]) for one in found["survivors"])
        tried = "" if found["every"] == 1 else f" (each {found['every']}th)"
        lines.append(f"| `{module}` | {found['mutants']}{tried} | {found['killed']} | {same} | {len(found['survivors']) - same} |")
    totals = [sum(int(found[name]) for found in results.values()) for name in ("mutants", "killed")]
    alike = sum(bool(one["same"]) for found in results.values() for one in found["survivors"])
    lines.append(f"| all | {totals[0]} | {totals[1]} | {alike} | {totals[0] - totals[1] - alike} |")
    lines.append("")
    for module, found in sorted(results.items()):
        for one in found["survivors"]:
            lines.append(f"- `{module}`, {one['place']}: `{one['before']}` as `{one['after']}`: {one['same'] or 'survived'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes mistakes in modules, one at a time, and reports those that no test notices.")
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TARGETS)}; all of them if none is named")
    parser.add_argument("--list", action="store_true", help="print the mistakes with their numbers and try none")
    parser.add_argument("--only", default="", help="numbers of the list, with commas between: try these, show what pytest says, write nothing")
    parser.add_argument("--every", type=int, default=1, help="try each N-th mistake alone")
    parser.add_argument("--again", action="store_true", help="where a module is as it was, try the survivors of last time alone")
    asked = parser.parse_args()
    modules = asked.modules or list(TARGETS)
    if wrong := [name for name in modules if name not in TARGETS]:
        parser.error(f"no tests are named for {', '.join(wrong)}; known are {', '.join(TARGETS)}")
    if asked.list:
        for module in modules:
            for number, mutant in enumerate(mutants((REPOSITORY / module).read_text())):
                print(f"{module}:{mutant.line} [{number}] {mutant.place}: {mutant.before}\n    => {mutant.after}")
        return 0
    known = json.loads(SAME.read_text()) if SAME.exists() else {}
    with tempfile.TemporaryDirectory(prefix="hf-mutation-") as room:
        tree = copy_of_tree(Path(room))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(REPOSITORY)))]
        for name in _LARGE:
            __import__(name)
        survived = 0
        for module in modules:
            results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            before = results.get(module) if asked.again else None
            if before and before["source"] != _sum((tree / module).read_text()):
                before = None
            numbers = {int(word) for word in asked.only.split(",") if word}
            found = try_module(tree, module, numbers, known, asked.every, {one["number"] for one in before["survivors"]} if before else None)
            found = again(before, found) if before else found
            survived += sum(not one["same"] for one in found["survivors"])
            if not asked.only:
                results[module] = found
                RESULT.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
                PAGE.write_text(_HEAD + table(results) + "\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
