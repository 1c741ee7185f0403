"""Frozen decoders of every family against transformers' own models with the same (dequantized) weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    RecurrentGemmaConfig,
)

from dist_qft.base_model.loss import token_loss
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.wrapper import text_decoder
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from tests.support.families import (
    COMMON,
    FAMILIES,
    GROUPED,
    ONE_SAMPLE_A_ROW,
    QUANTIZED,
    VOCABULARY,
    WINDOW,
    open_base,
    reference_model,
    refused,
    save_random,
    tokens_of,
)

each_family = pytest.mark.parametrize("family", FAMILIES)


# Every family in one format, and every format in a plain family and in those whose experts are stacked.
IN_A_FORMAT = dict.fromkeys(
    [(family, list(QUANTIZED)[f % len(QUANTIZED)]) for f, family in enumerate(FAMILIES)]
    + [(family, format) for family in ("llama", "mixtral", "gpt_oss") for format in QUANTIZED]
)


@pytest.mark.parametrize(("family", "quantization"), IN_A_FORMAT)
@torch.no_grad()
def test_states_logits_and_loss_are_transformers(folder_of, family, quantization):
    folder = folder_of(family)
    base = open_base(folder, QUANTIZED[quantization])
    model = reference_model(base, folder)
    tokens, positions = tokens_of(2, 12)
    expected = model(input_ids=tokens, position_ids=positions, output_hidden_states=True)
    hidden = base.hidden_states(tokens, positions)
    torch.testing.assert_close(hidden, text_decoder(model)(input_ids=tokens).last_hidden_state, rtol=1e-5, atol=2e-5)
    logits = base.model(input_ids=tokens, position_ids=positions).logits
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=5e-5)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss = token_loss(hidden, targets, base.head.loss)
    reference = F.cross_entropy(expected.logits.flatten(0, 1).double(), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)


@each_family
def test_gradient_of_the_states_through_the_frozen_layers(folder_of, family):
    """As adapters see it: loss by an offset added to the first layer's output."""
    folder = folder_of(family)
    base = open_base(folder, QUANTIZED["affine4"])
    model = reference_model(base, folder)
    tokens, positions = tokens_of(2, 9)
    gradients = []
    for causal, decoder in ((base.model, base.decoder), (model, text_decoder(model))):
        offset = torch.zeros(64, requires_grad=True)
        hook = layers_of(decoder)[0].register_forward_hook(lambda module, args, y, o=offset: _shifted(y, o))
        if causal is model:
            logits = model(input_ids=tokens, position_ids=positions).logits.flatten(0, 1)
            F.cross_entropy(logits, tokens.roll(-1, 1).flatten(), reduction="sum").backward()
        else:
            token_loss(base.hidden_states(tokens, positions), tokens.roll(-1, 1), base.head.loss).backward()
        hook.remove()
        gradients.append(offset.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in base.model.parameters())


