"""LEAF on one GPU, or on a laptop: `python train.py` tells the whole story.

    python train.py                          synthetic spoken question answering; nothing to download
    python train.py --task translation       synthetic speech in another language -> English text
    python train.py --algo grpo              the baseline: same base, data, seed, budget and rollouts
    python train.py --data DIR               your corpus: train.jsonl, validation.jsonl, test.jsonl (see data.py)
    python train.py --init DIR --data DIR    start from a released Granite Speech checkpoint
    python train.py --ask AUDIO "question" --out RUN     use what was trained; add --samples 8 to see the tree
    python train.py --eval-only --out RUN    evaluate what was trained, or a checkpoint: --init DIR --data DIR
    torchrun --nproc_per_node=N train.py     any of the trainings, on N GPUs of one machine

Top to bottom: data -> base model (CTC on the encoder, freeze it, then next-token on projector and decoder) ->
evaluate -> LoRA -> rollouts, rewards, credit, update -> evaluate. Ctrl-C saves; the same command goes on from there.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import data
import leaf
from corpora import synthetic
from lora import DECODER_TARGETS, apply_lora, load_adapter, lora_disabled, lora_layers, lora_parameters, save_adapter
from lora import RANK, WORLD, average, averaged
from model import SpeechConfig, SpeechLM, pad

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every field is a flag


def flag(default, help, choices=None, least=1):
    """A field that is a flag; least is the smallest value of a whole number."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass
class Config:
    # data
    task: str = flag("qa", "synthetic task", ("qa", "translation"))
    data: str = flag("", "folder of a corpus with train.jsonl, validation.jsonl and test.jsonl; replaces --task")
    skip_bad_rows: bool = flag(False, "go on without the rows of --data that fail the check")
    max_audio_seconds: float = flag(30.0, "longest recording accepted")
    train_rows: int = flag(2000, "synthetic rows to train on")
    validation_rows: int = flag(96, "synthetic validation rows; of --data at most so many are used")
    test_rows: int = flag(300, "synthetic test rows; of --data at most so many are used")
    # base model
    init: str = flag("", "folder of a released Granite Speech checkpoint: the base is this, and not trained here")
    system_prompt: str = flag("", "with --init, the system turn of its chat template; default: the template's own")
    base: str = flag("", "folder of the base model; default: beside the run, shared by runs; trained if not there")
    base_seed: int = flag(0, "seed of the base model and of the synthetic data", least=0)
    ctc_steps: int = flag(120, "steps of CTC training of the encoder")
    ctc_lr: float = flag(3e-3, "its learning rate")
    sft_steps: int = flag(400, "steps of next-token training of projector and decoder")
    sft_lr: float = flag(3e-3, "its learning rate")
    base_batch: int = flag(32, "rows per step, in both")
    # policy optimisation
    algo: str = flag("leaf", "how credit is assigned", ("leaf", "grpo"))
    steps: int = flag(400, "rollout batches")
    prompts: int = flag(8, "prompts per rollout batch (paper: 6)")
    responses: int = flag(8, "K, responses per prompt; one alone has nothing to be compared with", least=2)
    update_prompts: int = flag(4, "prompts, with all their responses, per optimiser step (paper: about 1)")
    micro_prompts: int = flag(4, "prompts per forward pass; changes memory and not the result")
    lr: float = flag(2e-3, "peak learning rate (paper: 5e-6, for 2 to 8 billion parameters)")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    final_lr: float = flag(0.1, "share of the peak learning rate at the end of the cosine")
    clip: float = flag(0.2, "epsilon of the clipped ratio")
    kl_coef: float = flag(0.02, "beta, weight of the KL to the base")
    grad_clip: float = flag(1.0, "largest gradient norm")
    temperature: float = flag(1.0, "of the rollouts")
    top_p: float = flag(0.9, "of the rollouts")
    max_new_tokens: int = flag(32, "longest response (paper: 200)")
    rescore: bool = flag(False, "old log-probabilities from a forward pass of their own instead of the sampler's")
    # LEAF
    fork_budget: int = flag(2, "B, boundaries per prompt", least=0)
    min_prefix: int = flag(1, "earliest boundary")
    boundaries: str = flag("surprisal", "where to cut; the others are ablations", ("surprisal", "random", "even"))
    terms: str = flag("both", "advantage terms; leave-one-out is ours", ("both", "global", "local", "leave-one-out"))
    multiplicity: bool = flag(True, "divide a shared span's credit by the root of how many share it")
    # GRPO
    std_floor: float = flag(1 / 3, "least reward std to divide by (the authors' 1/3; 0: plain GRPO)")
    # LoRA
    lora_r: int = flag(16, "rank (paper: 64)")
    lora_alpha: float = flag(32.0, "scale is alpha / r (paper: 128)")
    lora_dropout: float = flag(0.0, "in the update's forward pass only (paper: 0.05)")
    lora_targets: str = flag("decoder", "its 7 projections; or last names of layers, q_proj,up_proj,... anywhere")
    resume_adapter: str = flag("", "folder of a PEFT adapter to go on from; its own settings replace the four above")
    # evaluation
    eval_every: int = flag(50, "steps between greedy evaluations on the validation split; 0: never", least=0)
    eval_passes: int = flag(5, "sampled passes over the test split, at temperature 0.9 and top-p 0.9")
    # run
    seed: int = flag(0, "of rollouts, data order and LoRA", least=0)
    out: str = flag("", "run folder; default: runs/TASK-ALGO-seedN")
    save_every: int = flag(50, "steps between checkpoints")
    device: str = flag("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = flag("auto", "of the policy; auto: bfloat16 on CUDA where supported", ("auto", "float32", "bfloat16"))
    cuda_graph: bool = flag(True, "on CUDA, replay a recorded decoding step instead of launching its kernels anew")
    cache_gb: float = flag(1.0, "memory for each cache of features, encoder frames and audio embeddings")

    # May change between a run and its resumption; everything else is what the run is.
    FREE = ("out", "init", "base", "data", "save_every", "device", "cuda_graph", "cache_gb", "micro_prompts")
    # What the base model depends on
    BASE = ("task", "base_seed", "ctc_steps", "ctc_lr", "sft_steps", "sft_lr", "base_batch")

    @property
    def name(self) -> str:
        return Path(self.data).resolve().name if self.data else self.task

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}-{self.algo}-seed{self.seed}")

    @property
    def base_folder(self) -> Path:
        return Path(self.init or self.base or self.run_folder.parent / f"base-{self.name}-seed{self.base_seed}")


