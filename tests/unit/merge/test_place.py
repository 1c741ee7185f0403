"""Places that a merge refuses, because the run, a checkpoint, the base or somebody's file would be lost there."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.errors import SetupError, UserError
from dist_qft.merge.certificate_file import require_own
from dist_qft.merge.place import require_free, require_place, require_place_at_end, require_room
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.targets import checked_request
from dist_qft.methods.adapters.schedule import TileSettings

OURS = {"adapter": {}, "result": {"path": ".", "sha256": {"model.safetensors": "0", "more/a.jinja": "0"}}}
CARD = "# merged.gguf\n\nFine-tuned with dist_qft from base.\n"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run with two checkpoints, bases, and links to them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for step in (3, 6):
        Path(f"runs/a/checkpoint-{step}").mkdir(parents=True)
        Path(f"runs/a/checkpoint-{step}/trainer_state.json").write_text("{}")
    Path("runs/a/config.yaml").write_text("x")
    Path("models/base/sub").mkdir(parents=True)
    Path("models/base.gguf").write_text("GGUF")
    Path("link").symlink_to("runs/a")
    Path("inner").symlink_to("models/base/sub")
    Path("runs/a/checkpoint-3/out").symlink_to(tmp_path / "elsewhere")
    Path("nothing").symlink_to("gone")
    return tmp_path


def request(target: str, path: str, overwrite: bool = True):
    return checked_request(target, Path(path), Path("runs/a"), overwrite=overwrite, requantize=None, dtype="bfloat16")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("target", "path", "base", "reason"),
    [
        ("dense", "runs/a", "hub/id", "it is the run's folder 'runs/a'"),
        ("dense", "runs/../runs/a/", "hub/id", "it is the run's folder 'runs/a'"),
        ("dense", "link", "hub/id", "it is the run's folder 'runs/a'"),
        ("peft", "runs", "hub/id", "it holds the run's folder 'runs/a'"),
        ("quantized", "runs/a/checkpoint-3", "hub/id", "it is the checkpoint 'runs/a/checkpoint-3'"),
        ("quantized", "link/checkpoint-3/merged", "hub/id", "it lies in the checkpoint '*runs/a/checkpoint-3'"),
        ("gguf", "runs/a/checkpoint-6/merged.gguf", "hub/id", "it lies in the checkpoint '*runs/a/checkpoint-6'"),
        ("dense", "runs/a/checkpoint-3/out", "hub/id", "it lies in the checkpoint '*runs/a/checkpoint-3'"),
        ("dense", "runs/a/checkpoint-9", "hub/id", "it is the checkpoint '*runs/a/checkpoint-9'"),  # yet to come
        ("dense", "models/base", "models/base", "it is the base 'models/base'"),
        ("dense", "models", "models/base", "it holds the base 'models/base'"),
        ("dense", "models/base/new", "models/base", "it lies in the base 'models/base'"),
        ("dense", "inner", "models/base", "it lies in the base 'models/base'"),
        ("gguf", "models/base.gguf", "models/base.gguf", "it is the base 'models/base.gguf'"),
        ("dense", "nothing", "hub/id", "it is a symbolic link to nothing"),
    ],
)
def test_what_the_merge_reads_is_never_replaced(world, target, path, base, reason, overwrite):
    with pytest.raises(UserError) as refused:
        require_place(request(target, path, overwrite), Path("runs/a"), base, Path("runs/a/checkpoint-3"))
    start = f"-o (merge.path): got '{Path(path)}', must be another place: "
    assert str(refused.value).startswith(start)
    assert str(refused.value).removeprefix(start).replace(f"{world}/", "*") == reason


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("dense", "runs/a/merged-dense"),
        ("gguf", "runs/a/merged.gguf"),
        ("gguf", "models/merged.gguf"),
        ("dense", "models/base-merged"),
        ("peft", "runs/b/checkpoint-3"),
        ("peft", "elsewhere/new"),
    ],
)
def test_other_places_are_free(world, target, path):
    for base in ("models/base", "models/base.gguf", "hub/id"):
        require_place(request(target, path), Path("runs/a"), base, Path("runs/a/checkpoint-3"))
        require_free(request(target, path, overwrite=False))
    assert not Path("elsewhere").exists(), "a refused merge leaves no folder behind"


def test_a_file_is_not_put_where_a_folder_is_and_no_folder_where_a_file_is(world):
    Path("dir.gguf").mkdir()
    for target, path, message in (
        ("gguf", "dir.gguf", r"got 'dir\.gguf', which is a folder, must be a file: gguf writes one"),
        ("dense", "runs/a/config.yaml", r"got 'runs/a/config\.yaml', which is a file, must be a folder: dense "),
        ("dense", ".", r"got '\.', must end with the name of a file or folder"),
        ("dense", "runs/..", r"got 'runs/\.\.', must end with the name of a file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            require_place(request(target, path), Path("runs/b"), "hub/id", Path("elsewhere/checkpoint-3"))
    with pytest.raises(SetupError, match=r"cannot write to 'runs/a/config\.yaml/x': Not a directory"):
        require_free(request("dense", "runs/a/config.yaml/x/y"))


def config(path: str | None, base: str = "hub/id", overwrite: bool = True) -> RunConfig:
    merge = {"at_end": "dense", "overwrite": overwrite} | ({"path": path} if path else {})
    return RunConfig.model_validate({"output_dir": "runs/new", "model": {"path": base}, "merge": merge})


def test_a_config_is_refused_before_its_run_is_there(world):
    for path, base, reason in (
        ("runs/new", "hub/id", "is the run's folder 'runs/new'"),
        ("runs", "hub/id", "holds the run's folder 'runs/new'"),
        ("runs/new/checkpoint-3", "hub/id", f"is the checkpoint '{world}/runs/new/checkpoint-3'"),
        ("models/base", "models/base", "is the base 'models/base'"),
    ):
        for overwrite in (True, False):
            with pytest.raises(UserError, match=f"'{path}', must be another place: it {reason}$"):
                require_place_at_end(config(path, base, overwrite))
    with pytest.raises(UserError, match="so no merge wrote it"):
        require_place_at_end(config("models/base"))
    require_place_at_end(config("models/base", overwrite=False))  # a finished run's result is there, too
    require_place_at_end(config(None))
    require_place_at_end(RunConfig.model_validate({"output_dir": "models", "model": {"path": "models/base"}}))
    own = Path("runs/new/merged-dense")  # a result of an earlier run here, of which this one is to start
    own.mkdir(parents=True)
    with pytest.raises(UserError, match="it is the base 'runs/new/merged-dense'"):
        require_place_at_end(config(None, str(own)))


def test_only_results_of_a_merge_are_replaced(world):
    folder, gguf = Path("old"), Path("old.gguf")
    require_free(request("dense", "old"))
    folder.mkdir()
    require_free(request("dense", "old"))  # empty
    with pytest.raises(UserError, match="'old' exists already; --overwrite"):
        require_free(request("dense", "old", overwrite=False))
    (folder / "model.safetensors").write_text("x")
    gguf.write_text("x")
    for target, path, place in (("dense", folder, "old/certificate.json"), ("gguf", gguf, f"{gguf}.certificate.json")):
        got = rf"^--overwrite \(merge\.overwrite\): got '{path}', must be the result of a merge"
        for content in (None, "[]", '{"version": 1}', "{"):  # of another program
            if content is not None:
                Path(place).write_text(content)
            with pytest.raises(UserError, match=rf"{got}: there is no certificate '{place}', so no merge wrote it; "):
                require_free(request(target, str(path)))
        for content in (OURS, {"next": OURS}, {**OURS, "next": OURS}, {**OURS, "version": 99}):
            Path(place).write_text(json.dumps(content))
            require_free(request(target, str(path)))


def test_files_of_others_in_a_result_are_kept(world):
    folder = Path("old")
    (folder / "more").mkdir(parents=True)
    for name in ("model.safetensors", "more/a.jinja", "README.md"):
        (folder / name).write_text("x")
    (folder / "certificate.json").write_text(json.dumps(OURS))
    require_own(folder)
    for name in ("model-f16.gguf", "more/b.jinja", "run2/checkpoint-3/adapter_model.safetensors"):
        other = folder / name
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("years of work")
        first = other if name != "run2/checkpoint-3/adapter_model.safetensors" else folder / "run2"
        with pytest.raises(UserError, match=f"alone: no merge wrote '{first}'; move it to another place"):
            require_own(folder)
        other.unlink()


def test_a_new_file_replaces_no_text_of_others_beside_it(world):
    for name, text in (
        ("new.gguf.md", "my notes"),
        ("new.gguf.Modelfile", "FROM x"),
        ("new.gguf.certificate.json", "1"),
    ):
        Path(name).write_text(text)
        for overwrite in (True, False):
            with pytest.raises(UserError, match=f"'{name}' would be replaced together with 'new.gguf'"):
                require_free(request("gguf", "new.gguf", overwrite))
        Path(name).unlink()
    Path("new.gguf.md").write_text(CARD)  # as a merge leaves them that was killed before its certificate was there
    Path("new.gguf.Modelfile").write_text("FROM ./new.gguf\n")
    require_free(request("gguf", "new.gguf", overwrite=False))


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_a_dense_result_that_the_disk_cannot_hold_is_refused(tiny_llama, tmp_path, monkeypatch, dtype, size):
    base = build_skeleton(ModelConfig(path=str(tiny_llama)), QuantizationConfig(), torch.float32)
    asked = checked_request(
        "dense", tmp_path / "new" / "merged", tmp_path, overwrite=False, requantize=None, dtype=dtype
    )
    recipe = Recipe(asked, "dense", {}, {}, QuantizationConfig())
    weights = {path: weight.weight_shape for path, weight in base.weights().items()}
    needed = size * sum(rows * columns for rows, columns in weights.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    require_room(recipe, base)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    refused = rf"^-o \(merge.path\): '{tmp_path}/new' has {needed - 1} bytes free, the result needs {needed}$"
    with pytest.raises(SetupError, match=refused):
        require_room(recipe, base)


def test_a_gguf_result_needs_the_room_of_its_adapted_tensors(tiny_gguf, tmp_path, monkeypatch):
    """As Q4_1, 20 bytes for 32 weights. The base may be of more bits, so its file's size says nothing."""
    base = build_skeleton(ModelConfig(path=str(tiny_gguf)), QuantizationConfig(), torch.float32)
    settings = {"in_features": 64, "out_features": 96, "pool": 32, "repeat": 1, "rank": 1, "alpha": 1.0, "inner": None}
    tiles = {path: TileSettings(**settings) for path in ("q_proj", "k_proj")}
    recipe = Recipe(request("gguf", str(tmp_path / "merged.gguf")), "exact", tiles, {}, QuantizationConfig())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7680))
    require_room(recipe, base)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7679))
    with pytest.raises(SetupError, match=r"has 7679 bytes free, the result needs 7680$"):
        require_room(recipe, base)
