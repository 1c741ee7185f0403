"""The trainer's side of the trackers: every record goes to each tracker's process, and nothing waits for one.

Records wait in memory while a process is busy, up to a limit; beyond it they are dropped. Failures give one note.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_qft.storage.atomic import json_text
from dist_qft.storage.home import without_home
from dist_qft.trackers.process import FINISHED_SECONDS, STOPPED_SECONDS
from dist_qft.trackers.secrets import without_secrets

TRACKERS_FOLDER = "trackers"
WAITING_BYTES = 8 << 20  # of records that a busy process has not taken yet

Say = Callable[[str], None]


class Trackers:
    """The trackers of one run, in the order of their names in the config.

    Args:
        names: keys of `libraries.LIBRARIES`.
        output_dir: the run's folder; files go to `trackers/` in it.
        config: settings to record once; secrets and the home folder in them are hidden.
        resumed: go on with the runs that the trackers have recorded here before.
        say: shows a note to the person watching.
    """

    def __init__(
        self, names: Sequence[str], output_dir: Path, config: dict[str, Any], *, resumed: bool, say: Say
    ) -> None:
        folder = (output_dir / TRACKERS_FOLDER).resolve()
        shown = without_home(config)
        opening = {"folder": str(folder), "name": output_dir.resolve().name, "config": shown, "resumed": resumed}
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._processes = [TrackerProcess(name, folder, say) for name in names]
        self._finished, self._step = False, 0
        self._send(opening)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers under their tags at an optimizer step."""
        self._step = step
        self._send({"step": step, "figures": values})

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text."""
        self._send({"step": step, "tag": tag, "text": text})

    def hparams(self, settings: dict[str, Any], results: dict[str, float]) -> None:
        """Record the results of a run that has come to its end; its settings were sent at its start."""
        self._finished = True
        self._send({"step": self._step, "results": results})

    def flush(self) -> None:
        """Hand over what waits, as far as the processes take it, and show their notes."""
        for process in self._processes:
            process.exchange()

    def close(self) -> None:
        """End the trackers' runs, within a time limit for all of them together."""
        seconds = FINISHED_SECONDS if self._finished else STOPPED_SECONDS
        until = time.monotonic() + seconds
        self._send({"end": self._finished, "seconds": seconds})
        for process in self._processes:
            process.end(until, seconds)
        self._processes = []

    def _send(self, record: dict[str, Any]) -> None:
        if self._processes:
            line = json_text(without_secrets(record), indent=None).encode()
            for process in self._processes:
                process.send(line)


class TrackerProcess:
    """One tracker's process and the records that it has not taken yet."""

    def __init__(self, name: str, folder: Path, say: Say) -> None:
        self._name, self._say = name, say
        self._log = folder / f"{name}.log"
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes, self._dropped = 0, False
        self._heard = b""
        self._process: subprocess.Popen[bytes] | None = None
        path = os.pathsep.join(each or os.getcwd() for each in sys.path)
        try:
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "dist_qft.trackers.process", name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C and a launcher's signals are for the trainer
                )
        except OSError as error:
            self._tell(f"cannot be started: {error.strerror or error}")
            return
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None, "both are pipes"
            os.set_blocking(stream.fileno(), False)

    def send(self, line: bytes) -> None:
        """Append a record to those that wait, and hand over as many as the process takes now."""
        if self._process is None:
            return
        if self._waiting_bytes + len(line) > WAITING_BYTES:
            if not self._dropped:
                self._dropped = True
                self._tell(f"does not keep up; records are left out of it, metrics.jsonl has them all ({self._log})")
        else:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
        self.exchange()

    def exchange(self) -> None:
        """Write what the process takes without waiting, and show the notes that it has sent."""
        if self._process is None:
            return
        self._listen()
        assert self._process.stdin is not None, "a pipe"
        try:
            while self._waiting:
                written = os.write(self._process.stdin.fileno(), self._waiting[0])
                self._waiting_bytes -= written
                if written < len(self._waiting[0]):
                    self._waiting[0] = self._waiting[0][written:]
                else:
                    self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:  # nobody reads any more
            self._leave()

    def end(self, until: float, seconds: float) -> None:
        """Hand over the rest and wait for the process to end, up to the time `until`; then end it by force."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        while self._waiting and self._process is not None and (left := until - time.monotonic()) > 0:
            select.select([], [process.stdin], [], left)
            self.exchange()
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._tell(f"did not end within {seconds:g} s and was stopped; its last records may be missing")
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._listen()
        process.stdout.close()
        self._process = None

    def _leave(self) -> None:
        """Give up a process that has ended before its time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None, "a running process"
        self._waiting.clear()
        self._process = None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            code: int | None = process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        self._listen(process)
        process.stdout.close()
        if code != 0:  # with 0 it has told why
            self._tell(f"has ended by itself (exit code {code}); see {self._log}")

    def _listen(self, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """Show the notes that have come."""
        process = process or self._process
        assert process is not None and process.stdout is not None, "a pipe"
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(process.stdout.fileno(), 65536):
                self._heard += piece
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._tell(json.loads(line)["note"])

    def _tell(self, text: str) -> None:
        self._say(f"{self._name}: {text}")
