"""Records of token ids, with what other programs write beside them: labels, masks, positions.

Masks that mean "train on these" narrow the labels. Fields that would make another training of the same ids are refused.
"""

import itertools
from typing import Any

from dist_qft.data.fields import Fields
from dist_qft.data.samples import IGNORED, Tokenized

TRAINED_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
OPTIONAL = ("labels", "attention_mask", *TRAINED_MASKS, "position_ids", "seq_lengths")
# Kinds of tokens that some models tell apart; only those of one kind train as plain ids do.
_KINDS = ("token_type_ids", "mm_token_type_ids")
_OTHERS = ("prompt_mask", "loss_weights")


def read_tokenized(fields: Fields) -> Tokenized:
    """The token ids of a record, and which of them are predicted.

    Raises:
        RowError: a field has another length or other values than it may have, or is not supported.
    """
    for name in _OTHERS:
        if fields.get(name):
            raise fields.fault(name, "is not supported; must be a completion_mask, or labels of -100")
    for name in _KINDS:
        value = fields.get(name)
        if value and (not isinstance(value, list) or any(value)):
            raise fields.fault(name, "is not supported; must be zeros or absent")
    input_ids = fields.integers("input_ids")
    labels = fields.integers("labels") if fields.get("labels") is not None else input_ids
    if len(labels) != len(input_ids):
        raise fields.fault("labels", f"has {len(labels)} entries, input_ids {len(input_ids)}")
    trained = [label != IGNORED for label in labels]
    for name in TRAINED_MASKS:
        if fields.get(name) is not None:
            trained = [one and bool(other) for one, other in zip(trained, _mask(fields, name), strict=True)]
    kept = _unpadded(fields) if fields.get("attention_mask") is not None else slice(None)
    _require_one_sample(fields, kept)
    for i, (label, token) in enumerate(zip(labels[kept], input_ids[kept], strict=True)):
        if label not in (token, IGNORED):
            raise fields.fault("labels", f"entry {i} is {label}, must be the same as input_ids ({token}) or {IGNORED}")
    return Tokenized(input_ids[kept], trained[kept])


def _entries(fields: Fields, field: str) -> list[Any]:
    value, length = fields.require(field), len(fields.require("input_ids"))
    if not isinstance(value, list) or len(value) != length:
        found = f"has {len(value)} entries" if isinstance(value, list) else f"is {type(value).__name__}"
        raise fields.fault(field, f"{found}, input_ids {length}")
    return value


def _mask(fields: Fields, field: str) -> list[Any]:
    mask = _entries(fields, field)
    wrong = next((i for i, entry in enumerate(mask) if not isinstance(entry, int) or entry not in (0, 1)), None)
    if wrong is not None:
        raise fields.fault(field, f"entry {wrong} is {mask[wrong]!r:.40}, must be 0 or 1")
    return mask


def _unpadded(fields: Fields) -> slice:
    """The part of a padded row that is not padding."""
    fields.integers("attention_mask")
    mask = _entries(fields, "attention_mask")
    real = [i for i, entry in enumerate(mask) if entry]
    kept = slice(real[0], real[-1] + 1) if real else slice(0)
    if 0 in mask[kept]:
        raise fields.fault("attention_mask", "has zeros between ones; must have them at the ends only")
    return kept


def _require_one_sample(fields: Fields, kept: slice) -> None:
    """Refuse rows that hold several samples: they would see each other."""
    packed = "tells of several samples in one row; must be one sample a row (data.packing packs them)"
    if fields.get("seq_lengths") is not None and len(fields.integers("seq_lengths")) > 1:
        raise fields.fault("seq_lengths", packed)
    if fields.get("position_ids") is not None:
        fields.integers("position_ids")
        positions = _entries(fields, "position_ids")[kept]
        if any(second != first + 1 for first, second in itertools.pairwise(positions)):
            raise fields.fault("position_ids", packed)
