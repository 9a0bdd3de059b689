"""The documentation does what it says: its commands are run, its Python is run, its YAML is read, its links lead somewhere.

How a block says what it is, in any Markdown file of the repository:

    ```sh                      run, line by line, on the lab, in a folder of the page; each must end with 0
    ```sh fails                the same; the last must not
    ```sh not-run: WHY         shown only; but commands and settings that it names must exist
    ```python                  run by itself, in the folder of the page
    ```python not-run: WHY     shown only; must compile
    ```yaml                    a job or site file: every name and value is checked
    indented block             shown only; but commands and settings that it names must exist
    <!-- run --> above it      an indented block that is run like ```sh, its remarks behind two blanks and # left out

A block in ``` without a word is refused: nobody would know whether it is meant to work. Blocks of one page are run in order, in one folder.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
from conftest import REPOSITORY, Cluster

from jobs.config.resolver import resolve
from jobs.config.setting_names import OTHER_VARIABLES, setting_name
from launcher.cli.app import app
from slurm import site_file

PAGES = sorted(path for path in (*REPOSITORY.glob("*.md"), *(page for top in ("docs", "examples", "benchmarks") for page in (REPOSITORY / top).rglob("*.md"))))
# Words of a person's own, and of commands that take no settings.
_PLACEHOLDERS = {"KEY", "RUN", "RUNS_DIR", "JOB", "ARGS", "SITE"}


@dataclass(frozen=True)
class Block:
    """One block of a page: `kind` is sh, python, yaml, text or shown; `how` is "", fails or not-run."""

    page: str
    line: int
    kind: str
    how: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in order. Lists may be indented too; a block stands behind an empty line and is no list."""
    name, lines, found = page.relative_to(REPOSITORY).as_posix(), page.read_text().splitlines(), []
    index, in_list = 0, False
    while index < len(lines):
        line = lines[index]
        if line.startswith("```"):
            end = next(at for at in range(index + 1, len(lines)) if lines[at].startswith("```"))
            kind, _, how = line[3:].strip().partition(" ")
            found.append(Block(name, index + 1, kind, how.partition(":")[0].strip(), "\n".join(lines[index + 1 : end])))
            index = end
        elif line.startswith("    ") and not in_list and (index == 0 or not lines[index - 1].strip() or lines[index - 1].startswith("<!-- run")):
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[index:end]).rstrip()
            above = "\n".join(lines[max(index - 2, 0) : index])
            found.append(Block(name, index + 1, "sh" if "<!-- run -->" in above else "shown", "", text))
            index = end - 1
        elif line.strip():
            in_list = bool(re.match(r"\s*(?:[-*]|\d+\.)\s", line)) or (in_list and line.startswith(" "))
        index += 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def where(block: Block) -> str:
    return f"{block.page}:{block.line}"


