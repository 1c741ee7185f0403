"""Chat templates, rendered in a process of their own (`template_process`) that cannot hang or swallow this one."""

import contextlib
import datetime
import io
import json
import select
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dist_qft.data import template_process
from dist_qft.errors import UserError

Message = dict[str, Any]
Tool = dict[str, Any]
CPU_SECONDS = 10  # for one rendering
WALL_SECONDS = 120.0  # for one rendering, on a machine under heavy load


class Request(NamedTuple):
    """messages and tools as the template takes them; prompt: append the header of an answer to come."""

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    prompt: bool = False


class Rendered(NamedTuple):
    """text: the conversation. marked: (start, end) of its parts inside `{% generation %}`. error: why there is none."""

    text: str = ""
    marked: tuple[tuple[int, int], ...] = ()
    error: str | None = None


class TemplateStopped(UserError):
    """One rendering, or the template's start, took more time or memory than any template needs."""


class ChatTemplate:
    """One chat template of a tokenizer. Starts its process when it first renders, and again after a limit was hit.

    `today` is the date that the template is told if it asks for one.
    """

    def __init__(self, source: str, variables: dict[str, str], today: datetime.date) -> None:
        self.source = source
        self._setup: dict[str, Any] = {"template": source, "variables": variables, "date": today.isoformat()}
        self._setup["cpu_seconds"] = CPU_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def render(self, request: Request) -> Rendered:
        """The text of a conversation; a refusal by the template is in `Rendered.error`.

        Raises:
            UserError: the template is not valid.
            TemplateStopped: the rendering took more time or memory than any template needs.
        """
        if self._process is None:
            self._start()
        answer = self._ask(request._asdict())
        if "error" in answer:
            return Rendered(error=answer["error"])
        return Rendered(answer["text"], tuple((start, end) for start, end in answer["marked"]))

    def _start(self) -> None:
        command = [sys.executable, "-P", str(Path(template_process.__file__))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        try:
            answer = self._ask(self._setup)
        except TemplateStopped as stopped:  # no row has a part in it
            raise UserError(str(stopped)) from None
        if "error" in answer:
            self.close()
            raise UserError(f"model.path: the chat template is not valid: {answer['error']}")

    def close(self) -> None:
        """End the template's process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, request: Any) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and isinstance(process.stdout, io.BufferedReader)
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            parts: list[bytes] = []
            while not parts or not parts[-1].endswith(b"\n"):
                if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
                    break
                part = process.stdout.read1(2**20)
                if not part:
                    break
                parts.append(part)
            else:
                return json.loads(b"".join(parts))
        except BrokenPipeError:
            pass
        self.close()
        raise TemplateStopped(
            f"model.path: the chat template was stopped: one rendering may use {CPU_SECONDS} seconds "
            f"of CPU and {template_process.MEMORY_BYTES >> 20:,} MiB of memory"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "it was opened with the process"
        with contextlib.suppress(OSError):
            pipe.close()
    process.kill()
    process.wait()


def template_source(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] | None) -> str | None:
    """The template that the tokenizer uses with or without tools; None if it has none.

    Raises:
        UserError: it has several, and none for this.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template(tools=None if tools is None else list(tools))
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(f"model.path: got a tokenizer with the chat templates {names}, must have a default") from None


def has_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer's chat template asks for today's date."""
    templates = tokenizer.chat_template or ""
    return "strftime_now" in (" ".join(templates.values()) if isinstance(templates, dict) else templates)
