"""IBM's released Granite Speech checkpoints: see README.md in this folder.

    tokenizer = released.ChatTokenizer(folder)
    model = released.load_model(folder)
    python -m tools.export RUN OUT       a run on one, as a whole checkpoint

Only `train.py --init` and what uses its runs import this package, and with it tokenizers and
jinja2; the default run needs neither.
"""

from released.chat import ChatTokenizer
from released.checkpoint import load_model

__all__ = ["ChatTokenizer", "load_model"]
