"""README and docs: links lead somewhere, named files exist, commands are those of the program, the site builds."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dist_qft.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "dist_qft|tests|launch|slurm|configs|docs|studies|benchmarks|docker"
# Paths within `dist_qft/` there, not within the root.
WITHIN_PACKAGE = {"private-apis.md", "architecture.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    dead = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", text)
    roots = [ROOT, ROOT / "dist_qft"] if page.name in WITHIN_PACKAGE else [ROOT]
    gone = [path for path in named if not any(list(root.glob(path.rstrip("/"))) for root in roots)]
    assert not dead and not gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_those_of_the_program(page):
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = re.findall(r"(?:dist-qft|python -m dist_qft) ([a-z][a-z-]*)\b", page.read_text())
    assert set(used) <= verbs


def test_every_page_is_reached_from_the_index_and_readme_is_short():
    index = (ROOT / "docs/index.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index]
    assert not missing
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_site_builds_without_a_warning(tmp_path):
    words = [ROOT / "docs/serve.sh", "build", "--site-dir", tmp_path / "site"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/getting-started/index.html").exists()
