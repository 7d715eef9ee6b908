"""Released checkpoints, as IBM publishes them: shards, a LoRA of their own, a chat template.

Made up here by transformers and PEFT, at random and small; what is loaded is held against them.
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import data
import lora
import train
from corpora import load
from data import AUDIO
from model import SpeechConfig, SpeechLM
from released import ChatTokenizer, load_model
from released.checkpoint import INDEX, fold
from released.config import from_dict, without_weights
from tests.helpers import (
    PLAIN,
    SUFFIXES,
    adapter,
    by_letters,
    causal_logits,
    edit_json,
    first_run,
    growth_in_loading,
    logits_of,
    make_large_model,
    make_model,
    make_transformers,
    odd_config,
    randn,
    read_json_lines,
    roughly,
    same,
    seeded,
    shake,
    shake_lora,
    tiny,
    write_corpus,
)
from tools import ask
from tools.export import export
from upkeep.errors import DataError, UserError
from upkeep.files import read_json
from upkeep.tensors import our_name

__all__ = ["first_run", "seeded"]  # fixtures

# --------------------------------------------------------------------------------------------------
# Weights: shards, names, a LoRA in the folder


@pytest.mark.parametrize("seed", range(4))
def test_their_shards_are_one_model(seed, tmp_path):
    """Several files with an index are loaded as one file is: the test of model.py that it computes
    what transformers does is on one."""
    make_transformers(seed, tmp_path / "whole")
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    theirs = make_transformers(seed, tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists() and len(shards) > 1
    ours = load_model(tmp_path / "shards").eval()
    assert ours.config == from_dict(theirs.config.to_dict()) == odd_config(seed)
    same(ours.state_dict(), load_model(tmp_path / "whole").state_dict())
    assert all(p.requires_grad for p in ours.parameters())
    shards[-1].with_name("model-00001-of-00099.safetensors").write_bytes(b"not in the index")
    same(load_model(tmp_path / "shards").state_dict(), ours.state_dict())
    shards[0].write_bytes(b"Entry not found, says the server")
    with pytest.raises(ValueError, match=f"{shards[0].name} cannot be read"):
        load_model(tmp_path / "shards")


@pytest.mark.parametrize("seed", [1, 2])
def test_model_files(seed, tmp_path):
    """What we save is loaded; and under the names that tensors have in transformers' memory."""
    model = make_model(seed)
    model.save(tmp_path)
    file = tmp_path / "model.safetensors"
    config = read_json(tmp_path / "config.json")
    weights = load_file(file)
    again = load_model(tmp_path)
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    half.save(tmp_path)
    same(load_model(tmp_path).state_dict(), half.state_dict())  # as stored
    tied = {part: config[part] for part in ("encoder_config", "projector_config", "text_config")}
    for value, want in (({}, True), ({"tie_word_embeddings": False}, False)):
        text = tied | {"text_config": tied["text_config"] | value}  # 3.3 says it here alone
        assert from_dict(text).tie_word_embeddings == want
        untied = from_dict(text | {"tie_word_embeddings": False})
        assert not untied.tie_word_embeddings
    in_memory = {}
    for name, tensor in weights.items():
        if "lm_head" in name:
            in_memory[name.replace("language_model.lm_head", "lm_head")] = tensor
        else:
            inner = name.replace("language_model.model.", "language_model.")
            in_memory["model." + inner] = tensor
    save_file(in_memory, file)
    same(load_model(tmp_path).state_dict(), model.state_dict())
    without_counters = {n: w for n, w in in_memory.items() if "num_batches" not in n}
    save_file(without_counters, file)
    same(load_model(tmp_path).state_dict(), model.state_dict())  # as in the 3.3 releases

    def refused(*words):
        with pytest.raises(ValueError) as error:
            load_model(tmp_path)
        assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value

    name, tensor = next(item for item in in_memory.items() if "o_proj" in item[0])
    some = {n: w for n, w in in_memory.items() if n != name}
    save_file(some | {"model.encoder.extra": tensor}, file)
    missing = "missing language_model.model.layers.0.self_attn.o_proj.weight"
    refused("2 problems", missing, "unknown model.encoder.extra")
    save_file(in_memory | {name: tensor[1:].contiguous()}, file)
    refused("1 problems", f"{name} is {tuple(tensor[1:].shape)}, not {tuple(tensor.shape)}")
    file.write_bytes(b"Entry not found, says the server, in place of a model")
    refused("model.safetensors cannot be read")
    save_file(in_memory, file)
    edit_json(tmp_path / "config.json", has_lora_adapter=True)
    refused("adapter_config.json and adapter_model.safetensors are missing")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_loading_shards_takes_little_more_memory_than_the_weights(tmp_path):
    model = make_large_model()
    size = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path)
    del model
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shard_of = {name: f"model-{i % 4}.safetensors" for i, name in enumerate(names)}
    for shard in set(shard_of.values()):
        save_file({n: tensors[n] for n in names if shard_of[n] == shard}, tmp_path / shard)
    index = {"weight_map": shard_of}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors
    grown = growth_in_loading(tmp_path, "from released import load_model", "load_model")
    assert size > 200e6 and 0.9 < grown / size < 1.3, grown / size


