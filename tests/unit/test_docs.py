"""README and docs: links lead somewhere, named files exist, commands are those of the program, the site builds."""

import os
import re
import subprocess

import pytest
from typer.main import get_command

from dist_qft.cli import app
from dist_qft.config.renamed import RENAMED
from tests.support.documented import LEFT_OUT, PAGES, ROOT, documented_commands

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


COMMANDS = {command.name or command.callback.__name__: command for command in get_command(app).commands.values()}
SECTIONS = "model|quantization|method|task|data|train|sharding|checkpoint|evaluation|logging|merge"
LAUNCHERS = r"launch/(?:torchrun|deepspeed|mpirun)\.sh|sbatch slurm/train\.sbatch|-m dist_qft train"


def commands_in(text: str) -> list[list[str]]:
    """The words behind the program's or a launcher's name, of every command in code on a page."""
    code = re.findall(r"^(?:    |\$ )?(.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in code:
        for part in re.split(r" && |;| \| |  +#|[`)]", line):
            if match := re.search(rf"(?:dist-qft|python -m dist_qft) ([a-z].*)|(?:{LAUNCHERS}) (.*)", part):
                words = (match[1] or match[2]).split()
                found.append(words if match[1] or (words and words[0] in COMMANDS) else ["train", *words])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_those_of_the_program(page):
    for verb, *words in commands_in(page.read_text()):
        if not re.fullmatch(r"[a-z-]+", verb):
            continue  # prose: `dist-qft`'s own name
        assert verb in COMMANDS, f"{page.name}: dist-qft {verb}"
        options = {name for parameter in COMMANDS[verb].params for name in parameter.opts + parameter.secondary_opts}
        flags = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        assert flags <= options | {"--help"}, f"{page.name}: dist-qft {verb} {' '.join(words)}"
        files = [word for word in words if re.match(r"(configs|studies)/\S+\.yaml$", word)]
        assert all((ROOT / file).is_file() for file in files), f"{page.name}: {files}"


def test_a_command_is_left_out_of_those_that_are_run_for_a_reason_that_holds():
    """`benchmarks/documented_commands.py` runs all others; a command that is one rule's alone keeps the rule alive."""
    reasons = {command.left_out for command in documented_commands()}
    assert None in reasons and reasons - {None} <= set(LEFT_OUT.values())
    for why in LEFT_OUT.values():
        assert (ROOT / why).exists() if why.startswith("tests") else re.match(r"needs |takes ", why)
    assert all(any(re.search(rule, command.text) for command in documented_commands()) for rule in LEFT_OUT)


def config_keys() -> set[str]:
    """Every key of a config and every section, by their paths, as docs/config.md has them; renamed ones, too."""
    found, section = {f"{section}.{old}" for section, old in RENAMED}, ""
    for line in (ROOT / "docs/config.md").read_text().splitlines():
        if heading := re.match(r"## `([^`]+)`", line):
            section = re.sub(r" \(name: \w+\)|\[\]", "", heading[1])
            found.add(section)
        elif row := re.match(r"\| `(\w+)` \|", line):
            found.add(f"{section}.{row[1]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_are_those_of_the_schema(page):
    named = re.findall(
        rf"(?<![\w./-])(?!model\.(?:l|safetensors))((?:{SECTIONS})(?:\.[a-z_]\w*)+)(?![\w(]|\.[a-z])", page.read_text()
    )
    keys = {name for name in named if not re.search(r"\.(py|sh|sbatch|md|jsonl?|yaml|csv|html|gguf)$", name)}
    assert keys <= config_keys()


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
