"""LEAF on one GPU, or on a laptop: `python train.py` tells the whole story.

    python train.py                        synthetic spoken question answering; nothing to download
    python train.py --task translation     synthetic speech in another language -> English text
    python train.py --algo grpo            the baseline: same base, data, seed, budget and rollouts
    python train.py --data DIR             your corpus: train.jsonl, validation.jsonl, test.jsonl
    python train.py --init DIR --data DIR  start from a released Granite Speech checkpoint
    python train.py --eval-only --out RUN  evaluate what was trained, or --init DIR --data DIR
    torchrun --nproc_per_node=N train.py   any of the trainings, on N GPUs of one machine

Top to bottom: data -> base model (CTC on the encoder, freeze it, then next-token on projector and
decoder) -> evaluate -> LoRA -> rollouts, rewards, credit, reference, updates -> evaluate. Ctrl-C
saves; the same command goes on from there. `python -m tools.ask RUN AUDIO "question"` uses what was
trained.
"""

import collections
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import data
import leaf
import pretrain
from corpora import synthetic
from corpora.load import fingerprint, load_corpus
from lora import (
    DECODER_TARGETS,
    apply_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    save_adapter,
)
from model import SpeechLM, to_device
from upkeep.checkpoints import Rescue, load_checkpoint, save_checkpoint
from upkeep.errors import UserError, command, errors_of_reading, errors_of_writing
from upkeep.files import check_same, is_there, lock, read_json, read_lines, write_json, write_lines
from upkeep.flags import check_numbers, flag, make_parser
from upkeep.forks import checked_credit, identity, those_of_the_run
from upkeep.log import Log, StopSignals, append_line, best_validation, keep_lines
from upkeep.machine import choose_device, peak_memory, quote
from upkeep.optim import Updater, learning_rate
from upkeep.processes import average, average_numbers, joined_processes, rank, wait_for_all, world

# --------------------------------------------------------------------------------------------------
# Configuration: every field is a flag


