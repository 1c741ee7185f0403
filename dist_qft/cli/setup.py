"""Verbs that help before the first run."""

from pathlib import Path
from typing import Annotated

import typer

from dist_qft.cli.app import OVERRIDABLE, Overrides, app, read_config


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write.")] = Path("run.yaml"),
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub id, folder or .gguf file.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="File of rows, or Hub id.", show_default=False)
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(metavar="adapter|exact|exact-gguf|memory", help="What to have in the end.", show_default=False),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a node; 0 trains on the CPU.", show_default=False)
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.", show_default=False)] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where the run goes.", show_default=False)
    ] = None,
) -> None:
    """Write a commented config to start from and print the command that runs it; asks for what is not given."""
    from dist_qft.init import GOALS, Answers, ask, commands, whole_number, write_config

    goals = "\n".join(f"  {name:11} {each.title}" for name, each in GOALS.items())
    answers = Answers(
        model=model or ask("model", None, "The base: a Hub id (owner/name), a folder or a .gguf file."),
        data=data or ask("data", "stdlib-docs", "Your rows: a json, jsonl, csv or parquet file, or a Hub id."),
        goal=goal or ask("goal", "adapter", goals),
        gpus=gpus if gpus is not None else whole_number("gpus", ask("gpus", "1", "GPUs of a node; 0 for the CPU.")),
        nodes=nodes if nodes is not None else whole_number("nodes", ask("nodes", "1")),
        output=output or ask("output", f"runs/{file.stem}"),
    )
    write_config(file, answers)
    print(f"wrote {file}; next:", *commands(file, answers), sep="\n  ")


@app.command(context_settings=OVERRIDABLE)
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this run needs.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show what this machine has for a run, what is missing and how to get it; exit code 3 if no run can start."""
    from dist_qft.doctor import examine, print_findings

    findings = examine(read_config(config, overrides) if config else None)
    print_findings(findings)
    raise typer.Exit(3 if any(finding.status == "missing" for finding in findings) else 0)


@app.command(name="config-schema")
def config_schema() -> None:
    """Print the JSON schema of a config file, with which editors complete and check it."""
    from json import dumps

    from dist_qft.config.reference import config_schema

    print(dumps(config_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    from dist_qft import __version__

    print(__version__)
