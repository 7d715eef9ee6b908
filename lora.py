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
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
        self.r, self.alpha, self.scale, self.dropout = r, alpha, alpha / r, nn.Dropout(dropout)
        self.enabled, self.merged, self.rounded = True, False, None
        self.train(base.training)  # an adapter put on a model in eval mode must not drop out

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled or self.merged:
            return y
        A, B = self.rounded or (self.lora_A.to(x.dtype), self.lora_B.to(x.dtype))
        Ax = F.linear(self.dropout(x), A).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), Ax, B.T, alpha=self.scale).view(y.shape)


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
    for target in [targets] if isinstance(targets, str) else [[t] for t in targets] or [[]]:
        if not any(is_target(name, target) for name in names):
            raise ValueError(f"no linear layer matches {target!r} of the LoRA targets {targets!r}")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout))
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


@contextlib.contextmanager
def lora_rounded(model: nn.Module):
    """Inside, which is for inference, adapters are rounded to the weights' dtype once and not in every forward."""
    layers = lora_layers(model).values()
    try:
        for layer in layers:
            layer.rounded = tuple(p.detach().to(layer.weight.dtype) for p in (layer.lora_A, layer.lora_B))
        yield
    finally:
        for layer in layers:
            layer.rounded = None


@torch.no_grad()
def merge(model: nn.Module):
    """Fold the adapters into the weights, W + (alpha / r) B A: faster to run, but rounded to the weights' dtype."""
    for layer in lora_layers(model).values():
        if not layer.merged:
            layer.weight.copy_(layer.weight.float() + layer.scale * layer.lora_B @ layer.lora_A)  # rounded once
            layer.merged = True


@torch.no_grad()
def unmerge(model: nn.Module):
    """Undo merge, up to rounding."""
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.weight.copy_(layer.weight.float() - layer.scale * layer.lora_B @ layer.lora_A)
            layer.merged = False


def fold(model: nn.Module):
    """Merge for good: plain linear layers again, ready for another adapter."""
    merge(model)
    for name, layer in lora_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        model.set_submodule(name, plain.train(layer.training))


# ---------------------------------------------------------------------------------------------------------------------
# Names. Released Granite Speech files, and our modules, say language_model.model.layers; transformers 5 in memory says
# model.language_model.layers, and the keys of PEFT's files follow it with base_model.model. in front.


def released_name(name: str) -> str:
    """Any of these names of a tensor or module, as released files and our modules have it."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    name = re.sub(r"^lm_head\b", "language_model.lm_head", name)
    return re.sub(r"^language_model\.(model\.)*(?!lm_head\b)", "language_model.model.", name)


def transformers_name(name: str) -> str:
    """The name of one of our modules in transformers 5."""
    name = "model." + name.replace("language_model.model.", "language_model.")
    return name.replace("model.language_model.lm_head", "lm_head")


def read_tensors(files: list[Path], wanted: dict[str, tuple], device="cpu", dtype=None) -> dict[str, torch.Tensor]:
    """Tensors of safetensors files by our names, one by one to the device and in dtype (None: as stored).

    wanted: every name and its shape. Raises ValueError with the tensors that are unknown, missing or of another shape.
    """

    def stored(tensor):
        return tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor.clone()

    found, problems, missing = {}, [], dict(wanted)
    for file in files:
        try:
            tensors = safe_open(file, framework="pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): get it again") from None
        for key in tensors.keys():
            name, shape = released_name(key), tuple(tensors.get_slice(key).get_shape())
            missing.pop(name, None)
            if name not in wanted:
                problems.append(f"unknown {key}")
            elif shape != tuple(wanted[name]):
                problems.append(f"{key} is {shape}, not {tuple(wanted[name])}")
            else:
                found[name] = stored(tensors.get_tensor(key))
        del tensors  # no longer mapped, where the copies are in another dtype
    for name in [name for name in missing if name.endswith("num_batches_tracked")]:
        found[name] = torch.zeros(missing.pop(name), dtype=torch.int64, device=device)  # no weight; some files lack it
    problems += [f"missing {name}" for name in missing]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems)[:10]) + "\n  ..." * (len(problems) > 10)
        raise ValueError(f"{files[0]} does not fit the model or its config.json, {len(problems)} problems:{listed}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files: adapter_model.safetensors and adapter_config.json

# Options of PEFT's LoraConfig that change what the tensors mean.
UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "kasa_config", "layer_replication",
    "layers_to_transform", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
)  # fmt: skip


def save_adapter(model: nn.Module, folder, targets=DECODER_TARGETS, base: str = ""):
    """Write the adapters as PEFT does; base is the name or path of the model they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layer = next(iter(lora_layers(model).values()))
    theirs = {name: transformers_name(name) for name in lora_layers(model)}  # for targets that are whole names
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": layer.r,
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout.p,
        "target_modules": targets if isinstance(targets, str) else [theirs.get(t, t) for t in targets],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, parameter in lora_parameters(model).items():
        tensors[f"base_model.model.{transformers_name(name)}.weight"] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder):
    """Apply and fill the adapters that save_adapter or PEFT wrote. Returns their target_modules.

    Raises ValueError, and leaves the model as it was, where the tensors do not fit the model or adapter_config.json,
    or PEFT options are set that are not implemented here.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    refused = [key for key in UNSUPPORTED if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        refused.append("init_lora_weights")  # these change the weights of the base, too
    if refused or config.get("peft_type") != "LORA" or not {"r", "lora_alpha", "target_modules"} <= config.keys():
        what = f"{', '.join(refused)} not supported here" if refused else "not a LoRA as PEFT writes it"
        raise ValueError(f"{folder / 'adapter_config.json'}: {what}")
    r, targets = config["r"], config["target_modules"]

    wanted, names = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (is_target(name, targets) or is_target(transformers_name(name), targets)):
            wanted[f"{name}.lora_A.weight"] = (r, module.in_features)
            wanted[f"{name}.lora_B.weight"] = (module.out_features, r)
            names.append(name)
    tensors = read_tensors([folder / "adapter_model.safetensors"], wanted)
    apply_lora(model, names, r, config["lora_alpha"], config.get("lora_dropout", 0.0))
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[f"{name}.weight"])
    return targets


def load_weights(model: nn.Module, folder: Path, needs_adapter: bool, device, dtype):
    """Fill a model, made on the meta device, from a checkpoint's model.safetensors or its numbered parts.

    A LoRA that lies in the folder is part of the checkpoint and is merged. Raises ValueError where tensors do not fit,
    or needs_adapter and there is none.
    """
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = read_tensors([folder / file for file in sorted(files)], shapes, device, dtype)
    model.load_state_dict(tensors, assign=True)
    if (folder / "adapter_config.json").exists():
        load_adapter(model, folder)
        fold(model.requires_grad_(True))
    elif needs_adapter:
        raise ValueError(f"{folder}: adapter_config.json and adapter_model.safetensors are missing, which by "
                         "config.json belong to it (has_lora_adapter: false if they are merged)")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them, have prompts of their own and the same adapters: these are small, and the
# mean of their gradients is all that travels.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this process, of how many


def average(tensors: list[torch.Tensor]):
    """In place, the mean over the processes."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / WORLD).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def averaged(figures: dict[str, float], device) -> dict[str, float]:
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device if WORLD > 1 else "cpu")
    average([values])
    return dict(zip(figures, values.tolist()))
