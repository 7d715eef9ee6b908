"""What tests in several rooms need: miniature models, runs and corpora, and ways to compare."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import data
import lora
import pretrain
import train
from corpora import synthetic
from model import EncoderConfig, ProjectorConfig, Prompts, SpeechConfig, SpeechLM, TextConfig
from pretrain import ends_of_branches, init_weights
from upkeep.files import read_json
from upkeep.optim import Updater

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask its hub about the base model
ROOT = Path(train.__file__).resolve().parent
torch.set_num_threads(1)  # tensors here are tiny: a second thread would only be waited for

EOS = 0
V = 23  # vocabulary of the models here, and the audio token's id

near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
roughly = partial(near, atol=1e-4, rtol=1e-4)
same = partial(near, atol=0, rtol=0)


def rand(*shape, seed=0, kind=torch.rand):
    return kind(shape, generator=torch.Generator().manual_seed(seed))


randn = partial(rand, kind=torch.randn)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """What a test finds must not depend on which tests ran before it; bases are shallow."""
    torch.manual_seed(0)
    monkeypatch.setattr(pretrain, "compact", shallow)


def shallow(*sizes):
    """The compact model with half of its layers: at these sizes a layer costs its kernels' calls,
    and no test can tell four from two."""
    config = compact(*sizes)
    config.encoder_config.num_layers = 2
    config.text_config.num_hidden_layers = 2
    return config


compact = pretrain.compact
# Runs in miniature hear the same few rows: each is synthesised once.
synthetic.Speech.samples = cache(synthetic.Speech.samples)


def pad_responses(responses, width=None, pad=EOS):
    """Lists of token ids -> tokens (K, T), lengths (K,)."""
    width = max(map(len, responses)) if width is None else width
    rows = [list(o) + [pad] * (width - len(o)) for o in responses]
    tokens = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
    return tokens, torch.tensor([len(o) for o in responses])


@torch.no_grad()
def shake(net, scale=0.1):
    """Every weight and running statistic away from its initial value, so that none is ignored
    unnoticed."""
    for seed, p in enumerate(net.parameters()):
        p += scale * randn(*p.shape, seed=seed)
    for seed, (name, b) in enumerate(net.named_buffers()):
        b.copy_(rand(*b.shape, seed=seed) + 0.5 if "running" in name else b)
    return net.eval()


def odd_config(seed):
    """Odd sizes and no multiplier at 1. Four seeds: 1 to 4 encoder layers; GQA, MHA, one KV
    head; tied and untied."""
    tied = seed % 2 == 1
    context = 9 + 7 * seed
    window, downsample, heads, kv_heads, head_dim = [
        (15, 5, 4, 2, None),
        (6, 2, 4, 4, None),
        (8, 4, 6, 3, 10),
        (7, 7, 6, 1, 10),
    ][seed]
    return SpeechConfig(
        EncoderConfig(
            num_layers=1 + seed,
            hidden_dim=24,
            feedforward_mult=1 + seed,
            num_heads=3,
            dim_head=5 + seed,
            output_dim=[6, 7, 5, 9][seed],
            context_size=context,
            max_pos_emb=context + 8 * tied,
            conv_kernel_size=4 + seed,
            conv_expansion_factor=2 - tied,
            dropout=0.0,
        ),
        ProjectorConfig(
            hidden_size=32,
            num_hidden_layers=1 + seed,
            num_attention_heads=2 + 2 * tied,
            intermediate_size=40,
            encoder_hidden_size=24,
            cross_attention_frequency=1 + tied,
            layer_norm_eps=[1e-12, 1e-2][tied],
        ),
        TextConfig(
            vocab_size=V,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2 + tied,
            head_dim=head_dim,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=[1e-5, 0.1][tied],
            rope_theta=10.0 ** (2 + seed),
            embedding_multiplier=1.5,
            attention_multiplier=0.4,
            residual_multiplier=0.7,
            logits_scaling=1.6,
        ),
        audio_token_index=V,
        window_size=window,
        downsample_rate=downsample,
        tie_word_embeddings=tied,
    )


def even_config(seed):
    """Attention as wide as GPUs' kernels want it, multiples of 8: 8, 16 and 64 in encoder, projector
    and decoder. Odd widths they leave to plain matrix products."""
    config = odd_config(seed)
    config.encoder_config.dim_head = 8
    config.projector_config.num_attention_heads = 2
    config.text_config.head_dim = 64
    config.text_config.attention_multiplier = 1 / 8
    return config


def make_model(seed=2, scale=0.3, config=odd_config):
    """Nothing of it at its initial value; scale: how far from uniform its distributions are."""
    model = init_weights(SpeechLM(config(seed)), 0)
    for last in ends_of_branches(model):  # begun small, they would hide behind the rest
        last.weight.data *= 10
    return shake(model, scale)


def make_transformers(seed, folder, max_shard_size="1GB"):
    """The same in transformers, saved under folder as IBM publishes it. Their Granite Speech
    forgets logits_scaling."""
    hf = pytest.importorskip("transformers")
    config = asdict(odd_config(seed))
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    text = {k: v for k, v in config["text_config"].items() if v is not None}  # head_dim
    text |= {"model_type": "granite", "pad_token_id": 0, "tie_word_embeddings": seed % 2 == 1}
    config["text_config"] = text
    torch.manual_seed(seed)
    config = hf.GraniteSpeechConfig(**config, has_lora_adapter=False)
    theirs = shake(hf.GraniteSpeechForConditionalGeneration(config), 0.3)
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs


def their_logits(theirs, mel):
    """Ids and logits of 4 <audio> 5 6."""
    c = theirs.config
    windows = math.ceil(mel.shape[1] / c.window_size)
    audio = [V] * (windows * (c.window_size // c.downsample_rate))
    ids = torch.tensor([[4, *audio, 5, 6]] * len(mel))
    return ids, theirs(input_ids=ids, input_features=mel).logits / c.text_config.logits_scaling


def rms_norm(x, layer):
    """nn.RMSNorm by its formula."""
    mean_square = x.float().square().mean(-1, keepdim=True)
    return (x.float() * (mean_square + layer.eps).rsqrt()).to(x.dtype) * layer.weight


def turn(x, angle):
    """Rotary positions: x (B, S, H, D) as D / 2 complex numbers, turned by angle (S, D / 2)."""
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def causal_logits(model, x):
    """Logits for embeddings (B, S, C) as plain causal sequences, written out from the layers'
    weights: nothing of model.py's decoder runs but its linear layers, which may have LoRA."""
    text = model.config.text_config
    decoder = model.language_model.model
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    D = text.head_dim or text.hidden_size // heads
    S = x.shape[1]
    future = torch.ones(S, S).triu(1) > 0
    angle = torch.arange(S)[:, None] * text.rope_theta ** (-torch.arange(0, D, 2) / D)
    x = x * text.embedding_multiplier
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = rms_norm(x, layer.input_layernorm)
        q = turn(attention.q_proj(normed).unflatten(-1, (heads, D)), angle)
        k = turn(attention.k_proj(normed).unflatten(-1, (kv_heads, D)), angle)
        v = attention.v_proj(normed).unflatten(-1, (kv_heads, D))
        k = k.repeat_interleave(heads // kv_heads, dim=2)
        v = v.repeat_interleave(heads // kv_heads, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * text.attention_multiplier
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        found = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + text.residual_multiplier * attention.o_proj(found)
        normed = rms_norm(x, layer.post_attention_layernorm)
        gate = mlp.gate_proj(normed)
        x = x + text.residual_multiplier * mlp.down_proj(
            gate * gate.sigmoid() * mlp.up_proj(normed)
        )
    hidden = rms_norm(x, decoder.norm)
    if text_head := getattr(model.language_model, "lm_head", None):
        return text_head(hidden).float() / text.logits_scaling
    return (hidden @ decoder.embed_tokens.weight.T).float() / text.logits_scaling


def score_alone(model, x, tokens):
    """Logits (T, V) that predict each token of one response (T,) after one prompt (L, C); their
    log-probabilities."""
    sequence = torch.cat((x, model.language_model.model.embed_tokens(tokens)))
    logits = causal_logits(model, sequence[None])[0, len(x) - 1 : -1]
    return logits, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def make_prompts(lengths, padding=(0, 1.0)):
    """Ragged prompts of random embeddings, padded with junk on the left. padding: how many columns
    of it more than the longest prompt needs, and how large it is."""
    more, size = padding
    L = max(lengths) + more
    valid = torch.arange(L) >= L - torch.tensor(lengths)[:, None]
    x = randn(len(lengths), L, 24)
    return Prompts(torch.where(valid[..., None], x, size * x), valid)


PADDINGS = [(0, 1.0), (2, 1e3), (8, -30.0)]


def truncated(logits, temperature, top_p):
    """Sampling distribution (V,), in float64 and one token at a time; and the log of the mass
    that was kept. Tokens as probable as the last one that is needed are kept, too."""
    p = (logits.double() / temperature).softmax(-1)
    probability = p.tolist()
    mass = 0.0
    last = math.inf
    kept = []
    for token in p.argsort(descending=True).tolist():
        if mass >= top_p and probability[token] < last:
            break
        last = probability[token]
        mass += last
        kept.append(token)
    q = torch.zeros_like(p)
    q[kept] = p[kept]
    return (q / mass).float(), math.log(mass)


def edit_json(file, **changes):
    """Change fields of a JSON file; ... removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# Loads a model in bfloat16 and prints by how much the process grew at its peak, in bytes.
LOADING = r"""
import re, sys, torch
{imports}
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
torch.nn.Embedding(9, 9, device="meta").requires_grad_(False)  # these import a lot
torch.randn(9, device="meta")
before = peak()
model = {load}(sys.argv[1], dtype=torch.bfloat16)
assert sum(p.sum() for p in model.parameters()).isfinite()  # touches all
print(peak() - before)
"""


def growth_in_loading(folder, imports, load):
    """By how much a process grows at its peak when it loads the model in a folder, in bytes."""
    command = [sys.executable, "-c", LOADING.format(imports=imports, load=load), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout)


def make_large_model():
    """In bfloat16, more than 200 MB."""
    config = odd_config(0)
    config.text_config.vocab_size = 30_000
    config.text_config.hidden_size = 768
    config.text_config.intermediate_size = 8192
    config.text_config.num_hidden_layers = 4
    with torch.device("meta"):
        model = SpeechLM(config).bfloat16()
    model.to_empty(device="cpu")  # random numbers would take longer than all that is tested
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEL = randn(2, 20, 160)


def shake_lora(model, targets=lora.DECODER_TARGETS, r=3, alpha=12.0, dropout=0.0):
    """Adapters whose B is not zero."""
    names = lora.apply_lora(model, targets, r, alpha, dropout)
    for seed, p in enumerate(lora.lora_parameters(model).values()):
        p.data += 0.2 * randn(*p.shape, seed=seed)
    return names


def forward(model, mel=MEL):
    """Logits of 4 <audio> 5 6, through every module."""
    lengths = torch.tensor([mel.shape[1]] * len(mel))
    sound, _ = model.projector(model.encoder(mel, lengths)[0], lengths)
    return causal_logits(model, model.embed_prompts([[4, V, 5, 6]] * len(mel), list(sound)).x)


# Without gradients; where they are wanted, other kernels may round differently.
logits_of = torch.no_grad()(forward)


def write_tone(path, seconds, rate, channels=1):
    """440 Hz on the first channel, silence on the others."""
    time = np.arange(round(seconds * rate)) / rate
    both = np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0 * time], axis=1)
    soundfile.write(path, both[:, :channels], rate)


TINY = """
    --train-rows 24 --validation-rows 4 --test-rows 6 --ctc-steps 3 --sft-steps 4 --base-batch 4
    --steps 4 --prompts 4 --update-prompts 2 --micro-prompts 2 --responses 4 --max-new-tokens 8
    --lora-r 4 --eval-every 2 --eval-passes 1 --save-every 2 --device cpu
""".split()
TIMINGS = ("seconds", "sampling_share", "tokens_per_second")
SUFFIXES = ",".join(PLAIN)  # as the paper's runs: the Conformer's feed-forwards are adapted, too


def tiny(flags="", **paths):
    """The command line of a run in miniature: more flags as one would type them, and --NAME PATH
    for each of the paths."""
    command = [*TINY, *flags.split()]
    for name, path in paths.items():
        command += ["--" + name.replace("_", "-"), str(path)]
    return command


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """A whole run in miniature that nobody interrupts; its base model is shared by the tests
    below. Made once, whichever file of tests asks first: a finished run is not run again."""
    folder = tmp_path_factory.getbasetemp() / "runs" / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "compact", shallow)
        train.main(tiny(out=folder))
    return folder


def base_of(run):
    return run.parent / "base-qa-seed0"


def read_json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder, stage="policy"):
    rows = read_json_lines(folder / f"{stage}.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@contextlib.contextmanager
def stopping_at(update, number=signal.SIGTERM):
    """A signal arrives during the update of that number."""
    calls = []
    step = Updater.step

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return step(self, *args)

    # As in a terminal: under nohup, or behind a shell's &, some signals are ignored from the start.
    before = signal.signal(number, lambda *_: pytest.fail("the run did not take the signal"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Updater, "step", interrupted)
            yield calls
    finally:
        signal.signal(number, before)


def assert_same_run(a, b, base=True):
    """Weights bit for bit, the base's too, metrics and results to the last digit."""
    weights_a = adapter(a)
    weights_b = adapter(b)
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)
    if base:
        base_a, base_b = (load_file(base_of(folder) / "model.safetensors") for folder in (a, b))
        assert all(torch.equal(base_a[k], base_b[k]) for k in base_a)
    assert repr(metrics(a)) == repr(metrics(b))  # repr: nan equals nan
    samples_a, samples_b = (folder / "samples.jsonl" for folder in (a, b))
    assert samples_a.exists() == samples_b.exists()
    assert not samples_a.exists() or samples_a.read_bytes() == samples_b.read_bytes()
    results_a, results_b = (read_json(folder / "results.json") for folder in (a, b))
    assert repr(results_a["base"]) == repr(results_b["base"])
    assert repr(results_a["trained"]) == repr(results_b["trained"])


def by_letters(answer, row):
    """A reward that tells answers apart: the tiny base never earns any BLEU."""
    return sum(map(ord, answer)) % 11 / 11


def load_policy(first_run, out, flags):
    """What train_policy is given, up to the targets: on the base of the first run, with fresh
    LoRA."""
    cfg, _ = train.parse(tiny(flags, base=base_of(first_run), out=out))
    model, tokenizer = train.load(cfg, torch.device("cpu"), torch.float32)
    targets = train.adapt(cfg, model)
    splits = {name: data.Split(name, rows, 1.0) for name, rows in train.load_rows(cfg).items()}
    for split in splits.values():
        split.hear(model, tokenizer)
    return cfg, model, tokenizer, splits, out, targets


def write_corpus(folder, transcripts=True, rows=12):
    """A corpus of short tones at 16 kHz; the reference names the tone."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = []
        for i in range(rows):
            time = torch.arange(6400 + 160 * i) / 16000
            tone = 0.3 * torch.sin(2 * math.pi * 300 * (1 + i % 3) * time)
            soundfile.write(folder / f"{split}{i}.wav", tone.numpy(), 16000)
            row = {
                "audio": f"{split}{i}.wav",
                "prompt": "<|audio|>Which tone?",
                "reference": f"Tone {'abc'[i % 3]} it is.",
            }
            if transcripts:
                row |= {"transcript": "abc"[i % 3], "group": "g"}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
