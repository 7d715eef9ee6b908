"""The config.json of a released checkpoint, checked: what would silently be another model is refused."""

import math
from dataclasses import fields
from pathlib import Path

import torch

from model import EncoderConfig, ProjectorConfig, SpeechConfig, SpeechLM, TextConfig
from upkeep.errors import errors_of_reading
from upkeep.files import read_json

# Other fields that shape a model, and what they may say: nothing else is implemented.
IMPLEMENTED = {
    SpeechConfig: {"model_type": ("granite_speech", "granite_speech_plus")},
    EncoderConfig: {
        "model_type": ("granite_speech_encoder", "granite_speech_plus_encoder"),
        "input_dim": (160,),  # that of our log-mels
    },
    ProjectorConfig: {
        "model_type": ("blip_2_qformer",),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "use_qformer_text_input": (False,),
    },
    TextConfig: {
        "model_type": ("granite",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1,),
        "rope_scaling": ({},),
        "rope_type": ("default",),
        "sliding_window": (),
    },
}


def without_weights(file: Path) -> SpeechLM:
    """The model of a config.json on the meta device, for load_state_dict(..., assign=True)."""
    config = read_json(file)
    with errors_of_reading(file, "the config.json of a model that this code knows"):
        with torch.device("meta"):
            return SpeechLM(from_dict(config))


def from_dict(config: dict) -> SpeechConfig:
    """From a config.json; null is as good as nothing, and what shapes no model is ignored.

    Raises ValueError on what is not implemented, and whatever it comes to on what is no config.json
    at all. A size that the weights do not have shows where they are read.
    """
    config = without_null(config)
    text = config["text_config"]
    text = without_null(text | (text.get("rope_parameters") or {}))  # newer files nest them
    encoder = pick(EncoderConfig, config["encoder_config"])
    projector = pick(ProjectorConfig, config["projector_config"])
    kept = set(encoder.cat_hidden_layers) & set(range(encoder.num_layers))
    if projector.encoder_hidden_size != encoder.hidden_dim * (1 + len(kept)):
        raise ValueError("encoder_hidden_size and cat_hidden_layers do not go together")
    parts = {"encoder_config": encoder, "projector_config": projector}
    parts["text_config"] = pick(TextConfig, text)
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", True)}
    return pick(SpeechConfig, tied | config | parts)


def without_null(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def pick(kind, values: dict):
    """A config of this kind from the values that are its fields; ValueError where IMPLEMENTED has no
    such model, or a number is none, or one that turns everything into NaN."""
    values = without_null(values)
    for name, implemented in IMPLEMENTED[kind].items():
        if name in values and values[name] not in implemented:
            raise ValueError(f"{kind.__name__}: {name} = {values[name]!r} is not implemented")
    known = {f.name: values[f.name] for f in fields(kind) if f.name in values}
    for f in fields(kind):
        value = known.get(f.name, f.default)
        is_scale = f.type is float and f.name != "dropout"
        if isinstance(value, str) or (is_scale and not 0 < value < math.inf):
            raise ValueError(f"{kind.__name__}: {f.name} = {value!r}")
    return kind(**known)
