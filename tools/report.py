"""See what runs did: one page to open in a browser, and to send to somebody.

    python -m tools.report RUN [RUN ...]

writes report.html into the first run's folder: what was run, the scores of base and trained model,
learning curves, and examples with the recording, the answers, and the prefix tree of the sampled
responses, its tokens on the colour of their credit. A run need not be finished: its newest
checkpoint is shown. Everything is computed here; report.html beside this file, in which the page's
JavaScript is, only draws it.
"""

import argparse
import base64
import difflib
import io
import json
import math
import os
from dataclasses import fields
from pathlib import Path
from shlex import quote
from statistics import fmean

import soundfile
import torch

import data
import leaf
import train
from corpora.load import fingerprint
from lora import lora_disabled, lora_parameters
from upkeep.checkpoints import read_checkpoint, saved_steps
from upkeep.errors import DataError, UserError, command, reading, writing
from upkeep.files import is_there, read_json, read_lines
from upkeep.machine import choose_device

CURVES = {  # of policy.jsonl: a title, and what to look for
    "reward": ("Reward", "of the sampled answers, 0 to 1; should rise"),
    "validation_bleu": (
        "Validation BLEU",
        "greedy answers to rows not trained on, from the first validation on; should rise",
    ),
    "kl": ("KL to the base", "how far the model has gone; should stay below about 1"),
    "grad_norm": ("Gradient norm", "before --grad-clip (1 by default); trouble where it soars"),
    "response_length": ("Response length", "tokens; a collapse or an explosion is trouble"),
    "equal_rewards": ("Prompts with equal rewards", "a share; these teach nothing"),
    "usable_fork_fire": (
        "Usable forks",
        "share of LEAF's cuts (GRPO: those it would make) with different rewards in a node",
    ),
}
POINTS = 100  # of a curve, at most
TERMS = {"LEAF": "both", "GA only": "global", "LA only": "local"}  # the names of leaf.span_credits
COLUMNS = 300  # of a waveform


# --------------------------------------------------------------------------------------------------
# A run: what it is, how it went


def configuration(folder: Path, given: dict) -> train.Config:
    """That of a run, finished or not, and what was given."""
    if not is_there(folder / "policy.jsonl"):
        raise UserError(f"{folder} holds no run that trains yet: policy.jsonl is missing")
    if (folder / "results.json").exists():
        return train.finished(folder, given)
    with reading(folder, "a run"):
        saved = read_json(folder / "config.json")
        kept = {f.name: saved[f.name] for f in fields(train.Config) if f.name in saved}
        kept["base"] = os.path.normpath(folder / saved["base"])
    return train.Config(**(kept | given))


def overview(cfg: train.Config, folder: Path) -> dict:
    """What was run, the table that train.py prints, and the curves, as far as there are any."""
    settings = read_json(folder / "config.json")
    del settings["base"]  # where it lies, and not the flag
    base = read_json(folder / "base.json")
    lines = read_lines(folder / "policy.jsonl")
    results = {}
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        settings |= results["config"]
    steps = len(lines)
    seconds = results.get("seconds", sum(line["seconds"] for line in lines))
    facts = {
        "task": cfg.name,
        "method": cfg.algo.upper(),
        "steps": f"{steps}" if results else f"{steps} of {cfg.steps}",
        "each step": f"{cfg.prompts} prompts × {cfg.responses} responses (K), of at most "
        f"{cfg.max_new_tokens} tokens, temperature {cfg.temperature:g}, top-p {cfg.top_p:g}",
        "updates": f"{cfg.prompts // cfg.update_prompts} a step, learning rate up to {cfg.lr:g}",
        "command": " ".join(["python train.py", *changed_flags(settings)]),
        "device": results.get("device", "not noted before the end"),
        "time": f"{seconds / 60:.1f} min" + ("" if results else " in the steps so far"),
        "peak memory": f"{results['peak_memory_gb']:.1f} GB"
        if results
        else "not noted before the end",
    }
    columns = {"base": base}
    if results:
        columns["trained"] = results["trained"]
    table = train.score_table(columns)
    for row in table:
        row[3:] = [difference.replace("-", "\N{MINUS SIGN}") for difference in row[3:]]
    curves = {name: curve(lines, name) for name in CURVES}
    return {"facts": facts, "table": table, "curves": curves}


