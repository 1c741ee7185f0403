"""The tokenized data sets of a config's data section, built once and cached.

Meant to run before the process group starts, so that no rank waits in a collective for a tokenizer. Ranks that share
`cache_dir` may all call it at once: the first builds under a file lock, the others load its files.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dist_qft.config.data_schema import DataConfig, TaskConfig
from dist_qft.data.dataset import FORMAT_VERSION, TokenDataset
from dist_qft.data.encode import Encoded, dropped_line, encode_records
from dist_qft.data.holding_out import held_out_indices
from dist_qft.data.long_texts import most_characters
from dist_qft.data.mixture import shares
from dist_qft.data.samples import Conversation
from dist_qft.data.sources import Source, open_data_source
from dist_qft.data.tokens import SampleEncoder, TokenSequence
from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.ranks.launchers import local_rank_text
from dist_qft.storage.lock import locked

_SILENT_SECONDS = 3600  # that a start waits for another process that builds the same data and shows no sign of life


@dataclass(frozen=True)
class Prepared:
    """Training data, and held-out data if the config asks for any."""

    train: TokenDataset
    eval: TokenDataset | None

    @property
    def held_out_digest(self) -> str:
        """Digest of the held-out data; empty without any."""
        return self.eval.digest if self.eval is not None else ""

    def notes(self) -> list[str]:
        """Lines for the user: rows that were left out or cut, and texts that a template did not render."""
        held_out = [self.eval] if self.eval is not None else []
        return [note for dataset in (self.train, *held_out) for note in dataset.notes]


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    cache_dir: Path,
    task: TaskConfig | None = None,
) -> Prepared:
    """The tokenized training data, and the held-out data if the config asks for any.

    A changed config section, tokenizer, chat template, date (for templates that print it), data file or Python (for
    stdlib-docs) makes another cache entry; a damaged entry is rebuilt.

    Args:
        tokenizer: with the chat template of `data.template` (see `templates`).
        vocab_size: rows of the model's embedding; no token id may reach it.
        task: tokens (the default) or labels.

    Raises:
        UserError: something is wrong with the data, naming the place.
        SetupError: the cache cannot be written, or another process that builds the same data seems to hang.
    """
    assert data.eval is None or not data.eval_samples, "the config's check refuses both"
    sets, longest = data.all_sets(), most_characters(data.max_length)
    sources = {key: open_data_source(dataset, key, longest) for key, dataset in sets.items()}
    task = task or TaskConfig()
    encoder = SampleEncoder(
        tokenizer,
        vocab_size,
        data.loss_on,
        task,
        train_on=data.train_on,
        on_missing=data.on_missing,
        today=datetime.date.fromisoformat(data.date) if data.date else None,
        template=data.template,
        max_length=data.max_length,
    )
    has_eval = data.eval is not None or data.eval_samples > 0

    key = _cache_key(data, tokenizer, vocab_size, list(sources.values()), task)
    train_path, eval_path = (cache_dir / f"{key}-{part}.safetensors" for part in ("train", "eval"))
    # What is there needs no lock, nor a folder that can be written.
    if cached := _load(train_path, eval_path if has_eval else None):
        return cached
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"data.cache_dir: cannot write to '{cache_dir}': {error.strerror}") from None
    # One rank of a node says for whom it waits: the others wait for the same process, or for that rank. However long
    # the data take, as long as they are at work: a second process would need as long.
    tell = local_rank_text() == "0"
    with locked(cache_dir / f"{key}.building", f"data.cache_dir: '{cache_dir}'", _SILENT_SECONDS, tell=tell):
        if cached := _load(train_path, eval_path if has_eval else None):
            return cached
        prepared = _build(data, encoder, sources)
        _save(prepared, train_path, eval_path)
        return prepared


def _load(train_path: Path, eval_path: Path | None) -> Prepared | None:
    try:
        return Prepared(TokenDataset.load(train_path), TokenDataset.load(eval_path) if eval_path else None)
    except (OSError, CorruptFileError):
        return None


def _save(prepared: Prepared, train_path: Path, eval_path: Path) -> None:
    try:
        prepared.train.save(train_path)
        if prepared.eval is not None:
            prepared.eval.save(eval_path)
    except SetupError as error:
        raise SetupError(f"data.cache_dir: {error}") from None


def _cache_key(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, sources: list[Source], task: TaskConfig
) -> str:
    # A tokenizer's last padding and truncation are part of its file, but say nothing about its tokens.
    model = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    parts = {
        "version": FORMAT_VERSION,
        "data": data.model_dump(exclude={"cache_dir"}),
        # What the loss alone depends on makes no other tokens.
        "task": {"name": task.name, "labels": task.labels} | ({"rows": task.rows} if task.prefers else {}),
        "tokenizer": model,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "vocab_size": vocab_size,
        "sources": [source.digest for source in sources],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _build(data: DataConfig, encoder: SampleEncoder, sources: dict[str, Source]) -> Prepared:
    """Encode every data set, hold samples out if the config says so, and lay the rest out in rows."""
    train_sets = data.train_sets()
    encoded = {key: encode_records(data, train_sets[key], sources[key], encoder, key) for key in train_sets}
    notes = [line for key, part in encoded.items() for line in _told(key, part)]
    counts = _sum_of(encoded)
    kept = [part.sequences for part in encoded.values()]
    held_out: list[TokenSequence] = []
    if data.eval_samples:
        kept, held_out = _hold_out(kept, data.eval_samples, list(encoded))
        counts |= {"kept": sum(map(len, kept)), "held_out": len(held_out)}

    def rows(sequences: list[TokenSequence], counted: dict[str, int]) -> TokenDataset:
        packed_length = data.max_length if data.packing else None
        return TokenDataset.from_sequences(sequences, _pad_id(encoder), packed_length, counted, encoder.task.rows)

    weights = [dataset.weight for dataset in train_sets.values() if dataset.weight is not None]
    if weights:
        train = TokenDataset.mixed([rows(sequences, {}) for sequences in kept], weights, counts)
        notes.append(_told_mixture(train, list(encoded)))
    else:
        train = rows([sequence for sequences in kept for sequence in sequences], counts)
    parts: dict[str, Encoded] = {}
    if data.eval is not None:
        parts = {key: encode_records(data, each, sources[key], encoder, key) for key, each in data.eval_sets().items()}
    _require_use_of_template(data, encoder)
    train = replace(train, notes=tuple(notes))
    if parts:
        told = tuple(line for key, part in parts.items() for line in _told(key, part))
        sequences = [sequence for part in parts.values() for sequence in part.sequences]
        return Prepared(train, replace(rows(sequences, _sum_of(parts)), notes=told))
    return Prepared(train, rows(held_out, {"kept": len(held_out)}) if held_out else None)


def _sum_of(parts: Mapping[str, Encoded]) -> dict[str, int]:
    """The counts of several data sets, added up."""
    counts: dict[str, int] = {}
    for part in parts.values():
        counts = {name: counts.get(name, 0) + part.counts.get(name, 0) for name in {**counts, **part.counts}}
    return counts


def _told(key: str, encoded: Encoded) -> list[str]:
    line = dropped_line(key, encoded.counts)
    return [*([line] if line else []), *encoded.notes]


def _require_use_of_template(data: DataConfig, encoder: SampleEncoder) -> None:
    """UserError for a template that no row gets."""
    if data.template == "alpaca" and Conversation not in encoder.encoded:
        raise UserError(
            "data.template: got alpaca, which writes conversations and alpaca rows, but the data have none; must be "
            "unset or none, or name such columns in data.train.columns (instruction, input, output)"
        )


def _told_mixture(train: TokenDataset, keys: list[str]) -> str:
    """Say how many rows of each data set an epoch has; UserError for one that has none."""
    drawn = shares(train.mixture)
    for key, share in zip(keys, drawn, strict=True):
        if not share:
            raise UserError(f"{key}.weight: too small, an epoch of {len(train):,} rows has none of this data set")
    told = ", ".join(
        f"{share:,} of {key} ({part.rows:,} rows)" for key, part, share in zip(keys, train.mixture, drawn, strict=True)
    )
    return f"data.train: an epoch draws {told}"


def _hold_out(
    kept: list[list[TokenSequence]], wanted: int, keys: list[str]
) -> tuple[list[list[TokenSequence]], list[TokenSequence]]:
    """The samples of each data set that are trained on, and those of all that are held out: `wanted` records whole."""
    records = sum(not sequence.follows for sequences in kept for sequence in sequences)
    chosen = held_out_indices(records, wanted)
    trained: list[list[TokenSequence]] = []
    held_out: list[TokenSequence] = []
    number = -1
    for key, sequences in zip(keys, kept, strict=True):
        rest: list[TokenSequence] = []
        for sequence in sequences:
            number += not sequence.follows
            (held_out if number in chosen else rest).append(sequence)
        trained.append(rest)
        if not rest:
            raise UserError(f"data.eval_samples: got {wanted}, which leaves no sample of {key} to train on")
    return trained, held_out


def _pad_id(encoder: SampleEncoder) -> int:
    """Padding id. Any id works: padding is neither attended to nor trained on."""
    tokenizer = encoder.tokenizer
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < encoder.vocab_size:
            return token
    return 0
