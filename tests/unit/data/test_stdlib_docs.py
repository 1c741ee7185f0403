"""The embedded data set: deterministic, split by module without leaks, and true to the documentation."""

import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from dist_qft.data import stdlib_docs
from dist_qft.data.stdlib_docs import load

ROOT = Path(__file__).parents[3]


def by_name(split):
    return {sample["name"]: sample["messages"] for sample in load(split)}


def test_loading_is_deterministic_and_imports_nothing(tmp_path):
    """In a process whose sets have another order; a few modules, since all of them take seconds."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("antigravity.py", "textwrap.py", "turtle.py", "json"):
        copy = shutil.copytree if (stdlib / name).is_dir() else shutil.copy
        copy(stdlib / name, tmp_path / name)
    program = (
        "import sys; from pathlib import Path; from dist_qft.data import stdlib_docs\n"
        "print(stdlib_docs._samples(Path(sys.argv[1])))\n"
        "assert not {'antigravity', 'turtle', 'tkinter'} & set(sys.modules)"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, tmp_path],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("'name': ") > 50


def test_splits_share_no_module_and_no_text():
    train, held_out = load("train"), load("eval")
    assert len(train) > 3000
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.2
    assert {sample["module"] for sample in train}.isdisjoint(sample["module"] for sample in held_out)
    answers = {sample["messages"][1]["content"].partition("\n\n")[2] for sample in train}
    repeated = [s["name"] for s in held_out if s["messages"][1]["content"].partition("\n\n")[2] in answers - {""}]
    # A shortened docstring may coincide with another's; whole ones never do.
    assert len(repeated) <= len(held_out) // 100


def test_every_sample_is_public_short_and_answered():
    for sample in load("train"):
        user, assistant = sample["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert f"`{sample['name']}`" in user["content"]
        assert not any(part.startswith("_") for part in sample["name"].split("."))
        body = assistant["content"].partition("`\n\n")[2] or assistant["content"]
        assert 0 < len(body) <= stdlib_docs.MAX_ANSWER_CHARACTERS


def test_the_first_samples_come_from_many_modules():
    assert len({sample["module"] for sample in load("train")[:100]}) > 25


@pytest.mark.parametrize("function", [textwrap.dedent, inspect.getdoc, textwrap.TextWrapper.fill])
def test_answers_agree_with_inspect(function):
    name = f"{function.__module__}.{function.__qualname__}"
    answer = by_name("train")[name][1]["content"]
    signature, _, body = answer.partition("\n\n")
    parameters = ", ".join(p for p in inspect.signature(function).parameters if p != "self")
    assert signature == f"`{name}({parameters})`"
    assert body and inspect.getdoc(function).startswith(body)


def test_shorten_cuts_between_paragraphs_then_lines_then_characters():
    paragraph = "x" * 250
    assert stdlib_docs._shorten("\n\n".join([paragraph] * 3)) == "\n\n".join([paragraph] * 2)
    assert stdlib_docs._shorten("\n".join([paragraph] * 3)) == "\n".join([paragraph] * 2)
    assert stdlib_docs._shorten("x" * 700) == "x" * 600
    assert stdlib_docs._shorten("short") == "short"
