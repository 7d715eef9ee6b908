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

import argparse
import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
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
from upkeep.errors import UserError, command, reading, writing
from upkeep.files import check_same, is_there, lock, read_json, read_lines, write_json
from upkeep.flags import check_numbers, flag, make_parser
from upkeep.log import Log, best_validation
from upkeep.machine import choose_device, peak_memory, quote
from upkeep.optim import Updater, learning_rate
from upkeep.processes import average, join_processes, rank, world

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
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    clip: float = flag(0.2, "epsilon of the clipped ratio")
    kl_coef: float = flag(0.02, "beta, weight of the KL to the base")
    grad_clip: float = flag(1.0, "largest gradient norm")
    temperature: float = flag(1.0, "sampling temperature of the rollouts")
    top_p: float = flag(0.9, "rollouts sample from the likeliest tokens of this mass")
    max_new_tokens: int = flag(32, "longest response (paper: 200)")
    rescore: bool = flag(False, "old log-probabilities by a forward pass instead of the sampler's")

    fork_budget: int = flag(2, "B, boundaries per prompt", least=0, group="credit")
    terms: str = flag("both", "advantage terms of LEAF", ("both", "global", "local"))
    multiplicity: bool = flag(True, "LEAF: divide a span's credit by the root of how many share it")
    std_floor: float = flag(1 / 3, "GRPO: least std to divide by (the authors' 1/3; 0: plain GRPO)")

    lora_r: int = flag(16, "rank r (paper: 64)", group="LoRA")
    lora_alpha: float = flag(32.0, "the update is scaled by alpha / r (paper: 128)")
    lora_dropout: float = flag(0.0, "dropout, in updates only (paper: 0.05)")
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

    # May change between a run and its resumption; everything else is what the run is.
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
EVALUATION, PROMPT_ORDER, ROLLOUTS, EXAMPLES, ASKED = range(3, 8)


# --------------------------------------------------------------------------------------------------
# The loop: rollouts, rewards, credit, reference, updates, what there is to see


def credit(cfg: Config, tokens, lengths, surprisal, rewards):
    """The rule: advantages (K, T) of one prompt's K responses, and the boundaries they are cut at.

    tokens (K, T) int, lengths (K,) int, surprisal (K, T) float in nats, rewards [K] float, all on
    the host. A fork replaces this, or hands a function of its own to train_policy.
    """
    boundaries = leaf.select_boundaries(surprisal, lengths, cfg.fork_budget)
    if cfg.algo == "grpo":  # it has no boundaries; statistics of forks are those LEAF would have
        advantages = leaf.grpo_advantages(rewards, lengths, cfg.std_floor)
        return F.pad(advantages, (0, tokens.shape[1] - advantages.shape[1])), boundaries
    ablations = {"terms": cfg.terms, "multiplicity": cfg.multiplicity}
    group = (tokens, lengths, surprisal, rewards)
    advantages = leaf.leaf_advantages(*group, boundaries=boundaries, **ablations)
    return advantages, boundaries


