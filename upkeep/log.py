"""What a stage of training writes and says while it runs, and requests to stop it."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from upkeep.errors import errors_of_reading, errors_of_writing
from upkeep.files import is_there, read_lines, write_file
from upkeep.processes import rank


class StopSignals:
    """A context that notes Ctrl-C, SIGTERM and a closed terminal, for the loop to save and leave
    after the step. A second Ctrl-C stops at once; other signals may come twice, for torchrun forwards
    what a scheduler sends to all. Outside the main thread, to which signals come, none is noted."""

    def __enter__(self):
        self.numbers = []
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self.handlers[number] = signal.signal(number, self.ask_to_stop)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ask_to_stop(self, number, frame):
        if number == signal.SIGINT and number in self.numbers:
            raise SystemExit(128 + number)
        self.numbers.append(number)

    @property
    def asked(self) -> bool:
        return bool(self.numbers)

    @property
    def exit_code(self) -> int:
        return 128 + (self.numbers or [signal.SIGTERM])[0]  # or another process was asked


class Log:
    """A context in which `write` appends a line of metrics per step to a file, moves a bar, and
    tells how far it is where there is no terminal for one. Only the first process does. Where
    nobody reads what is printed any more (`| head`), stop is asked."""

    def __init__(self, path: Path, start: int, steps: int, stop: StopSignals):
        self.path = path if rank() == 0 else Path(os.devnull)
        self.stage, self.start, self.steps, self.stop = path.stem, start, steps, stop

    def __enter__(self):
        with errors_of_writing(self.path):
            self.file = open(self.path, "a", encoding="utf-8")
        disable = None if rank() == 0 else True  # None: where there is no terminal
        self.bar = tqdm(
            total=self.steps, initial=self.start, desc=self.stage, disable=disable, mininterval=0.5
        )
        self.began = time.time()
        return self

    def __exit__(self, *error):
        self.bar.close()
        with errors_of_writing(self.path):
            self.file.close()

    def write(self, done: int, metrics: dict[str, float]):
        """The line of the step after which `done` are done."""
        with errors_of_writing(self.path):
            self.file.write(json.dumps({"step": done, **metrics}) + "\n")
            self.file.flush()
        shown = {name: f"{metrics[name]:.3f}" for name in SHOWN if name in metrics}
        try:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(done - self.bar.n)
        except OSError:
            self.nobody_reads()
        if self.bar.disable and 10 * done // self.steps > 10 * (done - 1) // self.steps:
            seconds = (time.time() - self.began) / (done - self.start) * (self.steps - done)
            told = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = tqdm.format_interval(seconds)
            self.say(f"{self.stage} {done}/{self.steps}  {told}  {left} left")

    def say(self, text: str):
        """Print a line, above the bar."""
        try:
            tqdm.write(text)
        except OSError:
            self.nobody_reads()

    def nobody_reads(self):
        """Be silent from now on, and ask the run to stop."""
        self.bar.disable = True
        sys.stdout = open(os.devnull, "w")
        self.stop.numbers.append(signal.SIGTERM)

    def sync(self):
        """Wait until all lines are on the disk."""
        with errors_of_writing(self.path):
            os.fsync(self.file.fileno())


SHOWN = ("loss", "reward", "kl")


def keep_lines(path: Path, count: int):
    """Cut a file of lines to the first so many: what lies past a checkpoint comes again."""
    if rank() == 0:
        with errors_of_reading(path, "lines"):
            lines = path.read_bytes().splitlines(keepends=True) if is_there(path) else []
        write_file(path, b"".join(lines[:count]))


def append_line(path: Path, row: dict):
    """One more line, on the disk when this returns."""
    with errors_of_writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def best_validation(metrics: Path) -> dict:
    """The first line of policy.jsonl with the greatest mean reward in validation; {} where none
    has one."""
    validated = [line for line in read_lines(metrics) if "validation_reward" in line]
    return max(validated, key=lambda line: line["validation_reward"], default={})
