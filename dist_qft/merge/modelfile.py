"""A Modelfile for Ollama: the GGUF file, its chat template as a Go template, and the ends of an answer.

Ollama runs Go templates and knows the Jinja templates of popular families only. Most templates frame each turn by two
fixed texts; those frames are read off rendered conversations, and the result is compared with a rendering.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dist_qft.data.samples import Message
from dist_qft.data.templates import writes_bos
from dist_qft.errors import UserError
from dist_qft.tuned_model.prompts import conversation_text

_SYSTEM, _USER, _ANSWER = "qzsystemKj", "qzuserKj", "qzanswerKj"


@dataclass(frozen=True)
class Frames:
    """The texts around each role's messages.

    Attributes:
        start: before the first turn of a conversation without a system message.
        system, user, assistant: (before, after) a turn.
        prompt: with which an answer is asked for.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def text(self, messages: list[Message]) -> str:
        """A conversation in these frames, up to where the next answer begins."""
        by_role = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        turns = [f"{by_role[turn['role']][0]}{turn['content']}{by_role[turn['role']][1]}" for turn in messages]
        has_system = bool(messages) and messages[0]["role"] == "system"
        return ("" if has_system else self.start) + "".join(turns) + self.prompt

    def go_template(self) -> str:
        """The same as a template of Ollama."""
        start = f"{{{{ if not .System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        branches = [("system", self.system)] if self.system else []
        branches += [("user", self.user), ("assistant", self.assistant)]
        turns = "".join(
            f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}{frame[0]}{{{{ .Content }}}}{frame[1]}'
            for index, (role, frame) in enumerate(branches)
        )
        return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> str:
    """The content of a Modelfile beside the GGUF file of that name; `stops` are the texts that end an answer."""
    lines = [first_line(gguf_name)]
    frames = frames_of(tokenizer)
    if frames is not None:
        lines.append(f'TEMPLATE """{frames.go_template()}"""')
    elif tokenizer.chat_template:
        lines.append(
            "# The chat template does more than frame turns by fixed texts: Ollama takes its own, if it knows it."
        )
    lines += [f'PARAMETER stop "{_escaped(stop)}"' for stop in stops]
    return "\n".join(lines) + "\n"


def first_line(gguf_name: str) -> str:
    """The first line of a Modelfile for the GGUF file beside it."""
    return f"FROM ./{gguf_name}"


def frames_of(tokenizer: PreTrainedTokenizerBase) -> Frames | None:
    """The frames of the tokenizer's chat template; None if it has none, or does more than frame the turns."""
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    system = {"role": "system", "content": _SYSTEM}
    try:
        frames = _read_frames(tokenizer, user, answer)
        if frames is None:
            return None
        conversations = [[user], [user, answer, user, answer, user]]
        if (frame := _system_frame(tokenizer, system, user, frames)) is not None:
            frames = replace(frames, system=frame)
            conversations.append([system, user, answer, user])
        if any(frames.text(each) != _text(tokenizer, each) for each in conversations):
            return None
    except UserError:  # it refuses such conversations
        return None
    texts = "".join([frames.start, frames.prompt, *(frames.system or ()), *frames.user, *frames.assistant])
    return None if '"""' in texts or "{{" in texts else frames


def _read_frames(tokenizer: PreTrainedTokenizerBase, user: Message, answer: Message) -> Frames | None:
    head, _, tail = _text(tokenizer, [user]).partition(_USER)
    bare = _text(tokenizer, [user], prompt=False)
    ended = _text(tokenizer, [user, answer], prompt=False).partition(_ANSWER)[2]
    _, _, rest = _text(tokenizer, [user, answer, user]).partition(_USER)
    before_answer, _, behind = rest.partition(_ANSWER)
    after_answer = behind.partition(_USER)[0]
    prompt = tail[len(bare) - len(head) - len(_USER) :] if bare.startswith(f"{head}{_USER}") else ""
    end_of_user, before_user = tail.removesuffix(prompt), after_answer.removeprefix(ended)
    fits = before_answer.startswith(end_of_user) and after_answer.startswith(ended) and head.endswith(before_user)
    if not fits or not rest:
        return None
    start = head.removesuffix(before_user)
    return Frames(start, None, (before_user, end_of_user), (before_answer.removeprefix(end_of_user), ended), prompt)


def _system_frame(
    tokenizer: PreTrainedTokenizerBase, system: Message, user: Message, frames: Frames
) -> tuple[str, str] | None:
    """The texts around a system message; None if the template takes none."""
    try:
        before, found, after = _text(tokenizer, [system, user]).partition(_SYSTEM)
    except UserError:
        return None
    end, asked, _ = after.partition(f"{frames.user[0]}{_USER}")
    return (before, end) if found and asked else None


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompt: bool = True) -> str:
    """The rendered conversation, without BOS if the runtime adds it by itself; some begin their turns with it."""
    text = conversation_text(tokenizer, messages, prompt=prompt)
    return text.removeprefix(str(tokenizer.bos_token)) if writes_bos(tokenizer) else text


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
