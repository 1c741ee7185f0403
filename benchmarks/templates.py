"""A table of the public chat templates that train exactly the assistant's words, for five kinds of conversation.

    python benchmarks/templates.py FOLDER ORIGIN > docs/templates.md

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_qft.data.samples import Conversation
from dist_qft.data.tokens import SampleEncoder
from dist_qft.errors import UserError

_DATE = datetime.date(2026, 1, 31)
# <|...|>, DeepSeek's with a wide bar and a low block, and tags of reasoning, calls, turns.
_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|>|<[\uff5c\u2581A-Za-z]+>"
    r"|</?(?:think|tool_call|start_of_turn|end_of_turn|s)>|\[/?INST\]"
)
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


def main(folder: Path, origin: str) -> int:
    """Print the page; 1 if a template trains anything else than what was said."""
    faults, refusals, rows = 0, [], []
    for file in sorted(folder.glob("*.jinja")):
        encoder = SampleEncoder(*_tokenizer(file.read_text()), today=_DATE)
        cells = []
        for case, (messages, tools, said) in _CASES.items():
            try:
                trained = _words(encoder, messages, tools)
            except UserError as refusal:
                refusals.append((str(refusal), file.stem, case))
                cells.append(str(len(refusals)))
                continue
            faults += trained != said
            cells.append("yes" if trained == said else f"**{' '.join(trained)}**")
        rows.append((file.stem, cells))
    print(_page(origin, rows, refusals))
    return int(faults > 0)


def _tokenizer(template: str) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer of bytes, with the special tokens that the template writes, and its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.add_tokens(sorted(set(_SPECIAL.findall(template))), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer, len(tokenizer)


def _words(encoder: SampleEncoder, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[str]:
    """The words of the conversation in its targets."""
    sequence = encoder.encode(Conversation(list(messages), tools), "the data")
    return re.findall(r"word[a-z]+", encoder.tokenizer.decode(sequence.input_ids[sequence.targets]))


def _page(origin: str, rows: list[tuple[str, list[str]]], refusals: list[tuple[str, str, str]]) -> str:
    """The page in Markdown; equal refusals share a number."""
    numbers: dict[str, int] = {}
    for text, _, _ in refusals:
        numbers.setdefault(text, len(numbers) + 1)
    lines = []
    for name, cells in rows:
        shown = [f"[{numbers[refusals[int(cell) - 1][0]]}]" if cell.isdigit() else cell for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    exact = sum(cell == "yes" for _, cells in rows for cell in cells)
    wrong = sum(len(cells) for _, cells in rows) - exact - len(refusals)
    intro = f"""
    `yes`: the targets are exactly what the assistant said, which may be content, reasoning, and the name and arguments
    of tool calls, with the ends of its turns. A number: the conversation is refused with that line, since the template
    cannot write what was said in it; `data.on_missing: warn` trains without it. {len(rows)} templates of {origin},
    {len(rows) * len(_CASES)} conversations: {exact} exact, {len(refusals)} refused, {wrong} wrong.
    Measured on {datetime.date.today()} with

        python benchmarks/templates.py FOLDER "{origin}"
    """
    head = f"| template | {' | '.join(_CASES)} |\n|---{'|---' * len(_CASES)}|"
    told = "\n".join(f"{number}. `{text}`" for text, number in numbers.items())
    table = "\n".join(lines)
    return f"# Chat templates\n{textwrap.dedent(intro)}\n{head}\n{table}\n\n## Refusals\n\n{told}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
