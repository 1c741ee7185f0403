"""The trackers' own libraries behind one interface. Each is used in a process of its own, see `process`.

All write below one folder and need no network, unless the library's own environment variables say otherwise.
"""

import json
import math
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dist_qft.storage.atomic import publishing

PROJECT = "dist_qft"  # unless the environment names another
_STEP = "train/global_step"  # as transformers calls it


@dataclass(frozen=True)
class Opening:
    """The run that a tracker is to record.

    Attributes:
        folder: of the run's trackers, absolute.
        name: for people.
        config: nested settings.
        run_id: the tracker's own name of this run, if it has recorded a part of it; None begins a new run.
        note: tells people of a failure that the library does not raise.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    run_id: str | None
    note: Callable[[str], None] = lambda text: None


class Tracker(Protocol):
    """One library with one open run. Methods raise the errors of their library.

    Attributes:
        run_id: to go on with this run later.
        where: a line that tells people where to look.
    """

    run_id: str
    where: str

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Record numbers at an optimizer step."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text at an optimizer step."""

    def results(self, step: int, values: dict[str, float]) -> None:
        """Record the figures of the whole run."""

    def close(self, finished: bool) -> None:
        """End the run; `finished` is False for one that was stopped or failed."""


class Wandb:
    """Weights & Biases: online if the user has logged in, else offline; `WANDB_MODE` decides where it is set."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self.run_id = os.environ.get("WANDB_RUN_ID") or opening.run_id or secrets.token_hex(4)
        mode = os.environ.get("WANDB_MODE")

        def start(mode: str | None) -> Any:
            return wandb.init(
                id=self.run_id,
                resume="allow",
                project=None if "WANDB_PROJECT" in os.environ else PROJECT,
                name=None if "WANDB_NAME" in os.environ else opening.name,
                dir=None if "WANDB_DIR" in os.environ else str(opening.folder),
                config=opening.config,
                allow_val_change=True,  # of settings that differ after a resume
                mode=mode,
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )

        note = ""
        try:
            self._run = start(mode or ("online" if _logged_in_to_wandb() else "offline"))
        except Exception as error:
            if mode:
                raise
            self._run = start("offline")
            note = f" (not online: {str(error).strip().partition(chr(10))[0]})"
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        folder = Path(self._run.dir).parent
        self.where = self._run.url or f"offline{note}; upload with: wandb sync {folder}"

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, _STEP: step})

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: text, _STEP: step})

    def results(self, step: int, values: dict[str, float]) -> None:
        self._run.summary.update(values)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _logged_in_to_wandb() -> bool:
    """True with a key in the environment or in the netrc file, where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


class Mlflow:
    """MLflow: `MLFLOW_TRACKING_URI`, else an SQLite file in the run's folder."""

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric: Callable[..., Any] = Metric
        given = os.environ.get("MLFLOW_TRACKING_URI")
        store = given or _sqlite_store(opening.folder / "mlflow.db")
        self._client = MlflowClient(tracking_uri=store)
        self.run_id = os.environ.get("MLFLOW_RUN_ID") or opening.run_id or ""
        if self.run_id:
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment(
                None if given else (opening.folder / "mlflow").as_uri()
            )
            self.run_id = self._client.create_run(experiment, run_name=opening.name).info.run_id
            # MLflow's parameters never change, so those of the first start stay.
            params = [Param(key, value[:6000]) for key, value in _flat(opening.config)]
            for part in _parts(params, 100):
                self._client.log_batch(self.run_id, params=part)
        self.where = f"{store}" if given else f"mlflow ui --backend-store-uri {store}"

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name, artifact_location=artifacts)

    def figures(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(mlflow_name(tag), float(value), now, step) for tag, value in values.items()]
        for part in _parts(metrics, 500):
            self._client.log_batch(self.run_id, metrics=part)

    def text(self, step: int, tag: str, text: str) -> None:
        self._client.log_text(self.run_id, text, f"{mlflow_name(tag)}/step-{step}-{secrets.token_hex(3)}.txt")

    def results(self, step: int, values: dict[str, float]) -> None:
        self.figures(step, values)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def _sqlite_store(file: Path) -> str:
    """The address of an SQLite store, which is made if it is missing.

    Making one takes MLflow seconds, and it opens none that was left half-made: so the file gets its name at the end.
    """
    from mlflow import MlflowClient

    if not file.exists():
        with publishing(file, overwrite=True) as temporary:
            MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)
    return f"sqlite:///{file}"


def mlflow_name(tag: str) -> str:
    """A tag in the characters that MLflow allows: `time/step(s)` becomes `time/step_s`."""
    return re.sub(r"[^\w/. -]", "_", re.sub(r"\((\w+)\)$", r"_\1", tag))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested settings; lists are JSON."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Trackio:
    """Trackio: files in the run's folder, unless `TRACKIO_DIR`, a Space or a server is set."""

    def __init__(self, opening: Opening) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(opening.folder / "trackio"))  # read when the package is imported
        # Trackio goes on without a word to the caller where it cannot write.
        Path(os.environ["TRACKIO_DIR"]).mkdir(parents=True, exist_ok=True)
        import trackio

        _tell_first_warning(opening.note)
        self._library = trackio
        # Its runs are resumed by name, so the name must be of this run alone.
        self.run_id = opening.run_id or f"{opening.name}-{secrets.token_hex(3)}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(
            project, name=self.run_id, config=opening.config, resume="allow" if opening.run_id else "never", embed=False
        )
        remote = next((os.environ[key] for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if key in os.environ), "")
        self.where = remote or f"TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {project}"

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._library.Markdown(text)}, step=step)

    def results(self, step: int, values: dict[str, float]) -> None:
        self.figures(step, values)

    def close(self, finished: bool) -> None:
        self._run.finish()


def _tell_first_warning(note: Callable[[str], None]) -> None:
    """Pass on the first warning of a library that does not raise its failures; all of them are shown as before."""
    show = warnings.showwarning
    told: list[Warning | str] = []

    def tell(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if category is UserWarning and not told:
            told.append(message)
            note(str(message))
        show(message, category, *place, **options)

    warnings.showwarning = tell


LIBRARIES: dict[str, Callable[[Opening], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def finite_or_nan(value: float | None) -> float:
    """A number as it was before JSON, which has no NaN and no infinities."""
    return math.nan if value is None else value
