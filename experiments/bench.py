"""This repository against transformers + PEFT: the same weights, tokens and machine, in one run.

    python -m experiments.bench                 compact and small, answers of 16 to 400 tokens
    python -m experiments.bench --shape 2b      Granite Speech 3.3 2B; needs CUDA

Three sides take the same training step, from log-mels to updated adapters:

    ours      this repository, through the functions that train.py calls
    official  transformers + PEFT as the authors' code calls them: one prompt at a time, encoded and
              decoded K times to sample, for old and for reference log-probabilities; the reference
              is a second model in memory; a forward pass of an update has one response
    tuned     transformers + PEFT as well as we can: audio heard once, all prompts and responses in
              one batch, adapters merged while sampling, a prompt's cache made once and repeated for
              its K responses, also to score and with gradients; logits where they are needed; the
              reference is the model without adapters

All freeze the encoder, leave dropout out and use leaf.policy_loss. Each samples T tokens per
response, whatever they are; what it then scores and learns from is one given set of responses, in
two variants: they share beginnings as the default run's do, or nothing at all. Ours takes old
log-probabilities from its sampler; so could "tuned", whence the row "step, old log-probs kept".
First the sides must agree. Then whole steps are timed, the sides in turn; a ratio is the median of
those of each round. "Official" is left out where answers are long, for its steps take minutes.
Memory is that of a fresh process with one side in it: weights, and what its first step adds at its
peak. OMP_NUM_THREADS says how many threads. Results go to experiments/results/bench.json.
"""

import gc
import multiprocessing
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import peft
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import leaf
import train
from experiments.common import RESULTS, command_line, environment, table
from lora import apply_lora, load_adapter, lora_disabled, lora_parameters, save_adapter
from model import EncoderConfig, ProjectorConfig, SpeechConfig, SpeechLM
from pretrain import compact, init_weights
from upkeep.errors import UserError, command
from upkeep.files import read_json, write_json
from upkeep.machine import choose_device

SIDES = ("ours", "official", "tuned")
PARTS = ("hearing", "sampling", "old log-probs", "reference", "update")
DEVICE, DTYPE = choose_device("auto", "auto")
VERSIONS = {module.__name__: module.__version__ for module in (transformers, peft)}


@dataclass
class Workload:
    """A rollout batch and its updates."""

    prompts: int
    responses: int  # K
    tokens: int  # T
    audio: int  # seconds
    text: int  # text tokens of a prompt
    update_prompts: int
    rank: int  # of LoRA; alpha is twice as much