# ---------------------------------------------------------------------------------------------------------------------
# Never lose work: checkpoints, and a loop that goes on where it stopped


def fit(stage: str, folder: Path, steps: int, named: dict, optimizer, cfg: Config, seed: int, step_fn, agree=bool):
    """Call step_fn(step) -> metrics for every step; log a line each, save, resume. agree(asked) says whether to stop.

    Everything random inside a step is keyed by (seed, step), so parameters, moments and the step number are all the
    state there is: a resumed run repeats nothing and misses nothing.
    """
    log_file, checkpoints = folder / f"{stage}.jsonl" if RANK == 0 else Path(os.devnull), folder / "checkpoints" / stage
    folder.mkdir(parents=True, exist_ok=True)
    start = data.load_checkpoint(checkpoints, named, optimizer)
    lines = log_file.read_bytes().splitlines(keepends=True) if log_file.exists() else []
    log_file.write_bytes(b"".join(lines[:start]))  # one line a step: what lies past the checkpoint comes again
    bar = tqdm(total=steps, initial=start, desc=stage, disable=True if RANK else None, mininterval=0.5)
    with data.stop_requests() as stop, open(log_file, "a", encoding="utf-8") as log, bar:
        for step in range(start, steps):
            key = [seed, step, RANK] if RANK else [seed, step]
            torch.manual_seed(int(np.random.default_rng(key).integers(2**31)))  # dropout
            metrics = step_fn(step)
            log.write(json.dumps({"step": step + 1, **metrics}) + "\n")
            log.flush()
            bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("loss", "reward", "kl") if k in metrics}, refresh=False)
            bar.update()
            stopping = agree(stop)
            if RANK == 0 and ((step + 1) % cfg.save_every == 0 or step + 1 == steps or stopping):
                os.fsync(log.fileno())
                data.save_checkpoint(checkpoints, step + 1, named, optimizer)
            if stopping:
                tqdm.write(f"saved step {step + 1} of {steps} in {checkpoints}; the same command goes on from there")
                raise SystemExit(128 + (stop or [signal.SIGTERM])[0])


