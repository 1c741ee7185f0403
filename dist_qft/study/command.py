"""The `study` verb: which of a study's jobs the options ask for, and the exit code."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from dist_qft.errors import UserError
from dist_qft.harness.tasks import require_tasks
from dist_qft.ranks.world import World
from dist_qft.study.rows import expand, expand_all
from dist_qft.study.run import outcome_of, require_data, run_in_processes, run_rows, wanted
from dist_qft.study.settings import Study, load_study
from dist_qft.study.study_run import StudyRun

REPORT_PACKAGES = ("matplotlib", "scipy")


def run_study(
    path: Path,
    *,
    plan: bool,
    count: bool,
    row: int | None,
    report: bool,
    write_report: bool,
    jobs: int,
    retry_failed: bool,
    suggest: int | None,
) -> int:
    """Carry out the options; returns the exit code. At most one of plan, count, row, report and suggest.

    Raises:
        UserError: anything in the study that cannot work, before any run starts.
    """
    _require_one(
        {
            "--plan": plan,
            "--count": count,
            "--row": row is not None,
            "--report": report,
            "--suggest": suggest is not None,
        }
    )
    study = load_study(path)
    rows = expand(study)
    if count:
        print(len(rows))
    elif plan:
        from dist_qft.study.planned import print_plan

        print_plan(study, expand_all(study), jobs)
    elif row is not None:
        return _one(rows, row, retry_failed)
    elif report:
        _report(study)
    elif suggest is not None:
        from dist_qft.study.suggest import write_suggestions

        write_suggestions(study, rows, suggest)
    else:
        return _all(path, study, rows, jobs, retry_failed, write_report)
    return 0


def _require_one(given: dict[str, bool]) -> None:
    names = [name for name, present in given.items() if present]
    if len(names) > 1:
        raise UserError(f"use only one of {', '.join(names)}")


def _one(rows: Sequence[StudyRun], number: int, retry_failed: bool) -> int:
    if not 0 <= number < len(rows):
        raise UserError(f"--row: got {number}, the study has runs 0 to {len(rows) - 1}")
    _require_tasks([rows[number]], retry_failed)
    require_data([rows[number]], retry_failed=retry_failed)
    run_rows(rows, [number], retry_failed=retry_failed)
    return outcome_of(rows[number])


def _all(path: Path, study: Study, rows: Sequence[StudyRun], jobs: int, retry_failed: bool, write_report: bool) -> int:
    """All runs, those too that become known on the way, then the report; the exit code of the first that failed."""
    if write_report:
        _require_report_packages()
    _require_tasks(rows, retry_failed)
    require_data(rows, retry_failed=retry_failed)
    if jobs > 1:
        if World.from_environment().world_size > 1:
            raise UserError(f"--jobs: got {jobs}, must be 1 on several ranks")
        _all_in_processes(path, study, rows, jobs, retry_failed)
    else:
        run_rows(rows, range(len(rows)), retry_failed=retry_failed, further=lambda: expand_all(study))
    rows = expand(study)
    if World.from_environment().rank != 0:
        return 0
    if not write_report:
        return 0
    _report(study)
    from dist_qft.study.results import collect, distinct

    runs = distinct(collect(rows))
    ended = [outcome for outcome in runs if outcome.result and outcome.result.exit_code]
    failed = [outcome.result.exit_code for outcome in ended if outcome.result and outcome.row.tries is None]
    if len(ended) > len(failed):
        values = f"{len(ended) - len(failed)} values of the search failed"
        print(f"{values} and are not chosen; --retry-failed tries them again", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; --retry-failed runs them again", file=sys.stderr)
    return failed[0] if failed else 0


def _require_tasks(rows: Sequence[StudyRun], retry_failed: bool) -> None:
    """Refuse tasks that are unknown, before any of the runs that are to be measured on them starts."""
    for request in {row.tasks for row in rows if row.tasks is not None and wanted(row, retry_failed)}:
        require_tasks(request)


def _all_in_processes(path: Path, study: Study, rows: Sequence[StudyRun], jobs: int, retry_failed: bool) -> None:
    """Start processes until every run is done. One ends when it finds no run that nobody is at."""
    todo = [row for row in rows if wanted(row, retry_failed)]
    while todo:
        run_in_processes(path, jobs, retry_failed=retry_failed)
        retry_failed = False  # once is what was asked for
        before, todo = todo, [row for row in expand(study) if wanted(row, False)]
        if {row.name for row in before} <= {row.name for row in todo}:
            raise UserError(f"{len(todo)} runs are left, which another process is at; start the study again later")


def _report(study: Study) -> None:
    _require_report_packages()
    from dist_qft.study.report import write_report

    print(write_report(study))


def _require_report_packages() -> None:
    """A report needs packages that nothing else does; better missed before the runs than after."""
    missing = [name for name in REPORT_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"the report needs {' and '.join(missing)}; pip install 'dist-qft[study]', or --no-report")
