"""lora.py: adapters, the switch, PEFT's files."""

import itertools
import json
import math
import warnings

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import lora
from released import load_model
from tests.helpers import (
    EOS,
    MEL,
    PLAIN,
    edit_json,
    first_run,
    forward,
    logits_of,
    make_model,
    make_prompts,
    make_transformers,
    near,
    rand,
    randn,
    roughly,
    same,
    seeded,
    shake_lora,
    their_logits,
)
from upkeep.errors import DataError
from upkeep.files import read_json

__all__ = ["first_run", "seeded"]  # fixtures


@pytest.mark.parametrize("bias", [True, False])
def test_lora_layer_is_its_formula(bias):
    """y = W x + b + (alpha / r) B A x; gradients reach A and B alone; dropout acts on x, and in
    training only."""
    net = nn.Sequential(nn.Linear(7, 5, bias=bias)).eval()
    x = randn(4, 3, 7)
    base = net(x).detach()
    assert shake_lora(net, ["0"], r=2, alpha=5.0, dropout=0.5) == ["0"]
    want = base + 5 / 2 * x @ net[0].lora_A.T @ net[0].lora_B.T
    near(net(x), want)  # an adapter is born in its layer's mode
    net(x).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {"0.lora_A", "0.lora_B"}
    net.train()
    near(net(x.expand(2000, *x.shape)).mean(0), want, atol=0.3)
    assert not torch.allclose(net(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_for_sampling_is_lora(dtype):
    """Up to rounding in float32, to the bit in bfloat16, where a sum with the weight would lose
    most of it; weights stay what they are, and adapters made ready are what they were then. After
    an exception adapters count as they are again."""
    model = make_model(scale=0.1).to(dtype)
    shake_lora(model)
    mel = MEL.to(dtype)
    with torch.no_grad():
        plain = forward(model, mel)
    parameters = lora.lora_parameters(model)
    before = {n: p.clone() for n, p in model.state_dict().items() if n not in parameters}
    check = roughly if dtype == torch.float32 else same
    with pytest.raises(KeyError), torch.no_grad(), lora.lora_for_sampling(model):
        check(forward(model, mel), plain)
        for parameter in parameters.values():
            parameter.zero_()
        check(forward(model, mel), plain)
        same({n: p for n, p in model.state_dict().items() if n not in parameters}, before)
        raise KeyError
    with lora.lora_disabled(model), torch.no_grad():
        base = forward(model, mel)
    same(forward(model, mel), base)
    assert (plain - base).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_sampled_where_lora_is_off(dtype):
    """Whichever of the two contexts is entered first."""
    model = make_model().to(dtype)
    prompts = make_prompts([5, 1, 9])
    prompts.x = prompts.x.to(dtype)
    u = rand(3, 4, 12)
    base = model.sample(prompts, u, EOS)
    logits = forward(model, MEL.to(dtype))
    shake_lora(model)
    assert not torch.equal(model.sample(prompts, u, EOS).tokens, base.tokens)
    with lora.lora_disabled(model):
        same(vars(model.sample(prompts, u, EOS)), vars(base))
    with lora.lora_for_sampling(model), lora.lora_disabled(model):
        same(forward(model, MEL.to(dtype)), logits)


def test_lora_targets():
    """The pattern names the decoder; plain suffixes also hit the Conformer's feed-forwards;
    refusals change nothing."""
    model = make_model()
    names = shake_lora(make_model())
    places = {p: "mlp" if p in PLAIN[4:] else "self_attn" for p in PLAIN}
    in_layer = [f"{places[p]}.{p}" for p in PLAIN]
    want = [f"language_model.model.layers.{i}.{name}" for i in (0, 1) for name in in_layer]
    assert sorted(names) == sorted(want)
    more = set(shake_lora(make_model(), PLAIN)) - set(names)
    feed_forwards = itertools.product(range(3), ("ff1", "ff2"), ("up_proj", "down_proj"))
    assert more == {f"encoder.layers.{i}.{ff}.{p}" for i, ff, p in feed_forwards}
    assert shake_lora(make_model(), names[:1]) == names[:1]
    for nothing in (["nope"], ["proj"], "q_proj", r".*layers\.7.*", []):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(model, nothing)
    assert all(p.requires_grad for p in model.parameters())
    shake_lora(model.bfloat16())
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(model)
    forward(model, MEL.bfloat16()).sum().backward()
    for p in lora.lora_parameters(model).values():  # float32: small steps would be rounded away
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.any()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [lora.DECODER_TARGETS, PLAIN, PLAIN[:3], r".*language_model.*\.1\.self_attn\.(k|o)_proj"],
)
def test_adapters_travel_to_peft_and_back(targets, tmp_path):
    """PEFT, on transformers' model, reads what we write, and writes what we read."""
    peft = pytest.importorskip("peft")
    theirs = make_transformers(0, tmp_path / "base")
    ours, again = (load_model(tmp_path / "base").eval() for _ in "ab")
    base = logits_of(ours)
    shake_lora(ours, targets, r=3, alpha=9.0, dropout=0.1)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT only warns of missing keys
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    config = adapted.peft_config["default"]
    held = peft.get_peft_model_state_dict(adapted)
    assert (config.base_model_name_or_path, config.lora_dropout) == (str(tmp_path / "base"), 0.1)
    assert len(held) == len(lora.lora_parameters(ours))
    assert not torch.allclose(base, logits_of(ours), atol=1e-2)
    roughly(their_logits(adapted, MEL)[1], logits_of(ours))
    config = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=targets, lora_dropout=0.1, init_lora_weights=False
    )
    adapted = peft.get_peft_model(adapted.unload(), config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    tensors = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    ]
    settings = [read_json(tmp_path / name / "adapter_config.json") for name in ("ours", "theirs")]
    shapes, their_shapes = ({k: v.shape for k, v in part.items()} for part in tensors)
    assert shapes == their_shapes
    for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "inference_mode"):
        assert settings[0][key] == settings[1][key]
    assert sorted(settings[0]["target_modules"]) == sorted(settings[1]["target_modules"])
    lora.load_adapter(again, tmp_path / "theirs")
    roughly(logits_of(again), their_logits(adapted, MEL)[1])
    assert not torch.allclose(logits_of(again), logits_of(ours), atol=1e-2)
    with lora.lora_disabled(again):
        same(logits_of(again), base)