def layers_of(decoder: torch.nn.Module) -> torch.nn.ModuleList:
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def _shifted(output, offset: Tensor):
    return (output[0] + offset, *output[1:]) if isinstance(output, tuple) else output + offset


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONE_SAMPLE_A_ROW])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(folder_of, family):
    base = open_base(folder_of(family))
    lengths = [5, 9, 1, 6]
    samples = [tokens_of(1, length, seed=length)[0] for length in lengths]
    packed = torch.cat(samples, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    # A second row, packed differently: the batch is no excuse.
    rows = torch.cat([packed, packed.flip(1)]), torch.cat([positions, torch.arange(sum(lengths))[None]])
    together = base.hidden_states(*rows)
    start = 0
    for sample, length in zip(samples, lengths, strict=True):
        alone = base.hidden_states(sample, torch.arange(length)[None])
        torch.testing.assert_close(together[:1, start : start + length], alone, rtol=1e-4, atol=2e-5)
        start += length
    lone_row = base.hidden_states(rows[0][1:], rows[1][1:])
    torch.testing.assert_close(together[1:], lone_row, rtol=1e-4, atol=2e-5)
    base.require_separate_samples(torch.device("cpu"))


@torch.no_grad()
def test_the_sliding_window_is_alive(folder_of):
    base = open_base(folder_of("mistral"))
    tokens, positions = tokens_of(1, 3 * WINDOW)
    changed = tokens.clone()
    changed[0, 0] += 1
    same = (base.hidden_states(tokens, positions) == base.hidden_states(changed, positions)).all(-1)[0]
    # Two layers look back 2 * (WINDOW - 1) tokens.
    assert same.tolist() == [False] * (2 * WINDOW - 1) + [True] * (WINDOW + 1)


@each_family
def test_generation_is_transformers_own(folder_of, family):
    folder = folder_of(family)
    base = open_base(folder, QUANTIZED["affine4"])
    model = reference_model(base, folder)
    tokens, _ = tokens_of(1, 6)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(base.model.generate(tokens, **settings), model.generate(tokens, **settings))


@torch.no_grad()
def test_bfloat16_stays_close_to_float32(folder_of):
    tokens, positions = tokens_of(2, 12)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        base = open_base(folder_of("llama"), QUANTIZED["affine4"], dtype)
        hidden = base.hidden_states(tokens, positions)
        assert hidden.dtype == dtype
        losses.append(token_loss(hidden, tokens.roll(-1, 1), base.head.loss).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("family", ["opt", "mixtral", "seed_oss"])
@torch.no_grad()
def test_training_mode_changes_nothing(folder_of, family):
    """Gradient checkpointing needs `train()`; neither dropout nor a router's jitter may come to life with it."""
    base = open_base(folder_of(family))
    tokens, positions = tokens_of(1, 8)
    before = base.hidden_states(tokens, positions)
    base.model.train()
    assert base.model.training, "so that whoever needs the other mode for a while can put it back"
    assert torch.equal(base.hidden_states(tokens, positions), before)


def test_tables_parts_and_notes(folder_of):
    tied, untied = open_base(folder_of("llama-tied")), open_base(folder_of("llama"))
    assert (tied.tied, list(tied.tables())) == (True, ["model.embed_tokens"])
    assert (untied.tied, list(untied.tables())) == (False, ["model.embed_tokens", "lm_head"])
    assert [base.vocab_size for base in (tied, untied)] == [VOCABULARY] * 2
    assert len(untied.linears) == 2 * 7
    assert {untied.depth_of(path) for path in untied.linears} == {0, 1}
    assert untied.depth_of("lm_head") is None
    assert untied.notes == []


def test_exempt_layers_stay_dense(folder_of):
    base = open_base(
        folder_of("llama"), {"linear": "nf4", "block": [32], "exempt": ["o_proj", "model.layers.1.mlp.up_proj"]}
    )
    names = {path: layer.format.name for path, layer in base.linears.items()}
    assert {path for path, name in names.items() if name == "dense"} == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_experts_may_be_exempt(folder_of):
    for exempt, dense in (["experts"], {"gate_up_proj", "down_proj"}), (["down_proj"], {"down_proj"}):
        quantization = QuantizationConfig(linear="nf4", block=[32], exempt=exempt)
        base = build_skeleton(ModelConfig(path=str(folder_of("mixtral"))), quantization, torch.float32)
        found = {path.rpartition(".")[2] for path, stack in base.experts.items() if stack.format.name == "dense"}
        assert found == dense


def test_too_much_that_would_stay_unquantized_is_refused(tmp_path):
    """A convolution of 64 taps is larger than all linear layers together."""
    config = Lfm2Config(**GROUPED, conv_L_cache=640, full_attn_idxs=[1], layer_types=["conv", "full_attention"])
    folder = save_random(config, tmp_path)
    text = refused(folder, {"linear": "nf4", "block": [32]})
    assert "of the decoder layers, are in no linear layer" in text
    assert "model.layers.0.conv.conv.weight; name them in quantization.exempt" in text
    base = open_base(folder, {"linear": "nf4", "block": [32], "exempt": ["conv"]})
    assert base.notes == ["40,960 weights of the decoder layers are not in linear layers and stay unquantized"]


def test_weights_outside_linear_layers_are_noted(tmp_path):
    config = MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    folder = save_random(config, tmp_path)
    base = build_skeleton(ModelConfig(path=str(folder)), QuantizationConfig(linear="affine4"), torch.float32)
    assert len(base.notes) == 1
    assert base.notes[0].endswith("weights of the decoder layers are not in linear layers and stay unquantized")


# --- what cannot be taken ---------------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    assert refused(tmp_path / "nowhere").endswith("and it is not a Hub id (owner/name)")
    assert refused(tmp_path / "x.gguf") == f"model.path: no file '{tmp_path / 'x.gguf'}'"
    assert (
        refused(tmp_path)
        == f"model.path: '{tmp_path}' has no config.json; must be a Hugging Face folder or a .gguf file"
    )


def test_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quetzalcoatl"}))
    text = refused(tmp_path)
    assert text.startswith(f"model.path: cannot read the configuration of '{tmp_path}': ")
    assert "quetzalcoatl" in text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=VOCABULARY),
            "model type 'mamba'",
        ),
        (
            PhiConfig(**COMMON, intermediate_size=96, tie_word_embeddings=True),
            "model type 'phi' has an LM head with a bias that shares the embedding's table",
        ),
        (
            RecurrentGemmaConfig(**GROUPED, lru_width=64, attention_window_size=16),
            "model type 'recurrent_gemma' changes its states or logits around the LM head in a way that is not "
            "supported (supported: logit_scale, logits_scaling, lm_head_multiplier, final_logit_softcapping)",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_families_that_cannot_be_taken_apart(tmp_path, config, text):
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert text in refused(tmp_path)


def test_a_checkpoint_that_is_already_quantized(folder_of, tmp_path):
    config = json.loads((folder_of("llama") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "vptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is already quantized by vptq; must be 16-bit or 32-bit weights" in refused(tmp_path)


def test_an_attention_that_the_family_lacks(folder_of, tmp_path):
    (tmp_path / "config.json").write_bytes((folder_of("gemma2") / "config.json").read_bytes())
    assert refused(tmp_path) == "model.attention: 'sdpa' does not work for model type 'gemma2'; try 'eager'"


def test_an_exemption_that_exempts_nothing(folder_of):
    text = refused(folder_of("llama"), {"linear": "dense", "exempt": ["o_proj", "out_proj"]})
    assert text == "quantization.exempt: no linear layer is called 'out_proj'"


def test_layers_that_the_format_cannot_hold(folder_of):
    text = refused(folder_of("llama"), {"linear": "nf4", "block": [64]})
    assert text.startswith("model.layers.0.mlp.down_proj: nf4 block 64 does not divide in_features 96")
    assert text.endswith("(and 1 more layers)")
