"""See what runs did: one page to open in a browser, and to send to somebody.

    python -m tools.report RUN [RUN ...]

writes report.html into the first run's folder: three recordings with the answers to them from before
training to its end, and the credit that LEAF and GRPO give to what was sampled; curves, scores and
settings. A run need not be finished. What it kept in samples.jsonl is shown, without model or reward;
test rows (--rows), and a run that kept nothing, are answered by the model. Everything is computed
here; report.html beside this file, in which the page's JavaScript is, only draws it.
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
from statistics import fmean, median, pstdev, stdev

import soundfile
import torch

import data
import leaf
import train
from corpora.load import fingerprint
from lora import lora_disabled, lora_parameters
from upkeep.checkpoints import read_checkpoint, saved_steps, step_of
from upkeep.errors import DataError, UserError, command, errors_of_reading, errors_of_writing
from upkeep.files import is_there, read_json, read_lines
from upkeep.forks import identity, those_of_the_run
from upkeep.machine import choose_device

CURVES = {  # of policy.jsonl: a title, what to look for, and the least and largest value if known
    "reward": ("Reward", "of the sampled answers; should rise", 0, 1),
    "validation_bleu": ("Validation BLEU", "greedy, rows not trained on; should rise", None, None),
    "kl": ("KL to the base", "how far the model has gone; should stay below about 1", 0, None),
    "grad_norm": ("Gradient norm", "before --grad-clip; trouble where it soars", 0, None),
    "response_length": ("Response length", "tokens; trouble where it leaps", None, None),
    "equal_rewards": ("Equal rewards", "share of prompts, which teach nothing", 0, 1),
    "usable_fork_fire": ("Usable cuts", "share behind which rewards differ in a node", 0, 1),
}
POINTS = 400  # of a curve, at most
COLUMNS = 300  # of a waveform
EXAMPLES = 3


# --------------------------------------------------------------------------------------------------
# A run: what it is, how it went


def configuration(folder: Path, given: dict) -> train.Config:
    """That of a run, finished or not, and what was given."""
    if not is_there(folder / "policy.jsonl"):
        raise UserError(f"{folder} holds no run that trains yet: policy.jsonl is missing")
    if (folder / "results.json").exists():
        return train.finished(folder, given)
    with errors_of_reading(folder, "a run"):
        saved = read_json(folder / "config.json")
        kept = {f.name: saved[f.name] for f in fields(train.Config) if f.name in saved}
        kept["base"] = os.path.normpath(folder / saved["base"])
    return train.Config(**(kept | given))


def overview(cfg: train.Config, folder: Path) -> dict:
    """What was run, its scores and its curves, as far as there are any."""
    settings = read_json(folder / "config.json")
    del settings["base"]  # where it lies, and not the flag
    lines = read_lines(folder / "policy.jsonl")
    results = {}
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        settings |= results["config"]
    seconds = [line["seconds"] for line in lines]
    later = "not noted before the end"
    facts = {
        "task": cfg.name,
        "method": name_of("credit", settings, train.credit, cfg.algo.upper()),
        "reward": name_of("reward", settings, data.reward, "data.reward"),
        "steps": f"{len(lines)}" if results else f"{len(lines)} of {cfg.steps}",
        "each step": f"{cfg.prompts} prompts × {cfg.responses} responses (K), of at most "
        f"{cfg.max_new_tokens} tokens, temperature {cfg.temperature:g}, top-p {cfg.top_p:g}",
        "updates": f"{cfg.prompts // cfg.update_prompts} a step, learning rate up to {cfg.lr:g}",
        "time of a step": f"{median(seconds):.2f} s (median)" if seconds else "no step yet",
        "device": results.get("device", later),
        "peak memory": f"{results['peak_memory_gb']:.1f} GB" if results else later,
        "flags": " ".join(changed_flags(settings)) or "as they are by default",
    }
    curves = {name: curve(lines, name) for name in CURVES}
    for first in kept_samples(folder)[:1]:  # of the base
        curves["validation_bleu"]["points"].insert(0, (0, rounded(first["validation_bleu"])))
    return {
        "facts": facts,
        "rows": len(read_lines(folder / "predictions-base.jsonl")),
        "base": read_json(folder / train.BASE_SCORES),
        "trained": results.get("trained"),
        "curves": curves,
    }


def name_of(kind: str, settings: dict, ours, told: str) -> str:
    """How the run's rule or reward is called: as told where it is ours, else by a fork's name."""
    trained_by = settings.get(kind, identity(ours))
    if trained_by == identity(ours):
        return told
    name = trained_by.partition(" ")[0]
    return f"another {name}" if name == ours.__qualname__ else name


def kept_samples(folder: Path) -> list[dict]:
    """The lines of samples.jsonl, as far as there are any yet."""
    file = folder / train.SAMPLES
    return read_lines(file) if is_there(file) else []


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
# Rows with their answers, as a run keeps them in samples.jsonl: kept, or asked for now


def heard(row: dict) -> dict[str, bool]:
    """Whether the row's greedy answer has each field that only the recording tells."""
    words = data.spoken_words(row["greedy"])
    slots = data.named_slots(row)
    return {name: bool(data.occurrences(slot, words)) for name, slot in slots if name}


