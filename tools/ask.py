"""Ask a trained model about a recording, and see its sampled answers as LEAF sees them.

    python -m tools.ask RUN AUDIO "question"

prints the greedy answer; with --samples 8 also the prefix tree of 8 sampled ones; and with
--reference TEXT besides, their rewards, the values of prefixes and the credit of every span. The
recording comes before the question, or where the question has <|audio|>.
"""

import argparse
from pathlib import Path

import data
import leaf
import train
from corpora.load import Recording
from tools.report import padded
from upkeep.errors import command
from upkeep.forks import those_of_the_run
from upkeep.machine import choose_device


def ask(
    run: Path, audio: str, question: str, samples: int, reference: str, device: str, adapter: str
):
    """Print the answer of a finished run, and with samples the prefix tree of so many responses."""
    cfg = train.finished(run, {"device": device}, adapter)
    torch_device, dtype = choose_device(cfg.device, cfg.dtype)
    prompt = question if data.AUDIO in question else data.AUDIO + question
    row = {"audio": Recording(audio), "prompt": prompt, "reference": reference}
    split = data.Split("asked", [row], cfg.cache_gb)
    model, tokenizer = train.load(cfg, torch_device, dtype, cfg.resume_adapter)
    split.hear(model, tokenizer)
    print(train.answer(model, tokenizer, split, cfg)[0])
    if samples == 0:
        return
    ours = {"credit": None, "reward": None}
    if reference:
        ours = those_of_the_run(run, credit=train.credit, reward=data.reward)
    cfg.responses = samples
    sampled = train.sample_with_credit(cfg, model, tokenizer, split, [0], **ours)[0]
    lengths = [len(tokens) for tokens in sampled["tokens"]]
    boundaries = leaf.select_boundaries(padded(sampled["surprisal"]), lengths, cfg.fork_budget)
    rewards = sampled.get("rewards")
    nodes = leaf.build_tree(sampled["tokens"], lengths, rewards or [0.0] * samples, boundaries)
    print(f"boundaries {boundaries}")
    print(leaf.format_tree(sampled["pieces"], rewards, nodes, sampled.get("credit")))


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tools.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("audio", help="recording to ask about")
    parser.add_argument("question")
    parser.add_argument("--samples", type=int, default=0, help="sample so many, show their tree")
    parser.add_argument(
        "--reference", default="", help="the right answer: shows rewards and credit"
    )
    parser.add_argument(
        "--best", action="store_true", help="ask the best validation's adapter, not the last one"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args(argv)
    if args.question.count(data.AUDIO) > 1:
        parser.error(f"the question may hold {data.AUDIO} once")
    if args.samples < 0 or args.samples == 1:
        parser.error("--samples must be 2 or more, which a tree needs, or 0")
    if args.reference and not args.samples:
        parser.error("--reference goes with --samples")
    adapter = train.BEST if args.best else "adapter"
    ask(args.run, args.audio, args.question, args.samples, args.reference, args.device, adapter)


if __name__ == "__main__":
    command(main)
