"""The tokens of `method.train_tokens` found in the tokenizer and in the base's tables, before any weight is read."""

from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.token_rows import KEY, TrainedTokens


def trained_tokens(config: RunConfig, base: BaseModel) -> TrainedTokens:
    """The rows that a config trains, in the tables that the task reads.

    Raises:
        UserError: the tokenizer has no such token, the tables have no such row, or a token is named twice. Or the base
            has a norm behind the rows that it looks up, whose backward pass would need the table gathered again.
    """
    if base.embedding.steps:
        steps = " and ".join(base.embedding.steps)
        raise UserError(
            f"{KEY}: the embedding of {base.model.config.model_type} has {steps} behind its rows; remove it"
        )
    tokenizer = run_tokenizer(config)
    rows = min(table.num_embeddings for table in base.tables().values())
    vocabulary = tokenizer.get_vocab()
    names: dict[int, str | int] = {}
    for given in config.method.tokens_to_train:
        token = vocabulary.get(given) if isinstance(given, str) else given
        if token is None:
            raise _no_token(str(given), tokenizer)
        if not 0 <= token < rows:
            raise UserError(f"{KEY}: got {given!r}, must be one of the base's rows 0 to {rows - 1}")
        if token in names:
            raise UserError(
                f"{KEY}: got {names[token]!r} and {given!r}, must be different tokens; both are row {token}"
            )
        names[token] = given
    ids = sorted(names)
    of_id = {token: text for text, token in vocabulary.items() if token in names}
    strings = tuple(of_id.get(token) for token in ids)
    tables = {path: table.embedding_dim for path, table in base.tables().items()}
    if config.task.predicts_labels:  # by a head of its own; the LM head is not read
        tables = {path: tables[path] for path in list(tables)[:1]}
    return TrainedTokens(tuple(ids), strings, tables, base.tied)


def _no_token(text: str, tokenizer: PreTrainedTokenizerBase) -> UserError:
    """The refusal of a text that the tokenizer has no token for."""
    parts = tokenizer.tokenize(text)
    return UserError(
        f"{KEY}: got {text!r}, must be a token of the tokenizer or an id; the tokenizer cuts this text into "
        f"{len(parts)}: {' '.join(parts[:8])}"
    )
