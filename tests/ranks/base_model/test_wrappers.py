"""The text decoder of multimodal models on real ranks, and the wholes that are made of it again."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, PreTrainedModel

import dist_qft
from dist_qft.plan import make_plan
from dist_qft.tuned_model.loaded_model import LoadedModel
from tests.support.merges import merge_run
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import METHODS, train_losses
from tests.support.wrappers import WRAPPERS, save_wrapper

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300]])
# Each with another method; the merge of qahira is exact, so that its packed folder has the live model's logits.
METHOD_OF = {"gemma3": "qahira", "gemma4": "qablora", "mistral3": "qalora", "qwen3_vl": "qlora", "qwen3_5": "qbara"}
TOLERANCE = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def wrapper_of(tmp_path_factory: pytest.TempPathFactory):
    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = save_wrapper(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return get


def stock(folder: Path) -> PreTrainedModel:
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()


def base_weights(tuned: LoadedModel) -> dict[str, torch.Tensor]:
    return {f"{path}.weight": weight.dequantize() for path, weight in tuned.base.weights().items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", WRAPPERS)
def test_trained_merged_and_exported(pools, wrapper_of, tmp_path, kind):
    folder, method = wrapper_of(kind), METHODS[METHOD_OF[kind]]
    skip = {"skip": True, "layers": ["in_proj_a", "in_proj_b"]}  # smaller than a LoRA on them
    sections = {**method, "method": method.get("method", {}) | ({"schedule": [skip]} if kind == "qwen3_5" else {})}
    run = tiny_config(folder, tmp_path / "run", **sections)
    with torch.enable_grad():
        losses = pools[2].run(train_losses, config=run)
        if kind == "qwen3_vl":
            zero = tiny_config(folder, tmp_path / "zero", **sections, sharding={"engine": "zero"})
            assert pools[2].run(train_losses, config=zero)[0] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]

    live = dist_qft.load(run.output_dir)
    assert not any("vision" in name or "visual" in name for name, _ in live.base.model.named_parameters())
    assert live.generate("Say the 3:", max_new_tokens=4) is not None
    expected = live.logits(IDS)
    near = TOLERANCE * expected.abs().max()
    for target in ("dense", "peft"):
        pools[2].run(merge_run, source=Path(run.output_dir), target=target, path=tmp_path / target)

    # The whole is written again: what is not the text decoder's byte for byte, under the names of the base's files.
    before, after = tensors_of(folder), tensors_of(tmp_path / "dense")
    assert before.keys() == after.keys()
    other = [name for name in before if "language_model" not in name and not name.startswith("lm_head")]
    assert other and all(torch.equal(before[name], after[name]) for name in other)
    assert (tmp_path / "dense" / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    architectures = [
        json.loads((place / "config.json").read_text())["architectures"] for place in (folder, tmp_path / "dense")
    ]
    assert architectures[0] == architectures[1]
    assert (stock(tmp_path / "dense")(input_ids=IDS).logits - expected).abs().max() < near
    assert (dist_qft.load(tmp_path / "dense").logits(IDS) - expected).abs().max() < near

    model = stock(folder)
    unknown = model.load_state_dict(base_weights(live), strict=False).unexpected_keys
    assert not unknown
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert (tuned(input_ids=IDS).logits - expected).abs().max() < near
    with tuned.disable_adapter():
        assert (tuned(input_ids=IDS).logits - expected).abs().max() > 10 * near, "the adapters change nothing"


@torch.no_grad()
def test_packed_folder_of_a_wrapper(pools, wrapper_of, tmp_path):
    """An exact merge; opened by this project and by transformers, whose model has its vision part."""
    folder = wrapper_of("gemma3")
    run = tiny_config(folder, tmp_path / "run")
    with torch.enable_grad():
        pools[2].run(train_losses, config=run)
    pools[2].run(merge_run, source=Path(run.output_dir), target="quantized", path=tmp_path / "packed")
    merged = dist_qft.load(tmp_path / "packed").logits(IDS)
    assert (merged - dist_qft.load(run.output_dir).logits(IDS)).abs().max() < 5e-3 * merged.abs().max()
    theirs, plain = stock(tmp_path / "packed"), stock(folder)
    assert (theirs(input_ids=IDS).logits - merged).abs().max() < TOLERANCE * merged.abs().max()
    vision = {name: tensor for name, tensor in plain.state_dict().items() if "vision" in name}
    assert vision and all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in vision.items())


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl"])
def test_side_network_beside_a_wrapper(pools, wrapper_of, tmp_path, kind):
    config = tiny_config(
        wrapper_of(kind), tmp_path / "run", method={"name": "qst", "reduction": 2, "downsample_rank": 4}
    )
    losses = pools[2].run(train_losses, config=config)[0]
    assert min(losses) < losses[0]
    assert dist_qft.load(config.output_dir).generate("Say the 3:", max_new_tokens=4) is not None


def test_plan_counts_the_text_decoder_alone(wrapper_of, tmp_path):
    plan = make_plan(tiny_config(wrapper_of("gemma3"), tmp_path / "run"), 2).to_dict()
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert plan["base_formats"][0]["weights"] == 2 * per_layer
    assert not any("vision" in warning for warning in plan["warnings"])
