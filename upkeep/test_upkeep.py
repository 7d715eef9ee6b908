"""upkeep/: nothing is lost; what the user can mend is one line; processes and cards."""

import contextlib
import errno
import functools
import io
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

import data
import train
from model import pad_ragged
from tests.helpers import (
    ROOT,
    adapter,
    assert_same_run,
    base_of,
    by_letters,
    edit_json,
    first_run,
    make_model,
    metrics,
    randn,
    same,
    seeded,
    stopping_at,
    tiny,
)
from upkeep import checkpoints
from upkeep.checkpoints import load_checkpoint, save_checkpoint, saved_steps
from upkeep.errors import DataError, UserError, command, errors_of_reading
from upkeep.files import lock, read_lines
from upkeep.log import Log, StopSignals
from upkeep.machine import choose_device, quote
from upkeep.optim import Updater, learning_rate
from upkeep.tensors import our_name, transformers_name

fcntl = pytest.importorskip("fcntl")  # and /proc: these tests are for Linux

__all__ = ["first_run", "seeded"]  # fixtures


@pytest.mark.parametrize(
    "ours, others",
    [
        ("encoder.out.bias", ["model.encoder.out.bias"]),
        ("projector.query", ["model.projector.query"]),
        ("language_model.lm_head.weight", ["lm_head.weight"]),
        (
            "language_model.model.norm.weight",
            [
                "model.language_model.norm.weight",
                "language_model.model.model.norm.weight",  # transformers 5.20
            ],
        ),
        (
            "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            [
                "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
                "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            ],
        ),
    ],
)
def test_names(ours, others):
    assert [our_name(name) for name in (ours, *others)] == [ours] * (1 + len(others))
    assert "lm_head" in ours or our_name(transformers_name(ours)) == ours


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate(2.0, 0.1, progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2])


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def die_at(where, count, folder):
    """Kill this process without a chance to clean up: at the count-th call of a function (module,
    name), or the count-th time that something below folder is opened, made, renamed or removed."""
    calls = []

    def count_call():
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in FILE_OPERATIONS and str(args[0]).startswith(str(folder)):
            count_call()

    def dying(*args, **kwargs):
        count_call()
        return original(*args, **kwargs)

    if where == "files":
        sys.addaudithook(hook)
    else:
        original = getattr(*where)
        setattr(*where, dying)


# A run makes some 120 of these operations.
POINTS = [("files", count) for count in range(3, 120, 15)]
POINTS += [
    ((checkpoints, "save_file"), 6),  # in the middle of the policy's second checkpoint
    ((Updater, "step"), 13),  # between checkpoints, with metrics logged past the last one
]


@pytest.mark.parametrize("where, count", POINTS)
def test_kill_9_at_any_moment_loses_nothing(where, count, first_run, tmp_path):
    child = os.fork()
    if child == 0:
        try:
            die_at(where, count, tmp_path)
            train.main(tiny(out=tmp_path / "run"))
        finally:  # not the end of pytest, whatever happens
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith("saving-") or name.endswith(".tmp")]


