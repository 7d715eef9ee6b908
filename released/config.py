"""The config.json of a released checkpoint, checked: what would silently be another model is refused."""

from dataclasses import fields
from pathlib import Path

import torch

from model import EncoderConfig, ProjectorConfig, SpeechConfig, SpeechLM, TextConfig, head_dim
from upkeep.errors import reading
from upkeep.files import read_json

# Other fields that shape a model, and what they may say: nothing else is implemented.
IMPLEMENTED = {
    SpeechConfig: {"model_type": ("granite_speech", "granite_speech_plus")},
    EncoderConfig: {"model_type": ("granite_speech_encoder", "granite_speech_plus_encoder")},
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
    with reading(file, "the config.json of a model that this code knows"):
        with torch.device("meta"):
            return SpeechLM(from_dict(config))


def from_dict(config: dict) -> SpeechConfig:
    """From a config.json; null is as good as nothing, and what shapes no model is ignored.

    Raises ValueError on what is not implemented or makes no model, and whatever it comes to on
    what is no config.json at all.
    """
    config = without_null(config)
    text = config["text_config"]
    text = without_null(text | (text.get("rope_parameters") or {}))  # newer files nest them
    encoder = pick(EncoderConfig, config["encoder_config"])
    projector = pick(ProjectorConfig, config["projector_config"])
    parts = {"encoder_config": encoder, "projector_config": projector}
    parts["text_config"] = decoder = pick(TextConfig, text)
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", True)}
    whole = pick(SpeechConfig, tied | config | parts)

    kept = encoder.cat_hidden_layers
    frames = encoder.hidden_dim * (1 + len(kept))
    misfits = {
        "input_dim": encoder.input_dim != 160,  # that of our log-mels
        "max_pos_emb": encoder.max_pos_emb < encoder.context_size,
        "cat_hidden_layers": not set(kept) <= set(range(encoder.num_layers)),
        "encoder_hidden_size": projector.encoder_hidden_size != frames,
        "hidden_size": projector.hidden_size % projector.num_attention_heads,
        "downsample_rate": whole.downsample_rate > whole.window_size,
        "num_key_value_heads": decoder.num_attention_heads % decoder.num_key_value_heads,
        "head_dim": head_dim(decoder) % 2,
        "rope_theta": decoder.rope_theta == 0,
        "logits_scaling": decoder.logits_scaling == 0,
    }
    wrong = [name for name, is_misfit in misfits.items() if is_misfit]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: at odds with the other fields")
    return whole


def without_null(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def pick(kind, values: dict):
    """A config of this kind from the values that are its fields; ValueError on one of another type,
    or where IMPLEMENTED has no such model."""
    values = without_null(values)
    for name, implemented in IMPLEMENTED[kind].items():
        if name in values and values[name] not in implemented:
            raise ValueError(f"{kind.__name__}: {name} = {values[name]!r} is not implemented")
    known = {}
    for f in fields(kind):
        if f.name in values:
            known[f.name] = value = values[f.name]
            if not is_of_type(value, f.type):
                raise ValueError(f"{kind.__name__}: {f.name} = {value!r}")
    return kind(**known)


def is_of_type(value, kind) -> bool:
    """Whole numbers count something, and not absurdly much; others are finite and not negative."""
    if kind in (int, int | None):
        return type(value) is int and 0 < value < 2**24
    if kind is float:
        return type(value) in (int, float) and 0 <= value <= torch.finfo(torch.float32).max
    if kind is list:
        return type(value) is list and all(type(item) is int for item in value)
    return isinstance(value, kind)