def changed_flags(settings: dict) -> list[str]:
    flags = []
    for f in fields(train.Config):
        value = settings.get(f.name, f.default)
        if value == f.default or f.name == "out":
            continue
        name = f.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name} {quote(str(value))}")
    return flags


def curve(lines: list[dict], name: str) -> dict:
    """At most POINTS points (step, mean over `size` steps up to it) of a metric."""
    logged = [(line["step"], line[name]) for line in lines if name in line]
    logged = [(step, value) for step, value in logged if math.isfinite(value)]
    size = max(1, math.ceil(len(logged) / POINTS))
    points = []
    for start in range(0, len(logged), size):
        steps, values = zip(*logged[start : start + size])
        points.append((steps[-1], rounded(fmean(values))))
    return {"size": size, "points": points}


def rounded(value: float) -> float:
    """To five decimals, which is more than anybody reads and keeps the page small."""
    return round(float(value), 5)


# --------------------------------------------------------------------------------------------------
# Examples: what a model answers to a row, and the tree of what it samples


def load(cfg: train.Config, folder: Path):
    """The model with the run's adapter, its tokenizer, and what to call the adapter: "trained", or
    the step of the newest checkpoint; empty where there is none yet."""
    model, tokenizer = train.load(cfg, *choose_device(cfg.device, cfg.dtype))
    train.adapt(cfg, model)
    if (folder / "results.json").exists():
        return model, tokenizer, "trained"
    # load_checkpoint would clean up, and the run may be saving at this moment.
    checkpoints = saved_steps(folder / "checkpoints" / "policy")
    if not checkpoints:
        return model, tokenizer, ""
    _, tensors = read_checkpoint(checkpoints[-1], lora_parameters(model))
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[f"value.{name}"])
    return model, tokenizer, f"step {int(checkpoints[-1].name.removeprefix('step-'))}"


@torch.no_grad()
def answers(cfg: train.Config, model, tokenizer, split: data.Split, numbers: list[int]):
    """For each row of split its greedy answer and the tree of K sampled ones, with noise of
    their own; numbers: the rows' places in the test split."""
    greedy = train.answer(model, tokenizer, split, cfg)
    u = data.noise(
        [cfg.base_seed, train.EXAMPLES], numbers, cfg.responses, cfg.max_new_tokens, model.device
    )
    prompts = split.prompts(model, list(range(len(numbers))))
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p).to("cpu")
    found = []
    for p, row in enumerate(split.rows):
        group = (rollout.tokens[p], rollout.lengths[p], rollout.logq[p], rollout.logp[p])
        shown = {
            "greedy": marked(greedy[p], row["reference"]),
            "greedy_reward": rounded(data.reward(greedy[p], row)),
        }
        found.append(shown | sampled(cfg, tokenizer, row, *group))
    return found


