"""The embedded data set: deterministic, split by module without leaks, and true to the documentation."""

import functools
import inspect
import sys
import textwrap

import pytest

from dist_qft.data import stdlib_docs

load = functools.cache(stdlib_docs.load)


def by_name(split):
    return {sample["name"]: sample["messages"] for sample in load(split)}


def test_loading_is_deterministic_and_imports_nothing():
    modules = set(sys.modules)
    assert stdlib_docs.load("eval") == load("eval")
    assert {name.partition(".")[0] for name in set(sys.modules) - modules} & {
        "turtle",
        "tkinter",
        "antigravity",
    } == set()


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
