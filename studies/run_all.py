"""The small language model and the studies on it, one after another: one command for an idle machine.

    python studies/run_all.py [--hours H] [--jobs N] [--only e1-qbara-vs-qlora ...] [--plan]

makes the texts, pre-trains the model, runs every study with as many processes as there are cores and copies the reports
into studies/<name>/report. The base of e8-smollm2 is SmolLM2, which `launch/get_smollm2.sh` fetches. Whatever is done
is not done again: stopped at any time, by hand or by --hours, the same command goes on. With --plan it says how long
each study will take, once the model is there.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

STUDIES = [
    "e1-qbara-vs-qlora",
    "e2-merged",
    "e3-qst",
    "e4-cuts",
    "e5-balance",
    "e6-longer",
    "e7-merged-longer",
    "e8-smollm2",
    "e9-plateau",
]
ON_SMOLLM2 = "e8-smollm2"  # whose base launch/get_smollm2.sh fetches
HERE = Path(__file__).parent
GRACE = 120  # seconds in which a stopped study saves the run it is at
REPORT_FILES = ("report.html", "results.csv", "*.json")


def run(command: list[str], deadline: float) -> int:
    """The exit code of a command; it is asked to stop at the deadline, and 124 is returned then."""
    print("$", " ".join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=HERE.parent)

    def stop(number: int, frame: object) -> NoReturn:
        _end(process)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        return 124


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a process save what it is at, and end it if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep_report(name: str) -> None:
    """Copy a study's report, which its folder of runs holds, into the repository."""
    made, target = HERE.parent / "runs" / "studies" / name / "report", HERE / name / "report"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for pattern in REPORT_FILES:
        for path in made.glob(pattern):
            shutil.copy(path, target / path.name)
    if (made.parent / "costs.json").exists():
        shutil.copy(made.parent / "costs.json", target / "costs.json")
    print(f"{name}: report in {target}", flush=True)


def main() -> int:
    """Run everything; the exit code of the first step that failed, 124 at the time limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hours", type=float, default=12.0, help="stop after so many hours; start again to go on")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES, help="studies to run")
    parser.add_argument("--plan", action="store_true", help="say how long the studies will take, and stop")
    words = parser.parse_args()
    deadline = time.monotonic() + words.hours * 3600
    steps = []
    if set(words.only) != {ON_SMOLLM2}:
        steps += [["studies/docs-lm/corpus.py"], ["studies/docs-lm/code.py"], ["studies/docs-lm/pretrain.py"]]
        if words.plan and not (HERE.parent / "models" / "docs-lm" / "pretrain.json").exists():
            print(f"--plan: the model is missing; python {steps[0][0]} && python {steps[2][0]}")
            return 2
    if ON_SMOLLM2 in words.only:
        steps.append(["studies/e8-smollm2/rows.py"])
    for command in steps:
        if code := run(command, deadline):
            return code
    failed = 0
    for name in words.only:
        study = ["-m", "dist_qft", "study", f"studies/{name}/study.yaml", "--jobs", str(words.jobs)]
        started = time.monotonic()
        code = run([*study, *(["--plan"] if words.plan else [])], deadline)
        print(f"{name}: exit code {code} after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        if code == 124:
            print(f"the limit of {words.hours:g} hours is reached; the same command goes on", flush=True)
            return code
        failed = failed or code  # a study may have a report although some of its runs failed
        if not words.plan and (HERE.parent / "runs" / "studies" / name / "report").exists():
            keep_report(name)
    return failed


if __name__ == "__main__":
    sys.exit(main())
