"""IBM's released Granite Speech checkpoints: see README.md in this folder.

    model, tokenizer = released.load(folder)
    python -m tools.export RUN OUT       a run on one, as a whole checkpoint

Only `train.py --init` and what uses its runs import this package, and with it tokenizers and
jinja2; the default run needs neither.
"""

from data import AUDIO
from released.chat import ChatTokenizer
from released.checkpoint import load_model

__all__ = ["ChatTokenizer", "load", "load_model"]


def load(folder, device="cpu", dtype=None, system_prompt: str = ""):
    """The model of a checkpoint and its tokenizer. Raises ValueError where they do not belong
    together, or the chat template fails."""
    tokenizer = ChatTokenizer(folder, system_prompt)
    model = load_model(folder, device, dtype)
    if tokenizer.audio_id != model.config.audio_token_index:
        raise ValueError(
            f"{folder}: config.json's audio_token_index is not {AUDIO} of its tokenizer"
        )
    if tokenizer.vocab_size > model.config.text_config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has more tokens than its model")
    tokenizer.encode_prompt(AUDIO + "?")
    return model, tokenizer