def sampled(cfg: train.Config, tokenizer, row: dict, tokens, lengths, logq, logp) -> dict:
    """K responses to a row as the tree they form; tokens, logq, logp (K, T), lengths (K,).

    A block is a stretch of tokens with its members, the responses that pass through it: from one
    node to the next, with V as its value; or the tail of a response, with the reward, in which
    responses that are the same to their ends are together. `credit` has for each rule the mean
    over the members before and after normalising, and the least and the largest after it.
    """
    texts = train.decode(tokenizer, tokens, lengths)
    rewards = data.reward_all(texts, [row] * len(texts))
    boundaries = leaf.select_boundaries(-logq, lengths, cfg.fork_budget)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    credits = every_credit(cfg, tokens, lengths, -logq, rewards, boundaries)
    responses = [t[:n].tolist() for t, n in zip(tokens, lengths)]

    def block(members, start, end, value, is_leaf):
        i = members[0]
        pieces = tokenizer.pieces(responses[i][start:end])
        surprise = zip(logq[i, start:end].tolist(), logp[i, start:end].tolist())
        parts = [[piece, rounded(q), rounded(p)] for piece, (q, p) in zip(pieces, surprise)]
        shares = {}
        for rule, (before, after) in credits.items():
            if start < end:
                shares[rule] = {
                    "before": rounded(before[members, start].mean()),
                    "after": rounded(after[members, start].mean()),
                    "least": rounded(after[members, start].min()),
                    "most": rounded(after[members, start].max()),
                }
        return {
            "members": [i + 1 for i in members],
            "start": start,
            "value": rounded(value),
            "leaf": is_leaf,
            "tokens": parts,
            "credit": shares,
            "children": [],
        }

    root = block(list(range(len(texts))), 0, 0, fmean(rewards), False)
    blocks = {}  # by boundary and members of their nodes
    for i, response in enumerate(responses):
        parent, start = root, 0
        for node in leaf.path_of(i, nodes):
            end = min(node.boundary, len(response))
            key = (node.boundary, *node.members)
            if key not in blocks:
                blocks[key] = block(node.members, start, end, node.value, False)
                parent["children"].append(blocks[key])
            parent, start = blocks[key], end
        same = [j for j, other in enumerate(responses) if other == response]
        if same[0] == i:
            parent["children"].append(block(same, start, len(response), rewards[i], True))
    for parent in (root, *blocks.values()):
        parent["children"].sort(key=lambda child: -child["value"])
    forks = leaf.fork_stats(tokens, lengths, rewards, boundaries)
    equal = max(rewards) == min(rewards)
    return {"boundaries": boundaries, "forks": forks, "equal": equal, "tree": root}


def every_credit(cfg: train.Config, tokens, lengths, surprisal, rewards, boundaries) -> dict:
    """For each rule the credit of every token before and after normalising, both (K, T)."""
    credits = {}
    group = (tokens, lengths, surprisal, rewards)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    equal = max(rewards) == min(rewards)  # then exactly zero, and no rounding of it
    for rule, terms in TERMS.items():
        how = {"terms": terms, "multiplicity": cfg.multiplicity}
        spans = [] if equal else leaf.span_credits(lengths, rewards, nodes, **how)
        after = leaf.leaf_advantages(*group, boundaries=boundaries, **how)
        credits[rule] = (leaf.token_credits(spans, tokens), after)
    centred = torch.tensor(rewards) - fmean(rewards)
    after = leaf.grpo_advantages(rewards, lengths, cfg.std_floor)
    credits["GRPO"] = (centred[:, None].expand(after.shape), after)
    return credits


def marked(answer: str, reference: str) -> list[tuple[str, str]]:
    """The words of an answer as ("same", words) or ("other", words) than the reference's, and
    ("missing", words) where it only lacks some."""
    wanted, words = reference.split(), answer.split()
    parts = []
    matcher = difflib.SequenceMatcher(None, wanted, words, autojunk=False)
    for kind, i, j, start, end in matcher.get_opcodes():
        if kind == "delete":
            parts.append(("missing", " ".join(wanted[i:j])))
        else:
            name = "same" if kind == "equal" else "other"
            parts.append((name, " ".join(words[start:end])))
    return parts


def recording(row: dict) -> dict:
    """To hear, as 16-bit WAV in base64, and to see: the largest amplitude of each of COLUMNS parts."""
    audio = row["audio"].samples()
    file = io.BytesIO()
    soundfile.write(file, audio.numpy(), data.SAMPLE_RATE, format="WAV")
    parts = torch.tensor_split(audio.abs(), COLUMNS)
    return {
        "wav": base64.b64encode(file.getvalue()).decode(),
        "peaks": [round(float(part.max()), 3) for part in parts],
    }


