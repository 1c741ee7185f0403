"""From the config's data section to tokenized data sets, built once and cached.

Meant to run before the process group starts, so that no rank waits in a collective for a tokenizer. Ranks that share
`cache_dir` may all call it at once: the first builds under a file lock, the others load what it wrote.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import filelock
from transformers import PreTrainedTokenizerBase

from dist_qft.config.data_schema import DataConfig, DatasetConfig, TaskConfig
from dist_qft.data.dataset import FORMAT_VERSION, TokenDataset
from dist_qft.data.formats import resolve_format, to_sample
from dist_qft.data.lengths import limit_length
from dist_qft.data.records import LocatedRecord, Record, RowError
from dist_qft.data.sources import Source, load_records, open_source
from dist_qft.data.tokens import SampleEncoder, TokenSequence
from dist_qft.errors import CorruptFileError, SetupError, UserError


@dataclass(frozen=True)
class Prepared:
    train: TokenDataset
    eval: TokenDataset | None


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    cache_dir: Path,
    task: TaskConfig | None = None,
) -> Prepared:
    """The tokenized training data, and the held-out data if the config asks for any.

    vocab_size: rows of the model's embedding; no token id may reach it. task: tokens (the default) or labels. A changed
    config section, tokenizer, chat template, data file or Python (for stdlib-docs) makes another cache entry; a damaged
    entry is rebuilt.

    UserError: whatever is wrong with the data, naming the place. SetupError: the cache cannot be written.
    """
    assert data.eval is None or not data.eval_samples, "the config's check refuses both"
    train_source = open_source(data.train, "data.train")
    eval_source = open_source(data.eval, "data.eval") if data.eval is not None else None
    task = task or TaskConfig()
    encoder = SampleEncoder(
        tokenizer, vocab_size, data.loss_on, task, train_on=data.train_on, on_missing=data.on_missing
    )
    has_eval = data.eval is not None or data.eval_samples > 0

    key = _cache_key(data, tokenizer, vocab_size, train_source, eval_source, task)
    train_path, eval_path = (cache_dir / f"{key}-{part}.safetensors" for part in ("train", "eval"))
    lock = _lock(cache_dir, key)
    try:
        if cached := _load(train_path, eval_path if has_eval else None):
            return cached
        prepared = _build(data, encoder, train_source, eval_source)
        _save(prepared, train_path, eval_path)
        return prepared
    finally:
        lock.release()


def _lock(cache_dir: Path, key: str) -> filelock.BaseFileLock:
    """The cache entry's lock, held; waits for whoever builds the entry."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache_dir / f"{key}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write to {cache_dir}: {error.strerror}") from None
    return lock


def _load(train_path: Path, eval_path: Path | None) -> Prepared | None:
    try:
        return Prepared(TokenDataset.load(train_path), TokenDataset.load(eval_path) if eval_path else None)
    except (FileNotFoundError, CorruptFileError):
        return None


def _save(prepared: Prepared, train_path: Path, eval_path: Path) -> None:
    try:
        prepared.train.save(train_path)
        if prepared.eval is not None:
            prepared.eval.save(eval_path)
    except SetupError as error:
        raise SetupError(f"data.cache_dir: {error}") from None


def _cache_key(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    train_source: Source,
    eval_source: Source | None,
    task: TaskConfig,
) -> str:
    # A tokenizer's last padding and truncation are part of its file, but say nothing about its tokens.
    model = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    parts = {
        "version": FORMAT_VERSION,
        "data": data.model_dump(exclude={"cache_dir"}),
        "task": task.model_dump(),
        "tokenizer": model,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "vocab_size": vocab_size,
        "sources": [train_source.digest, eval_source.digest if eval_source else None],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _build(data: DataConfig, encoder: SampleEncoder, train_source: Source, eval_source: Source | None) -> Prepared:
    pad_id = _pad_id(encoder)
    packed_length = data.max_length if data.packing else None
    sequences, report = _encode_all(data, data.train, train_source, encoder, "data.train")
    held_out: list[TokenSequence] = []
    eval_report: dict[str, int] = {}
    if data.eval is not None and eval_source is not None:
        held_out, eval_report = _encode_all(data, data.eval, eval_source, encoder, "data.eval")
    elif data.eval_samples:
        chosen = held_out_indices(len(sequences), data.eval_samples)
        held_out = [sequences[i] for i in sorted(chosen)]
        sequences = [sequence for i, sequence in enumerate(sequences) if i not in chosen]
        report |= {"kept": len(sequences), "held_out": len(held_out)}
        eval_report = {"kept": len(held_out)}
    train = TokenDataset.from_sequences(sequences, pad_id, packed_length, report)
    if not held_out:
        return Prepared(train, None)
    return Prepared(train, TokenDataset.from_sequences(held_out, pad_id, packed_length, eval_report))


def _readable(located: LocatedRecord) -> tuple[Record, str]:
    """The record and its place. Raises the RowError of one that cannot be read."""
    record, where = located
    if isinstance(record, RowError):
        raise record
    return record, where


def _encode_all(
    data: DataConfig, dataset: DatasetConfig, source: Source, encoder: SampleEncoder, key: str
) -> tuple[list[TokenSequence], dict[str, int]]:
    """Every kept sample of one data set, and the counts of what became of the others."""
    counts: Counter[str] = Counter(read=0, blank_lines=0, truncated=0)
    records = load_records(dataset, source, key, counts)
    first = _readable(next(records))
    if encoder.task.name != "causal-lm":
        dataset = dataset.model_copy(update={"format": "classification"})
    format_name = resolve_format(dataset, first, key)
    sequences = []
    for record, where in chain([first], map(_readable, records)):
        sequence = encoder.encode(to_sample(record, format_name, dataset.columns, where), where)
        kept = limit_length(sequence, data.max_length, data.overlong, where, counts)
        if kept is not None:
            sequences.append(kept)
    if not sequences:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count)
        raise UserError(f"{key}: no sample of {dataset.path} has a token to train on ({reasons})")
    return sequences, {**counts, "kept": len(sequences)}


def held_out_indices(count: int, wanted: int) -> set[int]:
    """`wanted` of `count` sample indices, chosen by a hash of the index alone: no seed moves a sample across."""
    if wanted >= count:
        raise UserError(f"data.eval_samples: {wanted} of {count} samples; allowed: at most {count - 1}")
    ranked = sorted(range(count), key=lambda index: hashlib.sha256(f"held out {index}".encode()).digest())
    return set(ranked[:wanted])


def _pad_id(encoder: SampleEncoder) -> int:
    """A token id for the rest of a row; causal attention and masked targets make its choice matter to nobody."""
    tokenizer = encoder.tokenizer
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < encoder.vocab_size:
            return token
    return 0
