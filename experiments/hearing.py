"""Which fields a base of the synthetic tasks hears, and which a run does after RL.

    python -m experiments.hearing runs/base-qa-seed0 runs/qa-leaf-seed0

Each folder is a base or a finished run. A figure is the share of greedy answers that have a field
right, in any of its wordings, on 1,000 rows whose contents are in no other split. Figures go to
experiments/results/hearing.json; with --tune they are of another 1,000 rows, to choose by, and are
only printed.
"""

from pathlib import Path

import data
import train
from corpora import synthetic
from corpora.load import fingerprint
from experiments.common import RESULTS, command_line, environment, rounded, table
from upkeep.errors import UserError, command
from upkeep.files import read_json, write_json
from upkeep.machine import choose_device

ROWS = 1000


def configuration(folder: Path) -> train.Config:
    """Of a finished run, with its adapter, or of a base."""
    if (folder / "results.json").exists():
        return train.finished(folder, {})
    settings = read_json(folder / "base.json")
    return train.Config(base=str(folder), **{name: settings[name] for name in train.Config.BASE})


def measure(folder: Path, split: str) -> dict[str, float]:
    """By field, the percentage of the split's rows with the field whose answers have it right."""
    cfg = configuration(folder)
    sizes = {"train": cfg.train_rows, "validation": cfg.validation_rows, "test": cfg.test_rows}
    sizes |= {"tune": ROWS, "heard": ROWS}
    splits = synthetic.rows(cfg.task, sizes, cfg.base_seed)
    trained_on = read_json(cfg.base_folder / "base.json")["rows"]
    if fingerprint(splits["train"], cfg.data) != trained_on:
        raise UserError(f"{folder}: its base was trained on other rows, perhaps on some of these")
    rows = splits[split]
    device, dtype = choose_device(cfg.device, cfg.dtype)
    model, tokenizer = train.load(cfg, device, dtype, cfg.resume_adapter)
    heard = data.Split(split, rows, cfg.cache_gb)
    heard.hear(model, tokenizer)
    answers = train.answer(model, tokenizer, heard, cfg)
    fields = dict.fromkeys(field for row in rows for field, _ in data.named_slots(row))
    return {field: 100 * data.slot_accuracy(answers, rows, field) for field in fields}


def main():
    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="bases and finished runs")
    parser.add_argument("--tune", action="store_true", help="the rows to choose by")
    args = parser.parse_args()
    file = RESULTS / "hearing.json"
    kept = read_json(file) if file.exists() else {}
    found = {}
    for folder in args.folders:
        found[folder.name] = measure(folder, "tune" if args.tune else "heard")
        kept[folder.name] = rounded(found[folder.name] | {"environment": environment()})
    fields = list(found[args.folders[0].name])
    rows = [
        [name, *(f"{of.get(x, float('nan')):.1f}" for x in fields)] for name, of in found.items()
    ]
    print(table(["% heard", *fields], rows))
    if not args.tune:
        write_json(file, kept)


if __name__ == "__main__":
    command(main)
