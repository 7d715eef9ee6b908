"""LoRA (Hu et al. 2021) by hand: low-rank updates beside frozen linear layers, in PEFT's files.

    y = W x + (alpha / r) B A x        A (r, in), B (out, r)

W itself never changes. To train, (alpha / r) B A x is two thin products; to sample in float32,
W + (alpha / r) B A is formed beside W. Switching the adapters off leaves the base model bit for bit,
so the KL reference of RL needs no second model in memory:

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
from safetensors.torch import save_file

from upkeep.errors import DataError, errors_of_reading
from upkeep.files import read_json
from upkeep.tensors import read_tensors, transformers_name

# The seven projections of every decoder layer. A plain list of suffixes would also match `up_proj`
# and `down_proj` of the Conformer's feed-forwards; this pattern names the decoder, in our module
# names and in transformers'.
DECODER_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


# --------------------------------------------------------------------------------------------------
# The layer, and putting it on a model


class LoRALinear(nn.Linear):
    """A frozen linear layer, its parameters under their names, with a trainable low-rank update."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # not nn.Linear's, which would make and initialise a weight
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # Float32 whatever the base's dtype: at RL's learning rates bf16 would round updates away.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(
            torch.zeros(base.out_features, r, device=device)
        )  # zero: starts as the base
        self.r = r
        self.alpha = alpha
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        # Inside lora_for_sampling, one of these:
        self.merged = None  # W + scale B A
        self.rounded = None  # A and B in the weight's dtype
        self.train(base.training)  # on a model in eval mode an adapter must not drop out

    def forward(self, x):  # (..., in) -> (..., out)
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        y = F.linear(x, self.weight, self.bias)
        A, B = self.rounded or (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        Ax = F.linear(self.dropout(x), A)  # (..., r)
        # One kernel for y + scale * Ax B^T; addmm takes matrices, so leading dimensions are folded.
        return torch.addmm(y.flatten(0, -2), Ax.flatten(0, -2), B.T, alpha=self.scale).view(y.shape)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable adapter parameters by name."""
    names = ("lora_A", "lora_B")
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in names}


def is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a string is a pattern of whole names, a list holds names or last parts of them."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def apply_lora(
    model: nn.Module,
    targets: str | list[str] = DECODER_TARGETS,
    r: int = 64,
    alpha: float = 128,
    dropout: float = 0.0,
) -> list[str]:
    """Freeze the model, put an adapter on every linear layer that matches; returns their names.

    Raises ValueError where a target matches no layer, or adapters are already there.
    """
    if lora_layers(model):
        raise ValueError("the model already has LoRA adapters")
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name in linear if is_target(name, targets)]
    # Each must match something, so each is tried alone: the whole pattern, or a list of one name.
    each_target = [targets] if isinstance(targets, str) else [[target] for target in targets]
    for target in each_target:
        if not any(is_target(name, target) for name in names):
            raise ValueError(f"no linear layer matches {target!r} of the LoRA targets {targets!r}")
    if not names:
        raise ValueError("there are no LoRA targets")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout))
    return names


# --------------------------------------------------------------------------------------------------
# Off, and for sampling


@contextlib.contextmanager
def lora_disabled(model: nn.Module):
    """Inside, the model is the base model; the switch is restored whatever happens."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


@contextlib.contextmanager
def lora_for_sampling(model: nn.Module):
    """For inference: inside, each layer's update is prepared once, and not for every token.

    Float32 weights: W + scale B A is formed in a new tensor, `merged`. Bfloat16 weights: that sum
    would round most of the update away, and the policy that samples would differ from the one that
    is scored; so A and B are only cast, `rounded`, as forward does anyway.
    """
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            W, A, B = layer.weight, layer.lora_A.detach(), layer.lora_B.detach()
            if W.dtype == A.dtype:
                layer.merged = torch.addmm(W, B, A, alpha=layer.scale)
            else:
                layer.rounded = (A.to(W.dtype), B.to(W.dtype))
        yield
    finally:
        for layer in layers:
            layer.merged = None
            layer.rounded = None


# --------------------------------------------------------------------------------------------------
# PEFT's files: adapter_model.safetensors and adapter_config.json

# Options of PEFT's LoraConfig that are read here, or that no forward pass depends on.
KNOWN = (
    "r lora_alpha lora_dropout target_modules auto_mapping base_model_name_or_path eva_config "
    "inference_mode megatron_core peft_version qalora_group_size revision task_type"
).split()
# Others that may be set, and to what. These ways to initialise leave the base's weights as they are.
IMPLEMENTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def save_adapter(model: nn.Module, folder, targets=DECODER_TARGETS, base: str = ""):
    """Write the adapters as PEFT does; base: the name or path of the model they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    if not isinstance(targets, str):  # those that are whole names are translated
        targets = [transformers_name(target) if target in layers else target for target in targets]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": layer.r,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout.p,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, parameter in lora_parameters(model).items():
        key = f"base_model.model.{transformers_name(name)}.weight"
        tensors[key] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_settings(file: Path) -> dict:
    """A LoRA's adapter_config.json. Raises DataError with the options that are set but not
    implemented here: without these its tensors would compute something else."""
    settings = {"lora_dropout": 0.0}
    settings |= {name: value for name, value in read_json(file).items() if value is not None}
    refused = [
        f"{name} = {value!r}"
        for name, value in settings.items()
        if value and name not in KNOWN and value not in IMPLEMENTED.get(name, ())
    ]
    if refused:
        raise DataError(f"{file}: not supported here: {', '.join(refused)}")
    return settings


def read_adapter(model: nn.Module, folder: Path) -> tuple[dict, list[str], dict[str, torch.Tensor]]:
    """The settings of an adapter that save_adapter or PEFT wrote for the model, the names of the
    layers it is for, and NAME.lora_A.weight (r, in) and NAME.lora_B.weight (out, r) of each.

    Raises DataError where settings are not implemented here, or tensors fit neither them nor the
    model.
    """
    file = folder / "adapter_config.json"
    settings = read_settings(file)
    names = []
    shapes = {}
    with errors_of_reading(file, "the settings of a LoRA for this model"):
        r, alpha, targets = (settings[name] for name in ("r", "lora_alpha", "target_modules"))
        # A layer that nobody uses: bad values fail here, with the file's name.
        layer = LoRALinear(nn.Linear(1, 1, device="meta"), r, alpha, settings["lora_dropout"])
        if not math.isfinite(layer.scale):
            raise ValueError(f"lora_alpha = {alpha}")
        for name, module in model.named_modules():
            matches = is_target(name, targets) or is_target(transformers_name(name), targets)
            if isinstance(module, nn.Linear) and matches:
                names.append(name)
                shapes[f"{name}.lora_A.weight"] = (r, module.in_features)
                shapes[f"{name}.lora_B.weight"] = (module.out_features, r)
        if not names:
            raise ValueError(f"no linear layer matches {targets!r}")
    return settings, names, read_tensors([folder / "adapter_model.safetensors"], shapes)


def load_adapter(model: nn.Module, folder):
    """Apply and fill the adapters that save_adapter or PEFT wrote; returns their target_modules.

    Raises what read_adapter raises, and leaves the model as it was.
    """
    settings, names, tensors = read_adapter(model, Path(folder))
    apply_lora(model, names, settings["r"], settings["lora_alpha"], settings["lora_dropout"])
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[f"{name}.weight"])
    return settings["target_modules"]
