"""One line for any number of faults in a stored file."""

import pytest
from pydantic import TypeAdapter, ValidationError

from dist_qft.storage.stored_faults import first_fault


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"a": "x"}, "a: Input should be a valid integer"),
        ({"a": [], "b": [], "c": []}, "a: Input should be a valid integer (and 2 more)"),
        (7, "content: Input should be a valid dictionary"),
    ],
)
def test_the_first_is_told_and_the_others_are_counted(content, line):
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(dict[str, int]).validate_python(content, strict=True)
    assert first_fault(refused.value) == line


def test_a_key_of_any_length_is_cut():
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(dict[str, int]).validate_python({"k" * 10_000: "x"}, strict=True)
    assert len(first_fault(refused.value)) <= 300
