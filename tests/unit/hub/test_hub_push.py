"""`dist-qft push`: the folder that would be sent, what is never in it, and refusals without a network."""

import base64
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from dist_qft.base_model.base_license import base_license
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.hub.command import run_push
from dist_qft.hub.contents import stale_files
from dist_qft.merge.certificate import (
    IN_FOLDER,
    AdapterUsed,
    BaseUsed,
    Certificate,
    Origin,
    ResultFiles,
    WeightFigures,
    file_digests,
)
from dist_qft.merge.certificate_file import certificate_text, read_certificate
from dist_qft.merge.model_card import model_card
from dist_qft.merge.probe import LogitDifference
from dist_qft.merge.targets import TARGETS
from dist_qft.storage.checkpoint import Checkpoint, checkpoint_path, write_checkpoint
from dist_qft.storage.trainer_state import TrainerState
from tests.support.tiny_model import tiny_config

REPOSITORY = "owner/my-model"
SUMMARY = {
    "steps": 3,
    "base_eval_loss": 3.25,
    "tuned_eval_loss": 1.5,
    "base_eval_metrics": {"accuracy": 0.25},
    "tuned_eval_metrics": {"accuracy": 0.75},
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as training leaves it, with files that must stay here."""
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"base")
    config = tiny_config(base, tmp_path / "run")
    described = {
        "peft_type": "DIST_QFT_TILE",
        "base_model_name_or_path": str(base),
        "base_fingerprint": "f" * 64,
        "tiles": {"a": {}, "b": {}},
        "run_config": config.model_dump(),
    }
    state = TrainerState(step=3, data_digest="d" * 64, config=config.model_dump())
    write_checkpoint(Checkpoint(checkpoint_path(tmp_path / "run", 3), described, {"a.A": torch.ones(2, 2)}, {}, state))
    (tmp_path / "run/summary.json").write_text(json.dumps(SUMMARY))
    for name in ("metrics.jsonl", "trackers/wandb.log", "data_cache/tokens.safetensors"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("stays here")
    return tmp_path / "run"


def result_of(run: Path, target: str, files: dict[str, bytes]) -> Path:
    """A certified result of a merge; of several files it is a folder."""
    result = run / f"merged-{target}"
    if len(files) > 1:
        result.mkdir()
    for name, content in files.items():
        (result / name if len(files) > 1 else result).write_bytes(content)
    folder, base = result.is_dir(), "../../private/base" if result.is_dir() else "../private/base"
    certificate = Certificate(
        version=1, summary="lossless: all is well", lossless=True, kind="exact", target=target, dtype=None,
        result=ResultFiles("." if folder else result.name, file_digests(result, result.name)),
        base=BaseUsed(base, "f" * 64), adapter=AdapterUsed("../checkpoint-3", "a" * 64, "qahira", 3, 2),
        weights=WeightFigures(0.0), logits=LogitDifference(0.0, 0.0, 1.0, 1.0, 1.0), notes=[], probe=[], versions={},
    )  # fmt: skip
    place = result / IN_FOLDER if folder else result.with_name(f"{result.name}.certificate.json")
    place.write_text(certificate_text(certificate))
    config = tiny_config(run.parent / "private/base", run)
    card = model_card(result.name, Origin(config, run / "checkpoint-3", 3), certificate, TARGETS[target].card)
    (result / "README.md" if folder else result.with_name(f"{result.name}.md")).write_text(card)
    return result


def dry_run(source: Path, folder: Path) -> dict[str, str]:
    """The texts of the files that would be sent."""
    run_push(str(source), REPOSITORY, private=True, dry_run=folder)
    assert not any(path.is_symlink() for path in folder.iterdir())
    return {path.name: path.read_bytes().decode(errors="replace") for path in folder.iterdir()}


def test_a_run_sends_its_adapters_and_a_card(run, tmp_path):
    sent = dry_run(run, tmp_path / "sent")
    assert set(sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert torch.equal(load_file(tmp_path / "sent/adapter_model.safetensors")["a.A"], torch.ones(2, 2))
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert str(tmp_path) not in "".join(sent.values()) and "stays here" not in "".join(sent.values())
    card = sent["README.md"]
    front = card.split("---\n")[1]
    assert "license: apache-2.0\n" in front and "base_model_relation: adapter\n" in front and "qahira" in front
    assert f"init_from: {REPOSITORY}" in card and "d" * 64 in card
    assert "| loss (nats per target) | 3.2500 | 1.5000 |\n| accuracy | 0.2500 | 0.7500 |" in card
    assert dry_run(run / "checkpoint-3", tmp_path / "again") == sent


def test_a_folder_sends_its_certified_files_alone(run, tmp_path):
    adapter = {"base_model_name_or_path": str(tmp_path / "private/base"), "r": 8}
    files = {"adapter_config.json": json.dumps(adapter).encode(), "adapter_model.safetensors": b"x"}
    result = result_of(run, "peft", files)
    (result / "notes.txt").write_text("mine")
    sent = dry_run(result, tmp_path / "sent")
    assert set(sent) == {*files, IN_FOLDER, "README.md"}
    assert json.loads(sent["adapter_config.json"]) == {"base_model_name_or_path": "base", "r": 8}
    assert str(tmp_path) not in "".join(sent.values()) and "private" not in "".join(sent.values())
    assert "Lossless: all is well." in sent["README.md"] and "1.5000" in sent["README.md"]
    assert f'"{REPOSITORY}"' in sent["README.md"]
    _, certificate = read_certificate(tmp_path / "sent")
    assert certificate.result.sha256 == file_digests(tmp_path / "sent", "")
    (result / "adapter_model.safetensors").write_bytes(b"y")
    with pytest.raises(CorruptFileError):
        dry_run(result, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_gguf_file_goes_with_its_card_modelfile_and_certificate(run, tmp_path):
    result = result_of(run, "gguf", {"merged-gguf": b"GGUF"})
    result.with_name("merged-gguf.Modelfile").write_text("FROM ./merged-gguf\n")
    sent = dry_run(result, tmp_path / "sent")
    assert set(sent) == {"merged-gguf", "merged-gguf.Modelfile", "merged-gguf.certificate.json", "README.md"}
    assert read_certificate(tmp_path / "sent/merged-gguf")[1].base.path == "base"


def test_nothing_else_is_sent(run, tmp_path):
    for path in (tmp_path / "private/base", tmp_path / "nothing", run / "data_cache"):
        with pytest.raises(UserError, match=r"must be a run|no file or folder"):
            run_push(str(path), REPOSITORY, private=True, dry_run=tmp_path / "sent")
    for name in ("model", "a/b/c", "a b/c", "owner/--x"):
        with pytest.raises(UserError, match="must be owner/name"):
            run_push(str(run), name, private=True, dry_run=tmp_path / "sent")
    with pytest.raises(UserError, match="must be a new folder"):
        run_push(str(run), REPOSITORY, private=True, dry_run=run)


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload, answered as the Hub does; every body is kept."""

    bodies: dict[str, bytes] = {}
    there: list[str] = [".gitattributes"]

    def do_GET(self) -> None:
        assert self.path == f"/api/models/{REPOSITORY}"
        self.answer({"id": REPOSITORY, "sha": "c" * 40, "siblings": [{"rfilename": name} for name in self.there]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies[self.path] = body
        answer: dict[str, object] = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/{REPOSITORY}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/1", "commitOid": "1"}
        self.answer(answer)

    def answer(self, answer: dict[str, object]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Print nothing."""


def set_hub(monkeypatch, port: int) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def push(source: Path, monkeypatch, there: list[str], *, replace: bool = False) -> list[dict]:
    """Send to a repository with these files; returns the lines of the only commit."""
    monkeypatch.setattr(Hub, "bodies", {})
    monkeypatch.setattr(Hub, "there", there)
    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        set_hub(monkeypatch, hub.server_address[1])
        try:
            run_push(str(source), REPOSITORY, private=True, dry_run=None, replace=replace)
        finally:
            hub.shutdown()
    (commit,) = (body for path, body in Hub.bodies.items() if "/commit/" in path)
    return [json.loads(line) for line in commit.splitlines()]


OWNERS = [".gitattributes", "LICENSE", "README.md", "notes.txt", "runs/model.safetensors", "handler.py"]
FOLDER = ["certificate.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/rag.jinja"]
ADAPTERS = ["adapter_config.json", "adapter_model.safetensors"]
GGUF = ["merged.gguf", "merged.gguf.Modelfile", "merged.gguf.certificate.json"]


@pytest.mark.parametrize(
    ("form", "sent"),
    [("adapters", ADAPTERS), ("dense", FOLDER), ("gguf", ["merged-gguf", "merged-gguf.certificate.json"])],
)
def test_files_by_which_another_model_would_be_loaded_are_deleted_on_request(run, monkeypatch, capsys, form, sent):
    files = {"adapters": {}, "dense": dict.fromkeys(FOLDER[1:], b"{}"), "gguf": {"merged-gguf": b"GGUF"}}[form]
    source = result_of(run, form, files) if files else run
    there = [*OWNERS, *FOLDER, *SHARDS, *ADAPTERS, *GGUF]
    stale = set() if form == "gguf" else {*FOLDER, *SHARDS, *ADAPTERS} - set(sent)
    if stale:
        with pytest.raises(UserError, match=f"^{REPOSITORY}: holds .*{min(stale)}.*--replace deletes them"):
            push(source, monkeypatch, there)
        assert not any("/commit/" in path for path in Hub.bodies)
    lines = push(source, monkeypatch, there, replace=True)
    assert lines[0]["value"]["parentCommit"] == "c" * 40
    assert {line["value"]["path"] for line in lines if line["key"] == "deletedFile"} == stale
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == {"README.md", *sent}
    said = capsys.readouterr().err
    assert all(f"deleted  {name}\n" in said for name in stale)


def test_every_file_of_a_model_folder_may_be_a_stale_one(tmp_path):
    """The kinds are those that merges write; the owner's are left alone."""
    sent = {"vocab.json", "merges.txt", "tekken.json", "quantization.json", "preprocessor_config.json", "spiece.model"}
    assert stale_files([*sent, *OWNERS], ["config.json"]) == sorted(sent)
    assert stale_files([*sent, *OWNERS], sent) == []


def test_an_upload_holds_the_files_of_a_dry_run(run, tmp_path, monkeypatch, capsys):
    sent = dry_run(run, tmp_path / "sent")
    lines = push(run, monkeypatch, [".gitattributes"])
    assert json.loads(Hub.bodies["/api/repos/create"])["visibility"] == "private"
    uploaded = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert {name: base64.b64decode(text) for name, text in uploaded.items()} == {
        name: (tmp_path / "sent" / name).read_bytes() for name in sent
    }
    assert f"/{REPOSITORY}\n" in capsys.readouterr().out


def test_no_token_and_no_network_are_one_line_after_the_local_checks(run, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        set_hub(monkeypatch, closed.getsockname()[1])
    with pytest.raises(SetupError, match=f"{REPOSITORY}: the Hub did not take it: ") as refusal:
        run_push(str(run), REPOSITORY, private=True, dry_run=None)
    assert refusal.value.exit_code == 3 and "\n" not in str(refusal.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(SetupError, match="no token for the Hub") as refusal:
        run_push(str(run), REPOSITORY, private=True, dry_run=None)
    assert refusal.value.exit_code == 3
    os.truncate(run / "checkpoint-3/adapter_model.safetensors", 8)
    with pytest.raises(CorruptFileError):
        run_push(str(run), REPOSITORY, private=True, dry_run=None)


def test_the_license_of_a_base(tmp_path):
    def license_of() -> str | None:
        return base_license(ModelConfig(path=str(tmp_path)))

    assert license_of() is None
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: 'mit'\n---\nlicense: gpl\n")
    assert license_of() == "mit"
    (tmp_path / "config.json").write_text('{"license": "bsd-3-clause"}')
    assert license_of() == "bsd-3-clause"
    (tmp_path / "config.json").write_text('{"license": "a: b\\nc"}')
    assert license_of() == "mit"
    assert base_license(ModelConfig(path="owner/is-not-in-the-cache")) is None
