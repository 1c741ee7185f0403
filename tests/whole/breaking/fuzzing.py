"""Hostile inputs: configs, data, models, GGUF files and checkpoints with bytes or values of chance in them.

An input may be refused, with one of the program's codes and a line that says why, or be used. Nothing else may happen:
no traceback, no endless work, no memory beyond a good run's and a GiB.
"""

import gzip
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_qft.storage import manifest
from dist_qft.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL, OPTIMIZER, TRAINER_STATE
from tests.support.tiny_model import sentences
from tests.whole.breaking.attempts import Breaker, Budget, Ended, Tally, fault_in
from tests.whole.breaking.children import command
from tests.whole.breaking.mutations import spoil_bytes, spoil_tree
from tests.whole.breaking.workshop import ONE_STEP, Workshop

SLACK_BYTES = 1 << 30
Spoil = Callable[[Workshop, Path, random.Random], Ended]


def fuzzer(name: str, shop: Workshop, spoil: Spoil) -> Breaker:
    """Attempts in each of which `spoil` makes an input in an empty folder and has a command use it."""

    def attempt_all(budget: Budget) -> Tally:
        tally = Tally(name)
        for number, chance in budget.each():
            with tempfile.TemporaryDirectory(prefix="breaking-") as folder:
                ended = spoil(shop, Path(folder), chance)
            reason = fault_in(ended, shop.peak_bytes + SLACK_BYTES)
            if reason is not None:
                tally.fail(f"{budget.seed}:{number}", reason)
                if budget.only is not None:
                    print(ended.output)
            tally.outcomes["used" if ended.code == 0 else f"refused with {ended.code}"] += 1
        return tally

    return attempt_all


def text_of(tree: Any) -> str:
    """A tree as JSON, which may hold what JSON lacks."""
    return json.dumps(tree)


def spoil_config(shop: Workshop, folder: Path, chance: random.Random) -> Ended:
    """A config with other values or other bytes, checked or trained with."""
    path = folder / "run.yaml"
    if chance.random() < 0.8:
        tree = shop.tree()
        section = chance.choice([key for key, value in tree.items() if isinstance(value, dict)])
        if chance.random() < 0.8:
            tree[section] = spoil_tree(tree[section], chance)
        else:
            tree = spoil_tree(tree, chance)
        path.write_text(text_of(tree))
    else:
        path.write_bytes(spoil_bytes(shop.config.read_bytes(), chance))
    places = (f"output_dir={folder / 'out'}", "merge.at_end=null", "evaluation.max_new_tokens=2")
    if chance.random() < 0.5:
        return command("validate", path, places[0])
    return command("train", path, *ONE_STEP, *places)


def spoil_data(shop: Workshop, folder: Path, chance: random.Random) -> Ended:
    """Rows with other values, or a file with other bytes, in one of several forms."""
    rows = [_row(index, chance) for index in range(6)]
    spoiled = [spoil_tree(row, chance) if chance.random() < 0.3 else row for row in rows]
    content, suffix = _file_of(spoiled, chance)
    if chance.random() < 0.4:
        content = spoil_bytes(content, chance)
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    if not path.suffix:
        path = folder
    changes = [f"data.train.path={path}", "data.eval_samples=0", "data.cache_dir=null"]
    if chance.random() < 0.3:
        changes.append("data.on_bad_row=skip")
    return _one_step(shop.config, folder, *changes)