# --------------------------------------------------------------------------------------------------
# The page


def report(runs: list[Path], count: int, chosen: list[int], given: dict) -> dict:
    """All that the page shows: the first `count` rows of the test split, or the chosen ones."""
    names = [folder.resolve().name for folder in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    described = []
    examples = {}  # by the run's corpus and the row's number
    for name, folder in zip(names, runs):
        cfg = configuration(folder, given)
        run = overview(cfg, folder)
        rows = test_rows(cfg, folder)
        numbers = chosen or list(range(min(count, len(rows))))
        if max(numbers) >= len(rows):
            raise DataError(f"{folder} has {len(rows)} test rows, which count from 0")
        model, tokenizer, adapter = load(cfg, folder)
        split = data.Split("chosen", [rows[i] for i in numbers], cfg.cache_gb)
        split.hear(model, tokenizer, frozen=False)  # LoRA may be on what hears
        with lora_disabled(model):
            states = {"base": answers(cfg, model, tokenizer, split, numbers)}
        if adapter:
            states[adapter] = answers(cfg, model, tokenizer, split, numbers)

        own = sum(p.numel() for p in lora_parameters(model).values())
        size = sum(p.numel() for p in model.parameters()) - own
        run["facts"]["model"] = f"{size:,} parameters, frozen, and {own:,} of LoRA, trained"
        described.append({"name": name, "rows": len(rows), **run})
        corpus = fingerprint(rows, cfg.data)
        for p, i in enumerate(numbers):
            if (corpus, i) not in examples:
                examples[corpus, i] = {
                    "title": f"{cfg.name}, test row {i}",
                    "question": rows[i]["prompt"].replace(data.AUDIO, ""),
                    "reference": rows[i]["reference"],
                    "transcript": rows[i].get("transcript", ""),
                    "recording": recording(rows[i]),
                    "models": [],
                }
            models = examples[corpus, i]["models"]
            for state, answered in states.items():
                if state == "base" and answered[p] in [model["shown"] for model in models]:
                    continue  # runs that begin with one base share what it answers
                label = state if len(runs) == 1 or not models else f"{name}, {state}"
                models.append({"name": label, "shown": answered[p]})
    rule = "the rows asked for" if chosen else f"the first {count} rows of the test split, in order"
    return {
        "runs": described,
        "curves": {name: list(told) for name, told in CURVES.items()},
        "examples": list(examples.values()),
        "chosen": rule,
    }


def test_rows(cfg: train.Config, folder: Path) -> list[dict]:
    """The run's test split; an unfinished run does not tell where its own corpus lies."""
    rows = train.load_rows(cfg, ("test",))["test"]
    asked = read_lines(folder / "predictions-base.jsonl")
    fields = ("prompt", "reference")
    if [[row[f] for f in fields] for row in rows] != [[row[f] for f in fields] for row in asked]:
        raise DataError(f"{folder} was tested on other rows: name its corpus with --data")
    return rows


def page(content: dict) -> str:
    """The template with the content in it, as JSON in which nothing can end the script element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return template.replace("CONTENT", text, 1)


def row_numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 0:
        raise ValueError
    return numbers


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument("--examples", type=int, default=3, help="so many rows (default: 3)")
    parser.add_argument("--rows", type=row_numbers, help="these rows instead: 0,7,12")
    parser.add_argument("--data", help="the corpus, where the run does not tell or it has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    if args.examples < 1:
        parser.error("--examples must be at least 1")
    given = {"device": args.device}
    if args.data:
        given["data"] = args.data
    out = args.out or args.runs[0] / "report.html"
    content = page(report(args.runs, args.examples, args.rows or [], given))
    with writing(out):
        out.write_text(content, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    command(main)