@dataclass
class Config:
    task: str = flag("qa", "synthetic task", ("qa", "translation"), group="data")
    data: str = flag("", "folder with train, validation and test.jsonl; replaces --task")
    skip_bad_rows: bool = flag(False, "go on without the rows of --data that fail the check")
    max_audio_seconds: float = flag(30.0, "longest recording accepted")
    train_rows: int = flag(2000, "synthetic rows to train on")
    validation_rows: int = flag(96, "validation rows: synthetic ones, or the first of --data")
    test_rows: int = flag(300, "test rows: synthetic ones, or the first of --data")

    init: str = flag("", "folder of a released Granite Speech checkpoint", group="base model")
    system_prompt: str = flag("", "system turn of the chat of --init; default: the template's")
    base: str = flag("", "folder of the base; default: beside the run; trained if it is not there")
    base_seed: int = flag(0, "seed of the base model and of the synthetic data", least=0)
    ctc_steps: int = flag(400, "steps of CTC training of the encoder")
    sft_steps: int = flag(2000, "steps of next-token training of projector and decoder")
    base_lr: float = flag(3e-3, "peak learning rate of CTC and next-token training")
    base_batch: int = flag(8, "rows per step of CTC and next-token training")

    algo: str = flag("leaf", "the method", ("leaf", "grpo"), group="policy optimisation")
    steps: int = flag(400, "rollout batches")
    prompts: int = flag(8, "prompts per rollout batch (paper: 6)")
    responses: int = flag(8, "K, responses per prompt, which are compared with each other", least=2)
    update_prompts: int = flag(4, "prompts per optimiser step (paper: about 1)")
    micro_prompts: int = flag(4, "prompts per forward pass; changes memory and not the result")
    lr: float = flag(2e-3, "peak learning rate (paper: 5e-6, for 2 to 8 billion parameters)")
    warmup: float = flag(
        0.05, "share of the steps in which the learning rate rises", within="[0, 1)"
    )
    clip: float = flag(0.2, "epsilon of the clipped ratio")
    kl_coef: float = flag(0.02, "beta, weight of the KL to the base")
    grad_clip: float = flag(1.0, "largest gradient norm", within="(0, inf)")
    temperature: float = flag(1.0, "sampling temperature of the rollouts", within="(0, inf)")
    top_p: float = flag(0.9, "sample from the likeliest tokens of this mass", within="(0, 1]")
    max_new_tokens: int = flag(32, "longest response (paper: 200)")
    rescore: bool = flag(False, "old log-probabilities by a forward pass instead of the sampler's")

    fork_budget: int = flag(2, "B, boundaries per prompt", least=0, group="credit")
    terms: str = flag("both", "advantage terms of LEAF", ("both", "global", "local"))
    multiplicity: bool = flag(True, "LEAF: divide a span's credit by the root of how many share it")
    std_floor: float = flag(1 / 3, "GRPO: least std to divide by (the authors' 1/3; 0: plain GRPO)")

    lora_r: int = flag(16, "rank r (paper: 64)", group="LoRA")
    lora_alpha: float = flag(32.0, "the update is scaled by alpha / r (paper: 128)")
    lora_dropout: float = flag(0.0, "dropout, in updates only (paper: 0.05)", within="[0, 1)")
    lora_targets: str = flag("decoder", "the decoder's 7 projections; or names, q_proj,up_proj,...")
    resume_adapter: str = flag("", "go on from this PEFT adapter; the KL stays that to the base")

    eval_every: int = flag(50, "steps between validations; 0: never", least=0, group="evaluation")
    eval_passes: int = flag(5, "sampled passes over the test split, temperature 0.9 and top-p 0.9")

    seed: int = flag(0, "seed of rollouts, data order and LoRA", least=0, group="the run")
    out: str = flag("", "run folder; default: runs/TASK-ALGO-seedN")
    save_every: int = flag(50, "steps between checkpoints")
    device: str = flag("auto", "auto: CUDA or the CPU", ("auto", "cuda", "mps", "cpu"))
    dtype: str = flag("auto", "auto: bfloat16 on CUDA that has it", ("auto", "float32", "bfloat16"))
    cuda_graph: bool = flag(True, "on CUDA, record one decoding step and replay it")
    cache_gb: float = flag(1.0, "memory for each cache of features, frames and audio embeddings")

    # May differ when a run is resumed: how things are computed, and paths; a fingerprint of the rows
    # and the base's relative path are compared instead. All other fields must be equal.
    FREE = "out init base data save_every device cuda_graph cache_gb micro_prompts".split()
    # What the base model depends on.
    BASE = "task base_seed ctc_steps sft_steps base_lr base_batch warmup grad_clip".split()

    @property
    def name(self) -> str:
        return Path(self.data).resolve().name if self.data else self.task

    @property
    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}-{self.algo}-seed{self.seed}")

    @property
    def base_folder(self) -> Path:
        beside_the_run = self.run_folder.parent / f"base-{self.name}-seed{self.base_seed}"
        return Path(self.init or self.base or beside_the_run)


# What a random stream is for: the second number of its seed; pretrain has 1 and 2.
EVALUATION, PROMPT_ORDER, ROLLOUTS, LOOK = range(3, 7)

# What the loop leaves in the run folder besides policy.jsonl and checkpoints.
BASE_SCORES = "scores-base.json"  # on the test split
SAMPLES, SAMPLED_ROWS = "samples.jsonl", 16  # of the validation split
ASKED = ("prompt", "reference", "transcript", "slots")  # what is kept of a row, as far as it has it
BEST = "adapter-best"  # of the step with the best validation, beside "adapter", the last


# --------------------------------------------------------------------------------------------------
# The loop: rollouts, rewards, credit, reference, updates, what there is to see


def credit(cfg: Config, tokens, lengths, surprisal, rewards) -> torch.Tensor:
    """The rule: advantages (K, T) of the tokens of one prompt's K responses.

    tokens (K, T) int, lengths (K,) int, surprisal (K, T) float in nats, rewards [K] float, all on
    the host. To try a rule of your own, hand main a function of this form.
    """
    if cfg.algo == "grpo":
        return leaf.grpo_advantages(tokens, lengths, rewards, cfg.std_floor)
    ablations = {"terms": cfg.terms, "multiplicity": cfg.multiplicity}
    return leaf.leaf_advantages(tokens, lengths, surprisal, rewards, cfg.fork_budget, **ablations)