class Updater:
    """AdamW with gradient clipping that skips a step with a non-finite loss or gradient, and gives up after ten."""

    def __init__(self, parameters, cfg: Config):
        self.parameters, self.cfg, self.skipped = list(parameters), cfg, 0
        self.adam = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, loss: float, lr: float) -> float:
        """Apply the gradients; returns their norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.grad_clip))
        if math.isfinite(loss) and math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.skipped = 0
        else:
            self.skipped += 1
            tqdm.write(f"skipped an update: loss {loss}, gradient norm {norm} ({self.skipped} in a row)")
            if self.skipped == 10:
                raise data.UserError("10 updates in a row were not finite; lower the learning rate, or --dtype float32")
        self.adam.zero_grad(set_to_none=True)
        return norm


# ---------------------------------------------------------------------------------------------------------------------
# The base model, made as Granite Speech was: CTC on the encoder; freeze it; next-token on projector and decoder


def make_base(cfg: Config, train: data.Split, folder: Path, device):
    """Train the base unless it is there; another run may be training the same one, then wait for it."""
    settings = {name: getattr(cfg, name) for name in Config.BASE} | {"rows": data.fingerprint(train.rows)}
    if not folder.exists():
        work = folder.with_name(folder.name + "-training")  # renamed to its final name when complete
        with data.lock(work, wait=True):
            if not folder.exists():
                data.check_same(work, settings, "base.json")
                train_base(cfg, train, work, device)
                os.rename(work, folder)
                shutil.rmtree(folder / "checkpoints")
    data.check_same(folder, settings, "base.json")


def train_base(cfg: Config, train: data.Split, work: Path, device):
    """Train the compact model from scratch and save it as a checkpoint that from_pretrained reads."""
    (work / "tokenizer.model").write_bytes(data.Tokenizer.train(train.rows))
    tokenizer, alphabet = data.Tokenizer(work / "tokenizer.model"), data.Alphabet.of(train.rows)
    config = SpeechConfig.compact(tokenizer.vocab_size, len(alphabet), tokenizer.audio_id)
    model = SpeechLM(config).init_weights(cfg.base_seed).to(device)
    print(f"training a base model of {sum(p.numel() for p in model.parameters()):,} parameters")

    transcripts = [alphabet.encode(row.get("transcript", "")) for row in train.rows]
    spoken = [i for i, label in enumerate(transcripts) if label]
    if spoken:
        train_ctc(cfg, model, train, spoken, transcripts, work)
    else:
        print("no row has a transcript: CTC is skipped, and the encoder learns with the rest")
    train_sft(cfg, model, tokenizer, train, work, freeze_encoder=bool(spoken))
    model.save(work)
    data.sync(work / "model.safetensors")


def train_ctc(cfg, model, train, spoken, labels, folder):
    """The encoder learns to spell; the loss is the mean of the last and the middle CTC head's, per character."""
    encoder = model.encoder.train()
    updater = Updater(encoder.parameters(), cfg)

    def one_step(step):
        batch = [spoken[i] for i in data.order(len(spoken), [cfg.base_seed, 1], step * cfg.base_batch, cfg.base_batch)]
        mel, lengths = pad(train.mels(batch), model.device)
        frames, middle = encoder(mel, lengths)
        wanted = torch.cat([torch.tensor(labels[i]) for i in batch]).to(model.device)
        label_lengths = torch.tensor([len(labels[i]) for i in batch])
        loss = 0
        for logits in (encoder.out(frames), middle):
            logp = logits.float().log_softmax(-1).transpose(0, 1)
            loss = loss + 0.5 * F.ctc_loss(logp, wanted, lengths.cpu(), label_lengths, zero_infinity=True)
        loss.backward()
        lr = leaf.learning_rate(cfg.ctc_lr, cfg.warmup, cfg.final_lr, (step + 1) / cfg.ctc_steps)
        return {"loss": loss.item(), "grad_norm": updater.step(loss.item(), lr), "lr": lr}

    fit("ctc", folder, cfg.ctc_steps, encoder.state_dict(keep_vars=True), updater.adam, cfg, cfg.base_seed, one_step)
    encoder.eval()


def train_sft(cfg, model, tokenizer, train, folder, freeze_encoder):
    """Projector and decoder learn the targets, token by token, from encoder frames that are computed once."""
    model.train()
    trained = [model.projector, model.language_model] + ([] if freeze_encoder else [model.encoder])
    if freeze_encoder:
        model.encoder.eval().requires_grad_(False)
        train.encode(model)
    updater = Updater([p for module in trained for p in module.parameters()], cfg)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in train.rows]
    answers = [torch.tensor(tokenizer.encode_answer(data.target(row))) for row in train.rows]

    def one_step(step):
        batch = data.order(len(answers), [cfg.base_seed, 2], step * cfg.base_batch, cfg.base_batch)
        audio = model.project(train.frames(batch) if freeze_encoder else model.encode(train.mels(batch)))
        tokens, answer_lengths = pad([answers[i] for i in batch], model.device)
        batch = model.embed_prompts([prompts[i] for i in batch], audio)
        loss = -model.response_logp(batch, tokens[:, None], answer_lengths[:, None]).sum() / answer_lengths.sum()
        loss.backward()
        lr = leaf.learning_rate(cfg.sft_lr, cfg.warmup, cfg.final_lr, (step + 1) / cfg.sft_steps)
        return {"loss": loss.item(), "grad_norm": updater.step(loss.item(), lr), "lr": lr}

    fit("sft", folder, cfg.sft_steps, model.state_dict(keep_vars=True), updater.adam, cfg, cfg.base_seed, one_step)
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# What to train


