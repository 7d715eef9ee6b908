"""This repository against transformers + PEFT: the same weights, tokens and machine, in one run.

    python -m experiments.bench                                 shapes small and compact, on one
                                                                CPU thread
    python -m experiments.bench --shape default --base FOLDER   a base that train.py trained, and
                                                                rows of its data
    python -m experiments.bench --shape 2b                      Granite Speech 3.3 2B with random
                                                                weights; needs CUDA
    python -m experiments.bench --scaling                       time and memory as one size grows:
                                                                table and plot

Three sides take the same training step, from log-mels to updated adapters:

    ours      this repository, through the functions that train.py calls
    official  transformers + PEFT as the authors' code calls them: one prompt at a time; its audio
              is encoded K times, and the prompt decoded K times, to sample, for old and for
              reference log-probabilities; the reference is a second model in memory; a forward
              pass of an update has one response, audio included
    tuned     transformers + PEFT as well as we can: audio heard once, all prompts and responses in
              one batch, adapters merged while sampling, a prompt's cache made once and repeated for
              its K responses, in sampling and in scoring, with gradients, too; logits where they
              are needed; the reference is the model without adapters

All freeze the encoder, adapt the decoder alone, leave dropout out, take as many optimiser steps per
rollout batch and use leaf.policy_loss. Each samples T tokens per response, without an
end-of-sequence token; what it then scores and learns from is one given set of responses. Ours takes
old log-probabilities from its sampler; so could "tuned", whence the row "step, old log-probs kept".
Ours builds the prefix trees of a batch before the reference, whose time they count in.
transformers' Granite Speech ignores logits_scaling, which is 1 here.

Before anything is timed, the sides must agree: greedy tokens, log-probabilities with and without
adapters, gradients of the adapters. Timed are whole steps, the sides in turn, after one step each
to warm up; the table has the medians. Memory is that of a fresh process with one side in it:
weights, and what its first step adds at its peak (on a CPU VmHWM over VmRSS before, on a GPU
PyTorch's own counters). Results go to experiments/results/bench.json.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import leaf
from corpora import synthetic
from experiments.footprint import SHAPES
from experiments.keep import RESULTS, processor
from lora import (
    apply_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    our_name,
    save_adapter,
)
from model import (
    EncoderConfig,
    PrefixTree,
    ProjectorConfig,
    SpeechConfig,
    SpeechLM,
    TextConfig,
    head_dim,
)

PARTS = ("hearing", "sampling", "old log-probs", "reference", "update")


@dataclass
class Workload:
    """A rollout batch and its updates."""

    prompts: int
    responses: int  # K
    tokens: int  # T
    audio: float  # seconds
    text: int  # text tokens of a prompt
    update_prompts: int
    rank: int  # of LoRA; alpha is twice as much


WORKLOADS = {
    "small": Workload(8, 8, 48, 5, 20, 4, 64),
    "compact": Workload(8, 8, 16, 3, 12, 4, 16),
    "default": Workload(8, 8, 32, 0, 0, 4, 16),  # audio and text are those of the rows
    "2b": Workload(6, 8, 200, 15, 50, 1, 64),
}
# The audio token is outside the vocabulary, or random weights would now and then say it.
CONFIGS = {
    "small": SpeechConfig(
        EncoderConfig(
            num_layers=4, hidden_dim=140, num_heads=4, dim_head=35, context_size=50, max_pos_emb=50
        ),
        ProjectorConfig(140, 1, 4, 560, 140),
        TextConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            embedding_multiplier=12.0,
            attention_multiplier=32**-0.5,
            residual_multiplier=0.5,
        ),
        audio_token_index=1024,
    ),
    "compact": SpeechConfig.compact(vocab_size=800, ctc_size=25, audio_token_index=800),
    "2b": replace(SHAPES["granite-speech-3.3-2b"], audio_token_index=49160),
}


@dataclass
class Case:
    """What every side is given."""

    mels: list[torch.Tensor]  # (frames, 160) each
    prompts: list[list[int]]  # token ids, one audio token each
    tokens: torch.Tensor  # (P, K, T)
    lengths: torch.Tensor  # (P, K)
    logp: torch.Tensor  # (P, K, T), as our sampler returned them
    advantages: torch.Tensor  # (P, K, T)
    update_prompts: int

    @property
    def mask(self):
        T = self.tokens.shape[2]
        return torch.arange(T, device=self.tokens.device) < self.lengths[..., None]

    @classmethod
    def load(cls, folder: Path, device: str) -> "Case":
        saved = torch.load(folder / "case.pt")
        saved["mels"] = [mel.to(device) for mel in saved["mels"]]
        for name, value in saved.items():
            if isinstance(value, torch.Tensor):
                saved[name] = value.to(device)
        return cls(**saved)


def prepare(shape: str, work: Workload, folder: Path, base: Path | None, device: str, dtype) -> int:
    """Write a base model, an adapter that matters and a case into folder; returns the number of
    parameters."""
    if shape == "default":
        model = SpeechLM.from_pretrained(base, "cpu", dtype)
        tokenizer = data.Tokenizer(base / "tokenizer.model")
        split = data.Split("train", synthetic.rows("qa", {"train": work.prompts}, 0)["train"], 1.0)
        mels = split.mels(list(range(work.prompts)))
        prompts = [tokenizer.encode_prompt(row["prompt"]) for row in split.rows]
        eos = tokenizer.eos_id
    else:
        config = CONFIGS[shape]
        torch.set_default_dtype(dtype)
        model = SpeechLM(config).init_weights(0)
        torch.set_default_dtype(torch.float32)
        random = torch.Generator().manual_seed(0)
        frames = int(50 * work.audio)
        mels = [torch.randn(frames, 160, generator=random) for _ in range(work.prompts)]
        size = (work.prompts, work.text)
        text = torch.randint(config.text_config.vocab_size, size, generator=random)
        half = work.text // 2
        audio = config.audio_token_index
        prompts = [[*row[:half], audio, *row[half:]] for row in text.tolist()]
        eos = -1
    model.eval().save(folder)
    torch.manual_seed(0)
    apply_lora(model, r=work.rank, alpha=2 * work.rank)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.02)
    save_adapter(model, folder / "adapter")
    model.to(device)
    noise = torch.rand(work.prompts, work.responses, work.tokens).to(device)
    with torch.no_grad():
        heard = model.embed_prompts(prompts, model.project(model.encode(mels)))
        rollout = model.sample(heard, noise, eos, 1.0, 0.9).trimmed().to("cpu")
    case = Case(
        mels,
        prompts,
        rollout.tokens,
        rollout.lengths,
        rollout.logp,
        torch.randn(rollout.tokens.shape),
        work.update_prompts,
    )
    saved = {field.name: getattr(case, field.name) for field in fields(Case)}
    torch.save(saved, folder / "case.pt")
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


# --------------------------------------------------------------------------------------------------
# The three sides


class Side:
    """One way to take a step; adapters, optimiser and updates are the same on all."""

    def start(self, case: Case, adapters: dict[str, nn.Parameter]):
        self.case = case
        self.adapters = adapters
        self.adam = torch.optim.AdamW(
            adapters.values(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.P, self.K, self.T = case.tokens.shape
        self.device = case.tokens.device

    def loss(self, logp, old, ref, at):
        """Of log-probabilities (..., T) of the responses that at selects."""
        given = (old, ref, self.case.advantages, self.case.mask)
        flat = (x[at].reshape(-1, self.T) for x in given)
        loss, _ = leaf.policy_loss(logp.reshape(-1, self.T), *flat, clip=0.2, kl_coef=0.02)
        return loss

    def backward(self, old, ref, prompts):
        """The gradient of one update."""
        self.loss(self.logp(prompts), old, ref, prompts).backward()

    def update(self, old, ref):
        for prompts in self.updates():
            self.backward(old, ref, prompts)
            nn.utils.clip_grad_norm_(self.adapters.values(), 1.0)
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def updates(self):
        return torch.arange(self.P).split(self.case.update_prompts)

    def step(self) -> dict[str, float]:
        """The seconds of each part of a whole step."""
        times = [self.clock()]

        def lap(result):
            times.append(self.clock())
            return result

        lap(self.hear())
        lap(self.sample())
        old = lap(self.policy())
        ref = lap(self.reference())
        lap(self.update(old, ref))
        return {part: end - start for part, start, end in zip(PARTS, times, times[1:])}

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Ours(Side):
    def __init__(self, folder: Path, device: str, dtype):
        self.model = SpeechLM.from_pretrained(folder, device, dtype).eval()
        load_adapter(self.model, folder / "adapter")
        self.start(Case.load(folder, device), lora_parameters(self.model))

    @torch.no_grad()
    def hear(self):
        sounds = self.model.project(self.model.encode(self.case.mels))
        self.prompts = self.model.embed_prompts(self.case.prompts, sounds)

    def sample(self, greedy=False):
        noise = torch.rand(self.case.tokens.shape, device=self.device)
        return self.model.sample(self.prompts, noise, -1, 0.0 if greedy else 1.0, 0.9).tokens

    def logp(self, prompts):
        trees = [self.trees[p] for p in prompts.tolist()]
        return self.model.response_logp(self.prompts[prompts], trees)

    def policy(self):
        return self.case.logp  # the sampler's

    @torch.no_grad()
    def reference(self):
        groups = zip(self.case.tokens.cpu(), self.case.lengths.cpu())
        self.trees = [PrefixTree(tokens, lengths) for tokens, lengths in groups]
        with lora_disabled(self.model):
            return torch.cat([self.logp(prompts) for prompts in self.updates()])


def load_transformers(folder: Path, device: str, dtype):
    """The base model in transformers' class, in eval mode."""
    # The CPU's kernels take masks and groups of queries at once, which transformers does not count
    # on.
    if device == "cpu":
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    config = json.loads((folder / "config.json").read_text())
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    text = {k: v for k, v in config["text_config"].items() if v is not None}  # head_dim
    text |= {
        "model_type": "granite",
        "pad_token_id": 0,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    config = transformers.GraniteSpeechConfig(
        **config | {"text_config": text}, has_lora_adapter=False
    )
    kind = transformers.GraniteSpeechForConditionalGeneration
    model = kind.from_pretrained(folder, config=config, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


class Peer(Side):
    def __init__(self, folder: Path, device: str, dtype):
        self.base = load_transformers(folder, device, dtype)
        self.model = peft.PeftModel.from_pretrained(
            self.base, folder / "adapter", is_trainable=True
        ).eval()
        named = {our_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        self.start(
            Case.load(folder, device),
            {k.replace(".default.weight", ""): p for k, p in named.items()},
        )


class Official(Peer):
    def __init__(self, folder: Path, device: str, dtype):
        super().__init__(folder, device, dtype)
        self.frozen = load_transformers(folder, device, dtype)
        c, audio = self.base.config, self.base.config.audio_token_index
        self.ids = []  # with the audio token once for each of its embeddings
        for ids, mel in zip(self.case.prompts, self.case.mels):
            at, count = (
                ids.index(audio),
                -(-len(mel) // c.window_size) * (c.window_size // c.downsample_rate),
            )
            self.ids.append(
                torch.tensor([*ids[:at], *[audio] * count, *ids[at + 1 :]], device=self.device)
            )

    def hear(self):
        pass  # in every forward pass that begins a sequence

    def sample(self, greedy=False):
        how = (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
        )
        sampled = []
        for ids, mel in zip(self.ids, self.case.mels):
            ids, mel = ids.repeat(self.K, 1), mel.repeat(self.K, 1, 1)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=mel,
                max_new_tokens=self.T,
                return_dict_in_generate=True,
                output_scores=True,
                **how,
            )
            tokens = out.sequences[:, ids.shape[1] :]
            torch.stack(out.scores, 1).log_softmax(-1).gather(-1, tokens[..., None])  # surprisal
            sampled.append(tokens)
        return torch.stack(sampled)

    def logp(self, model, p: int, k: slice):
        """Of responses k of prompt p, (k, T)."""
        T = int(self.case.lengths[p, k].max())
        tokens, seen = self.case.tokens[p, k, :T], self.case.mask[p, k, :T]
        prompt = self.ids[p].expand(len(tokens), -1)
        ids, attended = (
            torch.cat((prompt, tokens), 1),
            torch.cat((torch.ones_like(prompt), seen), 1),
        )
        features = self.case.mels[p].repeat(len(tokens), 1, 1)
        logits = model(input_ids=ids, attention_mask=attended, input_features=features).logits
        logp = logits[:, :-1].log_softmax(-1)[:, -T:].gather(-1, tokens[..., None])[..., 0]
        return F.pad(logp, (0, self.T - T))

    @torch.no_grad()
    def policy(self):
        return torch.stack([self.logp(self.model, p, slice(None)) for p in range(self.P)])

    @torch.no_grad()
    def reference(self):
        return torch.stack([self.logp(self.frozen, p, slice(None)) for p in range(self.P)])

    def backward(self, old, ref, prompts):
        for p in prompts.tolist():
            for k in range(self.K):
                at = p, slice(k, k + 1)
                loss = self.loss(self.logp(self.model, *at), old, ref, at)
                (loss / (len(prompts) * self.K)).backward()


class Tuned(Peer):
    @torch.no_grad()
    def hear(self):
        mels, embed = self.case.mels, self.base.get_input_embeddings()
        if len({len(mel) for mel in mels}) == 1:
            sounds = self.base.get_audio_features(
                torch.stack(mels).to(self.base.dtype)
            ).pooler_output
        else:  # transformers' encoder would hear the padding of a batch
            sounds = [
                self.base.get_audio_features(mel[None].to(self.base.dtype)).pooler_output[0]
                for mel in mels
            ]
        rows = []
        for ids, sound in zip(self.case.prompts, sounds):
            at, ids = (
                ids.index(self.base.config.audio_token_index),
                torch.tensor(ids, device=self.device),
            )
            rows.append(torch.cat((embed(ids[:at]), sound, embed(ids[at + 1 :]))))
        self.x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        self.valid = (
            torch.arange(self.x.shape[1], device=self.device)
            >= (self.x.shape[1] - lengths)[:, None]
        )

    def prefill(self, prompts):
        """Last logits and cache of prompts, each repeated K times; attention mask and positions up
        to T tokens on."""
        valid, cache = self.valid[prompts], transformers.DynamicCache(config=self.base.config)
        seen = positions = None
        if not valid.all():  # without a mask, faster kernels
            seen = F.pad(valid, (0, self.T), value=True)
            positions = (seen.cumsum(1) - 1).clamp(min=0)
        L = valid.shape[1]
        logits = self.model(
            inputs_embeds=self.x[prompts],
            attention_mask=None if seen is None else seen[:, :L],
            position_ids=None if seen is None else positions[:, :L],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        cache.batch_repeat_interleave(self.K)
        if seen is not None:
            seen, positions = (x.repeat_interleave(self.K, 0) for x in (seen, positions))
        return logits.repeat_interleave(self.K, 0), cache, seen, positions

    def follow(self, tokens, cache, seen, positions, keep=0):
        """Logits after tokens (rows, n) that follow what is in the cache; keep: a mask, if not all
        are wanted."""
        start = cache.get_seq_length()
        end = start + tokens.shape[1]
        return self.model(
            inputs_embeds=self.base.get_input_embeddings()(tokens),
            past_key_values=cache,
            use_cache=True,
            attention_mask=None if seen is None else seen[:, :end],
            position_ids=None if seen is None else positions[:, start:end],
            logits_to_keep=keep,
        ).logits

    @torch.no_grad()
    def sample(self, greedy=False):
        self.model.merge_adapter()
        logits, *state = self.prefill(torch.arange(self.P))
        tokens, logq = [], []
        for t in range(self.T):
            if t:
                logits = self.follow(tokens[-1], *state)
            q, order = logits[:, -1].float().softmax(-1).sort(-1, descending=True)
            if greedy:
                tokens.append(order[:, :1])
                continue
            mass = q.cumsum(-1)
            total = mass.masked_fill(mass - q >= 0.9, 0).amax(-1, keepdim=True)
            # multinomial is slower
            rank = torch.searchsorted(mass, torch.rand_like(total) * total, right=True)
            tokens.append(order.gather(-1, rank))
            logq.append((q.gather(-1, rank) / total).log())  # LEAF needs surprisal
        self.model.unmerge_adapter()
        return torch.cat(tokens, 1).view(self.P, self.K, self.T)

    def logp(self, prompts):
        tokens, mask = (x[prompts].flatten(0, 1) for x in (self.case.tokens, self.case.mask))
        first, *state = self.prefill(prompts)
        rest = self.follow(tokens[:, :-1], *state, keep=mask[:, 1:])
        targets = torch.cat((tokens[:, 0], tokens[:, 1:][mask[:, 1:]]))
        nll = F.cross_entropy(torch.cat((first[:, 0], rest)).float(), targets, reduction="none")
        head, tail = nll.split((len(tokens), len(nll) - len(tokens)))
        tail = torch.zeros_like(tokens[:, 1:], dtype=nll.dtype).masked_scatter(mask[:, 1:], tail)
        return -torch.cat((head[:, None], tail), 1).view(-1, self.K, self.T)

    @torch.no_grad()
    def policy(self):
        return self.logp(torch.arange(self.P))

    def reference(self):
        with self.model.disable_adapter():
            return self.policy()


SIDES = {"ours": Ours, "official": Official, "tuned": Tuned}


# --------------------------------------------------------------------------------------------------
# Agreement, time and memory


def prove(sides: dict[str, Side], exact: bool) -> dict:
    """How far the peers are from ours, before any update. exact: float32, where more than rounding
    ends the run."""
    first = sides["ours"].updates()[0]
    ours, proof = {}, {}
    for name, side in tqdm(sides.items(), desc="proof", leave=False):
        side.hear()
        tokens = side.sample(greedy=True)[:, 0]
        old = side.policy().float()
        ref = side.reference().float()
        side.backward(side.case.logp, ours.get("ref", ref), first)
        gradient = torch.cat([side.adapters[key].grad.flatten() for key in sides["ours"].adapters])
        side.adam.zero_grad(set_to_none=True)
        if name == "ours":
            ours = {"tokens": tokens, "old": old, "ref": ref, "gradient": gradient}
            continue
        mask = side.case.mask
        gap = (gradient - ours["gradient"]).norm() / ours["gradient"].norm()
        found = proof[name] = {
            "greedy tokens that differ": (tokens != ours["tokens"]).float().mean().item(),
            "log-probs": (old - ours["old"])[mask].abs().max().item(),
            "reference log-probs": (ref - ours["ref"])[mask].abs().max().item(),
            "gradient, relative": gap.item(),
        }
        print(f"{name} against ours: " + ", ".join(f"{what} {x:.1e}" for what, x in found.items()))
        for what, x in found.items():
            if exact and not x < 1e-4:
                differs = f"{what} differ by {x:.1e}"
                raise SystemExit(f"{name} does not compute what ours does: {differs}")
    return proof


def clocked(run, device: str, times: int = 5) -> float:
    """Seconds of the fastest of some runs."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took[1:])


def without_folding(ours: Ours, repeats: int) -> dict[str, float]:
    """Our seconds where no two responses to a prompt share a prefix: they are as long, but each
    begins with another token."""
    tokens = ours.case.tokens.clone()
    tokens[..., 0] = torch.arange(ours.K, device=tokens.device)
    ours.case = replace(ours.case, tokens=tokens)
    took = [ours.step() for _ in range(repeats + 1)][1:]
    return {part: median(t[part] for t in took) for part in ("reference", "update")}


def rates(ours: Ours, seconds: dict[str, float], dtype) -> dict:
    """How near our update is to the rate of a matrix product here, and our sampler to that of
    copying memory."""
    device = ours.device.type
    text = ours.model.language_model
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    big = torch.ones(2**28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(big)
    flop_rate = 2 * n**3 / clocked(lambda: a @ a, device)
    bandwidth = 2**29 / clocked(lambda: copy.copy_(big), device)
    # In plain operations, for the counter knows no formula for the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for prompts in ours.updates():
            ours.backward(ours.case.logp, ours.case.logp, prompts)
    ours.adam.zero_grad(set_to_none=True)
    c = text.model.config
    slots = ours.P * (ours.prompts.x.shape[1] + ours.K * ours.T)
    width = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim(c)
    cache = width * dtype.itemsize * slots
    read = sum(p.nbytes for p in text.parameters()) + cache / 2
    per_token = seconds["sampling"] / ours.T
    flops = counter.get_total_flops()
    use = flops / seconds["update"] / flop_rate
    share = read / bandwidth / per_token
    print(
        f"our update: {flops / 1e9:.1f} GFLOP at {100 * use:.0f}% of the "
        f"{flop_rate / 1e9:.0f} GFLOP/s of a product"
    )
    print(
        f"our sampler: {read / 1e6:.1f} MB a token in {1e3 * per_token:.2f} ms, "
        f"{100 * share:.0f}% of the {bandwidth / 1e9:.1f} GB/s of a copy"
    )
    update = {"flops": flops, "matmul_flops_per_second": flop_rate, "utilisation": use}
    decode = {
        "bytes_per_token": read,
        "seconds_per_token": per_token,
        "copy_bytes_per_second": bandwidth,
        "utilisation": share,
    }
    return {"update": update, "decode": decode}


def resident(field: str) -> int:
    """Bytes, by /proc: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def alone(name: str, folder: Path, device: str, dtype, steps: int):
    """What a side needs in a process of its own: prints memory of the first step, seconds of
    further ones."""
    side = SIDES[name](folder, device, dtype)
    models = [m for m in vars(side).values() if isinstance(m, nn.Module)]
    tensors = {id(x): x for m in models for x in [*m.parameters(), *m.buffers()]}.values()
    for x in tensors:
        x.max()  # files are mapped into memory: touch every page before, not in, the step
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
        side.step()
        peak = resident("VmHWM")
    memory = {
        "weights_gb": sum(x.nbytes for x in tensors) / 1e9,
        "memory_gb": (peak - before) / 1e9,
    }
    print(json.dumps({**memory, "seconds": [sum(side.step().values()) for _ in range(steps)]}))


def in_a_process(name: str, folder, args, steps: int = 0) -> dict:
    command = [sys.executable, "-m", "experiments.bench", "--alone", name, str(folder), str(steps)]
    command += ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(told.splitlines()[-1])


def bench(shape: str, args) -> dict:
    """Everything about one shape, printed and returned."""
    work = WORKLOADS[shape]
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        parameters = prepare(shape, work, folder, args.base, args.device, dtype)
        sides = {name: kind(folder, args.device, dtype) for name, kind in SIDES.items()}
        tokens = int(sides["ours"].case.lengths.sum())
        sizes = f"{parameters:,} parameters, {tokens} tokens scored"
        print(f"\n{shape}: {sizes}, {args.dtype} on {args.device}")
        proof = prove(sides, dtype == torch.float32)
        repeats = {name: [] for name in sides}
        for repeat in tqdm(range(args.repeats + 1), desc="steps", leave=False):
            for name, side in sides.items():
                took = side.step()
                if repeat:  # the first warms up
                    repeats[name].append(took | {"step": sum(took.values())})
        for steps in repeats.values():
            for took in steps:
                took["step, old log-probs kept"] = took["step"] - took["old log-probs"]
        seconds = {}
        for name, steps in repeats.items():
            seconds[name] = {part: median(t[part] for t in steps) for part in steps[0]}
        found = rates(sides["ours"], seconds["ours"], dtype)
        unfolded = found["without folding"] = without_folding(sides["ours"], args.repeats)
        times = {part: x / seconds["ours"][part] for part, x in unfolded.items()}
        told = ", ".join(f"{part} {x:.2f}" for part, x in times.items())
        print(f"our time without folding prefixes, to that with: {told}")
        del sides, side
        names = tqdm(SIDES, desc="memory", leave=False)
        memory = {name: in_a_process(name, folder, args) for name in names}
    figures = {}
    for name in SIDES:
        sizes = {key: memory[name][key] for key in ("weights_gb", "memory_gb")}
        figures[name] = seconds[name] | sizes
    ratios = {}
    for peer in ("official", "tuned"):
        # Ours has old log-probabilities already.
        shared = {k: x for k, x in figures["ours"].items() if k != "old log-probs"}
        ratios[f"{peer}/ours"] = {k: figures[peer][k] / x for k, x in shared.items()}
    show(figures, ratios, tokens)
    return {
        "workload": asdict(work),
        "parameters": parameters,
        "tokens": tokens,
        "proof": proof,
        "medians": figures,
        "ratios": ratios,
        "tokens_per_second": {name: tokens / figures[name]["step"] for name in SIDES},
        "ours": found,
        "repeats": repeats,
        "machine": machine(),
    }


def show(figures: dict, ratios: dict, tokens: int):
    print("\n| | " + " | ".join(SIDES) + " | " + " | ".join(ratios) + " |\n" + "|---" * 6 + "|")

    def row(head, cells, key=None):
        over = [ratios[name].get(key) for name in ratios]
        print(f"| {head} | " + " | ".join(cells + [f"{x:.2f}" if x else "" for x in over]) + " |")

    heads = {"weights_gb": "weights, MB", "memory_gb": "memory of a step, MB"}
    for key in figures["ours"]:
        cells = [f"{1e3 * side[key]:.1f}" for side in figures.values()]
        row(heads.get(key, f"{key}, ms"), cells, key)
    row("tokens/s", [f"{tokens / side['step']:.0f}" for side in figures.values()])


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    python, threads = platform.python_version(), torch.get_num_threads()
    return {"processor": processor(), "gpu": gpu, "python": python, **versions, "threads": threads}


# --------------------------------------------------------------------------------------------------
# Scaling

AXES = {
    "responses": (2, 4, 8, 16, 32),
    "tokens": (16, 48, 100, 200, 400),
    "audio": (2, 5, 15, 30, 60),
    "prompts": (1, 2, 4, 8, 16),
}


def scale(args):
    """One size of the shape "small" at a time, with two prompts; goes on where it was stopped."""
    path, base = RESULTS / "scaling.json", replace(WORKLOADS["small"], prompts=2)
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "points": {}}
    points = result["points"]
    sizes = [(axis, value) for axis, values in AXES.items() for value in values]
    for axis, value in tqdm(sizes, desc="scaling"):
        work = replace(base, **{axis: value})
        point = points.setdefault(str(work), {})
        if len(point) < 2:
            with tempfile.TemporaryDirectory() as folder:
                prepare("small", work, Path(folder), None, args.device, getattr(torch, args.dtype))
                for name in ("ours", "tuned"):
                    point[name] = in_a_process(name, folder, args, steps=5)
            path.write_text(json.dumps(result, indent=2) + "\n")
    curves = {}
    for axis, values in AXES.items():
        curves[axis] = [points[str(replace(base, **{axis: value}))] for value in values]
    print("| | | ours, s | tuned, s | tuned/ours | ours, GB | tuned, GB | tuned/ours |")
    print("|---" * 8 + "|")
    for axis, curve in curves.items():
        for value, point in zip(AXES[axis], curve):
            ours, tuned = (median(point[name]["seconds"]) for name in ("ours", "tuned"))
            cells = [axis, str(value), f"{ours:.3f}", f"{tuned:.3f}", f"{tuned / ours:.2f}"]
            ours, tuned = (point[name]["memory_gb"] for name in ("ours", "tuned"))
            cells += [f"{ours:.4f}", f"{tuned:.4f}", f"{tuned / ours:.2f}"]
            print("| " + " | ".join(cells) + " |")
    plot(curves)


def plot(curves: dict):
    import matplotlib.pyplot as plt  # nothing else needs it

    size = (3 * len(AXES), 5)
    figure, rows = plt.subplots(
        2, len(AXES), figsize=size, sharex="col", sharey="row", squeeze=False
    )
    names = {"audio": "seconds of audio", "tokens": "tokens per response"}
    sides = {
        "ours": ("this repository", "o-"),
        "tuned": ("transformers + PEFT, tuned", "s--"),
    }
    for column, (axis, curve) in enumerate(curves.items()):
        x = AXES[axis]
        for name, (label, style) in sides.items():
            seconds = [median(point[name]["seconds"]) for point in curve]
            memory = [point[name]["memory_gb"] for point in curve]
            rows[0, column].loglog(x, seconds, style, label=label)
            rows[1, column].loglog(x, memory, style)
        rows[1, column].set_xticks(x, map(str, x))
        rows[1, column].minorticks_off()
        rows[1, column].set_xlabel(names.get(axis, axis))
    rows[0, 0].set_ylabel("seconds per step")
    rows[1, 0].set_ylabel("GB added by a step")
    rows[0, 0].legend(fontsize=8)
    for cell in rows.flat:
        cell.grid(alpha=0.3)
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"scaling.{kind}", dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=WORKLOADS, default=["small", "compact"])
    parser.add_argument(
        "--base", type=Path, help="for --shape default: a base model that train.py made"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument(
        "--scaling", action="store_true", help="instead: time and memory as one size grows"
    )
    # What a process of its own is told.
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's way into transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.alone:
        name, folder, steps = args.alone
        return alone(name, Path(folder), args.device, getattr(torch, args.dtype), int(steps))
    if args.scaling:
        return scale(args)
    if "2b" in args.shape and args.device != "cuda":
        raise SystemExit("--shape 2b needs a GPU")
    if "default" in args.shape and not args.base:
        needed = "--base, the folder of a base model that train.py made"
        raise SystemExit(f"--shape default needs {needed}")
    path = RESULTS / "bench.json"
    for shape in args.shape:
        found = bench(shape, args)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[f"{shape}, {args.device}, {args.dtype}, {args.threads} threads"] = found
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
