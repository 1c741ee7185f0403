"""Untie the LM head from the embedding where the files hold a head of their own, whatever the configuration says.

transformers compares the two and does not tie them if they differ (`PreTrainedModel.tie_weights`); here likewise.
"""

from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dist_qft.base_model.tensor_views import View, read_rows
from dist_qft.errors import UserError

_ROWS = 4096  # compared at a time


def untie_if_stored(causal: PreTrainedModel, config: PretrainedConfig, views: Mapping[str, View]) -> bool:
    """Set `tie_word_embeddings` to false if the files hold a head of their own.

    Reads the files' two tables, as far as they are equal, if they hold both. Returns whether they hold another head.
    """
    text = config.get_text_config()
    tied = tied_tables(causal)
    if tied is None:
        return False
    different = _differ(tied, views)
    if different:
        for each in (config, text, causal.config, causal.config.get_text_config()):
            each.tie_word_embeddings = False
    return different


def require_no_other_head(names: tuple[str, str], views: Mapping[str, View], where: str) -> None:
    """UserError if the files hold an LM head that differs from the table to which the model's head is tied.

    names: of the embedding's and of the head's table. For files that were fetched after the model was built.
    """
    if _differ(names, views):
        raise UserError(
            f"{where}: config.json ties the LM head, but '{names[1]}' differs from '{names[0]}'; the files are fetched "
            "now: start again, and their head counts"
        )


def ties_head(causal: PreTrainedModel) -> bool:
    """True if the class and the configuration of a model, not yet taken apart, tie the LM head to the embedding."""
    head = causal.get_output_embeddings()
    names = {f"{path}.weight" for path, module in causal.named_modules() if module is head}
    return bool(names & causal.get_expanded_tied_weights_keys(all_submodels=True).keys())


def tied_tables(causal: PreTrainedModel) -> tuple[str, str] | None:
    """The names of the embedding's and the LM head's table if they are tied, of a model not yet taken apart."""
    names = {module: f"{path}.weight" for path, module in causal.named_modules()}
    table, head = names.get(causal.get_input_embeddings()), names.get(causal.get_output_embeddings())
    return (table, head) if table and head and ties_head(causal) else None


def _differ(names: tuple[str, str], views: Mapping[str, View]) -> bool:
    table, head = map(views.get, names)
    if table is None or head is None or table is head or table.shape != head.shape:
        return False
    starts = range(0, table.shape[0], _ROWS)
    parts = ((start, min(start + _ROWS, table.shape[0])) for start in starts)
    return not all(torch.equal(read_rows(table, *rows), read_rows(head, *rows)) for rows in parts)
