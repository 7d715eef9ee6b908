"""The text side of a released checkpoint: its tokenizer.json, and its chat template around prompts."""

import datetime
import json
from pathlib import Path

import jinja2.sandbox
import tokenizers

from data import AUDIO, DataError

# Templates may tell the date. Here it is one for ever, so that a run means the same tomorrow: that
# of Granite Speech 3.3's model card.
TEMPLATE_DATE = datetime.date(2025, 4, 9)


class ChatTokenizer:
    """The tokenizer.json of a released checkpoint, with its chat template around every prompt.

    Raises DataError where a file is missing or damaged, or the template has no place for the audio.
    """

    def __init__(self, folder: Path, system_prompt: str = ""):
        settings = {}
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
        read_json(folder / "tokenizer.json")  # it is there, and JSON
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()  # the file may hold both, from somebody's training
        self.tokenizer.no_padding()
        self.special = {}  # what templates may ask for, as transformers hands it to them
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(name)
            if token:
                self.special[name] = token["content"] if isinstance(token, dict) else token
        self.eos_id = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.audio_id = self.tokenizer.token_to_id(AUDIO)
        if self.eos_id is None or self.audio_id is None:
            raise DataError(
                f"{folder}: no eos_token in tokenizer_config.json, or no {AUDIO} in tokenizer.json"
            )
        self.system = []
        if system_prompt:
            self.system = [{"role": "system", "content": system_prompt}]
        try:
            self.template = compile_template(chat_template(folder, settings))
        except jinja2.TemplateError as error:
            raise DataError(f"{folder}: the chat template is damaged ({error})") from None

    def encode_prompt(self, prompt: str) -> list[int]:
        messages = [*self.system, {"role": "user", "content": prompt}]
        try:
            text = self.template.render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the checkpoint's chat template fails: {error}") from None
        if self.system and self.system[0]["content"] not in text:
            raise DataError(
                "the checkpoint's chat template has no place for a system prompt: go on without it"
            )
        ids = self.tokenizer.encode(text).ids
        if ids.count(self.audio_id) != 1:
            raise DataError(
                f"the chat template turns {prompt!r} into a prompt without one {AUDIO}: {text!r}"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def chat_template(folder: Path, settings: dict) -> str:
    """The conversation's format, wherever a checkpoint keeps it."""
    source = settings.get("chat_template")
    if (folder / "chat_template.json").exists():
        source = read_json(folder / "chat_template.json")["chat_template"]
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not source:
        raise DataError(
            f"{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json"
        )
    return source


def compile_template(source: str) -> jinja2.Template:
    """Chat templates are code that comes with a download: they run in jinja's sandbox, with what
    transformers gives them."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return TEMPLATE_DATE.strftime(form)

    def tojson(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)


def read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): get it again") from None