@pytest.mark.parametrize("count", [1, 20])
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    count, first_run, tmp_path, monkeypatch, capsys
):
    """Whatever is being written: here, the count-th time that something must reach the disk."""
    calls = []
    fsync = os.fsync

    def full(handle):
        calls.append(None)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert run_as_script(*tiny(out=tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}") and "No space left on device" in error
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


def test_a_reader_that_leaves_is_a_request_to_stop(first_run, tmp_path):
    """`python train.py | head -1`: the run saves, and goes on later."""
    flags = tiny("--eval-every 1", base=base_of(first_run), out=tmp_path / "run")
    command = [sys.executable, "train.py", *flags]
    one_thread = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "LEAF: 4 steps" in line:
                break
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said and "Exception" not in said
    assert len(metrics(tmp_path / "run")) == 1  # noticed and saved after the first
    train.main(flags)
    rows = [{k: v for k, v in row.items() if "validation" not in k} for row in metrics(first_run)]
    for row, want in zip(metrics(tmp_path / "run"), rows, strict=True):
        assert repr({k: v for k, v in row.items() if "validation" not in k}) == repr(want)


def test_how_a_program_ends(monkeypatch, capsys):
    """What the user can mend, and Ctrl-C, in one line; what is a fault of ours with a traceback; 141
    only where it is stdout that nobody reads."""

    def end_with(error):
        def main():
            raise error

        command(main)

    for error, code in ((UserError("mend it"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop:
            end_with(error)
        assert stop.value.code == code and capsys.readouterr().err.count("\n") == 1
    for error in (OSError("not translated"), BrokenPipeError("another pipe")):
        with pytest.raises(type(error)):
            end_with(error)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as stop:
            command(lambda: print("to nobody"))
    assert stop.value.code == 128 + signal.SIGPIPE


def test_closed_streams_are_no_error(first_run, tmp_path):
    command = [sys.executable, "train.py", *tiny(out=first_run)]
    closed = 'exec "$@" >&- 2>&-'
    subprocess.run(["sh", "-c", closed, "sh", *command], cwd=ROOT, check=True)


@pytest.fixture
def stopped_run(first_run, tmp_path):
    """The command of a run that was stopped with two checkpoints, and their folder."""
    command = tiny("--save-every 1", base=base_of(first_run), out=tmp_path / "run")
    with pytest.raises(SystemExit), stopping_at(5):
        train.main(command)
    policy = tmp_path / "run" / "checkpoints" / "policy"
    assert [path.name for path in saved_steps(policy)] == ["step-000002", "step-000003"]
    return command, policy


def all_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["cut", "no tensors", "nan", "no moment"])
def test_a_damaged_checkpoint_stops_the_run(damage, stopped_run, first_run, capsys):
    """Nothing is touched; one line says what to remove to go on from the one before. What has
    another name there is not ours."""
    command, policy = stopped_run
    newest = policy / "step-000003"
    tensors = newest / "tensors.safetensors"
    if damage == "cut":
        os.truncate(tensors, 1000)
    elif damage == "no tensors":
        tensors.unlink()
    else:
        saved = load_file(tensors)
        name = next(name for name in saved if name.startswith("exp_avg."))
        saved[name] = saved[name] * math.nan if damage == "nan" else saved[name][:1].clone()
        save_file(saved, tensors)
    shutil.copytree(policy / "step-000002", policy / "step-000009.bak")
    (policy / "step-last").write_text("mine")
    before = all_files(policy.parent.parent)
    assert run_as_script(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and error.endswith(f"the one before, remove {newest}")
    assert all_files(policy.parent.parent) == before
    shutil.rmtree(newest)
    train.main(command)
    assert_same_run(first_run, policy.parent.parent, base=False)
    assert (policy / "step-last").exists() and (policy / "step-000009.bak").exists()


@pytest.mark.parametrize("trouble", ["memory", "handles", "share", "another rank", "folder"])
def test_a_checkpoint_that_cannot_be_read_now_is_as_before(
    trouble, stopped_run, first_run, monkeypatch, capsys
):
    command, policy = stopped_run
    before = all_files(policy.parent.parent)
    errors = {
        "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        "handles": FileNotFoundError("No such file or directory: tensors.safetensors"),
        "share": OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        "another rank": MemoryError(),
        "folder": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    }

    def fail(*_):
        raise errors[trouble]

    with monkeypatch.context() as broken:
        if trouble == "folder":
            scan = os.scandir
            listdir = os.listdir
            broken.setattr(os, "scandir", lambda path: fail() if path == policy else scan(path))
            broken.setattr(os, "listdir", lambda path: fail() if path == policy else listdir(path))
        else:
            broken.setattr(checkpoints, "load_file", fail)
        assert run_as_script(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {policy}") and "cannot be read now" in error
    assert all_files(policy.parent.parent) == before
    train.main(command)
    assert_same_run(first_run, policy.parent.parent, base=False)


def test_only_content_is_bad(tmp_path):
    """Whatever a library says of memory, handles and disks."""

    def read(error):
        with pytest.raises(UserError) as told, errors_of_reading(tmp_path / "it", "a table"):
            raise error
        assert str(told.value).count("\n") == 0 and str(told.value).startswith(str(tmp_path))
        return type(told.value)

    for error in (
        OSError(errno.EIO, "Input/output error"),
        PermissionError("no"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . can't allocate memory"),
        RuntimeError("unable to open file <tensors> in read-only mode: Too many open files (24)"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        soundfile.LibsndfileError(2),  # its SF_ERR_SYSTEM
        soundfile.LibsndfileError(17),  # of malloc
    ):
        assert read(error) is UserError
    for error in (
        ValueError("column"),
        KeyError("name"),
        SafetensorError("Error while deserializing header: HeaderTooLarge"),
        soundfile.LibsndfileError(1),  # format not recognised
        EOFError(),
    ):
        assert read(error) is DataError


def test_what_is_not_finite_is_not_saved(tmp_path):
    weights = {"a": torch.tensor([1.0, math.inf])}
    adam = torch.optim.AdamW(weights.values())
    with pytest.raises(UserError, match="step 7 is not saved.*value.a has values that") as told:
        save_checkpoint(tmp_path, 7, weights, adam)
    assert not isinstance(told.value, DataError)  # nobody's file is bad
    assert not saved_steps(tmp_path)


def test_a_skipped_step_leaves_the_model_as_it_was():
    """BatchNorm's statistics, too, which the forward pass has moved."""
    encoder = make_model().encoder.train()
    updater = Updater(encoder.parameters(), 1.0, encoder.buffers())

    def learn(mels):
        updater.zero_grad()
        mel, lengths = pad_ragged(mels, torch.device("cpu"))
        encoder(mel, lengths)[0].square().sum().backward()
        return updater.step(0.01)

    assert math.isfinite(learn([randn(20, 160), randn(31, 160)]))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert not math.isfinite(learn([randn(20, 160), 1e30 * randn(31, 160)]))
    same(encoder.state_dict(), before)
    assert math.isfinite(learn([randn(20, 160), randn(31, 160)]))
    moved = {n: not torch.equal(t, before[n]) for n, t in encoder.state_dict().items()}
    assert all(moved[name] for name in moved if "running" in name or "num_batches" in name)


@pytest.mark.parametrize("name", ["config.json", "base.json", "tokenizer.model"])
def test_the_first_write_of_all_may_have_been_killed(name, first_run, tmp_path):
    folder = tmp_path / ("run" if name == "config.json" else "base-qa-seed0-training")
    folder.mkdir()
    (folder / (name + ".tmp")).write_text("{")
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(first_run, capsys):
    before = (first_run / "policy.jsonl").read_bytes()
    train.main(tiny(out=first_run))
    assert "is finished" in capsys.readouterr().out
    assert (first_run / "policy.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"(?s)another configuration.*lr: 0.00\d+ there, 0.5 now"):
        train.main(tiny("--lr 0.5", out=first_run))
    with pytest.raises(UserError, match=r"(?s)base-qa-seed0.*ctc_steps: 3 there, 5 now"):
        train.main(tiny("--ctc-steps 5", out=first_run.parent / "other"))


def test_a_folder_serves_one_process_and_is_taken_by_what_trains_there(first_run, tmp_path):
    run = tmp_path / "run"
    command = tiny(base=base_of(first_run), out=run)
    with lock(run, wait=False):
        with pytest.raises(UserError, match="in use by another process"):
            train.main(tiny(out=run))

    def broken(answer, row):
        return math.nan

    with pytest.raises(UserError, match="broken gave nan, no finite number, for the answer"):
        train.main([*command, "--lr", "0.1"], reward=broken)
    train.main(command)  # nothing had been done there yet
    (run / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json cannot be read"):
        train.main(command)


def test_files_of_others_do_no_harm(first_run, tmp_path):
    """A log by tee, a scheduler's output, what a file manager leaves: the folder is new all the same,
    and so is an empty --base."""
    run, base = tmp_path / "run", tmp_path / "a base"
    for folder in (run, base):
        folder.mkdir()
        (folder / ".DS_Store").write_text("theirs")
    (run / "train.log").write_text("theirs")
    with pytest.raises(SystemExit), stopping_at(2):  # in CTC
        train.main(tiny("--lr 0.5", base=base, out=run))
    train.main(tiny(base=base, out=run))  # nothing of the run was begun yet
    assert same_weights(base / "model.safetensors", base_of(first_run) / "model.safetensors")
    assert_same_run(first_run, run, base=False)
    assert {(run / name).read_text() for name in (".DS_Store", "train.log")} == {"theirs"}
    assert not (base / "checkpoints").exists()


def same_weights(a, b):
    one, other = load_file(a), load_file(b)
    return all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_folder_that_is_no_run_is_said_to_be_none(first_run, tmp_path, capsys):
    """Files that were ours are to be restored; a stranger's are neither taken for ours nor lost."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "policy.jsonl").write_text("")
    assert run_as_script(*tiny(base=base_of(first_run), out=run)) == 2
    words = f"{run} holds policy.jsonl but no config.json: restore that, or choose another folder"
    assert words in capsys.readouterr().err
    (run / "policy.jsonl").unlink()
    theirs = '{"architectures": ["Theirs"]}'
    (run / "config.json").write_text(theirs)
    assert run_as_script(*tiny(base=base_of(first_run), out=run)) == 2
    assert "belongs to another configuration" in capsys.readouterr().err
    assert (run / "config.json").read_text() == theirs
    assert run_as_script(*tiny(base=run, out=tmp_path / "other")) == 2
    assert f"{run} holds config.json but no base.json" in capsys.readouterr().err
    (run / "results.json").write_text(theirs)
    assert run_as_script("--eval-only", "--out", run) == 2
    error = capsys.readouterr().err
    assert "cannot be read as a finished run" in error and error.count("\n") == 1


def test_a_flag_that_is_newer_than_the_run_has_its_default(first_run, capsys):
    run = first_run.parent / "older"
    shutil.copytree(first_run, run)
    for name in ("rescore", "terms"):
        edit_json(run / "config.json", **{name: ...})
    train.main(tiny(out=run))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"(?s)another configuration.*terms: 'both' there"):
        train.main(tiny("--terms local", out=run))


def test_lines_that_are_none(first_run, capsys):
    """Torn by a kill, zeros after a power cut: one line that says which."""
    run = first_run.parent / "torn"
    shutil.copytree(first_run, run)
    (run / "results.json").unlink()
    lines = (run / "policy.jsonl").read_bytes().splitlines()
    for bad in (lines[1][:20], bytes(40), b"3"):
        (run / "policy.jsonl").write_bytes(b"\n".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(DataError, match=r"policy.jsonl, line 2, cannot be read") as told:
            train.main(tiny(out=run))
        assert "\n" not in str(told.value)


def test_no_folder_with_an_open_file_is_renamed(first_run, tmp_path, monkeypatch):
    """Windows refuses that; so the lock of a base must not be in a folder that is renamed."""
    rename = os.rename

    def on_windows(source, target):
        for handle in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                if os.readlink(f"/proc/self/fd/{handle}").startswith(f"{source}{os.sep}"):
                    raise PermissionError(errno.EACCES, f"in use: {source}")
        rename(source, target)

    monkeypatch.setattr(os, "rename", on_windows)
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_mount_that_syncs_no_folders(number, tmp_path, monkeypatch):
    fsync = os.fsync

    def picky(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", picky)
    weights = {"a": torch.ones(2)}
    save_checkpoint(tmp_path, 7, weights, torch.optim.AdamW(weights.values()))
    assert [path.name for path in saved_steps(tmp_path)] == ["step-000007"]
    number = errno.EIO  # any other error is one
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path, 8, weights, torch.optim.AdamW(weights.values()))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_mount_that_knows_no_locks(number, tmp_path, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run_as_script(*tiny(out=tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'run'} cannot be locked")
    assert "choose another folder" in error and error.count("\n") == 1


def test_a_path_that_nobody_may_read(first_run, monkeypatch, capsys):
    """Not even whether it is there is known: one line, and not that it is missing."""
    closed = str(first_run)

    def denied(path, *args, original=os.stat, **kwargs):
        if str(path).startswith(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", denied)
    assert run_as_script("--eval-only", "--out", first_run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be read now (PermissionError" in error


def test_a_stdout_that_cannot_be_set(monkeypatch):
    """A notebook's."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    command(lambda: print("said"))
    assert sys.stdout.getvalue() == "said\n"


def test_paths_as_shells_leave_them(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/her")
    cfg, _ = train.parse(["--out=~/runs/a", "--data", "~", "--system-prompt", "Is ~ a tilde?"])
    assert (cfg.out, cfg.data) == ("/home/her/runs/a", "/home/her")
    assert cfg.system_prompt == "Is ~ a tilde?"
    for flag in ("--data", "--resume-adapter", "--out", "--lora-targets"):
        assert run_as_script(flag, "") == 2
        assert f"argument {flag}: it is empty" in capsys.readouterr().err


def test_commands_are_quoted_for_the_system_they_are_printed_on(monkeypatch):
    for text in ("", "a b", data.AUDIO + 'What\'s "it"?'):
        assert shlex.split(quote(text)) == [text]
    monkeypatch.setattr(sys, "platform", "win32")
    assert quote("C:\\my runs\\a") == '"C:\\my runs\\a"' and quote("") == '""'
    assert quote('<|audio|>What\'s "it"?') == '"<|audio|>What\'s \\"it\\"?"'


def run_as_script(*flags):
    """`python train.py FLAGS` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--algo ppo", "algo"),
        ("--no-such-flag", "no-such-flag"),
        ("--lr fast", "lr"),
        ("--top-p 0", "top_p"),
        ("--prompts 4 --update-prompts 3", "update_prompts"),
        ("--responses 0", "responses"),
        ("--base-seed 99999999999999999999", "base_seed"),
        ("--data nowhere", "train.jsonl"),
        ("--base run --out run", "two folders"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_as_script("--out", tmp_path / "run", *flags.split()) == 2
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_a_torchrun_that_is_none_gets_one_line_and_exit_code_2(
    environment, tmp_path, monkeypatch, capsys
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_as_script(*tiny(out=tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.count("\n") == 1
        and "RANK, WORLD_SIZE and LOCAL_RANK" in said.err
    )
    assert not (tmp_path / "run").exists()


def test_flags_are_few_and_in_groups(capsys):
    """At most 50, each with a line of --help under the title of what it belongs to."""
    assert run_as_script("--help") == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    wanted = {"--" + f.name.replace("_", "-") for f in fields(train.Config)} | {
        "--eval-only",
        "--best",
    }
    assert sorted(flags) == sorted(wanted) and len(flags) <= 50
    titles = [line for line in text.splitlines() if re.fullmatch(r"[A-Za-z ]+:", line)]
    assert titles == [
        "options:",  # --help itself
        "data:",
        "base model:",
        "policy optimisation:",
        "credit:",
        "LoRA:",
        "evaluation:",
        "the run:",
    ]
    of_title = {}
    for line in text[text.index("options:") :].splitlines():
        if line in titles:
            title = line
        elif line.startswith("  --"):
            of_title.setdefault(title, []).append(line.split()[0].rstrip(","))
    assert {"--kl-coef", "--lr", "--steps"} <= set(of_title["policy optimisation:"])
    assert {"--lora-r", "--lora-targets"} <= set(of_title["LoRA:"])
    assert {"--fork-budget", "--terms"} <= set(of_title["credit:"])
    assert {"--base-lr", "--init"} <= set(of_title["base model:"])


def test_a_run_goes_on_with_its_own_rule_and_reward_only(first_run, tmp_path):
    """A step that fails before it changes anything is saved like a stop; comments and docstrings
    are no other rule."""
    calls = []

    def own_rule(cfg, *group):
        """Fails once."""
        calls.append(None)  # of a prompt
        if len(calls) == 2 * 4 + 1:  # in the third step of 4 prompts
            raise ZeroDivisionError
        return train.credit(cfg, *group)

    first = own_rule

    def own_rule(cfg, *group):
        calls.append(None)
        if len(calls) == 2 * 4 + 1:
            raise ZeroDivisionError
        return train.credit(cfg, *group)

    command = tiny("--save-every 4 --eval-every 0", base=base_of(first_run), out=tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train.main(command, first, by_letters)
    assert [path.name for path in saved_steps(tmp_path / "run/checkpoints/policy")] == [
        "step-000002"
    ]
    assert len(metrics(tmp_path / "run")) == 2
    for others, told in (
        ({}, r"(?s)credit: '\S*own_rule \w+' there, 'credit \w+' now.*reward: "),
        ({"credit": own_rule}, r"reward: 'by_letters \w+' there, 'reward \w+' now"),
    ):
        with pytest.raises(UserError, match=told):
            train.main(command, **others)
    train.main(command, own_rule, by_letters)
    assert len(calls) == 2 * 4 + 1 + 2 * 4
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_step_that_fails_half_way_is_not_saved(first_run, tmp_path, monkeypatch, capsys):
    """Its weights are no longer those of the step before."""
    command = tiny("--save-every 2 --eval-every 0", base=base_of(first_run), out=tmp_path / "run")
    updates = []
    step = Updater.step

    def failing(self, *args):
        updates.append(None)
        if len(updates) == 2 * 3 + 2:  # the second update of the fourth step
            raise MemoryError
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Updater, "step", failing)
        train.main(command, reward=by_letters)
    checkpoints = saved_steps(tmp_path / "run" / "checkpoints" / "policy")
    assert [path.name for path in checkpoints] == ["step-000002"]
    assert "saved step 2 in" in capsys.readouterr().out
    train.main(command, reward=by_letters)
    train.main([*command[:-1], str(tmp_path / "whole")], reward=by_letters)
    assert_same_run(tmp_path / "run", tmp_path / "whole", base=False)


def test_a_save_that_fails_tells_why(first_run, tmp_path, monkeypatch, capsys):
    """Rescue tries again, and meets the same; the same command goes on."""
    command = tiny("--eval-every 0", base=base_of(first_run), out=tmp_path / "run")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        assert run_as_script(*command) == 2
    assert "No space left on device" in capsys.readouterr().err
    train.main(command)
    assert (tmp_path / "run" / "results.json").exists()


def test_training_in_a_thread(first_run, tmp_path):
    """Where no signals come to."""
    out = tmp_path / "run"
    command = tiny("--steps 1 --eval-every 0", base=base_of(first_run), out=out)
    with ThreadPoolExecutor() as pool:
        pool.submit(train.main, command).result()
    assert (out / "results.json").exists()


def test_what_a_fork_hands_in_is_checked(first_run, tmp_path):
    def number_of_each(cfg, tokens, lengths, surprisal, rewards):
        return torch.tensor(rewards)  # (K,)

    def not_finite(cfg, tokens, *_):
        return torch.full(tokens.shape, math.nan)

    for n, (rule, gave) in enumerate(((number_of_each, r"a tensor \(4,\)"), (not_finite, "gave"))):
        command = tiny("--eval-every 0", base=base_of(first_run), out=tmp_path / str(n))
        with pytest.raises(UserError, match=rf"{rule.__name__} must return .*\(4, \d\).*{gave}"):
            train.main(command, credit=rule)
    given = [True, np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5)]

    def next_given(answer, row):
        return given.pop()

    while given:
        want = [float(given[-1])]
        assert data.rewards_of(["a"], [{"prompt": "p"}], next_given) == want
    given += [None, "0.5", math.nan, np.array([0.5]), torch.ones(2), 1j, 10**400]
    while given:
        with pytest.raises(UserError, match="next_given gave .* for the answer 'a' to 'p'"):
            data.rewards_of(["a"], [{"prompt": "p"}], next_given)
    for no_function in (lambda answer, row: 1.0, functools.partial(by_letters), "reward", len):
        with pytest.raises(UserError, match="must be a function, made by def in a file"):
            train.main(tiny(base=base_of(first_run), out=tmp_path / "none"), reward=no_function)


def test_a_checkpoint_goes_to_where_its_parameters_are(tmp_path, monkeypatch):
    """AdamW's step, too: the fused kernel wants it beside them."""
    here = {"a": randn(5, 3).requires_grad_()}
    updater = Updater(here.values(), grad_clip=1.0)
    here["a"].grad = randn(5, 3, seed=1)
    updater.step(0.1)
    save_checkpoint(tmp_path, 1, here, updater.adam)
    saved = load_file(tmp_path / "step-000001" / "tensors.safetensors")  # true tensors
    monkeypatch.setattr(checkpoints, "load_file", lambda file: saved)
    monkeypatch.setattr(checkpoints, "is_finite", lambda tensor: True)  # they have no contents
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = {"a": torch.empty(5, 3, device="cuda", requires_grad=True)}
        updater = Updater(there.values(), grad_clip=1.0)
        assert load_checkpoint(tmp_path, there, updater.adam) == 1
        state = updater.adam.state[there["a"]]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}


# --------------------------------------------------------------------------------------------------
# Stops, alone and under torchrun


@pytest.mark.parametrize(
    "first, second, saved",
    [
        (signal.SIGTERM, signal.SIGTERM, 3),  # as torchrun forwards what they all got
        (signal.SIGTERM, signal.SIGINT, 3),
        (signal.SIGINT, signal.SIGINT, 2),
    ],
)
def test_only_a_second_ctrl_c_stops_at_once(first, second, saved, first_run, tmp_path):
    """Both in the third step; without it the second was the last to be saved."""
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop, stopping_at(5, second), stopping_at(5, first):
        train.main(tiny(base=base_of(first_run), out=run))
    assert stop.value.code == 128 + first
    assert saved_steps(run / "checkpoints" / "policy")[-1].name == f"step-{saved:06d}"


# What torchrun starts here: train.py, which leaves its process's number in a folder.
NUMBERED = """
import os, sys
from pathlib import Path
Path(sys.argv.pop(1), str(os.getpid())).touch()
from train import command, main
command(main)
"""


@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # by gloo
        pytest.param(  # by NCCL
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs"),
        ),
    ],
)
def test_two_processes_are_one(device, first_run, tmp_path):
    """Prompts shared out over two processes give the update of one; only the first writes. In the
    middle a scheduler stops them, which signals torchrun and them, so that torchrun forwards what
    they have already: the step is finished and saved, and the same command goes on."""
    flags = (
        f"--steps 6 --save-every 50 --eval-every 1 --device {device} --dtype float32 "
        "--train-rows 8 --validation-rows 1 --test-rows 1"
    )
    one = tmp_path / "one"
    two = tmp_path / "two"
    train.main(tiny(flags, base=base_of(first_run), out=one))
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    script = tmp_path / "numbered.py"
    script.write_text(NUMBERED)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    training = [script, numbers, *tiny(flags, base=base_of(first_run), out=two)]
    started = {
        "args": [sys.executable, *torchrun, *training],
        "cwd": ROOT,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(**started) as process:
        while not process.stdout.readline().startswith("step 1:"):  # its line is in the log
            assert process.poll() is None
        for number in [*map(int, os.listdir(numbers)), process.pid]:
            os.kill(number, signal.SIGTERM)
        said = process.stdout.read()
    done = len(metrics(two))
    assert process.returncode and 1 <= done < 6 and f"saved step {done} in" in said
    assert [path.name for path in saved_steps(two / "checkpoints/policy")] == [f"step-00000{done}"]
    said = subprocess.run(**started, check=True).stdout
    assert said.count("6 steps of") == 1 and said.count("took") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    alike = "loss reward kl grad_norm response_length usable_fork_fire equal_rewards lr".split()
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in alike:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-4, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# Cards


class Card:
    """torch.cuda as a machine with some cards would have it."""

    def __init__(self, monkeypatch, count=1, capability=(9, 0), runs=True):
        self.current = None
        emulates = {True: True, False: capability >= (8, 0)}
        for name, function in {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "set_device": lambda device: setattr(self, "current", device),
            "get_device_name": lambda device: "Tesla V100",
            "get_device_capability": lambda device: capability,
            "is_bf16_supported": lambda including_emulation=True: emulates[including_emulation],
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

        def ones(*shape, device):
            if not runs:
                raise torch.AcceleratorError("CUDA error: no kernel image is available\nmore")
            return torch.zeros(*shape)

        monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize("number", [None, 0, 1])
def test_each_process_takes_the_card_of_its_number(number, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if number is not None:
            monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else str(number))
    card = Card(monkeypatch, count=2)
    device, dtype = choose_device("auto", "auto")
    assert (device, dtype) == (torch.device("cuda", number or 0), torch.bfloat16)
    assert card.current == device
    Card(monkeypatch, count=1)
    if number == 1:
        with pytest.raises(UserError, match="no GPU of its own.*--nproc_per_node=1"):
            choose_device("auto", "auto")


def test_a_card_without_bfloat16_takes_float32(monkeypatch):
    Card(monkeypatch, capability=(7, 5))
    assert choose_device("auto", "auto")[1] == torch.float32


def test_a_card_that_this_torch_cannot_run_is_refused(monkeypatch):
    Card(monkeypatch, capability=(7, 0), runs=False)
    with pytest.raises(
        UserError, match=r"V100 \(compute capability 7.0\).*no kernel image"
    ) as told:
        choose_device("auto", "auto")
    assert "\n" not in str(told.value)


def test_without_a_terminal_a_line_per_tenth_tells_how_far_it_is(tmp_path, capsys):
    """And what is there already is not counted as quick work."""
    path = tmp_path / "ctc.jsonl"
    with StopSignals() as stop, Log(path, 10, 40, stop) as log:
        for done in range(11, 41):
            log.write(done, {"loss": 0.5, "lr": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/40" for n in range(12, 41, 4)]
    assert all(re.fullmatch(r"ctc \d+/40  loss 0.500  00:0\d left", line) for line in lines)
    assert [line["step"] for line in read_lines(path)] == list(range(11, 41))


def test_apples_gpu_is_taken_by_name_and_from_torch_2_13_on(monkeypatch):
    """Older ones decode wrongly with a mask like ours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for version in ("2.11.0", "2.12.1", "2.13.0", "2.14.1+cu130"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert choose_device("auto", "auto") == (torch.device("cpu"), torch.float32)
        if version < "2.13":
            with pytest.raises(
                UserError, match=f"mps needs torch 2.13 or newer: {version} "
            ) as told:
                choose_device("mps", "auto")
            assert "\n" not in str(told.value)
        else:
            assert choose_device("mps", "auto") == (torch.device("mps"), torch.float32)
    with pytest.raises(UserError, match="--device cuda: this torch sees no such device"):
        choose_device("cuda", "auto")