def _row(index: int, chance: random.Random) -> dict[str, Any]:
    row = sentences(index + 1)[index]
    match chance.randrange(4):
        case 0:
            return dict(row)
        case 1:
            turns = [("user", row["prompt"]), ("assistant", row["completion"])] * 2
            return {"messages": [{"role": role, "content": text} for role, text in turns]}
        case 2:
            call = {"type": "function", "function": {"name": "look", "arguments": {"place": row["prompt"]}}}
            tool = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
            turns += [{"role": "tool", "content": "a cat"}, {"role": "assistant", "content": row["completion"]}]
            return {"messages": turns, "tools": [{"type": "function", "function": tool}]}
        case _:
            pairs = [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
            return {"conversations": pairs}


def _file_of(rows: list[Any], chance: random.Random) -> tuple[bytes, str]:
    lines = "".join(text_of(row) + "\n" for row in rows).encode()
    match chance.randrange(6):
        case 0:
            return text_of(rows).encode(), ".json"
        case 1:
            return gzip.compress(lines), ".jsonl.gz"
        case 2:
            cells = "".join(f'"{index}","{text_of(row)[:300]}"\n' for index, row in enumerate(rows))
            return f"prompt,completion\n{cells}".encode(), ".csv"
        case 3:
            return _parquet([sentences(6)[index] for index in range(6)]), ".parquet"
        case _:
            return lines, ".jsonl"


def _parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def spoil_model(shop: Workshop, folder: Path, chance: random.Random) -> Ended:
    """A model's folder in which one file has other values or bytes."""
    model = Path(shutil.copytree(shop.model, folder / "model"))
    names = ["config.json"] * 3 + ["model.safetensors"] * 3 + [file.name for file in sorted(model.iterdir())]
    file = model / chance.choice(names)
    content = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.7:
        file.write_text(text_of(spoil_tree(json.loads(content), chance)))
    elif file.suffix == ".safetensors" and chance.random() < 0.5:
        file.write_bytes(_with_header(content, chance))
    else:
        file.write_bytes(spoil_bytes(content, chance, head=8 + 4000))
    return _one_step(shop.config, folder, f"model.path={model}")


def _with_header(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header's tree has other values, with a size that fits."""
    size = int.from_bytes(content[:8], "little")
    header = text_of(spoil_tree(json.loads(content[8 : 8 + size]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def spoil_gguf(shop: Workshop, folder: Path, chance: random.Random) -> Ended:
    """A GGUF file with other bytes, mostly in its header."""
    path = folder / "spoiled.gguf"
    path.write_bytes(spoil_bytes(shop.gguf.read_bytes(), chance, head=chance.choice((32, 600, 20_000))))
    return _one_step(shop.gguf_config, folder, f"model.path={path}")


def spoil_checkpoint(shop: Workshop, folder: Path, chance: random.Random) -> Ended:
    """A checkpoint of other values under a manifest that is right."""
    run = folder / "run"
    newest = Path(shutil.copytree(shop.run / "checkpoint-6", run / "checkpoint-6"))
    name = chance.choice((ADAPTER_CONFIG, ADAPTER_CONFIG, TRAINER_STATE, TRAINER_STATE, ADAPTER_MODEL, OPTIMIZER))
    content = (newest / name).read_bytes()
    if name.endswith(".json"):
        content = text_of(spoil_tree(json.loads(content), chance)).encode()
    else:
        content = _with_header(content, chance) if chance.random() < 0.5 else spoil_bytes(content, chance, head=2000)
    (newest / name).write_bytes(content)
    files = [(file.name, file.read_bytes()) for file in newest.iterdir() if file.name != manifest.MANIFEST]
    shutil.rmtree(newest)
    manifest.publish_folder(newest, files)
    match chance.randrange(4):
        case 0:
            changes = ("train.max_steps=7", f"output_dir={run}", "merge.at_end=null")
            return command("train", shop.config, *changes, "--resume", "auto")
        case 1:
            return command("generate", run, "--prompt", "Say", "--max-new-tokens", 2)
        case 2:
            return command("merge", run, "--to", "dense", "-o", folder / "merged")
        case _:
            return command("eval", run)


def _one_step(config: Path, folder: Path, *changes: str) -> Ended:
    return command("train", config, *ONE_STEP, f"output_dir={folder / 'out'}", "merge.at_end=null", *changes)


SPOILERS: dict[str, Spoil] = {
    "config": spoil_config,
    "data": spoil_data,
    "model folder": spoil_model,
    "GGUF": spoil_gguf,
    "checkpoint": spoil_checkpoint,
}
