"""A list of the model families that work: every causal language model that transformers knows, as a tiny random model.

    PYTHONPATH=. python benchmarks/families.py ROWS.jsonl [model types ...] > page.md

For each type a folder with random weights and buffers is written as `save_pretrained` publishes it, read again, and
compared with transformers' own logits. Those of `TUNED` are also trained on 2 ranks (qlora, qst), merged to floats for
transformers and exported for PEFT. Every row is kept in ROWS.jsonl, and a type that is there is not tried again.
Without types the page is of all. A family that does not work must say so in one line; a traceback is a fault of this
project, and the script then ends with exit code 1.
"""

import contextlib
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
from family_runs import (
    NEAR,
    NO_TEXT_ALONE,
    WORLDS,
    base_difference,
    losses_difference,
    opened,
    packs,
    quiet,
    reader_difference,
    run_config,
    said,
    share_in_4_bits,
    tune,
)
from family_sizes import save_random, tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

import dist_qft
from dist_qft.base_model.skeleton import BaseModel
from tests.support.rank_pool import RankPool

SECONDS = 400
# Tried with training: what people tune, and each kind of decoder once.
TUNED = (
    "llama", "qwen3", "gemma3", "qwen3_5", "mistral3", "qwen3_vl", "gemma4", "qwen3_moe", "gpt2", "phi", "phi3",
    "gemma2", "gemma3_text", "gemma4_text", "mistral", "mixtral", "qwen2", "qwen3_next", "gpt_neox", "gpt_oss",
    "falcon", "bloom", "mpt", "gptj", "gpt_bigcode", "opt", "olmo2", "granite", "granitemoehybrid", "falcon_h1",
    "minicpm3", "deepseek_v3", "glm4", "glm4_moe", "cohere2", "smollm3", "starcoder2", "lfm2", "bamba", "jamba",
    "nemotron_h", "llama4", "qwen2_5_vl", "internvl", "qwen3_5_text", "qwen3_5_moe_text", "stablelm", "olmo3",
    "olmoe", "granitemoe", "cohere", "apertus", "exaone4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "nemotron",
    "ministral3", "minimax_m2", "phimoe", "gemma", "qwen2_moe", "llama4_text", "lfm2_moe", "smolvlm", "llava",
)  # fmt: skip


@dataclass
class Row:
    """The findings on one model type: for each step its result, or the line in which it is refused."""

    kind: str
    result: str = ""
    attention: str = ""
    logits: str = ""
    quantized: str = ""
    packing: str = ""
    qlora: str = ""
    dense: str = ""
    peft: str = ""
    qst: str = ""
    losses: str = ""
    faults: list[str] = field(default_factory=list)


class TookTooLong(Exception):
    """A step of one model type has not come to an end."""


def try_family(kind: str, folder: Path, pools: Mapping[int, RankPool]) -> Row:
    row = Row(kind)
    try:
        save_random(tiny_config(kind), folder)
    except Exception as error:
        row.result = f"not built: {type(error).__name__}"
        return row
    base = None
    for attention in ("sdpa", "eager"):
        row.attention = attention
        outcome = said(row.faults, lambda attention=attention: opened(folder, attention))
        if isinstance(outcome, BaseModel):
            base = outcome
            break
        row.result = outcome
        if "model.attention" not in outcome:
            return row
    if base is None:
        return row
    found = said(row.faults, lambda: base_difference(base, folder, row.attention))
    row.logits = _number(found)
    row.result = "works" if isinstance(found, float) and found < NEAR else "other logits"
    if found == NO_TEXT_ALONE:
        row.logits, row.result = "", NO_TEXT_ALONE
    row.quantized = str(said(row.faults, lambda: share_in_4_bits(base)))
    row.packing = "yes" if said(row.faults, lambda: packs(base)) == "yes" else "no"
    if kind in TUNED:
        _tune(row, folder, pools)
    return row


def _tune(row: Row, folder: Path, pools: Mapping[int, RankPool]) -> None:
    attention = row.attention
    outcome = said(row.faults, lambda: pools[2].run(tune, folder=folder, attention=attention)[0])
    if isinstance(outcome, str):
        row.qlora = row.qst = outcome
        return
    row.qlora, row.qst, row.peft = outcome["qlora"], outcome["qst"], outcome.get("peft", "")
    formats = {name: outcome[name] for name in ("qlora", "qst") if outcome[name] in ("nf4", "dense")}
    row.losses = _number(said(row.faults, lambda: losses_difference(pools, folder, attention, formats)))
    run = Path(run_config(folder, attention, "qlora", row.qlora).output_dir) if "peft" in outcome else None
    if run is None:
        return
    live = dist_qft.load(run)
    results = {"dense": run / "merged-dense"} | ({} if row.peft else {"peft": folder.parent / "peft"})
    for target, result in results.items():
        found = said(row.faults, lambda result=result: reader_difference(live, result, folder, attention))
        setattr(row, target, _number(found))