def train_policy(
    cfg: Config,
    model: SpeechLM,
    tokenizer,
    train: data.Split,
    validation: data.Split | None,
    folder: Path,
    credit=credit,
):
    """Train LoRA by LEAF or GRPO; credit: the rule, a named function of the form of `credit`
    above."""
    parameters = lora_parameters(model)
    updater = Updater(parameters.values(), cfg.grad_clip)
    updates = cfg.prompts // cfg.update_prompts  # per step
    own_prompts = cfg.update_prompts // world()  # of an update: those of this process
    rule = getattr(credit, "__name__", type(credit).__name__)
    log = Log("policy", folder, cfg.steps, parameters, updater.adam, cfg.save_every, rule, world())
    with log:
        for step in range(log.start, cfg.steps):
            seed_dropout(cfg.seed, step)
            began = time.perf_counter()

            # Rollouts: K responses to each prompt, from the model as it is; LoRA on, dropout off.
            model.eval()
            numbers, indices = draw_prompts(cfg, step, len(train.rows))  # P of each
            u = data.noise(
                [cfg.seed, ROLLOUTS], numbers, cfg.responses, cfg.max_new_tokens, model.device
            )
            with torch.no_grad():
                prompts = train.prompts(model, indices)
            rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
            rollout = rollout.trimmed()  # (P, K, T), T the longest response
            on_host = rollout.to("cpu")  # plain numbers, for text and trees
            sampled = time.perf_counter()

            # Rewards: one per response, at its end.
            rewards = []  # P lists of K
            for i, tokens, lengths in zip(indices, on_host.tokens, on_host.lengths):
                answers = decode(tokenizer, tokens, lengths)
                rewards.append(data.reward_all(answers, [train.rows[i]] * cfg.responses))

            # Credit: per prompt, from the tree that its own responses form.
            advantages, forks = [], []
            surprisal = -on_host.logq
            for p in range(len(indices)):
                tokens, lengths = on_host.tokens[p], on_host.lengths[p]
                given, boundaries = credit(cfg, tokens, lengths, surprisal[p], rewards[p])
                advantages.append(given)
                forks += leaf.fork_stats(tokens, lengths, rewards[p], boundaries)
            advantages = to_device(torch.stack(advantages), model.device)  # (P, K, T)

            # Reference: log-probabilities under the base, of what was sampled.
            with lora_disabled(model):
                ref_logp = score(cfg, model, train, indices, on_host)
            old_logp = rollout.logp
            if cfg.rescore:  # still without dropout
                old_logp = score(cfg, model, train, indices, on_host)

            # Updates: some prompts per optimiser step, fewer per forward pass.
            for layer in lora_layers(model).values():
                layer.train()  # its dropout, and nobody else's
            statistics = []  # of each update, on the device: to read them is to wait for it
            grad_norms = []
            rates = []
            for n in range(updates):
                updater.zero_grad()
                parts = []
                for at in micro_batches(n * own_prompts, (n + 1) * own_prompts, cfg.micro_prompts):
                    prompts = train.prompts(model, indices[at])
                    logp = model.response_logp(prompts, on_host.tokens[at], on_host.lengths[at])
                    batch = (logp, old_logp[at], ref_logp[at], advantages[at], rollout.mask[at])
                    flat = [x.flatten(0, 1) for x in batch]  # (p * K, T)
                    loss, part = leaf.policy_loss(*flat, clip=cfg.clip, kl_coef=cfg.kl_coef)
                    weight = len(logp) / own_prompts  # its share of the update's responses
                    (loss * weight).backward()
                    parts.append(weight * torch.stack(list(part.values())))
                average([p.grad for p in parameters.values()])
                progress = (step * updates + n + 1) / (cfg.steps * updates)
                rates.append(learning_rate(cfg.lr, cfg.warmup, progress))
                grad_norms.append(updater.step(rates[-1]))
                statistics.append(sum(parts))

            # What there is to see: metrics, and now and then the validation split.
            model.eval()
            names = list(part)
            statistics = torch.stack(statistics).tolist()
            seconds = time.perf_counter() - began
            metrics = dict(zip(names, np.mean(statistics, axis=0).tolist()))
            metrics |= leaf.group_stats(rewards, forks)
            first_gap = statistics[0][names.index("ratio_gap")]
            metrics |= {
                "grad_norm": float(np.mean(grad_norms)),
                "lr": float(np.mean(rates)),
                "first_ratio_gap": first_gap,  # sampler against scorer: rounding
                "response_length": float(on_host.lengths.float().mean()),
                "seconds": seconds,
                "sampling_share": (sampled - began) / seconds,
                "tokens_per_second": world() * int(on_host.lengths.sum()) / seconds,
            }
            validation_bleu = {}
            if validation and rank() == 0 and cfg.eval_every and (step + 1) % cfg.eval_every == 0:
                bleu = greedy_bleu(model, tokenizer, validation, cfg)
                validation_bleu = {"validation_bleu": bleu}
            log.record(step, metrics, validation_bleu)


