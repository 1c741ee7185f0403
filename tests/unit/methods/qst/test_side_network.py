"""The side network against its formulas, on small decoders of every family: start, graph, gradients, generation."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, CohereModel
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

from dist_qft.base_model.loss import token_loss
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.methods.door import make_method
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError
from dist_qft.methods.qst.network import SideNetwork
from dist_qft.methods.qst.pruning import every_pair, start_from_base, turns_neighbours
from dist_qft.methods.qst.spec import side_network_spec
from tests.support.qst_models import FAMILIES, family_folder, load_whole, perturb, side_network
from tests.support.tiny_model import VOCABULARY, save_tiny_model

_COHERE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
DOWNSAMPLES = ["adapter", "lora", "linear", "maxpool", "avgpool"]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The saved random model of a family."""
    root = tmp_path_factory.mktemp("families")
    saved: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in saved:
            saved[name] = family_folder(name, root)
        return saved[name]

    return get


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def hidden(base: BaseModel, ids: Tensor) -> Tensor:
    return base.hidden_states(ids, torch.arange(ids.shape[1]).expand_as(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_start_at_the_base_bit_for_bit(folder, family):
    base, ids = load_whole(folder(family)), some_ids(2, 20)
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        side_network(base)
        assert torch.equal(base.model(input_ids=ids).logits, expected)


def test_each_state_is_narrowed_once(folder):
    """Also what enters the first layer, which the decoder is given and the first mix takes."""
    base, ids = load_whole(folder("llama")), some_ids(1, 8)
    side, calls = side_network(base), []
    for module in side.downsamples:
        module.register_forward_hook(lambda module, args, output: calls.append(args[0].data_ptr()))
    hidden(base, ids)
    assert len(calls) == len(set(calls)) == len(side.layers) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_every_downsample_starts_at_the_base_in_either_precision(folder, downsample, dtype):
    base, ids = load_whole(folder("llama"), dtype=dtype), some_ids(2, 12)
    with torch.no_grad():
        expected = hidden(base, ids)
        side = side_network(base, downsample=downsample)
        found = hidden(base, ids)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert all(parameter.dtype == torch.float32 for _, parameter in side.named_tensors())


@pytest.mark.parametrize(("family", "beams"), [(family, 1 + 2 * (f % 2)) for f, family in enumerate(FAMILIES)])
def test_generation_with_caches_equals_recomputation(folder, family, beams):
    base = load_whole(folder(family))
    side = side_network(base)
    perturb(side)
    ids = some_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    settings |= {"num_beams": beams, "pad_token_id": 0}
    cached = base.model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, base.model.generate(ids, use_cache=False, **settings))
    with side.disabled():
        assert not torch.equal(cached, base.model.generate(ids, **settings)), "the side network has no part in this"


def by_the_paper(side: SideNetwork, base: BaseModel, ids: Tensor) -> Tensor:
    """The mixed hidden states of a Llama with an adapter downsample, formula by formula."""
    with side.disabled(), torch.no_grad():
        output = base.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    # Hugging Face's last entry is behind the final norm; the layer's own output is wanted.
    states = list(output.hidden_states[:-1])
    with side.disabled(), torch.no_grad():
        captured = []
        handle = base.layers[-1].register_forward_hook(lambda module, args, out: captured.append(out))
        base.decoder(input_ids=ids, use_cache=False)
        handle.remove()
    states.append(captured[0])

    def down(index: int, h: Tensor) -> Tensor:
        first, _, second, norm = side.downsamples[index]
        inner = h @ first.weight.T + first.bias
        narrow = (inner * torch.sigmoid(inner)) @ second.weight.T + second.bias
        return F.layer_norm(narrow, (narrow.shape[-1],), norm.weight, norm.bias)

    decoder, positions = side.decoder, torch.arange(ids.shape[1])[None]
    h = down(0, states[0])
    rotary = decoder.rotary_emb(h, position_ids=positions)
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for index, layer in enumerate(decoder.layers):
        beta = 1 / (1 + torch.exp(-side.gates[index]))
        mixed = (1 - beta) * down(index, states[index + 1]) + beta * h
        for handle in (hooks := list(layer._forward_pre_hooks)):
            saved = layer._forward_pre_hooks.pop(handle)
        h = layer(mixed, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        layer._forward_pre_hooks[hooks[0]] = saved
    up = decoder.norm(h) @ side.upsample.weight.T + side.upsample.bias
    return side.alpha * output.last_hidden_state + (1 - side.alpha) * up


def test_forward_is_the_papers_formula(folder):
    base, ids = load_whole(folder("llama")), some_ids(2, 16)
    side = side_network(base)
    perturb(side)
    with torch.no_grad():
        torch.testing.assert_close(hidden(base, ids), by_the_paper(side, base, ids), rtol=1e-4, atol=1e-4)


def test_packed_samples_do_not_see_each_other(folder):
    base, ids = load_whole(folder("llama")), some_ids(1, 20)
    perturb(side_network(base))
    with torch.no_grad():
        packed = base.hidden_states(ids, torch.cat([torch.arange(12), torch.arange(8)])[None])
        alone = torch.cat([hidden(base, ids[:, :12]), hidden(base, ids[:, 12:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def train_loss(base: BaseModel, ids: Tensor) -> Tensor:
    return token_loss(hidden(base, ids), ids.roll(-1, 1), base.head.loss)


def test_alpha_moves_first_and_then_everything(folder):
    base, ids = load_whole(folder("llama")), some_ids(2, 16)
    side = side_network(base)
    named = side.named_tensors()
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in named}
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        train_loss(base, ids).backward()
        optimizer.step()
        moved.append({name for name, parameter in named if not torch.equal(parameter, before[name])})
    assert moved[0] == {"alpha"}
    assert moved[1] == set(before)


def nodes_of(tensor: Tensor) -> set[str]:
    """Names of all autograd nodes behind a tensor."""
    names, seen, open_nodes = set(), set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(type(node).__name__)
            open_nodes += [following for following, _ in node.next_functions]
    return names


def test_the_graph_holds_nothing_of_the_base(folder):
    base, ids = load_whole(folder("llama")), some_ids(2, 16)
    side = side_network(base)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = train_loss(base, ids)
    assert "_FrozenProductBackward" not in nodes_of(loss)
    # Of full width are saved: what the adapters read (the first layer's input and each output), the mix's two parts
    # and the loss's gradient.
    width = base.config.hidden_size
    wide = {tensor.data_ptr() for tensor in saved if tensor.numel() == ids.numel() * width}
    assert len(wide) <= len(base.layers) + 1 + 2 + 1
    assert max(tensor.numel() for tensor in saved) == ids.numel() * width, "something wider than the base is kept"
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in side.named_tensors())


@pytest.mark.parametrize("compat, at_base", [("paper", True), ("released", False)])
def test_released_gate_and_mix(folder, compat, at_base):
    base, ids = load_whole(folder("llama")), some_ids(2, 8)
    with torch.no_grad():
        bare = hidden(base, ids)
        side = side_network(base, compat=compat)
        assert torch.equal(hidden(base, ids), bare) is at_base
    shapes = {name: tuple(parameter.shape) for name, parameter in side.named_tensors()}
    assert shapes["gates"] == ((3,) if compat == "paper" else (3, 16))
    assert shapes["alpha"] == (() if compat == "paper" else (64,))
    assert ("downsamples.0.0.bias" in shapes) is at_base


def test_a_start_is_a_function_of_the_seed(folder):
    base = load_whole(folder("llama"))
    torch.manual_seed(5)
    first = side_network(base).state_dict()
    second = load_whole(folder("llama"))
    torch.manual_seed(6)
    again = side_network(second).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_side_network_of_another_depth_is_refused(folder, tmp_path):
    base = load_whole(folder("llama"))
    side = side_network(base)
    deeper = load_whole(folder("qwen2"))
    deeper.decoder.layers.append(deeper.decoder.layers[0])
    side._handles = []
    with pytest.raises(UserError, match="side network of 3 layers does not fit a base of 4"):
        side.attach(deeper.model)


def test_static_caches_are_refused(folder):
    base = load_whole(folder("llama"))
    side_network(base)
    with pytest.raises(UserError, match="needs a DynamicCache, got StaticCache"):
        base.model.generate(some_ids(1, 4), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_pruned_start_holds_every_rth_row_and_column(folder, family):
    path = folder(family)
    base = load_whole(path, "dense")
    side = side_network(base)
    start_from_base(side, base, open_source(ModelConfig(path=str(path))))
    whole = AutoModelForCausalLM.from_pretrained(path).get_decoder()
    for (name, narrow), wide in zip(side.decoder.named_parameters(), _matching(side, whole), strict=True):
        expected = wide[::4, ::4] if wide.ndim == 2 else wide[::4]
        assert torch.equal(narrow, expected), name


def _matching(side: SideNetwork, whole: nn.Module) -> list[nn.Parameter]:
    return [whole.get_parameter(name) for name, _ in side.decoder.named_parameters()]


def test_a_pruned_heads_rotary_frequencies_are_the_bases_own(folder):
    base = load_whole(folder("llama"))
    side = side_network(base)
    torch.testing.assert_close(side.decoder.rotary_emb.inv_freq, base.decoder.rotary_emb.inv_freq[::4])


def test_neighbours_that_are_turned_together_are_pruned_together():
    """Cohere turns channels (2 i, 2 i + 1) with one frequency: pruned and turned is turned and pruned."""
    sizes = {**_COHERE, "num_key_value_heads": 2}
    wide, narrow = CohereModel(CohereConfig(**sizes)), CohereModel(CohereConfig(**{**sizes, "hidden_size": 16}))
    assert turns_neighbours(wide)
    kept, positions = every_pair(4, reduction=4), torch.arange(6)[None]
    assert kept.tolist() == [0, 1, 8, 9]
    queries = torch.randn(1, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary_pos_emb(queries, queries, *wide.rotary_emb(queries, positions))[0]
    pruned = queries[..., kept]
    again = apply_rotary_pos_emb(pruned, pruned, *narrow.rotary_emb(pruned, positions))[0]
    torch.testing.assert_close(again, turned[..., kept])


def test_a_pruned_start_of_cohere_keeps_pairs_of_queries(tmp_path):
    path = save_tiny_model(tmp_path, CohereConfig(**_COHERE, vocab_size=VOCABULARY))
    base = load_whole(path, "dense")
    side = side_network(base)
    start_from_base(side, base, open_source(ModelConfig(path=str(path))))
    whole = AutoModelForCausalLM.from_pretrained(path).get_decoder().layers[0].self_attn
    narrow = side.layers[0].self_attn
    rows = torch.cat([every_pair(4, 4) + 16 * head for head in range(4)])
    assert torch.equal(narrow.q_proj.weight, whole.q_proj.weight[rows][:, ::4])
    assert torch.equal(narrow.v_proj.weight, whole.v_proj.weight[::4, ::4])


def test_a_pruned_start_needs_the_bases_heads(folder):
    base = load_whole(folder("llama"))
    with pytest.raises(UserError, match=r"method\.init: pruned keeps the base's 4 heads, .*reduction 32 .* has 1"):
        side_network_spec(make_method(name="qst", reduction=32, init="pruned"), base)