def test_adapter_files(tmp_path):
    """A round trip keeps every bit; files that do not fit, or say what is not implemented, are
    refused by name."""
    model = make_model()
    again = make_model()
    shake_lora(model, r=3, alpha=12.0, dropout=0.25)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(again, tmp_path)
    same(logits_of(again), logits_of(model))
    assert {layer.dropout.p for layer in lora.lora_layers(again).values()} == {0.25}
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    names = sorted(lora.lora_layers(model))
    theirs = ["model." + name.replace("language_model.model.", "language_model.") for name in names]
    del config["bias"]  # older files may lack keys
    for targets in (names, theirs):  # or name layers in full, as we or as transformers call them
        file.write_text(json.dumps({**config, "target_modules": targets}))
        again = make_model()
        assert lora.load_adapter(again, tmp_path) == targets
        same(logits_of(again), logits_of(model))
    again = make_model()
    for changed in (
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["q_proj"]},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"what_peft_will_have_next_year": {"alpha": 2}},
        {"lora_alpha": math.nan},
        # What would not go unnoticed gets one line, too.
        {"r": 4},
        {"r": 3.0},
        {"lora_alpha": "12"},
        {"lora_dropout": [0.1]},
        {"target_modules": PLAIN},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": [PLAIN]},
        {"target_modules": "(q_proj"},
        {"target_modules": None},
    ):
        file.write_text(json.dumps({**config, **changed}))
        with pytest.raises(DataError, match=f"{tmp_path.name}.*adapter_"):
            lora.load_adapter(again, tmp_path)
    assert not lora.lora_layers(again)  # as it was
    assert all(p.requires_grad for p in again.parameters())
    unset = {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "of_next_year": ""}
    file.write_text(json.dumps({**config, **unset, "peft_version": "9", "lora_dropout": None}))
    lora.load_adapter(again, tmp_path)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [
        ["lm_head"],
        ["q_proj", "lm_head"],
        ["language_model.model.layers.1.self_attn.q_proj", "ff1.up_proj"],
    ],
)
def test_every_target_counts_here_and_in_peft(targets, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = make_transformers(0, tmp_path / "base")
    ours = load_model(tmp_path / "base").eval()
    base = logits_of(ours)
    shake_lora(ours, targets)
    assert not torch.allclose(base, logits_of(ours), atol=1e-2)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    roughly(their_logits(adapted, MEL)[1], logits_of(ours))


def test_targets_without_a_layer_are_refused():
    for targets in (["q_proj", "vproj"], ["decoder", "out"]):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(make_model(), targets)


def test_adapters_that_changed_their_base_are_refused(tmp_path):
    model = make_model()
    shake_lora(model)
    lora.save_adapter(model, tmp_path)
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "mica", "of_next_year", 5):
        edit_json(tmp_path / "adapter_config.json", init_lora_weights=init)
        with pytest.raises(ValueError, match="init_lora_weights"):
            lora.load_adapter(make_model(), tmp_path)