def draw_prompts(cfg: Config, step: int, rows: int) -> tuple[list[int], list[int]]:
    """This process's prompts of a step: r, r + N, ... of its rollout batch.

    Returns their numbers in the endless sequence of prompts, which key the noise (a row that comes
    again gets other noise), and their rows in the training split.
    """
    start = step * cfg.prompts
    own = slice(rank(), None, world())
    numbers = list(range(start, start + cfg.prompts))[own]
    return numbers, data.order(rows, [cfg.seed, PROMPT_ORDER], start, cfg.prompts)[own]


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
        raise UserError(f"the base {folder} is missing: its place is told from the run's folder")
    try:
        if is_there(folder / "tokenizer.model"):  # trained here
            tokenizer = data.Tokenizer(folder / "tokenizer.model")
            model = SpeechLM.from_pretrained(folder, device, dtype)
        else:
            try:
                import released  # only now, for it needs packages that nothing else does
            except ImportError as error:
                raise UserError(
                    f"{folder}: a released checkpoint needs {error.name}; "
                    "fix: pip install -r requirements.txt"
                ) from None
            tokenizer = released.ChatTokenizer(folder, cfg.system_prompt)
            model = released.load_model(folder, device, dtype)
        if adapter:
            load_adapter(model, adapter)
        if tokenizer.audio_id != model.config.audio_token_index:
            raise ValueError(
                f"{folder}: config.json's audio_token_index is not {data.AUDIO} of its tokenizer"
            )
        if tokenizer.vocab_size > model.config.text_config.vocab_size:
            raise ValueError(f"{folder}: its tokenizer has more tokens than its model")
        tokenizer.encode_prompt(data.AUDIO + "?")  # a chat template that fails must fail now
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
    model: SpeechLM,
    tokenizer,
    split: data.Split,
    cfg: Config,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: tuple[int, ...] = (0,),
    audio_of: list[int] | None = None,
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


def greedy_bleu(model: SpeechLM, tokenizer, split: data.Split, cfg: Config) -> float:
    """Case-insensitive corpus BLEU of greedy answers."""
    references = [row["reference"] for row in split.rows]
    return data.corpus_bleu(answer(model, tokenizer, split, cfg), references, lowercase=True)


def evaluate(model, tokenizer, split: data.Split, cfg: Config, predictions: Path) -> dict:
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
    scores = data.evaluation_scores(rows, greedy, passes, swapped)
    with writing(predictions), open(predictions, "w", encoding="utf-8") as file:
        for row, one, *sampled in zip(rows, greedy, *passes):
            line = {name: row[name] for name in ("audio", "prompt", "reference")}
            line |= {"greedy": one, "sampled": sampled}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return scores


def score_table(columns: dict[str, dict]) -> list[list[str]]:
    """Rows of text: the scores that all columns have, the difference of two, and last the field of
    the slots that each hears worst."""
    results = list(columns.values())
    scores = [name for name in results[0] if all(name in result for result in results)]
    table = []
    for name in scores:
        values = [result[name] for result in results]
        table.append([name, *(f"{value:.2f}" for value in values)])
        if len(values) == 2:
            table[-1].append(f"{values[1] - values[0]:+.2f}")
    fields = [name.removeprefix(data.HEARD) for name in scores if name.startswith(data.HEARD)]
    if fields:
        worst = [min((result[data.HEARD + field], field) for field in fields) for result in results]
        table.append(["worst heard %", *(f"{field} {value:.1f}" for value, field in worst)])
    return table


def show_table(title: str, columns: dict[str, dict]):
    header = [title, *columns]
    if len(columns) == 2:
        header.append("difference")
    table = [header, *score_table(columns)]
    width = max(len(row[0]) for row in table)
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


def evaluate_only(cfg: Config, folder: Path, device, dtype):
    """Figures and answers of a run's or a checkpoint's model on the test split."""
    rows = load_rows(cfg, ("test",))["test"]
    model, tokenizer = load(cfg, device, dtype, cfg.resume_adapter)
    split = data.Split("test", rows, cfg.cache_gb)
    split.hear(model, tokenizer)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{cfg.name}-best" if Path(cfg.resume_adapter).name == BEST else cfg.name
    figures = folder / f"evaluation-{name}.json"
    answers = folder / f"predictions-{name}.jsonl"
    result = evaluate(model, tokenizer, split, cfg, answers)
    write_json(figures, {"config": asdict(cfg), "test_rows": len(rows), **result})
    show_table(f"test split, {len(rows)} rows", {"": result})
    print(f"\nfigures {figures}\nanswers {answers}")


