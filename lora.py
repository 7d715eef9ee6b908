"""LoRA (Hu et al. 2021) by hand: low-rank updates beside frozen linear layers, in PEFT's file format.

    y = W x + (alpha / r) B A x        A (r, in), B (out, r)

W + BA is never formed during training: the update of x is two thin products. Switching the adapters off leaves the
base model bit for bit, so the KL reference of RL needs no second model in memory:

    with lora_disabled(model):
        ref_logp = ...
"""

import contextlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

# The seven projections of every decoder layer. A plain list of suffixes would also match `up_proj` and `down_proj`
# of the Conformer's feed-forwards; this pattern names the decoder, in our module names and in transformers'.
DECODER_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank update. It keeps the layer's own parameters under their names."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        # No initialisation of a second weight: take over the base's.
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # Adapters stay in float32 whatever the base's dtype: at RL's learning rates bf16 would round updates away.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # so it starts as the identity
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.r, self.scale, self.dropout = r, alpha / r, nn.Dropout(dropout)
        self.enabled, self.merged = True, False
        self.train(base.training)  # an adapter put on a model in eval mode must not drop out

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled or self.merged:
            return y
        update = F.linear(F.linear(self.dropout(x), self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y + self.scale * update


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def is_target(name: str, targets) -> bool:
    """PEFT's rule: a string is a pattern for the whole name, a list holds names or last parts of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def apply_lora(model: nn.Module, targets=DECODER_TARGETS, r: int = 64, alpha: float = 128, dropout: float = 0.0):
    """Freeze the model and put an adapter on every linear layer that matches targets. Returns the adapted names.

    Raises ValueError where nothing matches or an adapter is already there.
    """
    if lora_layers(model):
        raise ValueError("the model already has LoRA adapters")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_target(n, targets)]
    if not names:
        raise ValueError(f"no linear layer matches the LoRA targets {targets!r}")
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, LoRALinear(getattr(parent, child), r, alpha, dropout))
    return names


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable adapter parameters by name."""
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("lora_A", "lora_B")}


@contextlib.contextmanager
def lora_disabled(model: nn.Module):
    """Inside, the model is the base model; the switch is restored whatever happens. Refuses a merged model."""
    layers = lora_layers(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged into the weights: unmerge them to switch them off")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module):
    """Fold the adapters into the weights, W + (alpha / r) B A: faster to run, but rounded to the weights' dtype."""
    for layer in lora_layers(model).values():
        if not layer.merged:
            layer.weight += (layer.scale * layer.lora_B @ layer.lora_A).to(layer.weight.dtype)
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module):
    """Undo merge, up to rounding."""
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.weight -= (layer.scale * layer.lora_B @ layer.lora_A).to(layer.weight.dtype)
            layer.merged = False


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files: adapter_model.safetensors and adapter_config.json. Released Granite Speech files, and our modules, say
# language_model.model.layers; transformers 5 in memory says model.language_model.layers, and PEFT keys follow it.


def _peft_key(name: str) -> str:
    module, _, which = name.rpartition(".")
    module = module.replace("language_model.model.", "language_model.")
    return f"base_model.model.model.{module}.{which}.weight"


def save_adapter(model: nn.Module, folder, alpha: float, dropout: float, targets=DECODER_TARGETS, base: str = ""):
    """Write the adapters as PEFT does; base is the name or path of the model they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = lora_parameters(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(iter(lora_layers(model).values())).r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {_peft_key(name): p.detach().cpu().contiguous() for name, p in parameters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder):
    """Apply and fill the adapters that save_adapter or PEFT wrote. Raises ValueError where they do not fit."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{folder / 'adapter_config.json'}: {key} is not supported here")
    tensors = load_file(folder / "adapter_model.safetensors")
    targets = config["target_modules"]
    apply_lora(model, targets, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    wanted = {_peft_key(name): p for name, p in lora_parameters(model).items()}
    if wanted.keys() != tensors.keys():
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"{folder}: tensors missing {missing[:3]}, unknown {unknown[:3]}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if parameter.shape != tensors[key].shape:
                raise ValueError(f"{folder}: {key} is {tuple(tensors[key].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(tensors[key])
