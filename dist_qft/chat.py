"""`dist-qft chat`: a conversation in the terminal with a tuned or a merged model, on one rank or on many.

Rank 0 reads the lines and prints; the other ranks get each line from it, because a sharded base answers together.
"""

import datetime
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TextIO

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, TextStreamer

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import ShardingConfig
from dist_qft.errors import SetupError, UserError
from dist_qft.methods.trainable import TrainableSet
from dist_qft.ranks.collectives import on_rank_0
from dist_qft.ranks.session import place
from dist_qft.tuned_model.answer import Sampling, answers, longest_sequence
from dist_qft.tuned_model.loaded_model import holds_model, load
from dist_qft.tuned_model.opened_run import opened_to_answer
from dist_qft.tuned_model.prompts import Messages, date_of, prompt_ids

_COMMANDS = """/base     answer the last message with the base model, without the adapters
/system TEXT   set the system prompt and begin anew (without TEXT: remove it)
/reset    begin a new conversation
/help     these lines
/exit     end (so does the end of the input)"""
# Sent to other ranks instead of a line: rank 0's input has ended, or nothing was typed for a while.
_END, _NOTHING = "\x00end", "\x00nothing"
_IDLE_SECONDS = 30
_Input = str | Exception | None  # a line, the failure to read one, or the end


@dataclass
class Chat:
    """One conversation, and the model that it is with. Every rank has the same turns.

    Attributes:
        trainables: None for a merged model.
        answering: entered for each answer; its keyword `tuned` says whether the answer is the tuned model's.
        output: gets answers and remarks; None on ranks other than 0.
        today: the date for chat templates that print it; None takes the day of each answer.
    """

    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    trainables: TrainableSet | None
    device: torch.device
    sampling: Sampling
    system: str | None = None
    output: TextIO | None = None
    today: datetime.date | None = None
    turns: Messages = field(default_factory=list)
    answering: Callable[..., AbstractContextManager[None]] = field(default=lambda *, tuned: nullcontext())

    def take(self, line: str) -> bool:
        """Act on one line of input; False if it ends the chat. Collective."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        match word:
            case "" | "/help":
                self._say(_COMMANDS if word else "")
            case "/exit":
                return False
            case "/reset":
                self.turns = []
                self._say("(a new conversation)")
            case "/system":
                self.system, self.turns = rest.strip() or None, []
                self._say("(a new conversation)")
            case "/base":
                self._answer_as_base()
            case _ if word.startswith("/"):
                self._say(f"(unknown command {word}; /help lists them)")
            case _:
                self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        asked = [*self.turns, {"role": "user", "content": line}]
        text = self._generate(asked)
        if text is not None:
            self.turns = [*asked, {"role": "assistant", "content": text}]

    def _answer_as_base(self) -> None:
        if self.trainables is None:
            return self._say("(a merged model has no adapters to leave out)")
        asked = self.turns[:-1]
        if not asked:
            return self._say("(there is no message yet)")
        with self.trainables.disabled():
            self._generate(asked, tuned=False)

    def _generate(self, asked: Messages, *, tuned: bool = True) -> str | None:
        """The streamed answer to a conversation; None if it has grown too long."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt: str | Messages = [*system, *asked]
        if not self.tokenizer.chat_template:  # a base model goes on with the text
            prompt = "\n".join([*([self.system] if self.system else []), *(turn["content"] for turn in asked)])
        length = len(prompt_ids(self.tokenizer, prompt, self.today))
        limit = longest_sequence(self.base)
        if limit is not None and length + self.sampling.max_new_tokens > limit:
            self._say(f"({length} tokens and an answer do not fit into the model's {limit}; /reset begins anew)")
            return None
        streamer = None if self.output is None else Streamer(self.tokenizer, self.output)
        with self.answering(tuned=tuned):
            return answers(self.base, self.tokenizer, [prompt], self.sampling, self.device, self.today, streamer)[0]

    def _say(self, text: str) -> None:
        if self.output is not None and text:
            print(text, file=self.output, flush=True)


class Streamer(TextStreamer):
    """A printer of an answer's tokens as they come, to any stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._output = output

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, file=self._output, end="\n" if stream_end else "", flush=True)


def run_chat(path: str, sampling: Sampling, system: str | None) -> None:
    """Chat with the model at `path`, a run, a checkpoint or a model, until the input ends.

    Raises:
        UserError: there is no model, or it answers no prompts.
        SetupError: the input cannot be read.
    """
    with _opened(path, sampling, system) as chat:
        asking = chat.output is not None and _prepare_input()
        if asking:
            print(_COMMANDS, flush=True)
        for line in shared_lines(lambda: _read(asking), chat.device):
            if not chat.take(line):
                break


@contextmanager
def _opened(path: str, sampling: Sampling, system: str | None) -> Iterator[Chat]:
    if holds_model(Path(path)):
        world, device = place(ShardingConfig())
        if world.world_size > 1:
            raise UserError(f"'{path}' is a whole model: chat with it in one process, not on {world.world_size} ranks")
        model = load(path, device)
        yield Chat(model.base, model.tokenizer, None, model.device, sampling, system, sys.stdout)
        return
    with opened_to_answer(path, doing="a chat", request={"settings": repr((sampling, system))}) as run:
        output = sys.stdout if run.world.rank == 0 else None
        base, trainables, today = run.parts.base, run.parts.trainables, date_of(run.config)
        answering = partial(run.parts.answering, run.device)
        yield Chat(base, run.tokenizer, trainables, run.device, sampling, system, output, today, answering=answering)


def _prepare_input() -> bool:
    """Have bytes that are no text replaced; return True if the input is a terminal."""
    if sys.stdin is None or sys.stdin.closed:  # `_read` says so
        return False
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin.isatty()


def _read(asking: bool) -> str | None:
    """The next line of the input; None at its end. Raises SetupError if there is no input, or none to read."""
    if sys.stdin is None:
        raise SetupError("standard input: it is closed, must be a terminal, a file or a pipe")
    if asking:
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.readline()
    except (OSError, ValueError) as error:
        raise SetupError(f"standard input: cannot be read: {error}") from error
    return line if line else None


def shared_lines(read: Callable[[], str | None], device: torch.device) -> Iterator[str]:
    """Lines that rank 0 reads, on every rank, until `read` returns None there. Collective.

    While nobody types, rank 0 tells the others so from time to time: a collective that takes long would be a lost peer.

    Raises:
        DistQFTError: the one that `read` raised, on every rank; see `on_rank_0`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from iter(read, None)
        return
    waiting: Queue[_Input] = Queue()
    if dist.get_rank() == 0:
        Thread(target=_read_all, args=(read, waiting), daemon=True).start()
    while (text := _from_rank_0(on_rank_0(lambda: _next(waiting), device) or "", device)) != _END:
        if text != _NOTHING:
            yield text


def _read_all(read: Callable[[], str | None], lines: "Queue[_Input]") -> None:
    try:
        while (line := read()) is not None:
            lines.put(line)
        lines.put(None)
    except Exception as error:  # of whatever kind: the ranks would wait for this thread
        lines.put(error)


def _next(lines: "Queue[_Input]") -> str:
    try:
        line = lines.get(timeout=_IDLE_SECONDS)
    except Empty:
        return _NOTHING
    if isinstance(line, Exception):
        raise line
    return _END if line is None else line


def _from_rank_0(line: str, device: torch.device) -> str:
    """Rank 0's text on every rank, as bytes: nothing is unpickled. Collective."""
    data = torch.frombuffer(bytearray(line.encode() or b" "), dtype=torch.uint8).to(device)
    size = torch.tensor(data.numel(), device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode(errors="replace")
