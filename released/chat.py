"""The text side of a released checkpoint: its tokenizer.json, and its chat template around prompts."""

import datetime
import json
from pathlib import Path

import jinja2.ext
import jinja2.sandbox
import tokenizers

from data import AUDIO
from upkeep.errors import DataError, errors_of_reading
from upkeep.files import is_there, read_json

# Templates may tell the date. Here it is one for ever, so that a run means the same tomorrow: that
# of Granite Speech 3.3's model card.
TEMPLATE_DATE = datetime.date(2025, 4, 9)


class ChatTokenizer:
    """The tokenizer.json of a released checkpoint, with its chat template around every prompt.

    Raises DataError where a file is missing or damaged, or the template has no place for the audio.
    """

    def __init__(self, folder: Path, system_prompt: str = ""):
        self.folder = folder
        settings = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second prevails
            if is_there(folder / name):
                values = read_json(folder / name)
                settings |= {key: value for key, value in values.items() if value is not None}
        self.file = folder / "tokenizer.json"
        with errors_of_reading(self.file, "a tokenizer of the library tokenizers"):
            text = self.file.read_text(encoding="utf-8-sig")
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
            self.tokenizer.no_truncation()  # the file may hold both, from somebody's training
            self.tokenizer.no_padding()
            self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())
        self.special = {}  # what templates may ask for, as transformers hands it to them
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                self.special[name] = token
        self.eos_id = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.audio_id = self.tokenizer.token_to_id(AUDIO)
        if self.eos_id is None or self.audio_id is None:
            raise DataError(
                f"{folder}: no eos_token in tokenizer_config.json or special_tokens_map.json that "
                f"tokenizer.json knows, or no {AUDIO} in tokenizer.json"
            )
        self.system = []
        if system_prompt:
            self.system = [{"role": "system", "content": system_prompt}]
        source = chat_template(folder, settings)
        with errors_of_reading(f"{folder}: the chat template", "jinja2"):
            self.template = compile_template(source)

    def encode_prompt(self, prompt: str) -> list[int]:
        messages = [*self.system, {"role": "user", "content": prompt}]
        with errors_of_reading(f"{self.folder}: the chat template", "one for this conversation"):
            text = self.template.render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        if self.system and self.system[0]["content"] not in text:
            raise DataError(
                "the checkpoint's chat template has no place for a system prompt: go on without it"
            )
        with errors_of_reading(self.file, "a tokenizer of this chat template's text"):
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
    """The conversation's format, wherever a checkpoint keeps it; of several, the default one."""
    source = settings.get("chat_template")
    if is_there(folder / "chat_template.json"):
        source = read_json(folder / "chat_template.json").get("chat_template")
    if is_there(folder / "chat_template.jinja"):
        with errors_of_reading(folder / "chat_template.jinja", "text"):
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8-sig")
    if isinstance(source, list):
        with errors_of_reading(f"{folder}: the list of chat templates", "names and templates"):
            source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or not source.strip():
        raise DataError(
            f"{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json "
            "or chat_template.json; of several, the one named default is wanted"
        )
    return source


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks an answer, for training on it; here it is what stands inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


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
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)