def commands_of(text: str) -> list[str]:
    """The command lines of a shell block: without remarks, continued lines joined, here-documents left out."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"<<'(\w+)'\n.*?\n\1(?=\n|$)", "", text, flags=re.S))
    return [re.sub(r"\s{2,}#.*$", "", line).strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_there_are_pages_and_blocks_of_every_kind() -> None:
    assert len(PAGES) > 30 and {"tutorial", "howto", "reference", "explanation", "adr", "evidence", "results"} <= {page.parent.name for page in PAGES}
    assert {"sh", "python", "yaml", "shown"} <= {block.kind for block in BLOCKS}


@pytest.mark.parametrize("block", BLOCKS, ids=where)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.kind in ("sh", "python", "yaml", "json", "text", "shown"), f"{where(block)}: ``` needs a word behind it; see tests/project/test_docs.py"
    assert block.how in ("", "fails", "not-run"), f"{where(block)}: {block.how!r}"


def test_the_reading_of_blocks_sees_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    page = tmp_path / "x.md"
    page.write_text(
        "- a list\n\n    that goes on\n\ntext\n\n    shown 1\n\n    shown 2\n\n<!-- run -->\n\n    holdfast status  # remark\n\n```sh fails\nfalse\n```\n```sh not-run: why\nx \\\n  y\n```\n"
    )
    assert [(block.kind, block.how, block.text) for block in blocks_of(page)] == [
        ("shown", "", "shown 1\n\nshown 2"), ("sh", "", "holdfast status  # remark"), ("sh", "fails", "false"), ("sh", "not-run", "x \\\n  y"),
    ]  # fmt: skip
    assert commands_of("holdfast status  # remark\nx \\\n  y\n# remark\ncat > f <<'END'\nholdfast nonsense\nEND\nls") == [
        "holdfast status",
        "x  y",
        "cat > f",
        "ls",
    ]


# -- what is only shown ------------------------------------------------------------------------------------------------


def known_commands() -> dict[str, set[str]]:
    """Command (`ckpt verify` as two words) -> its options."""
    found: dict[str, set[str]] = {}

    def walk(group: object, prefix: str) -> None:
        for name, command in getattr(group, "commands", {}).items():
            found[f"{prefix}{name}"] = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("-")
            } | {"--help"}
            walk(command, f"{prefix}{name} ")

    walk(typer.main.get_command(app), "")
    return found


COMMANDS = known_commands()
MAKE_TARGETS = set(re.findall(r"^([a-z-]+)(?= *[a-z-]*:)", (REPOSITORY / "Makefile").read_text(), re.M)) | set(
    re.search(r"JOB_TARGETS := (.*)", (REPOSITORY / "Makefile").read_text())[1].split()
)  # type: ignore[index]
# Words that the Makefile itself takes: make test TESTS=..., make test-repeat N=10.
MAKE_VARIABLES = set(re.findall(r"\$\(([A-Z]+)\)", (REPOSITORY / "Makefile").read_text()))


def wrong_words(command: str) -> list[str]:
    """What a `holdfast ...` or `make ...` line names that does not exist."""
    try:
        words = shlex.split(command.partition(" | ")[0].partition(" > ")[0])
    except ValueError:
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return []
    program, rest = words[0], words[1:]
    if program == "make":
        named = [word for word in rest if "=" not in word and not word.startswith("-") and not word.isupper()]
        return [f"make {word}" for word in named if word not in MAKE_TARGETS] + _settings_of(
            [word for word in rest if word.partition("=")[0] not in MAKE_VARIABLES]
        )
    if program.removeprefix(".venv/bin/") != "holdfast" or not rest or not re.fullmatch(r"[a-z]+", rest[0]):
        return []
    name = f"{rest[0]} {rest[1]}" if len(rest) > 1 and f"{rest[0]} {rest[1]}" in COMMANDS else rest[0]
    if name not in COMMANDS:
        return [f"holdfast {name}"]
    options = {word.partition("=")[0] for word in rest if word.startswith("-")}
    unknown = [option for option in options if option not in COMMANDS[name] and setting_name(option.lstrip("-")) is None]
    return [f"holdfast {name} {option}" for option in unknown] + _settings_of(rest)


def _settings_of(words: list[str]) -> list[str]:
    keys = [word.partition("=")[0] for word in words if re.fullmatch(r"[A-Za-z][A-Za-z_]*=.*", word)]
    return [key for key in keys if setting_name(key) is None and key.upper() not in _PLACEHOLDERS | OTHER_VARIABLES]


def shown_commands(block: Block) -> list[str]:
    """Lines that are meant to be typed. Two blanks end a command where its meaning stands beside it."""
    if block.kind not in ("sh", "shown"):
        return []
    lines = commands_of(block.text) if block.kind == "sh" else [line.strip() for line in block.text.splitlines()]
    return [
        re.split(r"\s{3,}", line.removeprefix("$ "))[0] for line in lines if re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:holdfast|make) ", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_targets_options_and_settings_that_a_page_names_exist(page: Path) -> None:
    wrong = [
        f"{where(block)}: {command}: no {word}"
        for block in BLOCKS
        if block.page == page.relative_to(REPOSITORY).as_posix() and block.how != "fails"
        for command in shown_commands(block)
        for word in wrong_words(command)
    ]
    inline = re.findall(r"`((?:holdfast|make) [^`\n]+)`", page.read_text())
    wrong += [
        f"{page.name}: `{command}`: no {word}" for command in inline for word in wrong_words(command.replace("[", " ").replace("]", " ").replace("|", " "))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_of_words_finds_what_does_not_exist() -> None:
    assert wrong_words("holdfast nonsense RUN") == ["holdfast nonsense"]
    assert wrong_words("PRECISION=bf16 holdfast submit PRECISON=x --wait --wat") == ["holdfast submit --wat", "PRECISON"]
    assert wrong_words("make submt PRECISION=bf16") == ["make submt"]
    assert wrong_words("holdfast ckpt verify RUN") == wrong_words("make submit ARGS=--wait JOB=x") == wrong_words("holdfast explain | head") == []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "yaml"], ids=where)
def test_yaml_is_a_job_or_site_file_as_it_stands(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(block.text)
    assert block.how == "not-run" or resolve([f"JOB={path}"], {}, tmp_path, lambda word: site_file.find(word, tmp_path)).job


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.kind == "python"], ids=where)
def test_python_compiles(block: Block) -> None:
    compile(block.text, where(block), "exec")


# -- what is run -------------------------------------------------------------------------------------------------------


def runnable() -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.kind in ("sh", "python") and block.how != "not-run":
            found.setdefault(block.page, []).append(block)
    return found


@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", runnable())
def test_what_a_page_says_to_type_works(page: str, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = cluster.runs.parent / "pages" / Path(page).with_suffix("")
    folder.mkdir(parents=True)
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), cluster.env["PATH"]])
    env = {**{name: value for name, value in cluster.env.items() if name != "RUNS_DIR"}, "PATH": path, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
    for block in runnable()[page]:
        if block.kind == "python":
            commands = [[sys.executable, "-c", block.text]]
        else:
            # Here-documents span lines, so the block is one script; it stops at the first line that fails.
            commands = [["bash", "-euo", "pipefail", "-c", block.text]]
        for command in commands:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
            said = f"{where(block)} ended with {done.returncode}\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert (done.returncode == 0) == (block.how != "fails"), said
            assert "Traceback" not in done.stderr, said


def test_no_page_is_run_that_would_take_a_cluster_away() -> None:
    """What is run on the lab must not stop labs, clean for good or start the long targets."""
    for block in BLOCKS:
        if block.kind == "sh" and block.how != "not-run":
            assert not re.search(r"\bmake\b|lab stop|--yes\b.*clean|clean .*--yes|scancel|rm -r", block.text), where(block)


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    dead = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One Thing\n[a](b.md) [b](a.md#one-thing) [c](a.md#two) [d](https://example.org) `[e](f.md)`\n")
    assert dead_links(tmp_path / "a.md") == ["b.md", "a.md#two"]
