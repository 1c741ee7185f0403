"""Descriptions of trainables in a checkpoint that somebody edited: refused, or found to differ, never a crash."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.methods.adapters.tile_adapter import exact_dW
from dist_qft.methods.adapters.token_rows import TrainedTokens
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
            assert spec.starting_values(stored, {}, "there") == {}
        except UserError as error:
            assert str(error).startswith("there: ")
        try:
            read(stored, base, "here").describe()
        except (UserError, CorruptFileError) as error:
            assert str(error).startswith("here: ")


@pytest.mark.parametrize(
    "change",
    [
        {"ids": [3, 1]},
        {"ids": [3, 3]},
        {"ids": [-1, 3]},
        {"ids": [], "tokens": []},
        {"ids": [1.0, 3]},
        {"ids": [True, 3]},
        {"ids": "13"},
        {"tokens": ["a"]},
        {"tokens": [3, None]},
        {"tables": {}},
        {"tables": {"model.embed_tokens": 0}},
        {"tables": {"model.embed_tokens": 8, "lm_head": 8}, "tied": True},
        {"tied": 1},
    ],
    ids=str,
)
def test_a_record_of_trained_tokens_that_no_run_writes(change):
    record = {"ids": [1, 3], "tokens": ["a", None], "tables": {"model.embed_tokens": 8}, "tied": True}
    assert TrainedTokens.read(record, "here").describe() == record
    with pytest.raises(CorruptFileError, match=r"^here: train_tokens: not a record of trained tokens"):
        TrainedTokens.read({**record, **change}, "here")


METHODS = {
    "qlora": {"name": "qlora", "rank": 4, "pool": None, "repeat": None},
    "qalora": {"name": "qalora", "rank": 4, "pool": 32},
    "qahira": {"name": "qahira", "rank": 4, "pool": 32, "repeat": 1},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"alpha": 3.0}, {"alpha": 5.0, "dropout": 0.5}], ids=str)
def test_starting_values_have_the_same_update_at_another_scale(method, changes, tiny_llama, tmp_path):
    configs = [tiny_config(tiny_llama, tmp_path / "run", method={**METHODS[method], **more}) for more in ({}, changes)]
    base = planned_base(configs[0])
    then, now = (make_spec(config, base) for config in configs)
    trained, begun = then.build(0), now.build(1)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in trained.named_tensors():
        torch.nn.init.normal_(parameter, generator=generator)
    values = {name: parameter.detach() for name, parameter in trained.named_tensors()}
    begun.load_tensors(now.starting_values(then.describe(), values, "there"))
    for path, adapter in trained.by_path.items():
        torch.testing.assert_close(exact_dW(begun.by_path[path]), exact_dW(adapter), rtol=1e-5, atol=1e-5)
    assert then.starting_values(then.describe(), values, "there") == values
    with pytest.raises(UserError, match=r"^there: adapter of .*: rank was 4, the config says 8"):
        other = tiny_config(tiny_llama, tmp_path / "run", method={**METHODS[method], **changes, "rank": 8})
        make_spec(other, base).starting_values(then.describe(), values, "there")