def train_policy(
    cfg: Config, model, tokenizer, splits, folder: Path, targets, credit=credit, reward=data.reward
):
    """Train LoRA, which `adapt` has put on `targets`, by LEAF, GRPO or another rule. splits:
    data.Split by name, "train" and, where there is one, "validation"."""
    training, validation = splits["train"], splits.get("validation")
    parameters = lora_parameters(model)
    updater = Updater(parameters.values(), cfg.grad_clip)
    updates = cfg.prompts // cfg.update_prompts  # per step
    own_prompts = cfg.update_prompts // world()  # of an update: those of this process
    model.eval()
    warned = False
    checkpoints = folder / "checkpoints" / "policy"
    start = load_checkpoint(checkpoints, parameters, updater.adam)
    keep_lines(folder / "policy.jsonl", start)
    validating = bool(validation and cfg.eval_every) and rank() == 0
    if validating:
        best = best_validation(folder / "policy.jsonl").get("validation_reward", -math.inf)
        # A line before the first step, and one per validation since.
        keep_lines(folder / SAMPLES, (1 + start // cfg.eval_every) if start else 0)
        if start == 0:
            validate(cfg, model, tokenizer, validation, 0, folder, credit, reward)
    with (
        Rescue(checkpoints, parameters, updater.adam, start) as rescue,
        StopSignals() as stop,
        Log(folder / "policy.jsonl", start, cfg.steps, stop) as log,
    ):
        for step in range(start, cfg.steps):
            seed_dropout(cfg.seed, step)
            began = time.perf_counter()

            # Rollouts: K responses to each prompt, from the model as it is; LoRA on, dropout off.
            draws, indices = draw_prompts(cfg, step, len(training.rows))  # P of each
            u = data.noise(
                [cfg.seed, ROLLOUTS], draws, cfg.responses, cfg.max_new_tokens, model.device
            )
            with torch.no_grad():
                prompts = training.prompts(model, indices)
            rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
            rollout = rollout.trimmed()  # (P, K, T), T the longest response
            on_host = rollout.to("cpu")  # plain numbers, for text and trees
            sampled = time.perf_counter()

            # Rewards: one per response, at its end.
            rewards = []  # P lists of K
            for i, tokens, lengths in zip(indices, on_host.tokens, on_host.lengths):
                answers = decode(tokenizer, tokens, lengths)
                rewards.append(data.rewards_of(answers, [training.rows[i]] * len(answers), reward))

            # Credit: per prompt, by LEAF from the tree that its own responses form.
            advantages, forks = [], []
            surprisal = -on_host.logq
            for p in range(len(indices)):
                tokens, lengths = on_host.tokens[p], on_host.lengths[p]
                of_tokens = credit(cfg, tokens, lengths, surprisal[p], rewards[p])
                advantages.append(checked_credit(of_tokens, credit, tokens))
                # Statistics of forks: where LEAF cuts, or would cut if this is another rule.
                boundaries = leaf.select_boundaries(surprisal[p], lengths, cfg.fork_budget)
                forks += leaf.fork_stats(tokens, lengths, rewards[p], boundaries)
            advantages = to_device(torch.stack(advantages), model.device)  # (P, K, T)

            # Reference: log-probabilities under the base, of what was sampled.
            with lora_disabled(model):
                ref_logp = score(cfg, model, training, indices, on_host)
            old_logp = rollout.logp
            if cfg.rescore:  # still without dropout
                old_logp = score(cfg, model, training, indices, on_host)

            # Updates: some prompts per optimiser step, fewer per forward pass.
            for layer in lora_layers(model).values():
                layer.train()  # its dropout, and nobody else's
            statistics = []  # of each update, on the device: to read them is to wait for it
            grad_norms = []
            rates = []
            rescue.updating = True  # from here a step that fails is half done, and is not saved
            for n in range(updates):
                updater.zero_grad()
                sums = collections.Counter()
                for at in micro_batches(n * own_prompts, (n + 1) * own_prompts, cfg.micro_prompts):
                    prompts = training.prompts(model, indices[at])
                    logp = model.response_logp(prompts, on_host.tokens[at], on_host.lengths[at])
                    batch = (logp, old_logp[at], ref_logp[at], advantages[at], rollout.mask[at])
                    flat = [x.flatten(0, 1) for x in batch]  # (p * K, T)
                    loss, part = leaf.policy_loss(*flat, clip=cfg.clip, kl_coef=cfg.kl_coef)
                    weight = len(logp) / own_prompts  # its share of the update's responses
                    (loss * weight).backward()
                    for name, value in part.items():
                        sums[name] += weight * value
                average([p.grad for p in parameters.values()])
                progress = (step * updates + n + 1) / (cfg.steps * updates)
                rates.append(learning_rate(cfg.lr, cfg.warmup, progress))
                grad_norms.append(updater.step(rates[-1]))
                statistics.append(sums)
            model.eval()

            # What there is to see: metrics, and now and then the validation split.
            seconds = time.perf_counter() - began
            metrics = {
                name: fmean(float(update[name]) for update in statistics) for name in statistics[0]
            }
            metrics |= leaf.group_stats(rewards, forks)
            metrics |= {
                "grad_norm": fmean(grad_norms),
                "lr": fmean(rates),
                "first_ratio_gap": float(statistics[0]["ratio_gap"]),  # sampler against scorer
                "response_length": float(on_host.lengths.float().mean()),
                "seconds": seconds,
                "sampling_share": (sampled - began) / seconds,
                "tokens_per_second": world() * int(on_host.lengths.sum()) / seconds,  # of all
            }
            metrics = average_numbers(metrics, model.device)
            done = step + 1
            if validating and done % cfg.eval_every == 0:
                metrics |= validate(cfg, model, tokenizer, validation, done, folder, credit, reward)
                log.say(VALIDATION.format(step=done, **metrics))
                if metrics["validation_reward"] > best:  # the first of equals
                    best = metrics["validation_reward"]
                    with errors_of_writing(folder / BEST):
                        save_adapter(model, folder / BEST, targets, base=str(cfg.base_folder))
            if metrics["equal_rewards"] >= 0.9 and not warned:
                warned = True
                equal = f"step {done}: of nine in ten prompts or more all answers earn the same"
                log.say(f"{equal}, which teaches nothing")

            # The end of the step: its line, a checkpoint if it is time, and leave if somebody asked.
            log.write(done, metrics)
            rescue.done, rescue.updating = done, False
            # Whoever was asked, all leave: the others would wait for ever.
            stopping = average_numbers({"asked": float(stop.asked)}, model.device)["asked"] > 0
            if rank() == 0 and (done % cfg.save_every == 0 or done == cfg.steps or stopping):
                log.sync()
                save_checkpoint(checkpoints, done, parameters, updater.adam)
            if stopping:
                raise SystemExit(stop.exit_code)


def draw_prompts(cfg: Config, step: int, rows: int) -> tuple[list[int], list[int]]:
    """This process's prompts of a step: every world()-th of the rollout batch, from rank() on.

    Returns for each its number among all draws of the run, which keys its noise (a row drawn again
    gets other noise), and its row in the training split.
    """
    start = step * cfg.prompts
    own = slice(rank(), None, world())
    draws = list(range(start, start + cfg.prompts))[own]
    return draws, data.order(rows, [cfg.seed, PROMPT_ORDER], start, cfg.prompts)[own]


@torch.no_grad()
def score(cfg: Config, model: SpeechLM, split: data.Split, indices, rollout) -> torch.Tensor:
    """Log-probabilities (P, K, T) of a rollout that is on the host, without gradients, micro-batch
    by micro-batch.

    Prompts are embedded anew, since an encoder with LoRA hears them as it is at this moment.
    """
    parts = []
    for at in micro_batches(0, len(indices), cfg.micro_prompts):
        prompts = split.prompts(model, indices[at])
        parts.append(model.response_logp(prompts, rollout.tokens[at], rollout.lengths[at]))
    return torch.cat(parts)


VALIDATION = (
    "step {step}: validation BLEU {validation_bleu:.1f}, reward {validation_reward:.3f}  "
    "training reward {reward:.2f}, KL {kl:.2f}, usable forks {usable_fork_fire:.2f}"
)


def validate(
    cfg: Config, model, tokenizer, split: data.Split, step: int, folder: Path, credit, reward
) -> dict[str, float]:
    """BLEU and mean reward of greedy answers to the validation split. Those to the first rows,
    with K sampled ones and their credit, are kept in SAMPLES: a line per validation."""
    rows = split.rows
    greedy = answer(model, tokenizer, split, cfg)
    rewards = data.rewards_of(greedy, rows, reward)
    bleu = data.corpus_bleu(greedy, [row["reference"] for row in rows], lowercase=True)
    first = range(min(SAMPLED_ROWS, len(rows)))
    kept = []
    for i, sampled in enumerate(
        sample_with_credit(cfg, model, tokenizer, split, first, credit, reward)
    ):
        row = {name: rows[i][name] for name in ASKED if name in rows[i]}
        row |= {"row": i, "greedy": greedy[i], "greedy_reward": rewards[i]}
        kept.append(row | sampled)
    append_line(folder / SAMPLES, {"step": step, "validation_bleu": bleu, "rows": kept})
    return {"validation_bleu": bleu, "validation_reward": fmean(rewards)}


@torch.no_grad()
def sample_with_credit(
    cfg: Config, model, tokenizer, split: data.Split, indices, credit, reward
) -> list[dict]:
    """K sampled responses to each row at indices, as a dict of plain lists per row: "answers"; by
    token "tokens", "pieces" and "surprisal"; "rewards" if there is a reward; by token "credit" if
    there is a rule, too. The noise is keyed by the row: each call uses the same."""
    u = data.noise([cfg.base_seed, LOOK], indices, cfg.responses, cfg.max_new_tokens, model.device)
    prompts = split.prompts(model, list(indices))
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p).to("cpu")
    looked = []
    for i, tokens, lengths, logq in zip(indices, rollout.tokens, rollout.lengths, rollout.logq):
        found = {"answers": decode(tokenizer, tokens, lengths)}
        by_token = {"tokens": tokens, "surprisal": -logq}  # (K, T)
        if reward:
            row = split.rows[i]
            rewards = data.rewards_of(found["answers"], [row] * cfg.responses, reward)
            found["rewards"] = rewards
            if credit:
                of_tokens = credit(cfg, tokens, lengths, -logq, rewards)
                by_token["credit"] = checked_credit(of_tokens, credit, tokens)
        for name, values in by_token.items():
            found[name] = [row[:n] for row, n in zip(values.tolist(), lengths.tolist())]
        found["pieces"] = [tokenizer.pieces(ids) for ids in found["tokens"]]
        looked.append(found)
    return looked


def micro_batches(start: int, end: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]


def decode(tokenizer, tokens, lengths) -> list[str]:
    """The texts of K responses; tokens (K, T), lengths (K,)."""
    return [tokenizer.decode(t[:n].tolist()) for t, n in zip(tokens, lengths)]


def seed_dropout(seed: int, step: int):
    """Dropout's random numbers, keyed by step and process: a resumed run repeats them."""
    torch.manual_seed(int(np.random.default_rng([seed, step, rank()]).integers(2**31)))


# --------------------------------------------------------------------------------------------------
# Rows, model, LoRA


def load_rows(cfg: Config, splits=("train", "validation", "test")) -> dict[str, list[dict]]:
    """The rows of --data, all checked, or of the synthetic task."""
    sizes = {"train": cfg.train_rows, "validation": cfg.validation_rows, "test": cfg.test_rows}
    if not cfg.data:
        return synthetic.rows(cfg.task, sizes, cfg.base_seed)
    checked = cfg.run_folder.parent / "checked.json"  # beside the base: serves every run there
    corpus = load_corpus(cfg.data, cfg.max_audio_seconds, cfg.skip_bad_rows, splits, checked)
    return {name: rows if name == "train" else rows[: sizes[name]] for name, rows in corpus.items()}


def load(cfg: Config, device, dtype, adapter=""):
    """The base in eval mode, with an adapter if one is named, and its tokenizer."""
    folder = cfg.base_folder
    if not is_there(folder):
        raise UserError(f"the base {folder} is missing: restore it, or name it with --base")
    try:
        if is_there(folder / "tokenizer.model"):  # trained here
            tokenizer = data.Tokenizer(folder / "tokenizer.model")
            model = SpeechLM.from_pretrained(folder, device, dtype)
        else:
            import released  # only now, for it needs packages that nothing else does

            model, tokenizer = released.load(folder, device, dtype, cfg.system_prompt)
        if adapter:
            load_adapter(model, adapter)
    except ImportError as error:
        fix = "pip install -r requirements.txt"
        raise UserError(f"{folder}: a released checkpoint needs {error.name}; fix: {fix}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    model.cuda_graph = cfg.cuda_graph
    return model.eval(), tokenizer


def adapt(cfg: Config, model: SpeechLM):
    """Put LoRA on the model; returns its targets, as PEFT writes them."""
    torch.manual_seed(cfg.seed)
    try:
        if cfg.resume_adapter:
            return load_adapter(model, cfg.resume_adapter)
        targets = DECODER_TARGETS
        if cfg.lora_targets != "decoder":
            targets = cfg.lora_targets.replace(" ", "").split(",")
        apply_lora(model, targets, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)
        return targets
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------------------
# Evaluation

EVALUATION_BATCH = 64  # rows answered together


@torch.no_grad()
def answer(
    model, tokenizer, split, cfg: Config, temperature=0.0, top_p=1.0, seed=(0,), audio_of=None
) -> list[str]:
    """One response to each row; audio_of: the row whose audio each hears instead of its own."""
    texts = []
    for start in range(0, len(split.rows), EVALUATION_BATCH):
        indices = list(range(start, min(len(split.rows), start + EVALUATION_BATCH)))
        heard = [audio_of[i] for i in indices] if audio_of else None
        prompts = split.prompts(model, indices, heard)
        u = data.noise(list(seed), indices, 1, cfg.max_new_tokens, model.device)
        rollout = model.sample(prompts, u, tokenizer.eos_id, temperature, top_p)
        texts += decode(tokenizer, rollout.tokens[:, 0], rollout.lengths[:, 0])
    return texts


def evaluate(
    model, tokenizer, split: data.Split, cfg: Config, predictions: Path, reward=data.reward
) -> dict:
    """data.evaluation_scores on a split; what was answered goes to the file `predictions`."""
    rows = split.rows
    greedy = answer(model, tokenizer, split, cfg)
    passes = []
    title = "sampled passes over the test split"
    for n in tqdm(range(cfg.eval_passes), desc=title, leave=False, disable=None):
        seed = (cfg.base_seed, EVALUATION, n)
        passes.append(answer(model, tokenizer, split, cfg, temperature=0.9, top_p=0.9, seed=seed))
    swapped = None
    if any(data.named_slots(row) for row in rows):
        swapped = answer(model, tokenizer, split, cfg, audio_of=data.swapped_audio(rows))
    scores = data.evaluation_scores(rows, greedy, passes, swapped, reward)
    lines = []
    for row, one, *sampled in zip(rows, greedy, *passes):
        asked = {name: row[name] for name in ("audio", "prompt", "reference")}
        lines.append(asked | {"greedy": one, "sampled": sampled})
    write_lines(predictions, lines)
    return scores


def show_table(title: str, columns: dict[str, dict]):
    """Print the scores that all columns have, the difference of two, and last the field of the slots
    that each hears worst."""
    results = list(columns.values())
    names = [name for name in results[0] if all(name in result for result in results)]
    table = [[title, *columns, *(["difference"] if len(results) == 2 else [])]]
    for name in names:
        values = [round(result[name], 2) for result in results]  # so that what is shown adds up
        difference = [f"{values[1] - values[0]:+.2f}"] if len(values) == 2 else []
        table.append([name, *(f"{value:.2f}" for value in values), *difference])
    fields = [name.removeprefix(data.HEARD) for name in names if name.startswith(data.HEARD)]
    if fields:
        worst = [min((result[data.HEARD + field], field) for field in fields) for result in results]
        table.append(["worst heard %", *(f"{field} {value:.1f}" for value, field in worst)])
    width = max(len(name) for name, *_ in table)
    print()
    for name, *cells in table:
        print(f"{name:{width}}" + "".join(f" {cell:>10}" for cell in cells))


def show_examples(folder: Path, count: int = 2):
    """The first test rows of a finished run: the greedy answers of the base and of what it became."""
    base, trained = (read_lines(folder / f"predictions-{x}.jsonl") for x in ("base", "trained"))
    for before, after in zip(base[:count], trained[:count]):
        print(f"\nquestion   {before['prompt'].replace(data.AUDIO, '')}")
        print(f"reference  {before['reference']}")
        print(f"before     {before['greedy']}")
        print(f"after      {after['greedy']}")


def evaluate_only(cfg: Config, folder: Path, device, dtype, reward):
    """Figures and answers of a run's or a checkpoint's model on the test split."""
    if is_there(folder / "config.json"):
        # None if the run had another: then a note says so, and no mean reward is shown.
        reward = those_of_the_run(folder, reward=reward)["reward"]
    rows = load_rows(cfg, ("test",))["test"]
    model, tokenizer = load(cfg, device, dtype, cfg.resume_adapter)
    split = data.Split("test", rows, cfg.cache_gb)
    split.hear(model, tokenizer)
    name = f"{cfg.name}-best" if Path(cfg.resume_adapter).name == BEST else cfg.name
    figures = folder / f"evaluation-{name}.json"
    predictions = folder / f"predictions-{name}.jsonl"
    result = evaluate(model, tokenizer, split, cfg, predictions, reward)
    write_json(figures, {"config": asdict(cfg), "test_rows": len(rows), **result})
    show_table(f"test split, {len(rows)} rows", {"": result})
    print(f"\nfigures {figures}\nanswers {predictions}")


# --------------------------------------------------------------------------------------------------
# From the command line


def finished(folder: Path, given: dict, adapter="adapter") -> Config:
    """The configuration with which to use the finished run in a folder: as saved, but resume_adapter
    is the adapter that the run made (or BEST). What is given has precedence over the rest."""
    if not is_there(folder / "results.json"):
        raise UserError(f"{folder} holds no finished run: name one, or train it first")
    with errors_of_reading(folder, "a finished run"):
        saved = read_json(folder / "config.json")  # has the base, and no other path
        kept = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
        kept["data"] = read_json(folder / "results.json")["config"]["data"]
        kept["base"] = os.path.normpath(folder / saved["base"])
    if not is_there(folder / adapter):
        raise UserError(f"{folder} has no {adapter}: it was not validated, see --eval-every")
    return Config(**(kept | given | {"resume_adapter": str(folder / adapter)}))


def evaluated(given: dict, adapter: str) -> Config:
    """What --eval-only means. Without --init and --base: the finished run in --out. With one of them:
    that model itself, in a folder of its own; but if --out names a run, that run."""
    cfg = Config(**given)
    as_it_is = cfg.init or cfg.base
    if as_it_is and not cfg.out:
        cfg.out = f"runs/{cfg.name}-{cfg.base_folder.resolve().name}-evaluation"
    if as_it_is and not is_there(cfg.run_folder / "config.json"):
        return cfg
    return finished(cfg.run_folder, given, adapter)


def parse(argv) -> tuple[Config, bool]:
    """The configuration, and whether only to evaluate. Exits with code 2 where a flag is wrong."""
    switches = {
        "--eval-only": "test the run in --out, or --init, and no more",
        "--best": "with --eval-only: the adapter of the best validation instead of the last",
    }
    parser = make_parser(Config, "train.py [flags]", __doc__, switches)
    given = vars(parser.parse_args(argv))
    eval_only = given.pop("eval_only", False)
    adapter = BEST if given.pop("best", False) else "adapter"
    if adapter == BEST and not eval_only:
        parser.error("--best goes with --eval-only")
    if given.get("init") and given.get("base"):
        parser.error("--init and --base exclude each other")
    cfg = evaluated(given, adapter) if eval_only else Config(**given)
    if cfg.base_folder.resolve() == cfg.run_folder.resolve():
        parser.error("--base and --out must be two folders")
    check_numbers(parser, cfg)
    if cfg.prompts % cfg.update_prompts:
        parser.error(
            f"prompts ({cfg.prompts}) must be a multiple of update_prompts ({cfg.update_prompts})"
        )
    return cfg, eval_only


def main(argv=None, credit=credit, reward=data.reward):
    """Everything that the command line starts. A script of yours may hand in a rule of the form of
    `credit`, or a reward of the form of data.reward."""
    began = time.time()
    cfg, eval_only = parse(argv)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    for name in ("tokenizer.json", "config.json"):
        if cfg.init and not is_there(cfg.base_folder / name):
            raise UserError(f"--init {cfg.init}: this is no folder with a checkpoint's {name}")
    with joined_processes(device):
        if world() > 1 and (eval_only or cfg.update_prompts % world()):
            raise UserError(
                f"{world()} processes only train, and must share update_prompts "
                f"({cfg.update_prompts}) evenly"
            )
        if eval_only:
            evaluate_only(cfg, cfg.run_folder, device, dtype, reward)
            return
        if rank() > 0:
            wait_for_all()  # the first process has checked the corpus, for all
        corpus = load_rows(cfg)  # checked whole before anything is written
        if rank() > 0:
            run(cfg, corpus, device, dtype, began, credit, reward)
            return
        wait_for_all()  # lets the others in
        with lock(cfg.run_folder, wait=False):
            run(cfg, corpus, device, dtype, began, credit, reward)


def run(cfg: Config, corpus: dict[str, list[dict]], device, dtype, began: float, credit, reward):
    """Base, before, training, after; in a run folder that is ours alone."""
    folder = cfg.run_folder
    base_folder = cfg.base_folder
    settings = {name: value for name, value in asdict(cfg).items() if name not in Config.FREE}
    settings["base"] = os.path.relpath(base_folder, folder)
    settings["rows"] = fingerprint(sum(corpus.values(), []), cfg.data)
    settings |= {"credit": identity(credit), "reward": identity(reward)}
    if rank() == 0:
        # Written into a new folder; any other must be of the same configuration.
        check_same(folder, settings, "config.json", asdict(Config()))
    title = f"test split, {len(corpus['test'])} rows"
    if is_there(folder / "results.json"):
        results = read_json(folder / "results.json")
        print(f"{folder} is finished; its results:")
        show_table(title, {name: results[name] for name in ("base", "trained")})
        return
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in corpus.items())
    print(f"{cfg.name}: {counts} rows; on {device}")

    # Base: load it, or train it. Put LoRA on it.
    wanted = corpus if rank() == 0 else {"train": corpus["train"]}
    splits = {name: data.Split(name, rows, cfg.cache_gb) for name, rows in wanted.items()}
    digest = fingerprint(corpus["train"], cfg.data)
    files = (base_folder / "base.json", base_folder / "model.safetensors")
    if cfg.base and all(map(is_there, files)):  # chosen by hand: it is taken as it is
        if read_json(base_folder / "base.json").get("rows") != digest:
            print(f"note: {base_folder} was trained on other rows, some perhaps of this test split")
    elif not cfg.init and rank() == 0:
        pretrain.make_base(cfg, splits["train"], digest, base_folder, device)
    wait_for_all()
    model, tokenizer = load(cfg, device, dtype)
    targets = adapt(cfg, model)
    hearing_is_frozen = all(name.startswith("language_model.") for name in lora_layers(model))
    for split in splits.values():
        split.hear(model, tokenizer, hearing_is_frozen)

    # Measure the base: LoRA off.
    if rank() == 0:
        with lora_disabled(model):
            if not is_there(folder / BASE_SCORES):
                predictions = folder / "predictions-base.jsonl"
                scores = evaluate(model, tokenizer, splits["test"], cfg, predictions, reward)
                write_json(folder / BASE_SCORES, scores)
            base_result = read_json(folder / BASE_SCORES)

    # Train.
    rule = cfg.algo.upper() if credit.__name__ == "credit" else credit.__qualname__
    trainable = sum(p.numel() for p in lora_parameters(model).values())
    batch = f"{cfg.prompts} prompts x {cfg.responses} responses"
    print(f"\n{rule}: {cfg.steps} steps of {batch}, {trainable:,} LoRA parameters")
    train_policy(cfg, model, tokenizer, splits, folder, targets, credit, reward)
    if rank() > 0:
        return
    with errors_of_writing(folder / "adapter"):
        save_adapter(model, folder / "adapter", targets, base=str(base_folder))
    best = best_validation(folder / "policy.jsonl")

    # Measure again, and show.
    predictions = folder / "predictions-trained.jsonl"
    trained_result = evaluate(model, tokenizer, splits["test"], cfg, predictions, reward)
    results = {
        "config": asdict(cfg),
        "test_rows": len(corpus["test"]),
        "base": base_result,
        "trained": trained_result,
        "best": {name: best.get(name) for name in ("step", "validation_bleu", "validation_reward")},
        "seconds": time.time() - began,
        "peak_memory_gb": peak_memory(device) / 1e9,
        "device": str(device),
    }
    write_json(folder / "results.json", results)
    show_examples(folder)
    show_table(title, {"base": base_result, "trained": trained_result})
    example = corpus["test"][0]
    recording = example["audio"]
    if not isinstance(recording, str):  # synthesised: leave one recording behind to ask about
        recording = folder / "example.wav"
        with errors_of_writing(recording):
            soundfile.write(recording, example["audio"].samples().numpy(), data.SAMPLE_RATE)
    question = quote(example["prompt"].removeprefix(data.AUDIO))
    out = quote(str(folder))
    asking = f"python -m tools.ask {out} {quote(str(recording))} {question}"
    print(f"""
run         {folder}  (policy.jsonl: metrics; adapter/ and {BEST}/: LoRA in PEFT's format)
best step   {best.get("step", "not validated")}  (python train.py --eval-only --best --out {out})
base        {base_folder}
ask it      {asking}
its tree    ... --samples 8 --reference {quote(example["reference"])}
see it all  python -m tools.report {out}
took        {results["seconds"]:.0f} s, peak memory {results["peak_memory_gb"]:.1f} GB""")


if __name__ == "__main__":
    command(main)
