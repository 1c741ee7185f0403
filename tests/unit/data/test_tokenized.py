"""Token ids with the masks of other programs: what is trained of them, and what is refused."""

import pytest

from dist_qft.data.formats import to_sample
from dist_qft.data.samples import Tokenized
from dist_qft.errors import UserError

WHERE = "data.jsonl:7"
ACCEPTED = {
    "padded on both sides": (
        {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0], "labels": [-100, -100, 6, 7, -100]},
        Tokenized([5, 6, 7], [False, True, True]),
    ),
    **{
        f"tokens with {mask}": (
            {"input_ids": [5, 6, 7], mask: [0, 1, True], "position_ids": [0, 1, 2], "seq_lengths": [3]},
            Tokenized([5, 6, 7], [False, True, True]),
        )
        for mask in ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
    },
    "masks and labels together, padded": (
        {
            "input_ids": [0, 5, 6, 7, 8],
            "attention_mask": [0, 1, 1, 1, 1],
            "labels": [-100, 5, 6, 7, -100],
            "completion_mask": [0, 0, 1, 1, 1],
            "assistant_masks": [0, 1, 1, 0, 1],
            "position_ids": [1, 0, 1, 2, 3],
            "token_type_ids": [0] * 5,
            "special_tokens_mask": [1, 0, 0, 0, 0],
            "length": 5,
        },
        Tokenized([5, 6, 7, 8], [False, True, False, False]),
    ),
}


@pytest.mark.parametrize(("record", "sample"), ACCEPTED.values(), ids=ACCEPTED)
def test_masks_narrow_what_is_trained(record, sample):
    assert to_sample(record, "tokenized", {}, WHERE) == sample


REFUSED = {
    "a mask of another length": (
        {"input_ids": [1, 2], "completion_mask": [1]},
        "field 'completion_mask' has 1 entries, input_ids 2",
    ),
    "a mask of weights": (
        {"input_ids": [1, 2], "loss_mask": [1, 0.5]},
        "field 'loss_mask' entry 1 is 0.5, must be 0 or 1",
    ),
    "a mask that is no list": (
        {"input_ids": [1], "loss_mask": "1"},
        "field 'loss_mask' is str, input_ids 1",
    ),
    "samples packed by others": (
        {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]},
        "field 'position_ids' tells of several samples in one row",
    ),
    "lengths of samples packed by others": (
        {"input_ids": [1, 2, 3], "seq_lengths": [2, 1]},
        "field 'seq_lengths' tells of several samples in one row",
    ),
    "tokens of several kinds": (
        {"input_ids": [1, 2], "token_type_ids": [0, 1]},
        "field 'token_type_ids' is not supported; must be zeros or absent",
    ),
    "a mask of the prompt": (
        {"input_ids": [1, 2], "prompt_mask": [1, 0]},
        "field 'prompt_mask' is not supported; must be a completion_mask",
    ),
}


@pytest.mark.parametrize(("record", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_another_training_is_refused(record, message):
    with pytest.raises(UserError) as caught:
        to_sample(record, "tokenized", {}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {message}")