# --------------------------------------------------------------------------------------------------
# From the command line


def finished(folder: Path, given: dict, adapter="adapter") -> Config:
    """The configuration of the finished run in a folder, with its adapter (or BEST), and what was
    given."""
    if not is_there(folder / "results.json"):
        raise UserError(f"{folder} holds no finished run: name one, or train it first")
    with reading(folder, "a finished run"):
        saved = read_json(folder / "config.json")  # without paths; those that matter follow
        kept = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
        kept["data"] = read_json(folder / "results.json")["config"]["data"]
        kept["base"] = os.path.normpath(folder / saved["base"])
    if not is_there(folder / adapter):
        raise UserError(f"{folder} has no {adapter}: it was not validated, see --eval-every")
    own_adapter = {"resume_adapter": str(folder / adapter)}  # its own, wherever it began
    return Config(**(kept | given | own_adapter))


BEST = "adapter-best"  # of the step with the best validation BLEU, beside "adapter", the last


def evaluated(given: dict, adapter: str) -> Config:
    """What --eval-only means: the finished run in --out; or --init or --base as they are, in a
    folder of their own."""
    cfg = Config(**given)
    folder = cfg.run_folder
    if not (cfg.init or cfg.base):
        return finished(folder, given, adapter)
    if not cfg.out:
        cfg.out = f"runs/{cfg.name}-{cfg.base_folder.resolve().name}-evaluation"
        folder = cfg.run_folder
    if is_there(folder / "results.json"):
        return finished(folder, given, adapter)
    if is_there(folder / "config.json"):
        raise UserError(
            f"{folder} holds an unfinished run: train it to its end, or choose another --out"
        )
    return cfg


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
    check_flags(parser, cfg)
    return cfg, eval_only


def check_flags(parser: argparse.ArgumentParser, cfg: Config):
    check_numbers(parser, cfg)
    if cfg.grad_clip == 0:
        parser.error("grad_clip must be above 0, or no gradient is left")
    if cfg.warmup >= 1 or cfg.lora_dropout >= 1:
        parser.error(
            f"warmup and lora_dropout must be below 1, not {cfg.warmup} and {cfg.lora_dropout}"
        )
    if cfg.prompts % cfg.update_prompts:
        parser.error(
            f"prompts ({cfg.prompts}) must be a multiple of update_prompts ({cfg.update_prompts})"
        )
    if not 0 < cfg.top_p <= 1 or cfg.temperature == 0:
        parser.error(
            "top_p must lie in (0, 1] and temperature above 0, "
            f"not {cfg.top_p} and {cfg.temperature}"
        )


def main(argv=None):
    began = time.time()
    cfg, eval_only = parse(argv)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    for name in ("tokenizer.json", "config.json") if cfg.init else ():
        if not is_there(cfg.base_folder / name):
            raise UserError(f"--init {cfg.init}: this is no folder with a checkpoint's {name}")
    join_processes(device)
    if world() > 1 and (eval_only or cfg.update_prompts % world()):
        raise UserError(
            f"{world()} processes only train, and must share update_prompts "
            f"({cfg.update_prompts}) evenly"
        )
    if eval_only:
        evaluate_only(cfg, cfg.run_folder, device, dtype)
        return
    with contextlib.ExitStack() as stack:
        if rank() > 0:  # only the first process writes and speaks
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            dist.barrier()  # the first process has checked the corpus, for all
        corpus = load_rows(cfg)  # checked whole before anything is written
        if rank() == 0:
            if world() > 1:
                dist.barrier()
            stack.enter_context(lock(cfg.run_folder, wait=False))
        run(cfg, corpus, device, dtype, began)
    if world() > 1:
        dist.destroy_process_group()