def telling(lines: list[dict]) -> dict[int, str]:
    """Which of the kept rows to show, and why; lines: one per validation, of the same rows."""
    first, last = lines[0]["rows"], lines[-1]["rows"]

    def spread(i):
        return pstdev(first[i]["rewards"])

    def change(i):
        before, after = first[i]["greedy"].split(), last[i]["greedy"].split()
        return 1 - difflib.SequenceMatcher(None, before, after, autojunk=False).ratio()

    def misheard(i):
        return sum(list(heard(line["rows"][i]).values()).count(False) for line in lines)

    reasons = {
        "before training its rewards differ most": spread,
        "its answer changed most": change,
        "it is heard worst": misheard,
    }
    chosen = {}
    for reason, measure in reasons.items():
        left = [i for i in range(len(first)) if i not in chosen and measure(i) > 0]
        if left:
            chosen[max(left, key=measure)] = reason
    rest = [i for i in range(len(first)) if i not in chosen]
    return chosen | dict.fromkeys(rest[: EXAMPLES - len(chosen)], "the next in order")


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
    tensors = read_checkpoint(checkpoints[-1], lora_parameters(model))
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(tensors[f"value.{name}"])
    return model, tokenizer, f"step {step_of(checkpoints[-1])}"


def answered_now(cfg: train.Config, folder: Path, rows: list[dict]) -> dict[str, list[dict]]:
    """What samples.jsonl would keep of these rows: of the base, and of what it became."""
    ours = those_of_the_run(folder, credit=train.credit, reward=data.reward)
    model, tokenizer, adapter = load(cfg, folder)
    split = data.Split("chosen", rows, cfg.cache_gb)
    split.hear(model, tokenizer, frozen=False)  # LoRA may be on what hears

    def answered():
        greedy = train.answer(model, tokenizer, split, cfg)
        found = train.sample_with_credit(cfg, model, tokenizer, split, range(len(rows)), **ours)
        for row, one, kept in zip(rows, greedy, found):
            kept |= {name: row[name] for name in train.ASKED if name in row} | {"greedy": one}
            if ours["reward"]:
                kept["greedy_reward"] = data.reward(one, row)
        return found

    with lora_disabled(model):
        states = {"base": answered()}
    if adapter:
        states[adapter] = answered()
    return states


# --------------------------------------------------------------------------------------------------
# What the page draws of such a row


def drawn(cfg: train.Config, row: dict, label: str) -> dict:
    """A line for each of the K responses, those that are the same in one, and those that share a
    node together; and a block for each span of LEAF's tree, over the lines of those who share it,
    with its credit before ("raw") and after ("final") the z-score.

    A line has GRPO's number, and where the run kept credit that is neither LEAF's nor GRPO's, as
    "own" that of each token.
    """
    lengths = [len(tokens) for tokens in row["tokens"]]
    rewards = row.get("rewards") or [0.0] * len(lengths)
    boundaries = leaf.select_boundaries(padded(row["surprisal"]), lengths, cfg.fork_budget)
    nodes = leaf.build_tree(row["tokens"], lengths, rewards, boundaries)
    spans = leaf.span_credits(lengths, rewards, nodes, cfg.terms, cfg.multiplicity)
    if max(rewards) == min(rewards):  # then exactly zero, and no rounding of it
        spans = [span._replace(credit=0.0) for span in spans]
    scored = leaf.z_score(spans)
    credit = {(a.response, a.start): (a.credit, z.credit) for a, z in zip(spans, scored)}
    raw = [span.credit for span in spans]
    root = fmean(rewards)
    grpo = leaf.grpo_advantages(padded(row["tokens"]), lengths, rewards, cfg.std_floor)  # (K, T)
    own = row.get("credit")
    by_leaf = leaf.token_credits(scored, grpo)
    if own and any(torch.allclose(padded(own), rule, 0.01, 0.001) for rule in (by_leaf, grpo)):
        own = None  # but for rounding

    def place(i):  # who shares a node stands together, and what earns more stands above
        path = [(-node.value, node.members) for node in leaf.path_of(i, nodes)]
        return [*path, (-rewards[i], row["tokens"][i])]

    lines = []
    blocks = {}
    previous = None
    for i in sorted(range(len(rewards)), key=place):
        if previous == (row["tokens"][i], own and own[i]):
            lines[-1]["members"].append(i + 1)
            continue
        previous = (row["tokens"][i], own and own[i])
        line = {
            "members": [i + 1],
            "reward": rounded(rewards[i]),
            "grpo": rounded(grpo[i, 0]),
            "own": own and own[i],
            "pieces": row["pieces"][i],
            "surprisal": [rounded(s) for s in row["surprisal"][i]],
        }
        lines.append(line)
        start = 0
        before = root
        tail = leaf.Node(lengths[i], [i], rewards[i])
        for node in [*leaf.path_of(i, nodes), tail]:
            end = min(node.boundary, lengths[i])
            if start < end:
                a, z = credit[i, start]
                block = {
                    "line": len(lines) - 1,
                    "lines": 0,
                    "start": start,
                    "end": end,
                    "n": len(node.members),
                    "value": rounded(node.value),
                    "before": rounded(before),
                    "raw": rounded(a),
                    "final": rounded(z),
                }
                blocks.setdefault((start, *node.members), block)["lines"] += 1
            start = end
            before = node.value
    return {
        "label": label,
        "greedy": marked(row["greedy"], row["reference"]),
        "greedy_reward": rounded(row["greedy_reward"]) if "rewards" in row else None,
        "heard": heard(row),
        "boundaries": boundaries,
        "surprisal": [rounded(s) for s in padded(row["surprisal"]).amax(0)],
        "lines": lines,
        "blocks": list(blocks.values()),
        "root": rounded(root),
        "std": rounded(stdev(rewards)),
        "z": [len(raw), rounded(fmean(raw)), rounded(stdev(raw) if len(raw) > 1 else 0)],
    }


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


