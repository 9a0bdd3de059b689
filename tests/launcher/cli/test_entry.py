"""A kept answer of `holdfast render` is given again only when everything that it depends on is as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLDFAST = Path(sys.executable).with_name("holdfast")


class Place:
    """A folder with a job file and a cache of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")} | {"XDG_CACHE_HOME": str(folder / "cache")}
        (folder / "mine.yaml").write_text("time_limit: 10\nstop_lead_s: 60\n")

    def render(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([HOLDFAST, "render", *words], cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=60)

    def kept(self) -> list[Path]:
        return sorted((self.folder / "cache" / "holdfast" / "render").iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_same_words_give_the_same_script_without_making_it_again(place: Place) -> None:
    first = place.render("mine.yaml")
    assert "#SBATCH --time=00:10:00" in first.stdout
    (kept,) = place.kept()
    # Proof that the second answer is the kept one: it shows a mark that was put into it.
    kept.write_text(kept.read_text().replace("--time=00:10:00", "--time=MARK"))
    assert place.render("mine.yaml").stdout == first.stdout.replace("--time=00:10:00", "--time=MARK")


def test_a_changed_job_file_is_seen(place: Place) -> None:
    place.render("mine.yaml")
    (place.folder / "mine.yaml").write_text("time_limit: 20\nstop_lead_s: 60\n")
    assert "--time=00:20:00" in place.render("mine.yaml").stdout


def test_a_changed_variable_is_seen_also_when_it_is_no_setting(place: Place) -> None:
    place.render("mine.yaml")
    assert "--time=00:30:00" in place.render("mine.yaml", TIME_LIMIT="30").stdout
    refused = place.render("mine.yaml", HOLDFAST_TIME_LIMT="30")
    assert refused.returncode == 2 and "HOLDFAST_TIME_LIMIT" in refused.stderr


def test_other_words_and_another_folder_are_seen(place: Place, tmp_path: Path) -> None:
    place.render("mine.yaml")
    assert "--partition=x" in place.render("mine.yaml", "PARTITION=x").stdout
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([HOLDFAST, "render", "mine.yaml"], cwd=elsewhere, env=place.env, capture_output=True, text=True)
    assert done.returncode == 2 and "mine.yaml" in done.stderr


def test_a_job_file_of_ones_own_that_appears_goes_before_the_shipped_one(place: Place) -> None:
    assert "--job-name=quickstart-0000" in place.render("quickstart.yaml").stdout
    (place.folder / "quickstart.yaml").write_text("job_name: mine\n")
    assert "--job-name=mine-0000" in place.render("quickstart.yaml").stdout


def test_a_damaged_kept_answer_is_not_used(place: Place) -> None:
    first = place.render("mine.yaml").stdout
    (kept,) = place.kept()
    kept.write_bytes(kept.read_bytes()[:-20])
    assert place.render("mine.yaml").stdout == first


def test_an_unwritable_cache_is_no_error(place: Place) -> None:
    assert place.render("mine.yaml", XDG_CACHE_HOME="/proc/nowhere").returncode == 0


def test_a_refused_render_is_refused_again(place: Place) -> None:
    for _ in range(2):
        assert place.render("mine.yaml", "BATCH_SIZE=x").returncode == 2
