"""The program, and the arguments that several verbs take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_qft.errors import UserError

if TYPE_CHECKING:
    from dist_qft.config.schema import RunConfig

app = typer.Typer(
    help="Distributed fine-tuning of 4-bit language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Overrides may be written as options (--train.learning_rate 1e-4), which typer cannot know.
OVERRIDABLE = {"ignore_unknown_options": True}

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key.sub=value", help="Settings that replace the file's; or --key.sub value.", show_default=False
    ),
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, checkpoint or model, also a GGUF file.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws one.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this joint probability.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 is all.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def read_config(config: Path, words: list[str] | None) -> "RunConfig":
    """The config in a file with the words of the command line applied. Raises UserError."""
    if str(config).startswith("-"):
        raise UserError(f"unknown option '{config}' before CONFIG; overrides come after it")
    from dist_qft.config.command_words import overrides_of
    from dist_qft.config.load import load_config

    return load_config(config, list(overrides_of(words or [])))