def load_rows(cfg: Config, splits=("train", "validation", "test")) -> dict[str, list[dict]]:
    """The rows of --data, all checked, or of the synthetic task."""
    sizes = {"train": cfg.train_rows, "validation": cfg.validation_rows, "test": cfg.test_rows}
    if not cfg.data:
        return synthetic.rows(cfg.task, sizes, cfg.base_seed)
    corpus = data.load_corpus(cfg.data, cfg.max_audio_seconds, cfg.skip_bad_rows, splits)
    return {name: rows if name == "train" else rows[: sizes[name]] for name, rows in corpus.items()}


def load(cfg: Config, device, dtype, adapter=""):
    """The base in eval mode, with an adapter if one is named, and its tokenizer."""
    try:
        tokenizer = data.load_tokenizer(cfg.base_folder, cfg.system_prompt)
        model = SpeechLM.from_pretrained(cfg.base_folder, device, dtype)
        if adapter:
            load_adapter(model, adapter)
        if tokenizer.audio_id != model.config.audio_token_index:
            raise ValueError(f"{cfg.base_folder}: config.json's audio_token_index is not {data.AUDIO} of its tokenizer")
        tokenizer.encode_prompt(data.AUDIO + "?")  # a chat template that fails must fail now
    except ValueError as error:
        raise data.UserError(str(error)) from None
    model.cuda_graph = cfg.cuda_graph
    return model.eval(), tokenizer