# Everywhere the audio token is outside the vocabulary, or random weights would now and then say it.
COMPACT = compact(vocab_size=800, ctc_size=25, audio_token_index=800)
SMALL = SpeechConfig(
    EncoderConfig(
        num_layers=4, hidden_dim=140, num_heads=4, dim_head=35, context_size=50, max_pos_emb=50
    ),
    ProjectorConfig(140, 1, 4, 560, 140),
    replace(
        COMPACT.text_config,
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    audio_token_index=1024,
)
CONFIGS = {
    "compact": COMPACT,
    "small": SMALL,
    "2b": SpeechConfig(EncoderConfig(num_layers=16, output_dim=256), audio_token_index=49160),
}
WORKLOADS = {  # by the config and T
    "compact-16": Workload(8, 8, 16, 3, 12, 4, 16),
    "small-48": Workload(8, 8, 48, 5, 20, 4, 64),
    "small-200": Workload(4, 8, 200, 5, 20, 2, 64),
    "small-400": Workload(4, 8, 400, 5, 20, 2, 64),
    "2b": Workload(6, 8, 200, 15, 52, 1, 64),  # the paper's; no length is a multiple of 8
}
SHARING = {"as the default run": True, "nothing": False}


@dataclass
class Case:
    """What every side is given."""

    mels: list[torch.Tensor]  # (frames, 160) each
    prompts: list[list[int]]  # token ids, one audio token each
    tokens: torch.Tensor  # (P, K, T)
    lengths: torch.Tensor  # (P, K)
    logp: torch.Tensor  # (P, K, T), before the update
    advantages: torch.Tensor  # (P, K, T)
    update_prompts: int


# A rollout batch of the default run at 6e37f83 (step 196), a line per prompt: a letter is a token,
# the same letter in a line the same token. The first four lines share as much as all eight.
ROLLOUTS = """
abcdefghijklm abcdnopjqlm abcdnijqlm abcdnijqlm abcdeijqlm abcdeijqlm abcdeijqlm rbcdeijqlm
abcdefghijklm anhdefghijklm aocdefghijklm apcdefghijklm aohdefghijklm aqhdefghijklm arhdefghijklm arcdefghijklm
abcdefghij kbcdefghij kbcdefghij kbcdefghij kbclefghij kbcdefghij abcdefghij mbclefghij
abcdefghijklm anhdefghijklm anhdefghijklm aohdefghijklm abpdefghijklm aocdefghijklm aohdefghijklm aocdefghijklm
abcdefghij kbcdlfghij abcdefghij mbcdefghij kbcdlfghij kbcdlfghij abcdefghij mbcdefghij
abcdefghijklm ancdefghijklm anhdefghijklm aopdefghijklm aqhdefghijklm arcdefghijklm ascdefghijklm ashdefghijklm
abcdefghij abcdkfghij abcdefghij abcdkfghij abcdkfghij abcdkfghij abcdkfghij abcdkfghij
abcdefgchijkl amcdengchijkl abodengchpjkl aqodengchpjkl arodengchpjkl arcdengchijkl amcdengchpjkl arodengchijkl
"""


def responses(work: Workload, vocab_size: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (P, K, T) and lengths (P, K) of responses that are as long, beside T, as those
    of ROLLOUTS beside their longest. shared: what begins alike there begins alike here."""
    lines = [line.split() for line in ROLLOUTS.split("\n") if line][: work.prompts]
    longest = max(len(response) for line in lines for response in line)
    ends = [round(work.tokens * t / longest) for t in range(longest + 1)]
    tokens = torch.zeros(work.prompts, work.responses, work.tokens, dtype=torch.int64)
    lengths = torch.zeros(work.prompts, work.responses, dtype=torch.int64)
    behind = {}  # by prompt and beginning, the tokens that its last letter stands for
    for p, line in enumerate(lines):
        for k, response in enumerate(line):
            for t in range(len(response)):
                key = (p, None if shared else k, response[: t + 1])
                if key not in behind:
                    behind[key] = torch.randint(vocab_size, (ends[t + 1] - ends[t],))
                tokens[p, k, ends[t] : ends[t + 1]] = behind[key]
            lengths[p, k] = ends[len(response)]
    return tokens, lengths


def shares(tokens, lengths) -> dict[str, float]:
    """Of responses to each prompt: the share of their tokens that differ in what they are or in
    what is before them, and of the responses that differ."""
    beginnings = set()
    whole = set()
    for p, (of_prompt, ends) in enumerate(zip(tokens.tolist(), lengths.tolist())):
        for response, n in zip(of_prompt, ends):
            beginnings |= {(p, *response[:t]) for t in range(1, n + 1)}
            whole.add((p, *response[:n]))
    return {
        "distinct tokens": len(beginnings) / int(lengths.sum()),
        "distinct responses": len(whole) / lengths.numel(),
    }


def prepare(shape: str, work: Workload, shared: bool, folder: Path) -> int:
    """Write a base model of random weights, an adapter that matters and a case into folder; returns
    the number of parameters."""
    config = CONFIGS[shape.split("-")[0]]
    torch.set_default_dtype(DTYPE)
    model = init_weights(SpeechLM(config), 0)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    mels = [torch.randn(50 * work.audio, 160) for _ in range(work.prompts)]
    text = torch.randint(config.text_config.vocab_size, (work.prompts, work.text)).tolist()
    half = work.text // 2
    prompts = [[*row[:half], config.audio_token_index, *row[half:]] for row in text]
    tokens, lengths = responses(work, config.text_config.vocab_size, shared)
    model.eval().save(folder)
    apply_lora(model, r=work.rank, alpha=2 * work.rank)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.02)
    save_adapter(model, folder / "adapter")
    model.to(DEVICE)
    with torch.no_grad():
        heard = model.embed_prompts(prompts, model.project(model.encode(mels)))
        logp = model.response_logp(heard, tokens, lengths).cpu()
    given = (tokens, lengths, logp, torch.randn(tokens.shape))
    torch.save(vars(Case(mels, prompts, *given, work.update_prompts)), folder / "case.pt")
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


# --------------------------------------------------------------------------------------------------
# The three sides


class Side:
    """One way to take a step; optimiser and updates are the same on all."""

    def __init__(self, model: nn.Module, case: Case):
        self.model = model
        self.case = case
        self.adapters = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(
            self.adapters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.P, self.K, self.T = case.tokens.shape
        self.mask = torch.arange(self.T, device=case.tokens.device) < case.lengths[..., None]
        self.device = case.tokens.device
        self.updates = train.micro_batches(0, self.P, case.update_prompts)

    def loss(self, logp, old, ref, at):
        """Of log-probabilities (..., T) of the responses that at selects."""
        given = (old, ref, self.case.advantages, self.mask)
        flat = (x[at].reshape(-1, self.T) for x in given)
        loss, _ = leaf.policy_loss(logp.reshape(-1, self.T), *flat, clip=0.2, kl_coef=0.02)
        return loss

    def backward(self, old, ref, prompts):
        """The gradient of one update."""
        self.loss(self.logp(prompts), old, ref, prompts).backward()

    def update(self, old, ref):
        for prompts in self.updates:
            self.backward(old, ref, prompts)
            nn.utils.clip_grad_norm_(self.adapters, 1.0)
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)

    def step(self) -> dict[str, float]:
        """The seconds of a whole step and of each part."""
        clock = [self.now()]
        self.hear()
        clock.append(self.now())
        self.sample()
        clock.append(self.now())
        old = self.policy()
        clock.append(self.now())
        ref = self.reference()
        clock.append(self.now())
        self.update(old, ref)
        clock.append(self.now())
        seconds = {part: end - start for part, start, end in zip(PARTS, clock, clock[1:])}
        seconds["step"] = clock[-1] - clock[0]
        seconds["step, old log-probs kept"] = seconds["step"] - seconds["old log-probs"]
        return seconds

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Ours(Side):
    def __init__(self, model: nn.Module, case: Case):
        super().__init__(model, case)
        self.on_host = (case.tokens.cpu(), case.lengths.cpu())

    @torch.no_grad()
    def hear(self):
        sounds = self.model.project(self.model.encode(self.case.mels))
        self.prompts = self.model.embed_prompts(self.case.prompts, sounds)

    def sample(self, greedy=False):
        noise = torch.rand(self.case.tokens.shape, device=self.device)
        return self.model.sample(self.prompts, noise, -1, 0.0 if greedy else 1.0, 0.9).tokens

    def logp(self, prompts):
        tokens, lengths = self.on_host
        return self.model.response_logp(self.prompts[prompts], tokens[prompts], lengths[prompts])

    def policy(self):
        return self.case.logp  # the sampler's

    @torch.no_grad()
    def reference(self):
        with lora_disabled(self.model):
            return torch.cat([self.logp(prompts) for prompts in self.updates])


class Official(Side):
    def __init__(self, model: nn.Module, case: Case, frozen: nn.Module):
        super().__init__(model, case)
        self.frozen = frozen
        c = model.config
        self.ids = []  # with the audio token once for each of its embeddings
        for ids, mel in zip(case.prompts, case.mels):
            at = ids.index(c.audio_token_index)
            count = -(-len(mel) // c.window_size) * (c.window_size // c.downsample_rate)
            expanded = [*ids[:at], *[c.audio_token_index] * count, *ids[at + 1 :]]
            self.ids.append(torch.tensor(expanded, device=self.device))

    def hear(self):
        pass  # in every forward pass that begins a sequence

    def sample(self, greedy=False):
        sampled = []
        for ids, mel in zip(self.ids, self.case.mels):
            ids = ids.repeat(self.K, 1)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=mel.repeat(self.K, 1, 1),
                max_new_tokens=self.T,
                return_dict_in_generate=True,
                output_scores=True,
                do_sample=not greedy,
                top_p=0.9,
                top_k=0,
            )
            tokens = out.sequences[:, ids.shape[1] :]
            torch.stack(out.scores, 1).log_softmax(-1).gather(-1, tokens[..., None])  # surprisal
            sampled.append(tokens)
        return torch.stack(sampled)

    def logp(self, model, p: int, k: slice):
        """Of responses k of prompt p, (k, T)."""
        tokens = self.case.tokens[p, k]
        ids = torch.cat((self.ids[p].expand(len(tokens), -1), tokens), 1)
        features = self.case.mels[p].repeat(len(tokens), 1, 1)
        attended = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=attended, input_features=features).logits
        return logits[:, :-1].log_softmax(-1)[:, -self.T :].gather(-1, tokens[..., None])[..., 0]

    @torch.no_grad()
    def policy(self):
        return torch.stack([self.logp(self.model, p, slice(None)) for p in range(self.P)])

    @torch.no_grad()
    def reference(self):
        return torch.stack([self.logp(self.frozen, p, slice(None)) for p in range(self.P)])

    def backward(self, old, ref, prompts):
        together = range(self.P)[prompts]
        for p in together:
            for k in range(self.K):
                at = p, slice(k, k + 1)
                loss = self.loss(self.logp(self.model, *at), old, ref, at)
                (loss / (len(together) * self.K)).backward()


class Tuned(Side):
    @torch.no_grad()
    def hear(self):
        embed = self.model.get_input_embeddings()
        mels = torch.stack(self.case.mels).to(DTYPE)
        sounds = self.model.get_audio_features(mels).pooler_output
        rows = []
        for ids, sound in zip(self.case.prompts, sounds):
            at = ids.index(self.model.config.audio_token_index)
            ids = torch.tensor(ids, device=self.device)
            rows.append(torch.cat((embed(ids[:at]), sound, embed(ids[at + 1 :]))))
        self.x = torch.stack(rows)

    def prefill(self, prompts):
        """Last logits and cache of prompts, each repeated K times."""
        cache = transformers.DynamicCache(config=self.model.config)
        logits = self.follow(self.x[prompts], cache, keep=1)
        cache.batch_repeat_interleave(self.K)
        return logits.repeat_interleave(self.K, 0), cache

    def follow(self, x, cache, keep=0):
        """Logits after embeddings x (rows, n, C) that follow what is in the cache; of the last keep
        alone, unless that is 0. There is no padding, and without a mask kernels are faster."""
        given = {"inputs_embeds": x, "past_key_values": cache, "use_cache": True}
        return self.model(**given, logits_to_keep=keep).logits

    @torch.no_grad()
    def sample(self, greedy=False):
        embed = self.model.get_input_embeddings()
        self.model.merge_adapter()
        logits, cache = self.prefill(slice(None))
        tokens, logq = [], []
        for t in range(self.T):
            if t:
                logits = self.follow(embed(tokens[-1]), cache)
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
        tokens = self.case.tokens[prompts].flatten(0, 1)
        first, cache = self.prefill(prompts)
        rest = self.follow(self.model.get_input_embeddings()(tokens[:, :-1]), cache)
        logits = torch.cat((first, rest), 1).float()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return -nll.view(-1, self.K, self.T)

    @torch.no_grad()
    def policy(self):
        return self.logp(slice(None))

    def reference(self):
        with self.model.disable_adapter():
            return self.policy()


def load_side(name: str, folder: Path) -> Side:
    """One of SIDES, of what prepare() wrote."""
    case = Case(**torch.load(folder / "case.pt", map_location=DEVICE))
    if name == "ours":
        model = SpeechLM.from_pretrained(folder, DEVICE, DTYPE).eval()
        load_adapter(model, folder / "adapter")
        return Ours(model, case)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's way into transformers
    base = load_transformers(folder)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    if name == "tuned":
        return Tuned(model, case)
    return Official(model, case, frozen=load_transformers(folder))


def load_transformers(folder: Path):
    """The base model in transformers' class, in eval mode."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if DEVICE.type == "cpu":  # whose kernels can do what transformers does not count on
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
    config = read_json(folder / "config.json")
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    text = {k: v for k, v in config["text_config"].items() if v is not None}  # head_dim
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    config["text_config"] = text | {"model_type": "granite", "pad_token_id": 0}
    config = transformers.GraniteSpeechConfig(**config, has_lora_adapter=False)
    kind = transformers.GraniteSpeechForConditionalGeneration
    model = kind.from_pretrained(folder, config=config, dtype=DTYPE).to(DEVICE).eval()
    model.generation_config.eos_token_id = None
    return model


# --------------------------------------------------------------------------------------------------
# Agreement, memory and time


def outputs(side: Side) -> dict[str, torch.Tensor]:
    """What a side computes before any update."""
    side.hear()
    greedy = side.sample(greedy=True)
    old = side.policy()
    ref = side.reference()
    side.backward(side.case.logp, ref, side.updates[0])
    gradient = torch.cat([p.grad.flatten() for p in side.adapters])
    side.adam.zero_grad(set_to_none=True)
    return {
        "greedy tokens": greedy,
        "log-probs": old * side.mask,
        "reference log-probs": ref * side.mask,
        "gradient": gradient,
    }


def gaps(found: dict, ours: dict) -> dict[str, float]:
    """How far the outputs of a side are from ours, relative to their length."""
    far = {what: (found[what].double() - ours[what].double()).norm() for what in ours}
    return {what: (gap / ours[what].double().norm()).item() for what, gap in far.items()}


def prove(sides: dict[str, Side]) -> dict:
    """How far the peers are from ours; in float32 more than rounding is an error."""
    found = {name: outputs(side) for name, side in sides.items()}
    proof = {name: gaps(found[name], found["ours"]) for name in sides if name != "ours"}
    for name, gap in proof.items():
        print(f"{name} against ours: {gap}")
        if DTYPE == torch.float32 and not max(gap.values()) < 1e-4:
            raise UserError(f"{name} does not compute what ours does")
    return proof


def resident(field: str) -> int:
    """Bytes, by /proc: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(name: str, folder: Path) -> dict:
    """GB of the weights of a side that is alone in this process, and GB that its first step
    adds."""
    side = load_side(name, folder)
    models = [value for value in vars(side).values() if isinstance(value, nn.Module)]
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    for x in tensors:
        x.max()  # files are mapped into memory: touch every page before, not in, the step
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
        side.step()
        peak = resident("VmHWM")
    weights = sum(x.nbytes for x in tensors)
    return {"weights_gb": weights / 1e9, "memory_gb": (peak - before) / 1e9}


def bench(shape: str, sharing: str, repeats: int = 5) -> dict:
    """Everything about one shape, printed and returned."""
    work = WORKLOADS[shape]
    names = SIDES if work.tokens < 200 or DEVICE.type == "cuda" else ("ours", "tuned")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        parameters = prepare(shape, work, SHARING[sharing], folder)
        sides = {name: load_side(name, folder) for name in names}
        case = sides["ours"].case
        share = shares(case.tokens, case.lengths)
        tokens = int(case.lengths.sum())
        print(f"\n{shape}: {parameters:,} parameters, {DTYPE} on {DEVICE}; sharing {sharing}:")
        print(f"{tokens} tokens, " + ", ".join(f"{x:.0%} {what}" for what, x in share.items()))
        proof = prove(sides)
        timed = {name: [] for name in names}
        for _ in tqdm(range(repeats + 1), desc="steps", leave=False):
            for name, side in sides.items():
                timed[name].append(side.step())
        del sides, side
        torch.cuda.empty_cache()
        medians, ratios = {}, {}
        for name, steps in timed.items():
            del steps[0]  # it warmed up
            medians[name] = {part: median(step[part] for step in steps) for part in steps[0]}
            ratios[name] = {
                part: median(
                    theirs[part] / ours[part] for theirs, ours in zip(steps, timed["ours"])
                )
                for part in steps[0]
            }
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
                memory = fresh_process.submit(measure, name, folder).result()
            medians[name] |= memory
            ratios[name] |= {what: memory[what] / medians["ours"][what] for what in memory}
    show(medians, ratios)
    return {
        "workload": asdict(work),
        "parameters": parameters,
        "tokens": tokens,
        "shares": share,
        "proof": proof,
        "medians": medians,
        "ratios": ratios,
        "repeats": timed,
        "environment": environment() | VERSIONS,
    }


def show(medians: dict, ratios: dict):
    rows = []
    peers = list(medians)[1:]
    for key in medians["ours"]:
        row = [key.removesuffix("_gb"), *(f"{1e3 * of[key]:.1f}" for of in medians.values())]
        if key != "old log-probs":  # ours has them already
            row += [f"{ratios[peer][key]:.2f}" for peer in peers]
        rows.append(row)
    print(table(["ms and MB", *medians, *(f"{peer}/ours" for peer in peers)], rows))


def main():
    parser = command_line(__doc__)
    on_cpu = [shape for shape in WORKLOADS if not shape.startswith("2b")]
    parser.add_argument("--shape", nargs="+", choices=WORKLOADS, default=on_cpu)
    args = parser.parse_args()
    if set(args.shape) - set(on_cpu) and DEVICE.type != "cuda":
        parser.error("--shape 2b needs a GPU")
    path = RESULTS / "bench.json"
    for shape in args.shape:
        for sharing in SHARING:
            found = bench(shape, sharing)
            results = read_json(path) if path.exists() else {}
            made_on = f"{DEVICE.type}, {DTYPE}, {torch.get_num_threads()} threads"
            results[f"{shape}, sharing {sharing}, {made_on}".replace("torch.", "")] = found
            write_json(path, results)


if __name__ == "__main__":
    command(main)
