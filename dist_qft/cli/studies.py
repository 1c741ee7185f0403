"""Verbs that do many runs."""

from pathlib import Path
from typing import Annotated

import typer

from dist_qft.cli.app import app


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Print the table of runs and stop.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print the number of runs and stop.")] = False,
    row: Annotated[int | None, typer.Option(metavar="N", help="Do run N alone (from 0); exit with its code.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the report from the runs that are done.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do the runs only.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the runs.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed runs again.")] = False,
    suggest: Annotated[
        int | None, typer.Option(min=1, metavar="BUDGET", help="Write a config of at most so many trainables.")
    ] = None,
) -> None:
    """Run a study, a grid of training runs, and write its report. Finished runs are skipped."""
    from dist_qft.study.command import run_study

    code = run_study(
        file,
        plan=plan,
        count=count,
        row=row,
        report=report,
        write_report=not no_report,
        jobs=jobs,
        retry_failed=retry_failed,
        suggest=suggest,
    )
    raise typer.Exit(code)


@app.command()
def bench(
    name: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="See --all.", show_default=False)] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="step, loading, frozen-layer, all-reduce, merge, scaling, mixture and nodes: 35 minutes."
        ),
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda")] = "cpu",
    precision: Annotated[
        str, typer.Option(metavar="float32|bfloat16|auto", help="Compute dtype of ours and of all peers.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Try out on a tiny model; the figures mean nothing.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Append a JSON line per benchmark.")] = None,
) -> None:
    """Benchmark dist_qft beside PEFT and other programs, on the same work in one run."""
    from dist_qft.bench.command import run_benchmarks
    from dist_qft.bench.options import Options

    run_benchmarks(name or [], every=every, options=Options(device, quick, precision=precision), json_path=json)
