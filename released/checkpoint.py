"""The weights of a released checkpoint: numbered shards, and a LoRA of its own that belongs to it."""

from pathlib import Path

import torch
import torch.nn as nn

from lora import load_adapter, lora_layers
from model import SpeechLM
from released.config import without_weights
from upkeep.errors import DataError, errors_of_reading
from upkeep.files import is_there, read_json
from upkeep.tensors import read_tensors


def load_model(folder, device="cpu", dtype=None) -> SpeechLM:
    """A released checkpoint: config.json, and model.safetensors or its numbered parts.

    A LoRA that lies in the folder is part of the checkpoint and is merged. Tensors go to the device
    one by one, in dtype (None: as stored), so that memory holds little more than the weights.
    Raises DataError where tensors are unknown, missing or of another shape than config.json says,
    or the LoRA that config.json promises is not there.
    """
    folder = Path(folder)
    model = without_weights(folder / "config.json")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = read_tensors(weight_files(folder), shapes, device, dtype)
    model.load_state_dict(tensors, assign=True)
    if is_there(folder / "adapter_config.json"):
        load_adapter(model, folder)
        fold(model)
        model.requires_grad_(True)
    elif read_json(folder / "config.json").get("has_lora_adapter"):
        raise DataError(
            f"{folder}: adapter_config.json and adapter_model.safetensors are missing, which by "
            "config.json belong to it (has_lora_adapter: false if they are merged)"
        )
    return model


INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names: stale shards may lie beside them."""
    index = folder / INDEX
    if not is_there(index):
        return [folder / "model.safetensors"]
    with errors_of_reading(index, "an index of safetensors files"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not names:
            raise ValueError("it names none")
        return [folder / name for name in names]


@torch.no_grad()
def fold(model: nn.Module):
    """Adapters become part of the weights, and their layers plain ones, ready for another adapter."""
    for name, layer in lora_layers(model).items():
        has_bias = layer.bias is not None
        plain = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
        plain.weight = layer.weight
        plain.bias = layer.bias
        # Added in float32, so that the sum is rounded once.
        plain.weight.copy_(layer.weight.float() + layer.scale * layer.lora_B @ layer.lora_A)
        model.set_submodule(name, plain.train(layer.training))
