"""Descriptions of trainables in a checkpoint that somebody edited: refused, or found to differ, never a crash."""

from collections.abc import Iterator
from typing import Any

import pytest

from dist_qft.errors import UserError
from dist_qft.methods.specs import KINDS, make_spec
from dist_qft.plan import planned_base
from tests.support.tiny_model import tiny_config

OTHERS = (None, True, 7, -1.5, "words", [], [[1]], {}, {"x": {}})


def spoiled(tree: Any) -> Iterator[Any]:
    """The tree with another value in each of its places, one at a time, and without each of its keys."""
    yield from (other for other in OTHERS if other != tree)
    if isinstance(tree, dict):
        for key in tree:
            yield {name: value for name, value in tree.items() if name != key}
            yield from ({**tree, key: value} for value in spoiled(tree[key]))
    if isinstance(tree, list):
        for place in range(len(tree)):
            yield from ([*tree[:place], value, *tree[place + 1 :]] for value in spoiled(tree[place]))


@pytest.mark.parametrize(
    "method", [{"targets": ["q_proj", "down_proj"], "train_tokens": ["<|im_end|>", 5]}, {"name": "qst"}]
)
def test_spoiled_descriptions_differ_or_are_refused(method, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", method=method)
    base = planned_base(config)
    spec = make_spec(config, base)
    read = next(kind.read for kind in KINDS.values() if kind.spec is type(spec))
    described = spec.describe()
    assert spec.difference(described) is None and read(described, base, "here").describe() == described
    for stored in (tree for tree in spoiled(described) if isinstance(tree, dict)):
        found = spec.difference(stored)
        assert found is None or isinstance(found, str)
        try:
            read(stored, base, "here").describe()
        except UserError as error:
            assert str(error).startswith("here: ")