def padded(rows: list[list[float]]) -> torch.Tensor:
    """(K, T), zeros past each row's end."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])


# --------------------------------------------------------------------------------------------------
# The page


def report(runs: list[Path], asked: list[int], given: dict) -> dict:
    """All that the page shows; asked: numbers of test rows, to be shown instead of kept ones."""
    names = [folder.resolve().name for folder in runs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in runs]
    described = []
    examples = {}  # by the split, its fingerprint and the row's number
    chosen = {}  # by the fingerprint: runs on the same rows show the same ones
    for name, folder in zip(names, runs):
        cfg = configuration(folder, given)
        described.append({"name": name, **overview(cfg, folder)})
        lines = kept_samples(folder)
        if lines and not asked:
            split = "validation"
            rows = rows_of(cfg, folder, split, lines[0]["rows"])
            numbers = chosen.setdefault(fingerprint(rows, cfg.data), telling(lines))
            states = {name: [(f"step {line['step']}", line["rows"]) for line in lines]}
        else:
            split = "test"
            rows = rows_of(cfg, folder, split, read_lines(folder / "predictions-base.jsonl"))
            numbers = dict.fromkeys(asked or range(min(EXAMPLES, len(rows))), "")
            if max(numbers) >= len(rows):
                raise DataError(f"{folder} has {len(rows)} test rows, which count from 0")
            found = answered_now(cfg, folder, [rows[i] for i in numbers])
            states = {x: [(x, dict(zip(numbers, kept)))] for x, kept in found.items()}
        for i, why in numbers.items():
            key = (split, fingerprint(rows, cfg.data), i)
            if key not in examples:
                examples[key] = {
                    "title": f"{cfg.name}, {split} row {i}",
                    "why": why,
                    "question": rows[i]["prompt"].replace(data.AUDIO, ""),
                    "reference": rows[i]["reference"],
                    "transcript": rows[i].get("transcript", ""),
                    "recording": recording(rows[i]),
                    "models": [],
                }
            models = examples[key]["models"]
            for model, found in states.items():
                shown = [drawn(cfg, of_rows[i], label) for label, of_rows in found]
                if model == "base" and shown in [other["states"] for other in models]:
                    continue  # runs that begin with one base share what it answers
                several = models and split == "test" and len(runs) > 1
                about = {
                    "name": f"{name}, {model}" if several else model,
                    "rule": described[-1]["facts"]["method"],
                    "terms": cfg.terms,
                    "multiplicity": cfg.multiplicity,
                    "floor": cfg.std_floor,
                    "states": shown,
                }
                models.append(about)
    return {"runs": described, "curves": CURVES, "examples": list(examples.values())}


def rows_of(cfg: train.Config, folder: Path, split: str, asked: list[dict]) -> list[dict]:
    """A split of the run's corpus, which begins with the rows that were asked about; an unfinished
    run does not tell where its own corpus lies."""
    rows = train.load_rows(cfg, (split,))[split]
    same = [
        all(row[f] == other[f] for f in ("prompt", "reference")) for row, other in zip(rows, asked)
    ]
    if not all(same) or len(same) < len(asked):
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
    parser.add_argument("--rows", type=row_numbers, help="test rows to be answered: 0,7,12")
    parser.add_argument("--data", help="the corpus, where the run does not tell or it has moved")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    given = {"device": args.device}
    if args.data:
        given["data"] = args.data
    out = args.out or args.runs[0] / "report.html"
    content = page(report(args.runs, args.rows or [], given))
    with errors_of_writing(out):
        out.write_text(content, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    command(main)
