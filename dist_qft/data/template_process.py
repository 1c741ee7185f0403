"""A program that renders chat templates. It runs as a process of its own, with limits on its memory and CPU time.

A chat template is code that comes with a model's files. Jinja's sandbox keeps it away from the machine, but not from
loops that never end or strings of gigabytes. `chat_template` starts this program and talks to it over pipes, one line
of JSON for each request and each answer. It imports jinja2 and the standard library only, so that it starts at once.

    first request  {"template", "variables", "date": "YYYY-MM-DD", "cpu_seconds"}      answer {} or {"error": reason}
    later ones     {"messages": [...], "tools": [...] | null, "prompt": bool}           answer {"text", "marked"}

`marked` lists the (start, end) characters inside `{% generation %}` blocks. A rendering that fails answers {"error"}.
"""

import datetime
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**30
CHARACTERS = 2**20  # of one rendered text, plus 16 for each character of its request


class GenerationBlocks(jinja2.ext.Extension):
    """The `{% generation %}` tag, with which a template's author marks the part that the assistant writes."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(rendered=[], marked=[])

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        state = vars(self.environment)
        start = sum(len(piece) for piece in state["rendered"])
        state["marked"].append((start, start + len(text)))
        return text


def make_environment(today: datetime.date) -> jinja2.Environment:
    """The environment that transformers gives to chat templates, with a clock that stands still at `today`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols]
    )

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that reach into Python's internals."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.TemplateError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **values: Any) -> Namespace:
        created = Namespace()
        for name, value in dict(*args, **values).items():
            created[name] = value
        return created

    midnight = datetime.datetime.combine(today, datetime.time())
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = namespace
    environment.globals["dict"] = lambda *args, **values: dict(*args, **values)
    environment.globals["strftime_now"] = midnight.strftime
    return environment


def render(template: jinja2.Template, request: dict[str, Any], variables: dict[str, Any], limit: int) -> dict[str, Any]:
    """One conversation as text and the marked parts of it.

    Raises:
        ValueError: the text is longer than `limit` characters.
        Exception: whatever the template raises.
    """
    pieces: list[str] = []
    marked: list[tuple[int, int]] = []
    vars(template.environment).update(rendered=pieces, marked=marked)  # `extend` would keep those of the last request
    length = 0
    for piece in template.generate(
        messages=request["messages"],
        tools=request["tools"],
        documents=None,
        add_generation_prompt=request["prompt"],
        **variables,
    ):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            raise ValueError(f"it renders more than {limit:,} characters")
    return {"text": "".join(pieces), "marked": marked}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    setup = json.loads(sys.stdin.readline())
    _limit_cpu(setup["cpu_seconds"])
    try:
        template = make_environment(datetime.date.fromisoformat(setup["date"])).from_string(setup["template"])
    except Exception as error:
        _answer({"error": _reason(error)})
        return
    _answer({})
    while line := sys.stdin.readline():
        _limit_cpu(setup["cpu_seconds"])
        limit = CHARACTERS + 16 * len(line)
        try:
            answer = render(template, json.loads(line), setup["variables"], limit)
        except Exception as error:
            answer = {"error": _reason(error)}
        _answer(answer)


def _limit_cpu(seconds: int) -> None:
    """Allow the next request so many CPU seconds; the system ends this process when they are used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES >> 20:,} MiB of memory"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