def adapt(cfg: Config, model):
    """Put LoRA on the model. Returns its targets, as PEFT writes them."""
    torch.manual_seed(cfg.seed)
    try:
        if cfg.resume_adapter:
            return load_adapter(model, cfg.resume_adapter)
        targets = DECODER_TARGETS if cfg.lora_targets == "decoder" else cfg.lora_targets.replace(" ", "").split(",")
        apply_lora(model, targets, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
        return targets
    except ValueError as error:
        raise data.UserError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def answer(model, tokenizer, split, cfg: Config, temperature=0.0, top_p=1.0, seed=(0,), swapped=None) -> list[str]:
    """One response per row of a data.Split; swapped: the row whose audio each row hears instead of its own."""
    texts = []
    for start in range(0, len(split.rows), 64):
        indices = list(range(start, min(len(split.rows), start + 64)))
        prompts = split.batch(model, indices, swapped and [swapped[i] for i in indices])
        u = data.noise(list(seed), indices, 1, cfg.max_new_tokens, model.device)
        rollout = model.sample(prompts, u, tokenizer.eos_id, temperature, top_p)
        rows = zip(rollout.tokens[:, 0].tolist(), rollout.lengths[:, 0].tolist())
        texts += [tokenizer.decode(tokens[:n]) for tokens, n in rows]
    return texts


def evaluate(model, tokenizer, split: data.Split, cfg: Config, predictions: Path) -> dict:
    """The figures of data.scores on a split, each explained in the README; what was answered goes to predictions."""
    rows, greedy = split.rows, answer(model, tokenizer, split, cfg)
    bar = tqdm(range(cfg.eval_passes), desc="sampled passes over the test split", leave=False, disable=None)
    passes = [answer(model, tokenizer, split, cfg, 0.9, 0.9, (cfg.base_seed, 3, p)) for p in bar]
    other = data.swap(rows) if any("slots" in row for row in rows) else None
    swapped = other and answer(model, tokenizer, split, cfg, swapped=other)
    result = data.scores(rows, greedy, passes, swapped)
    data.write_predictions(predictions, rows, greedy, passes)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The method's loop: rollouts -> rewards -> credit -> update


LOG = """\
step {step}: validation BLEU {validation_bleu:.1f}  reward {reward:.3f}  KL {kl:.3f}  clipped {clip_fraction:.3f}  \
ratio {ratio:.3f}  grad {grad_norm:.2f}  length {response_length:.1f}  equal rewards {equal_rewards:.2f}  \
usable forks {usable_fork_fire:.2f}  {tokens_per_second:.0f} tokens/s"""


def credit(cfg: Config, tokens, lengths, surprisal, rewards):
    """One prompt's (K, T) advantages and its fork statistics."""
    boundaries = leaf.choose_boundaries(cfg.boundaries, surprisal, lengths, cfg.fork_budget, cfg.min_prefix)
    forks = leaf.fork_stats(tokens, lengths, rewards, boundaries)
    if cfg.algo == "grpo":
        advantages = leaf.grpo_advantages(rewards, lengths, cfg.std_floor)
        return F.pad(advantages, (0, tokens.shape[1] - advantages.shape[1])), forks
    return leaf.leaf_advantages(
        tokens, lengths, surprisal, rewards, terms=cfg.terms, multiplicity=cfg.multiplicity, boundaries=boundaries
    ), forks


def train_policy(cfg: Config, model, tokenizer, train, validation, folder, parameters=None, reference=lora_disabled):
    """LoRA (or parameters, by name) trained by LEAF or GRPO against reference(model): rollout batches and updates."""
    parameters = parameters or lora_parameters(model)
    updater = Updater(parameters.values(), cfg)
    updates_per_step, own = cfg.prompts // cfg.update_prompts, cfg.update_prompts // WORLD  # prompts of an update
    mine = [n for n in range(cfg.prompts) if n % cfg.update_prompts // own == RANK]  # of a rollout batch

    def one_step(step):
        # Rollouts: K responses to each prompt, from the model as it is now, LoRA on, dropout off.
        model.eval()
        began = time.perf_counter()
        place = [step * cfg.prompts + n for n in mine]  # in the endless shuffled sequence of prompts
        indices = np.array(data.order(len(train.rows), [cfg.seed, 4], step * cfg.prompts, cfg.prompts))[mine].tolist()
        u = data.noise([cfg.seed, 5], place, cfg.responses, cfg.max_new_tokens, model.device)
        with torch.no_grad():
            prompts = train.batch(model, indices)
            rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
        lengths, T = rollout.lengths, int(rollout.lengths.max())  # nothing after the longest response matters
        tokens, mask, old_logp = (x[..., :T] for x in (rollout.tokens, rollout.mask, rollout.logp))
        sampled = time.perf_counter()

        # Rewards: once per response, at its end.
        tokens_host, lengths_host = tokens.cpu(), lengths.cpu()
        surprisal_host = -rollout.logq[..., :T].cpu()
        texts = [[tokenizer.decode(t[:n].tolist()) for t, n in zip(*group)] for group in zip(tokens_host, lengths_host)]
        rewards = [data.rewards(group, [train.rows[i]] * len(group)) for i, group in zip(indices, texts)]

        # Credit: per prompt, from the tree its own responses form.
        before_credit = time.perf_counter()
        credits = [credit(cfg, *group) for group in zip(tokens_host, lengths_host, surprisal_host, rewards)]
        advantages = torch.stack([a for a, _ in credits]).to(model.device)
        credit_seconds = time.perf_counter() - before_credit

        # Update: some prompts per optimiser step, fewer per forward pass; the loss is a mean over responses.
        def heard(chunk):  # an encoder in training hears differently with LoRA off, or after an update
            return prompts[chunk] if train.frozen else train.batch(model, [indices[i] for i in chunk])

        def score():
            chunks = torch.arange(len(mine)).split(cfg.micro_prompts)
            return torch.cat([model.response_logp(heard(c), tokens[c], lengths[c]) for c in chunks])

        with torch.no_grad():
            if cfg.rescore:
                old_logp = score()
            with reference(model):
                ref_logp = score()
        for layer in lora_layers(model).values():
            layer.train()  # its dropout, and nobody else's
        all_stats = []
        for n, update in enumerate(torch.arange(len(mine)).split(own)):
            stats = {}
            for c in update.split(cfg.micro_prompts):
                logp = model.response_logp(heard(c), tokens[c], lengths[c])
                flat = (x[c].flatten(0, 1) for x in (old_logp, ref_logp, advantages, mask))  # (P * K, T)
                loss, part = leaf.policy_loss(logp.flatten(0, 1), *flat, clip=cfg.clip, kl_coef=cfg.kl_coef)
                share = len(c) / len(update)
                (loss * share).backward()
                stats = {k: stats.get(k, 0) + share * v for k, v in part.items()}
            progress = (step * updates_per_step + n + 1) / (cfg.steps * updates_per_step)
            lr = leaf.learning_rate(cfg.lr, cfg.warmup, cfg.final_lr, progress)
            stats = averaged({k: v.item() for k, v in stats.items()}, model.device)
            average([p.grad for p in updater.parameters])
            all_stats.append({**stats, "grad_norm": updater.step(stats["loss"], lr), "lr": lr})
        seconds = time.perf_counter() - began

        metrics = {k: float(np.mean([s[k] for s in all_stats])) for k in all_stats[0]}
        metrics |= leaf.group_stats(rewards, [fork for _, report in credits for fork in report])
        metrics |= {
            "first_ratio_gap": all_stats[0]["ratio_gap"],  # sampler against scorer: rounding, before any update
            "response_length": float(lengths_host.float().mean()),
            "seconds": seconds,
            "sampling_share": (sampled - began) / seconds,
            "credit_share": credit_seconds / seconds,
            "tokens_per_second": WORLD * int(lengths_host.sum()) / seconds,
        }
        metrics = averaged(metrics, model.device)
        if RANK == 0 and cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            model.eval()
            greedy = answer(model, tokenizer, validation, cfg)
            references = [row["reference"] for row in validation.rows]
            metrics["validation_bleu"] = data.corpus_bleu(greedy, references, lowercase=True)
            tqdm.write(LOG.format(step=step + 1, **metrics))
        return metrics

    def agree(asked):  # all stop, or the others wait for ever
        return averaged({"asked": len(asked)}, model.device)["asked"] > 0

    fit("policy", folder, cfg.steps, parameters, updater.adam, cfg, cfg.seed, one_step, agree)
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Showing it


@torch.no_grad()
def show_examples(title, model, tokenizer, split: data.Split, cfg: Config, count: int = 2):
    """A few prompts: the reference, the greedy answer, and the best and worst of K responses shaded by their credit."""
    indices = list(range(min(count, len(split.rows))))
    prompts = split.batch(model, indices)
    greedy = model.sample(prompts, data.noise([0], indices, 1, cfg.max_new_tokens, model.device), tokenizer.eos_id, 0.0)
    u = data.noise([cfg.base_seed, 6], indices, max(2, cfg.responses), cfg.max_new_tokens, model.device)
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
    print(f"\n{title}")
    for n, i in enumerate(indices):
        row = split.rows[i]
        tokens, lengths = rollout.tokens[n].cpu(), rollout.lengths[n].cpu()
        texts = [tokenizer.decode(t[:m].tolist()) for t, m in zip(tokens, lengths)]
        rewards = data.rewards(texts, [row] * len(texts))
        advantages, _ = credit(cfg, tokens, lengths, -rollout.logq[n].cpu(), rewards)
        print(f"  question   {row['prompt'].replace(data.AUDIO, '')}")
        print(f"  reference  {row['reference']}")
        print(f"  greedy     {tokenizer.decode(greedy.tokens[n, 0, : greedy.lengths[n, 0]].tolist())}")
        for name, k in (("best of K", rewards.index(max(rewards))), ("worst of K", rewards.index(min(rewards)))):
            ids = tokens[k, : lengths[k]].tolist()
            shaded = leaf.shade(tokenizer.pieces(ids), advantages[k].tolist(), sys.stdout.isatty())
            print(f"  {name:10} {shaded}  reward {rewards[k]:.2f}")


def ask(cfg: Config, audio: str, question: str, samples: int, reference: str, device, dtype):
    """Answer a question about a recording with a trained run; with samples, show the responses as LEAF sees them."""
    if data.AUDIO in question or not question.strip() or samples < 0:
        raise data.UserError(f"--ask needs a question without {data.AUDIO}, and --samples a number from 0 up")
    model, tokenizer = load(cfg, device, dtype, cfg.resume_adapter)
    row = {"audio": audio, "prompt": data.AUDIO + question, "reference": reference}
    split = data.Split("asked", [row], cfg.cache_gb)
    split.project(model, tokenizer)
    print(answer(model, tokenizer, split, cfg)[0])
    if samples == 0:
        return
    u = data.noise([cfg.seed, 7], [0], samples, cfg.max_new_tokens, device)
    rollout = model.sample(split.batch(model, [0]), u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
    tokens, lengths, surprisal = rollout.tokens[0].cpu(), rollout.lengths[0].cpu(), -rollout.logq[0].cpu()
    rows = [t[:n].tolist() for t, n in zip(tokens, lengths)]
    rewards = data.rewards(list(map(tokenizer.decode, rows)), [row] * samples) if reference else [0.0] * samples
    boundaries = leaf.choose_boundaries(cfg.boundaries, surprisal, lengths, cfg.fork_budget, cfg.min_prefix)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    advantages, _ = credit(cfg, tokens, lengths, surprisal, rewards)
    known = (rewards, nodes, advantages.tolist()) if reference else (None, nodes)
    print(f"boundaries {boundaries}\n{leaf.format_tree([tokenizer.pieces(ids) for ids in rows], *known)}")


def evaluate_only(cfg: Config, folder: Path, device, dtype):
    """Figures and answers of a run's or a checkpoint's model on the test split."""
    rows = load_rows(cfg, ("test",))["test"]
    model, tokenizer = load(cfg, device, dtype, cfg.resume_adapter)
    split = data.Split("test", rows, cfg.cache_gb)
    split.project(model, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    table, answers = folder / f"evaluation-{cfg.name}.json", folder / f"predictions-{cfg.name}.jsonl"
    result = evaluate(model, tokenizer, split, cfg, answers)
    data.write_json(table, {"config": asdict(cfg), "test_rows": len(rows), **result})
    data.show_table(f"test split, {len(rows)} rows", {"": result})
    print(f"\nfigures {table}\nanswers {answers}")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def pick(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the policy's decoder on it."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if cfg.device not in ("auto", "cpu", best):
        raise data.UserError(f"--device {cfg.device}: this torch sees no such device here")
    device = best if cfg.device == "auto" else cfg.device
    if device == "cuda" and WORLD > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    dtype = ("bfloat16" if half else "float32") if cfg.dtype == "auto" else cfg.dtype
    return torch.device(device), getattr(torch, dtype)


def finished(folder: Path, given: dict) -> Config:
    """The configuration of the finished run in a folder, its adapter included, with what the command line changes."""
    if not (folder / "results.json").exists():
        raise data.UserError(f"{folder} holds no finished run: name one with --out, or train it first")
    saved = data.read_json(folder / "config.json")
    kept = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    kept["data"] = data.read_json(folder / "results.json")["config"]["data"]
    kept["base"] = os.path.normpath(folder / saved["base"])
    return Config(**{**kept, **given, "resume_adapter": str(folder / "adapter")})  # its own, wherever it began


def parse(argv):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(None, "train.py [flags]", __doc__, formatter_class=plain, allow_abbrev=False)
    for f in fields(Config):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        default = f"{f.default:.4g}" if isinstance(f.default, float) else f.default
        shown = f"{text} (default: {default})" if default != "" else text
        common = {"default": argparse.SUPPRESS, "help": shown}  # what is not given may come from a finished run
        if isinstance(f.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(name, type=type(f.default), choices=f.metadata["choices"], **common)
    use = parser.add_argument_group("use a trained run")
    use.add_argument("--ask", nargs=2, metavar=("AUDIO", "QUESTION"), help="answer a question about a recording")
    use.add_argument("--samples", type=int, default=0, help="with --ask: sample so many responses, show their tree")
    use.add_argument("--reference", default="", help="with --ask --samples: the right answer, for rewards and values")
    use.add_argument("--eval-only", action="store_true", help="test the run in --out, or --init with --resume-adapter")
    given = vars(parser.parse_args(argv))
    actions = {name: given.pop(name) for name in ("ask", "samples", "reference", "eval_only")}
    if (actions["samples"] or actions["reference"]) and not actions["ask"]:
        parser.error("--samples and --reference go with --ask")
    if given.get("init") and given.get("base"):
        parser.error("--init and --base exclude each other")
    cfg = Config(**given)
    if actions["eval_only"] and (cfg.init or cfg.base):  # a checkpoint is meant, unless --out is a run
        cfg.out = cfg.out or f"runs/{cfg.name}-{cfg.base_folder.resolve().name}-evaluation"
    use_run = (cfg.run_folder / "results.json").exists() or not (cfg.init or cfg.base)
    if actions["eval_only"] and not use_run and (cfg.run_folder / "config.json").exists():
        raise data.UserError(f"{cfg.run_folder} holds an unfinished run: train it to its end, or choose another --out")
    if actions["ask"] or actions["eval_only"] and use_run:
        cfg = finished(cfg.run_folder, given)
    for f in fields(Config):
        if type(f.default) is int and getattr(cfg, f.name) < f.metadata["least"]:
            parser.error(f"{f.name} must be at least {f.metadata['least']}, not {getattr(cfg, f.name)}")
        if type(f.default) is float and not 0 <= getattr(cfg, f.name) < math.inf:
            parser.error(f"{f.name} must be a number from 0 up, not {getattr(cfg, f.name)}")
    if cfg.warmup >= 1 or cfg.lora_dropout >= 1:
        parser.error(f"warmup and lora_dropout must be below 1, not {cfg.warmup} and {cfg.lora_dropout}")
    if cfg.prompts % cfg.update_prompts:
        parser.error(f"prompts ({cfg.prompts}) must be a multiple of update_prompts ({cfg.update_prompts})")
    if WORLD > 1 and (cfg.update_prompts % WORLD or actions["ask"] or actions["eval_only"]):
        parser.error(f"{WORLD} processes only train, and must share update_prompts ({cfg.update_prompts}) evenly")
    if not 0 < cfg.top_p <= 1 or cfg.temperature == 0:
        parser.error(f"top_p must lie in (0, 1] and temperature above 0, not {cfg.top_p} and {cfg.temperature}")
    return cfg, actions


def main(argv=None):
    began, (cfg, actions) = time.time(), parse(argv)
    (device, dtype), folder = pick(cfg), cfg.run_folder
    if cfg.init and not all((cfg.base_folder / name).exists() for name in ("config.json", "tokenizer.json")):
        raise data.UserError(f"--init {cfg.init}: this is no folder with a checkpoint's config.json and tokenizer.json")
    if actions["ask"]:
        return ask(cfg, *actions["ask"], actions["samples"], actions["reference"], device, dtype)
    if actions["eval_only"]:
        return evaluate_only(cfg, folder, device, dtype)
    if WORLD > 1:  # without an early time-out: the others wait while the first trains a base, or evaluates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    with contextlib.redirect_stdout(open(os.devnull, "w")) if RANK else contextlib.nullcontext():
        corpus = load_rows(cfg)  # checked whole before anything is written
        with contextlib.nullcontext() if RANK else data.lock(folder, wait=False):
            run(cfg, corpus, device, dtype, began)
    if WORLD > 1:
        dist.destroy_process_group()


def run(cfg: Config, corpus: dict[str, list[dict]], device, dtype, began: float):
    """The story itself, in a run folder that is ours alone."""
    folder, base_folder = cfg.run_folder, cfg.base_folder
    settings = {k: v for k, v in asdict(cfg).items() if k not in Config.FREE}
    settings |= {"base": os.path.relpath(base_folder, folder), "rows": data.fingerprint(sum(corpus.values(), []))}
    if RANK == 0:
        data.check_same(folder, settings, "config.json")
    title = f"test split, {len(corpus['test'])} rows"
    if (folder / "results.json").exists():
        results = data.read_json(folder / "results.json")
        print(f"{folder} is finished; its results:")
        return data.show_table(title, {name: results[name] for name in ("base", "trained")})
    print(f"{cfg.name}: " + ", ".join(f"{len(rows)} {name}" for name, rows in corpus.items()) + f" rows; on {device}")

    # Base: load it, or train it. LoRA, off for now.
    wanted = {name: rows for name, rows in corpus.items() if RANK == 0 or name == "train"}
    splits = {name: data.Split(name, rows, cfg.cache_gb) for name, rows in wanted.items()}
    if not cfg.init and (not cfg.base or not base_folder.exists()):  # a base chosen by hand is taken as it is
        if RANK == 0:
            make_base(cfg, splits["train"], base_folder, device)
    elif not cfg.init and data.read_json(base_folder / "base.json").get("rows") != data.fingerprint(corpus["train"]):
        print(f"note: {base_folder} was trained on other rows, which may hold some of this test split")
    if WORLD > 1:
        dist.barrier()
    model, tokenizer = load(cfg, device, dtype)
    targets = adapt(cfg, model)
    for split in splits.values():
        split.project(model, tokenizer, frozen=all(name.startswith("language_model.") for name in lora_layers(model)))

    # Measure it.
    if RANK == 0:
        with lora_disabled(model):
            if not (folder / "base.json").exists():
                answers = folder / "predictions-base.jsonl"
                data.write_json(folder / "base.json", evaluate(model, tokenizer, splits["test"], cfg, answers))
            base_result = data.read_json(folder / "base.json")
            show_examples("Before: the base model", model, tokenizer, splits["test"], cfg)

    # Train.
    trainable = sum(p.numel() for p in lora_parameters(model).values())
    print(f"\n{cfg.algo.upper()}: {cfg.steps} steps of {cfg.prompts} prompts x {cfg.responses} responses, "
          f"{trainable:,} LoRA parameters")  # fmt: skip
    train_policy(cfg, model, tokenizer, splits["train"], splits.get("validation"), folder)
    if RANK:
        return
    save_adapter(model, folder / "adapter", targets, base=str(base_folder))

    # Measure again, and show.
    result = evaluate(model, tokenizer, splits["test"], cfg, folder / "predictions-trained.jsonl")
    show_examples("After", model, tokenizer, splits["test"], cfg)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # KiB
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    took = {"seconds": time.time() - began, "peak_memory_gb": memory / 1e9, "device": str(device)}
    results = {"config": asdict(cfg), "test_rows": len(corpus["test"]), "base": base_result, "trained": result} | took
    data.write_json(folder / "results.json", results)
    data.show_table(title, {"base": base_result, "trained": result})
    example, recording = corpus["test"][0], corpus["test"][0]["audio"]
    if not isinstance(recording, str):  # synthesised: leave one recording behind to ask about
        recording = folder / "example.wav"
        soundfile.write(recording, data.load_audio(example).numpy(), data.SAMPLE_RATE)
    question = example["prompt"].replace(data.AUDIO, "")
    print(f"""
run         {folder}  (policy.jsonl: metrics, adapter/: LoRA in PEFT's format, results.json)
base        {base_folder}
ask it      python train.py --ask {quote(str(recording))} {quote(question)} --out {quote(str(folder))}
its tree    ... --samples 8 --reference {quote(example["reference"])}
took        {took['seconds']:.0f} s, peak memory {took['peak_memory_gb']:.1f} GB""")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as it comes
    try:
        main()
    except (data.UserError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted where there was nothing to save; the same command goes on", file=sys.stderr)
        sys.exit(130)