def run(cfg: Config, corpus: dict[str, list[dict]], device, dtype, began: float):
    """Base, before, training, after; in a run folder that is ours alone."""
    folder = cfg.run_folder
    base_folder = cfg.base_folder
    settings = {name: value for name, value in asdict(cfg).items() if name not in Config.FREE}
    settings["base"] = os.path.relpath(base_folder, folder)
    settings["rows"] = fingerprint(sum(corpus.values(), []), cfg.data)
    if rank() == 0:
        check_same(folder, settings, "config.json", asdict(Config()))
    title = f"test split, {len(corpus['test'])} rows"
    if is_there(folder / "results.json"):
        results = read_json(folder / "results.json")
        print(f"{folder} is finished; its results:")
        show_table(title, {name: results[name] for name in ("base", "trained")})
        return
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in corpus.items())
    print(f"{cfg.name}: {counts} rows; on {device}")

    # Base: load it, or train it. LoRA, off for now.
    wanted = corpus if rank() == 0 else {"train": corpus["train"]}
    splits = {name: data.Split(name, rows, cfg.cache_gb) for name, rows in wanted.items()}
    files = (base_folder / "base.json", base_folder / "model.safetensors")
    chosen_by_hand = cfg.base and all(map(is_there, files))  # taken as it is
    if chosen_by_hand:
        rows = fingerprint(corpus["train"], cfg.data)
        if read_json(base_folder / "base.json").get("rows") != rows:
            print(
                f"note: {base_folder} was trained on other rows, perhaps on some of this test split"
            )
    elif not cfg.init and rank() == 0:
        rows = fingerprint(corpus["train"], cfg.data)
        pretrain.make_base(cfg, splits["train"], rows, base_folder, device)
    if world() > 1:
        dist.barrier()
    model, tokenizer = load(cfg, device, dtype)
    targets = adapt(cfg, model)
    hearing_is_frozen = all(name.startswith("language_model.") for name in lora_layers(model))
    for split in splits.values():
        split.hear(model, tokenizer, hearing_is_frozen)

    # Measure it.
    if rank() == 0:
        with lora_disabled(model):
            if not is_there(folder / "base.json"):
                answers = folder / "predictions-base.jsonl"
                scores = evaluate(model, tokenizer, splits["test"], cfg, answers)
                write_json(folder / "base.json", scores)
            base_result = read_json(folder / "base.json")

    # Train.
    trainable = sum(p.numel() for p in lora_parameters(model).values())
    batch = f"{cfg.prompts} prompts x {cfg.responses} responses"
    print(f"\n{cfg.algo.upper()}: {cfg.steps} steps of {batch}, {trainable:,} LoRA parameters")
    train_policy(cfg, model, tokenizer, splits["train"], splits.get("validation"), folder)
    if rank() > 0:
        return
    with writing(folder / "adapter"):
        save_adapter(model, folder / "adapter", targets, base=str(base_folder))
    best = best_validation(folder / "policy.jsonl")
    if "step" in best:
        parameters = lora_parameters(model)
        file = folder / "checkpoints" / "policy" / "best.safetensors"
        with reading(file, "safetensors"):
            saved = load_file(file)
        values = [saved[name].to(model.device) for name in parameters]
        with writing(folder / BEST), other_values(parameters.values(), values):
            save_adapter(model, folder / BEST, targets, base=str(base_folder))

    # Measure again, and show.
    answers = folder / "predictions-trained.jsonl"
    trained_result = evaluate(model, tokenizer, splits["test"], cfg, answers)
    results = {
        "config": asdict(cfg),
        "test_rows": len(corpus["test"]),
        "base": base_result,
        "trained": trained_result,
        "best": {name: best.get(name) for name in ("step", "validation_bleu")},
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
        with writing(recording):
            soundfile.write(recording, example["audio"].samples().numpy(), data.SAMPLE_RATE)
    question = quote(example["prompt"].removeprefix(data.AUDIO))
    asking = f"python -m tools.ask {quote(str(folder))} {quote(str(recording))} {question}"
    print(f"""
run         {folder}  (policy.jsonl: metrics, adapter/: LoRA in PEFT's format, results.json)
best step   {best.get("step", "not validated")}  ({BEST}/; to test it: --eval-only --best)
base        {base_folder}
ask it      {asking}
its tree    ... --samples 8 --reference {quote(example["reference"])}
see it all  python -m tools.report {quote(str(folder))}
took        {results["seconds"]:.0f} s, peak memory {results["peak_memory_gb"]:.1f} GB""")


@contextlib.contextmanager
def other_values(parameters, values):
    """A context in which the parameters have these values; afterwards, and after an exception,
    their own."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own):
            parameter.data = value


if __name__ == "__main__":
    command(main)
