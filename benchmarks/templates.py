"""A table of the public chat templates that train exactly the assistant's words, for five kinds of conversation.

    python benchmarks/templates.py FOLDER ORIGIN [FOLDER ORIGIN ...] > docs/templates.md

FOLDER holds templates as `*.jinja`, such as `trl/chat_templates` of a clone of huggingface/trl; ORIGIN says where they
come from. Every text in the conversations is a word of its own. The words of the targets are compared with those that
the assistant said: content, reasoning, and the name and arguments of a tool call. A line that the program refuses a
conversation with is a result, too; other words in the targets, or fewer, are a fault of this project, and the script
then ends with exit code 1. Training variants of a template (`*_training.jinja`) mark what the assistant says.
"""

import datetime
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_qft.data.samples import Conversation
from dist_qft.data.tokens import SampleEncoder
from dist_qft.errors import UserError

_DATE = datetime.date(2026, 1, 31)
# <|...|>, DeepSeek's with a wide bar and a low block, and tags of reasoning, calls, turns.
_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<[\uff5c\u2581A-Za-z_:]+\uff5c>"
    r"|</?(?:think|tool_call|start_of_turn|end_of_turn|s)>|\[/?INST\]"
)
# The beginnings of turns, which no answer ends in.
_HEADERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>|<start_of_turn>|<\|turn>|<\|start\|>"
    r"|<\|begin_[a-z_]+\|>|<\|(?:user|assistant|User|Assistant)\|>|<\uff5c(?:User|Assistant)\uff5c>|\[INST\]|###"
)
_OPEN = "open"
_USER, _SYSTEM, _RESULT = {"role": "user"}, {"role": "system", "content": "wordsystem"}, "wordresult"
_TOOL = {
    "type": "function",
    "function": {
        "name": "wordtool",
        "description": "wordabout",
        "parameters": {"type": "object", "properties": {"wordkey": {"type": "string", "description": "wordhint"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "wordtool", "arguments": {"wordkey": "wordvalue"}}, "id": "abcdefghi"}


def _ask(word: str) -> dict[str, Any]:
    return {**_USER, "content": word}


def _say(word: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": word, **more}


# Messages, tools, and the words that the assistant says, in their order.
_CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[str]]] = {
    "single": ([_ask("wordask"), _say("wordanswer")], None, ["wordanswer"]),
    "multi-turn": (
        [_ask("wordask"), _say("wordfirst"), _ask("wordagain"), _say("wordsecond")],
        None,
        ["wordfirst", "wordsecond"],
    ),
    "system": ([_SYSTEM, _ask("wordask"), _say("wordanswer")], None, ["wordanswer"]),
    "tools": (
        [
            _ask("wordask"),
            _say("", tool_calls=[_CALL]),
            {"role": "tool", "name": "wordtool", "tool_call_id": "abcdefghi", "content": _RESULT},
            _say("wordanswer"),
        ],
        [_TOOL],
        ["wordtool", "wordkey", "wordvalue", "wordanswer"],
    ),
    "reasoning": (
        [_ask("wordask"), _say("wordanswer", reasoning_content="wordthought")],
        None,
        ["wordthought", "wordanswer"],
    ),
}


def main(collections: Sequence[tuple[Path, str]]) -> int:
    """Print the page, one table for each folder and its origin; 1 if a template trains other words than were said."""
    faults = 0
    numbers: dict[str, int] = {}
    sections = []
    for folder, origin in collections:
        rows: list[tuple[str, list[str]]] = []
        for file in sorted(folder.glob("*.jinja")):
            encoder = SampleEncoder(*_tokenizer(file.read_text()), today=_DATE)
            cells = []
            for messages, tools, said in _CASES.values():
                try:
                    trained = _words(encoder, messages, tools)
                except UserError as refusal:
                    cells.append(f"[{numbers.setdefault(str(refusal), len(numbers) + 1)}]")
                    continue
                end = trained.pop() if trained[-1] == _OPEN else ""
                exact = sorted(trained) == sorted(said)  # a few templates write a call's arguments before its name
                faults += not exact
                cells.append(f"yes{end and ', ' + end}" if exact else f"**{' '.join(trained)}**")
            rows.append((file.stem, cells))
        sections.append(_section(origin, rows))
    print(_page(sections, numbers))
    return int(faults > 0)


def _tokenizer(template: str) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer of bytes, with the special tokens that the template writes, and its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    written = set(_SPECIAL.findall(template))
    for messages, tools, _ in _CASES.values():  # some templates put a token's name together
        with suppress(Exception):  # a conversation that the template refuses
            written |= set(_SPECIAL.findall(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)))
    tokenizer.add_tokens(sorted(written), special_tokens=True)
    return tokenizer, len(tokenizer)


def _words(encoder: SampleEncoder, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[str]:
    """The words of the conversation in its targets, and the headers of turns that stand behind them.

    The last is OPEN if no target stands behind the last word.
    """
    sequence = encoder.encode(Conversation(list(messages), tools), "the data")
    borders = np.flatnonzero(np.diff(sequence.targets, append=False)) + 1
    texts = [
        str(encoder.tokenizer.decode(ids[inside]))
        for ids, inside in zip(np.split(sequence.input_ids, borders), np.split(sequence.targets, borders), strict=True)
        if inside.any()
    ]
    words: list[str] = []
    behind = ""
    for text in texts:
        words += re.findall(r"(?<!/)word[a-z]+", text)  # an argument's name comes again in its closing tag
        behind = re.split(r"word[a-z]+", text)[-1]
        # GLM's turns end in the next one's header, where the template's author marks it.
        words += _HEADERS.findall(behind) if behind != "<|user|>" or "generation" not in _source(encoder) else []
    return words if behind.strip() else [*words, _OPEN]


def _source(encoder: SampleEncoder) -> str:
    return str(encoder.tokenizer.chat_template)


def _section(origin: str, rows: list[tuple[str, list[str]]]) -> str:
    """The table of one collection, in Markdown."""
    cells = [cell for _, row in rows for cell in row]
    exact, refused = sum(cell.startswith("yes") for cell in cells), sum(cell.startswith("[") for cell in cells)
    words = f"{len(rows)} templates, {len(cells)} conversations: {exact} exact, {refused} refused, "
    words += f"{len(cells) - exact - refused} wrong."
    head = f"| template | {' | '.join(_CASES)} |\n|---{'|---' * len(_CASES)}|"
    table = "\n".join(f"| {name} | {' | '.join(row)} |" for name, row in rows)
    return f"## {origin}\n\n{words}\n\n{head}\n{table}"


def _page(sections: Sequence[str], numbers: Mapping[str, int]) -> str:
    """The page in Markdown; equal refusals share a number."""
    intro = f"""
    `yes`: the targets are exactly what the assistant said, which may be content, reasoning, and the name and arguments
    of tool calls, with the ends of its turns, and no header of another turn. `open`: the template ends no turn behind
    which nothing stands, inside of its `generation` blocks if it has such, or right behind them; the run says that such
    an answer does not teach the model to stop. A number: the conversation
    is refused with that line, since the template cannot write what was said in it; `data.on_missing: warn` trains
    without it. The Hub could not be reached for this page. Templates of models that are in none of these collections
    have not been tried, nor have later versions of these. Measured on {datetime.date.today()} with

        python benchmarks/templates.py FOLDER ORIGIN [FOLDER ORIGIN ...]
    """
    told = "\n".join(f"{number}. `{text}`" for text, number in numbers.items())
    tables = "\n\n".join(sections)
    return f"# Chat templates\n{textwrap.dedent(intro)}\n{tables}\n\n## Refusals\n\n{told}"


if __name__ == "__main__":
    sys.exit(main([(Path(folder), origin) for folder, origin in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
