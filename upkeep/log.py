"""The log of a stage of training, which also saves it, resumes it and stops it when asked."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from tqdm import tqdm

from upkeep.checkpoints import load_checkpoint, save_checkpoint
from upkeep.errors import reading, writing
from upkeep.files import read_lines, write_file
from upkeep.processes import average, rank


class Log:
    """Where a stage of training stands: `start`, its first step, and `record`, called after each.

    The steps before `start` are in the newest checkpoint below folder, which is loaded into `named`
    (tensors) and the optimizer. Everything random inside a step is keyed by (seed, step), so that
    is all the state there is: a resumed run repeats nothing and misses nothing. rule: the credit
    rule, which may not change on the way; processes: how many take these steps together.

    As a context it notes Ctrl-C, SIGTERM, a closed terminal and a reader that has left (`| head`),
    for record() to save and leave. A second Ctrl-C stops at once; other signals may come twice, for
    torchrun forwards what a scheduler sends to all.
    """

    def __init__(
        self, stage, folder: Path, steps: int, named, optimizer, save_every, rule="", processes=1
    ):
        self.stage, self.steps, self.named, self.optimizer = stage, steps, named, optimizer
        self.save_every, self.rule, self.processes = save_every, rule, processes
        self.writes = rank() == 0
        self.checkpoints = folder / "checkpoints" / stage
        self.start = load_checkpoint(self.checkpoints, named, optimizer, rule)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stage}.jsonl" if self.writes else Path(os.devnull)
        self.best = self.checkpoints / "best.safetensors"
        self.best_bleu = -math.inf
        if self.writes:  # one line a step: what lies past the checkpoint comes again
            lines = []
            if self.path.exists():
                with reading(self.path, "the metrics of a run"):
                    lines = self.path.read_bytes().splitlines(keepends=True)[: self.start]
            write_file(self.path, b"".join(lines))
            self.best_bleu = best_validation(self.path)["validation_bleu"]
        self.stop_signals = []

    def __enter__(self):
        with writing(self.path):
            self.file = open(self.path, "a", encoding="utf-8")
        disable = None if self.writes else True  # None: where there is no terminal
        self.bar = tqdm(
            total=self.steps, initial=self.start, desc=self.stage, disable=disable, mininterval=0.5
        )
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        with writing(self.path):
            self.file.close()

    def ask_to_stop(self, number, frame):
        if number == signal.SIGINT and number in self.stop_signals:
            raise SystemExit(128 + number)
        self.stop_signals.append(number)

    def record(self, step: int, metrics: dict[str, float], validation=None):
        """Log a step that is done: the mean of the processes' metrics, and figures of validation
        where there are any. Save when it is time, or when somebody was asked to stop, and stop."""
        stopping = len(self.stop_signals)
        if self.processes > 1:  # all stop, or the others would wait for ever
            device = next(iter(self.named.values())).device
            values = torch.tensor([*metrics.values(), stopping], device=device)
            average([values])
            *means, stopping = values.tolist()
            metrics = dict(zip(metrics, means))
        metrics = metrics | (validation or {})
        done = step + 1
        with writing(self.path):
            self.file.write(json.dumps({"step": done, **metrics}) + "\n")
            self.file.flush()
        if validation and validation["validation_bleu"] > self.best_bleu:  # the first of equals
            self.best_bleu = validation["validation_bleu"]
            values = {name: tensor.detach().cpu() for name, tensor in self.named.items()}
            write_file(self.best, save(values))
        shown = [name for name in ("loss", "reward", "kl") if name in metrics]
        self.bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown}, refresh=False)
        self.say(done, VALIDATION.format(step=done, **metrics) if validation else "")
        if self.writes and (done % self.save_every == 0 or done == self.steps or stopping):
            with writing(self.path):
                os.fsync(self.file.fileno())
            save_checkpoint(self.checkpoints, done, self.named, self.optimizer, self.rule)
        if stopping:
            saved = f"saved step {done} of {self.steps} in {self.checkpoints}"
            self.say(done, f"{saved}; the same command goes on from there")
            raise SystemExit(128 + (self.stop_signals or [signal.SIGTERM])[0])

    def say(self, done: int, text: str):
        """Move the bar, and print above it. Where nobody reads any more, be silent and stop."""
        try:
            self.bar.update(done - self.bar.n)
            if text:
                tqdm.write(text)
        except OSError:
            self.bar.disable = True
            sys.stdout = open(os.devnull, "w")
            self.stop_signals.append(signal.SIGTERM)


VALIDATION = (
    "step {step}: validation BLEU {validation_bleu:.1f}  reward {reward:.3f}  KL {kl:.3f}  "
    "clipped {clip_fraction:.3f}  ratio {ratio:.3f}  grad {grad_norm:.2f}  "
    "length {response_length:.1f}  equal rewards {equal_rewards:.2f}  "
    "usable forks {usable_fork_fire:.2f}  {tokens_per_second:.0f} tokens/s"
)


def best_validation(metrics: Path) -> dict:
    """The first line with the greatest validation BLEU; without a step where there is none."""
    best = {"validation_bleu": -math.inf}
    for row in read_lines(metrics):
        if row.get("validation_bleu", -math.inf) > best["validation_bleu"]:
            best = row
    return best