def test_a_lora_in_the_folder_belongs_to_the_checkpoint(tmp_path):
    """Whatever config.json says of it, as in transformers."""
    model = make_model()
    model.save(tmp_path)
    shake_lora(model, ["q_proj"])
    lora.save_adapter(model, tmp_path, ["q_proj"])
    for said in (..., False, True):
        edit_json(tmp_path / "config.json", has_lora_adapter=said)
        roughly(logits_of(load_model(tmp_path).eval()), logits_of(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_no_checkpoint_gets_one_line(checkpoint, tmp_path):
    """Each file of another kind: an error that names it, and what was expected."""
    folder = shutil.copytree(checkpoint[0], tmp_path / "ck")

    def refused(file, *words):
        with pytest.raises(UserError) as error:
            load_model(folder)
        said = str(error.value)
        assert all(word in said for word in (file, *words)), said
        assert "problems" in said or "\n" not in said

    def each(file, contents, *words):
        whole = (folder / file).read_bytes()
        for content in contents:
            (folder / file).write_bytes(content)
            refused(file, *words)
        (folder / file).write_bytes(whole)
        load_model(folder)

    no_json = (b"", b"[1, 2]", b"null", b"{", b"\xff\xfe{\0}\0", b"[" * 10**5, b"1" * 5000)
    for file in ("config.json", "adapter_config.json", INDEX):
        each(file, no_json, "cannot be read as a JSON object")
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(b"\xef\xbb\xbf" + whole)  # a byte order mark is no harm
        load_model(folder)
        (folder / file).write_bytes(whole)
    no_index = (b"{}", b'{"weight_map": {}}', b'{"weight_map": ["a"]}', b'{"weight_map": {"a": 1}}')
    each(INDEX, no_index, "index of safetensors")
    shard = next(iter(read_json(folder / INDEX)["weight_map"].values()))
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    cut_short = len(header).to_bytes(8, "little") + header + b"1234"
    for file in (shard, "adapter_model.safetensors"):
        each(file, (b"", b"Entry not found", cut_short), "safetensors")
        tensors = load_file(folder / file)
        name = next(name for name in tensors if name.endswith("weight"))
        for tensor, word in (
            (tensors[name].to(torch.int8), "int8"),
            (tensors[name].to(torch.float8_e4m3fn), "float8"),
            (tensors[name] > 0, "bool"),
            (tensors[name] / 0, "not finite"),
        ):
            save_file(tensors | {name: tensor}, folder / file)
            refused(file, "1 problems", name, word)
        save_file(tensors, folder / file)
    (folder / shard).rename(folder / "elsewhere")
    refused(shard, "No such file")


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("", "model_type", ("granite_speech_nar", "whisper")),
        ("encoder_config", "model_type", ("granite_speech5_encoder",)),
        ("projector_config", "hidden_act", ("relu", "gelu_new")),
        ("projector_config", "use_qformer_text_input", (True,)),
        ("projector_config", "position_embedding_type", ("relative_key",)),
        ("projector_config", "model_type", ("granite_speech_qformer",)),
        ("text_config", "model_type", ("llama", "granitemoehybrid")),
        ("text_config", "hidden_act", ("gelu", "relu")),
        ("text_config", "attention_bias", (True,)),
        ("text_config", "mlp_bias", (True,)),
        ("text_config", "partial_rotary_factor", (0.5,)),
        ("text_config", "rope_scaling", ({"type": "linear", "factor": 2.0},)),
        ("text_config", "rope_parameters", ({"rope_type": "yarn"}, {"partial_rotary_factor": 0.5})),
        ("text_config", "sliding_window", (4096,)),
        ("text_config", "logits_scaling", (0, float("nan"), float("inf"), -1)),
        # What would not go unnoticed gets one line, too.
        ("", "text_config", (..., [])),
        ("", "downsample_rate", (0, "5")),
        ("encoder_config", "cat_hidden_layers", ([1],)),
        ("encoder_config", "input_dim", (80,)),
        ("text_config", "logits_scaling", ("8", [8])),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_is_not_ours_is_refused(part, field, values, checkpoint, tmp_path):
    file = tmp_path / "config.json"
    config = read_json(checkpoint[0] / "config.json")
    file.write_text(json.dumps(config))
    without_weights(file)
    for value in values:
        file.write_text(json.dumps(config))
        changed = {field: value}
        if part:
            changed = {part: {**config[part], field: value}}
        edit_json(file, **changed)
        with pytest.raises(DataError, match=re.escape(f"{file} cannot be read as the config.json")):
            without_weights(file)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_concatenated_layers_are_those_of_transformers(tmp_path):
    """4.1-2b-plus: the input, the layer that is told the transcript and another one, besides the
    last, go to the projector."""
    config = odd_config(3)
    config.encoder_config.cat_hidden_layers = [0, 2, 3]
    config.projector_config.encoder_hidden_size = 4 * config.encoder_config.hidden_dim
    _, theirs = make_checkpoint(tmp_path, config, "Plus")
    ours = load_model(tmp_path).eval()
    assert ours.config.encoder_config == config.encoder_config
    mels = [randn(n, 160, seed=n) for n in (47, 7, 31)]
    frames = ours.encode(mels)
    sounds = ours.project(frames)
    audio = ours.config.audio_token_index
    prompts = ours.embed_prompts([[4, audio, 5, 6]] * len(mels), sounds)
    for i, mel in enumerate(mels):
        assert frames[i].shape == (len(mel), 4 * config.encoder_config.hidden_dim)
        roughly(frames[i], theirs.model.encoder(mel[None]).last_hidden_state[0])
        ids = torch.tensor([[4] + [audio] * len(sounds[i]) + [5, 6]])
        logits = theirs(input_ids=ids, input_features=mel[None]).logits
        x = prompts.x[i][None, prompts.valid[i]]
        roughly(causal_logits(ours, x), logits / config.text_config.logits_scaling)


def test_fold_leaves_plain_layers_rounded_once():
    model = make_model().bfloat16().train()
    names = shake_lora(model, ["ff1.up_proj", "q_proj"])
    layers = {name: model.get_submodule(name) for name in names}
    want = {n: (x.weight.float() + 4 * x.lora_B @ x.lora_A).bfloat16() for n, x in layers.items()}
    fold(model)
    assert not lora.lora_layers(model) and not lora.lora_parameters(model)
    for name, layer in layers.items():
        plain = model.get_submodule(name)
        same((plain.weight, plain.bias), (want[name], layer.bias))
        assert type(plain) is nn.Linear
        assert plain.training
        assert (plain.bias is not None) == ("ff1" in name)
    shake_lora(model)  # ready for the next


# --------------------------------------------------------------------------------------------------
# A whole checkpoint: from the recording and the question to the logits


TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}
    {%- set system = 'Today is ' + strftime_now('%d %B %Y') + '.' %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + eos_token + '\\n' }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('no such role') }}
    {%- endif %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}
    {{- message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""


def make_tokenizer():
    """Of bytes and few merges, as transformers wraps it, with the special tokens of Granite."""
    hf = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", AUDIO],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Who was where and when? What happened? Anna bought those red apples."
    tokenizer.train_from_iterator([text] * 3, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>"
    )


def make_checkpoint(folder, config: SpeechConfig, kind="", max_shard_size="60KB"):
    """A random checkpoint in the layout of granite-4.0-1b-speech, made by transformers: its
    processor and their model. kind: "Plus" for 4.1-2b-plus's."""
    hf = pytest.importorskip("transformers")
    fast = make_tokenizer()
    features = hf.GraniteSpeechFeatureExtractor()
    processor = hf.GraniteSpeechProcessor(features, fast, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    config = asdict(config)
    config |= {"has_lora_adapter": False, "window_size": 15, "downsample_rate": 5}
    config["audio_token_index"] = fast.convert_tokens_to_ids(AUDIO)
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    config["text_config"] |= {"model_type": "granite", "vocab_size": len(fast)}
    config["text_config"] |= {"pad_token_id": 0, "eos_token_id": 0}
    if config["text_config"]["head_dim"] is None:
        del config["text_config"]["head_dim"]
    torch.manual_seed(0)
    config = getattr(hf, f"GraniteSpeech{kind}Config")(**config)
    theirs = shake(getattr(hf, f"GraniteSpeech{kind}ForConditionalGeneration")(config), 0.2)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return processor, theirs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One in the layout of granite-speech-3.3, with a LoRA that PEFT made, and their model."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("released")
    processor, theirs = make_checkpoint(folder, odd_config(3))
    edit_json(folder / "config.json", has_lora_adapter=True)
    modality = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(theirs, modality).eval()
    theirs.save_pretrained(folder)
    adapter_file = folder / "adapter_model.safetensors"
    assert adapter_file.exists()
    tensors = {our_name(name): tensor for name, tensor in load_file(adapter_file).items()}
    save_file(tensors, adapter_file)  # IBM's has the decoder's released names
    left_behind = folder / "model-00001-of-00099.safetensors"
    left_behind.write_bytes(b"the index does not name it")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder, processor, theirs


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_released_checkpoint_says_what_it_says_in_transformers(checkpoint):
    """From the recording and the question to the logits, through the chat template and with its
    LoRA merged."""
    folder, processor, theirs = checkpoint
    ours = load_model(folder).eval()
    tokenizer = ChatTokenizer(folder, "Be brief.")
    assert not lora.lora_layers(ours) and all(p.requires_grad for p in ours.parameters())
    for samples, question in (
        (16000, "What happened?"),
        (33333, "Who\n was  where, naïve <|end_of_text|> Anna?"),
    ):
        audio = 0.1 * randn(samples, seed=samples)
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": AUDIO + question},
        ]
        text = processor.tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text, audio, return_tensors="pt")
        sound = ours.project(ours.encode([data.log_mel(audio)]))
        ids = tokenizer.encode_prompt(AUDIO + question)
        at = ids.index(tokenizer.audio_id)
        expanded = ids[:at] + [tokenizer.audio_id] * len(sound[0]) + ids[at + 1 :]
        assert expanded == inputs["input_ids"][0].tolist()
        prompts = ours.embed_prompts([ids], sound)
        logits = theirs(**{k: v for k, v in inputs.items() if "mask" not in k}).logits
        roughly(causal_logits(ours, prompts.x), logits / ours.config.text_config.logits_scaling)
        same(prompts.x.shape[1], len(expanded))
    answer = "Anna bought naïve apples. 漢"
    ids = processor.tokenizer(answer).input_ids
    assert tokenizer.decode(ids + [tokenizer.eos_id]) == answer
    assert "".join(tokenizer.pieces(ids[:3])) in answer
    assert tokenizer.eos_id == processor.tokenizer.eos_token_id


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_readmes_way_into_transformers(checkpoint, tmp_path):
    """What the README tells users of transformers and PEFT to do with our adapter gives our
    logits."""
    folder, _, _ = checkpoint
    ours = load_model(folder).eval()
    shake_lora(ours, PLAIN, r=3, alpha=9.0)
    lora.save_adapter(ours, tmp_path / "adapter", PLAIN, base=str(folder))
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from peft import .*?)```", readme, re.DOTALL)[1]
    for there, here in (
        ("granite-speech-3.3-2b", str(folder)),
        ("runs/sqa-leaf-seed0", str(tmp_path)),
        ('dtype="bfloat16"', 'dtype="float32"'),
    ):
        assert there in code
        code = code.replace(there, here)
    names = {}
    exec(code, names)
    theirs = names["model"].eval()
    mel = randn(47, 160)
    sounds = ours.project(ours.encode([mel]))
    audio = ours.config.audio_token_index
    prompts = ours.embed_prompts([[4, audio, 5, 6]], sounds)
    ids = torch.tensor([[4] + [audio] * len(sounds[0]) + [5, 6]])
    logits = theirs(input_ids=ids, input_features=mel[None]).logits
    logits = logits / ours.config.text_config.logits_scaling
    roughly(causal_logits(ours, prompts.x), logits)
    with lora.lora_disabled(ours):
        assert not torch.allclose(causal_logits(ours, prompts.x), logits, atol=1e-2)


# --------------------------------------------------------------------------------------------------
# The chat template and the tokenizer


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chat_templates_are_found_and_kept_in_their_sandbox(checkpoint, tmp_path):
    """In any of the three places; without a system prompt the date is a fixed one; a template
    cannot reach out."""
    folder, processor, _ = checkpoint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(tmp_path)

    def text(system=""):
        tokenizer = ChatTokenizer(tmp_path, system)
        ids = tokenizer.encode_prompt(AUDIO + "?")
        return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    for file, word, content in (
        ("tokenizer_config.json", "Today", json.dumps(settings | {"chat_template": TEMPLATE})),
        (
            "chat_template.json",
            "Now",
            json.dumps({"chat_template": TEMPLATE.replace("Today", "Now")}),
        ),
        ("chat_template.jinja", "It", TEMPLATE.replace("Today", "It")),
    ):
        (tmp_path / file).write_text(content)
        system = f"<|start_of_role|>system<|end_of_role|>{word} is 09 April 2025.<|end_of_text|>\n"
        assert text().startswith(system)
        end = f"{AUDIO}?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        assert text().endswith(end)
    for changed in ({"eos_token": None}, {"eos_token": "<|nowhere|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(DataError, match="no eos_token"):
            ChatTokenizer(tmp_path)
    in_full = settings | {"eos_token": {"content": "<|end_of_text|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(in_full))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message | tojson }}{% break %}{% endfor %}\n"
        "  {% if add_generation_prompt %}\n{{ eos_token }}{% endif %}"
    )
    assert text() == '{"role": "user", "content": "' + AUDIO + '?"}<|end_of_text|>'
    for template, error in (
        ("{{ messages[-1].content * 2 }}", "without one"),
        ("{{ raise_exception('no audio here') }}", "no audio here"),
        ("{{ messages[-1].content }}", "no place for a system prompt"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.replace('audio', 'x') }}", "audio"),
        ("{% if %}", "chat template"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(DataError, match=error):
            text("Be brief." if "system" in error else "")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    added = [token for token in tokens["added_tokens"] if token["content"] != AUDIO]
    tokens["added_tokens"] = added
    del tokens["model"]["vocab"][AUDIO]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(DataError, match=re.escape(f"no {AUDIO}")):
        ChatTokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chat_templates_get_what_transformers_gives_them(checkpoint, tmp_path):
    """White space, loop controls, tojson, special tokens; the date is fixed."""
    folder, processor, _ = checkpoint
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    special = {"content": "<|end_of_text|>", "lstrip": False, "special": True}
    settings = {"eos_token": special, "bos_token": "<|end_of_role|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = [{"role": "user", "content": AUDIO + "<é> & 'x'"}]
    for template in (
        "  {% for m in messages %}\n  {{ bos_token }}{{ m.content }}\n  {% endfor %}\n"
        "{{ eos_token }}",
        "{% for x in 'abc' %}{% if x == 'b' %}{% break %}{% endif %}{{ x }}{% endfor %}"
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        text = processor.tokenizer.apply_chat_template(
            chat,
            chat_template=template,
            tokenize=False,
            eos_token="<|end_of_text|>",
            bos_token="<|end_of_role|>",
        )
        ids = ChatTokenizer(tmp_path).encode_prompt(chat[0]["content"])
        assert ids == processor.tokenizer(text).input_ids
    tokenizer = ChatTokenizer(tmp_path)
    assert tokenizer.pieces([tokenizer.eos_id, tokenizer.audio_id]) == ["<|end_of_text|>", AUDIO]
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%B %d, %Y') }}" + AUDIO)
    tokenizer = ChatTokenizer(tmp_path)
    assert tokenizer.tokenizer.decode(tokenizer.encode_prompt("")) == "April 09, 2025"
    twice = "{{ messages[0].content }}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(twice)
    with pytest.raises(DataError, match="without one"):
        ChatTokenizer(tmp_path).encode_prompt(AUDIO)
    for settings, old in (({}, ""), ({"eos_token": "</s>"}, ""), ({"eos_token": special}, AUDIO)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if old:
            file = tmp_path / "tokenizer.json"
            without = file.read_text(encoding="utf-8").replace(old, "<|other|>")
            file.write_text(without, encoding="utf-8")
        with pytest.raises(DataError, match="no eos_token"):
            ChatTokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tokenizers_and_templates_as_others_write_them(checkpoint, tmp_path):
    """Named templates, marked answers, special tokens in any place and form, a byte order mark."""
    folder, processor, _ = checkpoint
    tokens = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + tokens)
    marked = (
        "{% set x = 'a' %}{% for m in messages %}\n  {% generation %}\n    {%- set x = 'b' %}"
        "{{ m.content }}{{ x }}\n  {% endgeneration %}\n{% endfor %}"
        "{% generation %}{% set x = 'c' %}{% endgeneration %}{{ x }}{{ eos_token }}"
    )
    chat = [{"role": "user", "content": AUDIO + "?"}]
    want = processor.tokenizer.apply_chat_template(chat, chat_template=marked, tokenize=False)
    named = [{"name": "rag", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": marked}]
    end = "<|end_of_text|>"

    def write(file, **values):
        (tmp_path / file).write_text("\ufeff" + json.dumps(values), encoding="utf-8")

    def text():
        tokenizer = ChatTokenizer(tmp_path)
        assert tokenizer.eos_id == processor.tokenizer.eos_token_id
        ids = tokenizer.encode_prompt(AUDIO + "?")
        return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)

    for eos_token in (end, {"content": end, "special": True}):
        write("tokenizer_config.json", eos_token=eos_token, chat_template=named)
        assert text() == want
        write("tokenizer_config.json", eos_token=None, chat_template=named)
        write("special_tokens_map.json", eos_token=eos_token)
        assert text() == want
    write("tokenizer_config.json", chat_template={"default": marked, "tool_use": "x"})
    assert text() == want
    write("chat_template.json", chat_template=named)
    write("tokenizer_config.json")
    assert text() == want

    def refused(words):
        with pytest.raises(UserError) as error:
            ChatTokenizer(tmp_path).encode_prompt(AUDIO + "?")
        assert all(word in str(error.value) for word in (str(tmp_path), words)), error.value
        assert "\n" not in str(error.value)

    for template in (named[:1], [marked], [{"name": "default"}], {"rag": marked}, 5, "", None):
        write("chat_template.json", chat_template=template)
        refused("chat template")
    for template in (
        "{{ 1 / 0 }}",
        "{{ 'x' * 10**13 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0].x.y }}",
        "{{ [].pop() }}",
        "{{ none + 1 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ strftime_now(5) }}",
        "{{ raise_exception(5) }}",
        "{% include 'x' %}",
        "{{ messages | nofilter }}",
        "{% generation %}",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        refused("chat template")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    refused("chat_template.jinja cannot be read as text")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + marked.encode())
    assert text() == want
    for eos_token in (5, ["a"], {"a": end}, {"content": None}, "<|nowhere|>"):
        write("special_tokens_map.json", eos_token=eos_token)
        refused("no eos_token")
    write("special_tokens_map.json", eos_token=end)
    pieces = {"a": 0, AUDIO: 1, end: 2}
    for content in (
        b"",
        b"[]",
        b'{"model": 5}',
        tokens[:-9],
        json.dumps(
            {**json.loads(tokens), "model": {"type": "WordLevel", "vocab": pieces}}
        ).encode(),
        json.dumps({**json.loads(tokens), "normalizer": {"type": "Precompiled"}}).encode(),
    ):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refused("tokenizer.json cannot be read as a tokenizer")
    (tmp_path / "tokenizer.json").write_bytes(tokens)
    for file in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
        for content in (b"", b"[]", b"5", b"{"):
            (tmp_path / file).write_bytes(content)
            refused(f"{file} cannot be read as a JSON object")
        write(file, eos_token=end, chat_template=marked)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tokenizer_neither_cuts_nor_pads_nor_says_none(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|end_of_text|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = '{"eos_token": "<|end_of_text|>", "bos_token": null}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    ours = ChatTokenizer(tmp_path)
    ids = ours.encode_prompt(AUDIO + "What happened?")
    text = ours.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == AUDIO + "What happened?"


# --------------------------------------------------------------------------------------------------
# train.py --init


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_is_trained_evaluated_and_goes_on(
    checkpoint, first_run, tmp_path, monkeypatch, capsys
):
    """--init with its chat and its LoRA merged; a run that was stopped; --resume-adapter;
    --eval-only on both."""
    folder, _, _ = checkpoint
    corpus = write_corpus(tmp_path / "tones")
    whole = tmp_path / "whole"
    flags = f"--lora-targets {SUFFIXES} --system-prompt Hm. --lr 0.05"
    command = tiny(flags, init=folder, data=corpus)
    evaluate_whole = ["--eval-only", "--out", str(whole), "--device", "cpu"]
    train.main([*command, "--out", str(whole), "--eval-passes", "2"], reward=by_letters)
    assert {"base-tones-seed0", "whole-training"}.isdisjoint(p.name for p in tmp_path.iterdir())
    results = read_json(whole / "results.json")

    # The base column is the checkpoint's own, the trained one the run's; predictions are a judge's
    # to read.
    train.main(
        [*command, "--eval-only", "--eval-passes", "2", "--out", str(tmp_path / "base")],
        reward=by_letters,
    )
    base = read_json(tmp_path / "base" / "evaluation-tones.json")
    train.main(evaluate_whole, reward=by_letters)
    trained = read_json(whole / "evaluation-tones.json")
    for name, value in results["trained"].items():
        assert (base[name], trained[name]) == (results["base"][name], value), name
    evaluated, answered = (whole / f"predictions-{name}.jsonl" for name in ("tones", "trained"))
    assert evaluated.read_text() == answered.read_text()
    rows = read_json_lines(evaluated)
    assert len(rows) == 6 and all(len(row["sampled"]) == 2 for row in rows)
    assert [row["reference"] for row in rows] == [f"Tone {'abc'[i % 3]} it is." for i in range(6)]

    # What was answered is what the model says, with the adapter on the right base.
    cfg = train.Config(init=str(folder), system_prompt="Hm.", max_new_tokens=8)
    test = data.Split("test", load.load_corpus(corpus, 30.0, False, ("test",))["test"][:6], 1.0)
    asking = [str(corpus / "test0.wav"), "Which tone?", "--device", "cpu"]
    for adapter_folder, file in (("", "base"), (whole / "adapter", "trained")):
        model, tokenizer = train.load(cfg, torch.device("cpu"), torch.float32, adapter_folder)
        assert tokenizer.system[0]["content"] == "Hm."
        assert not any(m.training for m in model.modules())
        test.hear(model, tokenizer)
        greedy = [row["greedy"] for row in read_json_lines(whole / f"predictions-{file}.jsonl")]
        assert greedy == train.answer(model, tokenizer, test, cfg)
        ask.main([str(whole), *asking])
        said = capsys.readouterr().out.rstrip("\n")
        assert said.endswith(greedy[0].rstrip("\n")) == (file == "trained")
    # One question; the other's audio.
    same(test.prompts(model, [2, 0], [0, 2]).x, test.prompts(model, [0, 2]).x)
    half, _ = train.load(cfg, torch.device("cpu"), torch.bfloat16)
    assert half.dtype == half.projector.query.dtype == torch.bfloat16

    # Its settings are the run's unless given; a checkpoint without --out has a folder of its own.
    train.main([*evaluate_whole, "--test-rows", "3", "--eval-passes", "1"], reward=by_letters)
    some = read_json(whole / "evaluation-tones.json")
    assert (some["test_rows"], some["config"]["eval_passes"], some["config"]["lora_r"]) == (3, 1, 4)
    monkeypatch.chdir(tmp_path)
    calls = []
    sample = SpeechLM.sample

    def recording(self, prompts, noise, eos_id, *how):
        calls.append((how, noise.sum().item()))
        return sample(self, prompts, noise, eos_id, *how)

    with monkeypatch.context() as recorded:
        recorded.setattr(SpeechLM, "sample", recording)
        own_adapter = ["--resume-adapter", str(whole / "adapter")]
        train.main([*command, "--eval-only", "--eval-passes", "3", *own_adapter], reward=by_letters)
    own_folder = tmp_path / "runs" / f"tones-{folder.name}-evaluation"
    again = read_json(own_folder / "evaluation-tones.json")
    assert again["BLEU greedy"] == trained["BLEU greedy"]
    assert again["exact match %"] == trained["exact match %"]
    assert [how for how, _ in calls] == [(0.0, 1.0)] + [(0.9, 0.9)] * 3
    assert len(set(calls)) == 4  # each its own noise
    greedy = [row["greedy"] for row in read_json_lines(own_folder / "predictions-tones.jsonl")]
    assert greedy == [row["greedy"] for row in rows]
    (corpus / "train.jsonl").rename(corpus / "kept")  # only the test split is asked for
    train.main([*evaluate_whole, "--eval-passes", "1"], reward=by_letters)
    (corpus / "kept").rename(corpus / "train.jsonl")

    # An adapter goes on from where it was, with its own settings.
    more = tmp_path / "more"
    other_settings = "--lora-r 9 --lr 0 --eval-passes 2".split()
    train.main([*command, *own_adapter, *other_settings, "--out", str(more)], reward=by_letters)
    same(adapter(more), adapter(whole))
    more_results = read_json(more / "results.json")
    assert more_results["base"] == results["base"]
    assert more_results["trained"] == results["trained"]
    config = read_json(more / "adapter" / "adapter_config.json")
    assert (config["r"], config["target_modules"]) == (4, PLAIN)
    ask.main([str(more), *asking])

    # Mistakes get one line.
    for flags, words in (
        (["--init", str(corpus)], "no folder with a checkpoint"),
        (["--lora-targets", "nothing", "--out", str(tmp_path / "x")], "no linear layer matches"),
        (
            ["--resume-adapter", str(first_run / "adapter"), "--out", str(tmp_path / "y")],
            "does not fit the model",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train.main([*command, *flags], reward=by_letters)
    with pytest.raises(SystemExit):
        train.main([*command, "--base", str(tmp_path / "b")])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_on_a_checkpoint_is_found_from_elsewhere(checkpoint, tmp_path, monkeypatch):
    """Its checkpoint by the run folder and not by the working directory; no split but test is
    needed."""
    folder, _, _ = checkpoint
    os.symlink(folder, tmp_path / "ck")
    corpus = write_corpus(tmp_path / "tones")
    monkeypatch.chdir(tmp_path)
    train.main(tiny("--init ck --out run --steps 1 --eval-every 0", data=corpus))
    (corpus / "train.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--eval-only", "--out", str(tmp_path / "run"), "--device", "cpu"])
    results = read_json(tmp_path / "run" / "results.json")
    again = read_json(tmp_path / "run" / "evaluation-tones.json")
    assert all(again[name] == value for name, value in results["trained"].items())
    export(tmp_path / "run", Path("whole"))  # and what it learned is all in its export
    train.main(tiny("--eval-only --init whole --out it", data=corpus))
    exported = read_json(Path("it") / "evaluation-tones.json")
    assert exported["BLEU greedy"] == pytest.approx(results["trained"]["BLEU greedy"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tokenizer_of_another_checkpoint_gets_one_line(checkpoint, tmp_path):
    """Of a longer vocabulary, which the model has no embeddings for."""
    folder = shutil.copytree(checkpoint[0], tmp_path / "ck")
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    one_more = {**tokens["added_tokens"][0], "id": 900, "content": "<|more|>"}
    edit_json(folder / "tokenizer.json", added_tokens=[*tokens["added_tokens"], one_more])
    with pytest.raises(UserError, match="ck: its tokenizer has more tokens than its model"):
        train.load(train.Config(init=str(folder)), torch.device("cpu"), torch.float32)