def _number(found: object) -> str:
    return f"{found:.0e}" if isinstance(found, float) else str(found)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def page(rows: list[Row]) -> str:
    works = [row for row in rows if row.result == "works"]
    not_built = [row for row in rows if row.result.startswith("not built")]
    others = [row for row in rows if row not in works and row not in not_built]
    tuned = [row for row in works if row.qlora]
    lines = [
        "# Which models work",
        "",
        f"Made by `PYTHONPATH=. python benchmarks/families.py ROWS.jsonl >docs/models.md` on {date.today()} with "
        f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}: for every causal or "
        "multimodal language model that transformers knows, a tiny random model is written as it is published, read by "
        "this project, and its float32 logits are compared with transformers' own. Differences are relative to the "
        "largest logit. Of a multimodal model "
        "(`...ForConditionalGeneration`) the text decoder is read, and tried on text (docs/multimodal.md).",
        "",
        "## Numbers",
        "",
        f"{len(works)} model types have the logits of transformers. *attention*: the implementation that the family "
        "needs (`model.attention`).",
        "",
        "## Tuned",
        "",
        f"{len(tuned)} of them were trained on 2 ranks under fsdp for 2 steps. *qlora*, *qst*: the base's format in "
        "that run (dense where the tiny sizes allow no other). *dense*: logits of transformers on `merge --to dense` "
        "against the tuned model's. *PEFT*: the same of stock PEFT on `merge --to peft`. A word stands for a "
        "refusal; its line is below. *in 4 bits*: share of the decoder layers' matrices that nf4 holds, smaller here "
        "than in real models. *packing*: `data.packing` keeps samples apart; of layers that attend to compressed "
        "or chosen blocks of a row (DeepSeek-V4, MiniMax-M3's sparse ones) it does not. *ranks*: losses of both "
        "methods on 2 ranks under zero and on 3 under fsdp against those of one rank, relative.",
        "",
        "| model type | attention | logits | in 4 bits | packing | qlora | dense | PEFT | qst | ranks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in tuned:
        steps = {name: getattr(row, name) for name in ("quantized", "qlora", "dense", "peft", "qst")}
        cells = {name: _short(text) for name, text in steps.items()}
        notes += [f"* {row.kind}, {name}: {_plain(text)}" for name, text in steps.items() if _short(text) != text]
        first = f"| {row.kind} | {row.attention} | {row.logits} | {cells['quantized']} | {row.packing} "
        lines.append(
            first + "".join(f"| {cells[name]} " for name in ("qlora", "dense", "peft", "qst")) + f"| {row.losses} |"
        )
    lines += ["", "What is refused of these:", "", *notes] if notes else []
    lines += ["", "## Read", "", "Same logits, not trained here.", ""]
    lines += ["| model type | attention | logits | packing |", "|---|---|---|---|"]
    lines += [f"| {r.kind} | {r.attention} | {r.logits} | {r.packing} |" for r in works if not r.qlora]
    lines += ["", "## Refused", "", "| model type | the line that says so |", "|---|---|"]
    lines += [f"| {row.kind} | {_plain(_reason(row))} |" for row in others]
    names = ", ".join(row.kind for row in not_built)
    return "\n".join([*lines, "", f"Not tried, because the sizes above make no small model of them: {names}."])


def _short(text: str) -> str:
    return text if len(text) < 25 else "refused"


def _reason(row: Row) -> str:
    return row.result if row.result != "other logits" else f"logits differ: {row.logits}"


def _plain(text: str) -> str:
    return text.partition("model.path: ")[2].replace("|", "/") or text.replace("|", "/")


def close(pools: Mapping[int, RankPool]) -> None:
    for pool in pools.values():
        pool.close()


def main(file: Path, kinds: list[str]) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = {row["kind"]: Row(**row) for row in known}
    every = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
    every.sort(key=lambda kind: TUNED.index(kind) if kind in TUNED else len(TUNED))
    pools = {ranks: RankPool(ranks) for ranks in WORLDS}
    for kind in [kind for kind in kinds or every if kind not in rows]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            try:
                with at_most(SECONDS), quiet():
                    row = try_family(kind, folder, pools)
            except TookTooLong:
                close(pools)
                row = Row(kind, result="no end", faults=[f"no end after {SECONDS} s"])
            text = json.dumps(asdict(row)).replace(f"'{folder}'", "the folder").replace(str(folder), "the folder")
            rows[kind] = Row(**json.loads(text.replace(place, "")))
        with file.open("a") as log:
            log.write(json.dumps(asdict(rows[kind])) + "\n")
        for fault in rows[kind].faults:
            print(f"{kind}: {fault}", file=sys.stderr, flush=True)
    close(pools)
    print(page([rows[kind] for kind in sorted(rows)]))
    return 1 if any(row.faults for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
