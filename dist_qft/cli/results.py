"""Verbs for what a run leaves: merged models, their certificates, the page of the run."""

from pathlib import Path
from typing import Annotated

import typer

from dist_qft.cli.app import app


@app.command()
def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Folder of a run or checkpoint.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", metavar="gguf|quantized|dense|peft", help="What to write.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PATH", help="Default: merged.gguf or merged-* in the run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the result of a merge that is there.")
    ] = False,
    requantize: Annotated[
        str | None, typer.Option(metavar="nf4|affine4", help="Merge with an error where an exact merge is impossible.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of a dense result's weights.")
    ] = "bfloat16",
) -> None:
    """Fold trained adapters into the base and write a model, with a certificate; runs under any launcher."""
    from dist_qft.merge.run import run_merge

    run_merge(run, to, output, overwrite=overwrite, requantize=requantize, dtype=dtype)


@app.command()
def verify(
    result: Annotated[Path, typer.Argument(metavar="PATH", help="Result of a merge.", show_default=False)],
) -> None:
    """Recompute a merge's certificate from the files: the result, its base and the checkpoint."""
    from dist_qft.merge.verify import run_verify

    run_verify(result)


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_RESULT", help="Run, checkpoint or result of a merge.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is new.")] = True,
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FOLDER", help="Write what would be sent, send nothing.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete the files of another model in the repository.")
    ] = False,
) -> None:
    """Send adapters or a merged model, with a model card, to the Hugging Face Hub; never the base, logs or data."""
    from dist_qft.hub.command import run_push

    run_push(source, repository, private=private, dry_run=dry_run, replace=replace)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
) -> None:
    """Write report.html into RUN, one page with curves, answers, costs and the merge; training ends with it, too."""
    from dist_qft.report.page import write_report
    from dist_qft.report.records import RunRecords

    print(write_report(RunRecords.read(run)))
