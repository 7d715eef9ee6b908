"""train.py: evaluation, adapters that go on, corpora of one's own, which model is meant."""

import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import pretrain
import train
from corpora import synthetic
from data import AUDIO
from tests.helpers import (
    ROOT,
    SUFFIXES,
    adapter,
    base_of,
    by_letters,
    first_run,
    metrics,
    read_json_lines,
    same,
    seeded,
    stopping_at,
    tiny,
    write_corpus,
)
from tools import ask
from upkeep.errors import DataError, UserError
from upkeep.files import read_json
from upkeep.optim import learning_rate
from upkeep.tensors import transformers_name

__all__ = ["first_run", "seeded"]  # fixtures


def test_the_best_step_is_kept(first_run, tmp_path, monkeypatch):
    """The first with the greatest mean reward in validation; a stop in between changes nothing."""
    reward = [0.2, 0.1, 0.3, 0.3, 0.2]  # before the first step, and after each
    weights = []

    def measured(cfg, model, tokenizer, split, step, *_):
        weights.append({n: p.detach().clone() for n, p in lora.lora_parameters(model).items()})
        return {"validation_bleu": 100 - step, "validation_reward": reward[step]}

    monkeypatch.setattr(train, "validate", measured)
    for stop in (3, 5):  # updates of the policy; two a step
        weights.clear()
        run = tmp_path / f"run-{stop}"
        command = tiny("--eval-every 1", base=base_of(first_run), out=run)
        with pytest.raises(SystemExit), stopping_at(stop):
            train.main(command)
        train.main(command)
        results = read_json(run / "results.json")
        assert results["best"] == {"step": 2, "validation_bleu": 98, "validation_reward": 0.3}
        best = load_file(run / "adapter-best" / "adapter_model.safetensors")
        for name, tensor in weights[2].items():
            same(best[f"base_model.model.{transformers_name(name)}.weight"], tensor)
        assert not torch.equal(next(iter(adapter(run).values())), next(iter(best.values())))
    monkeypatch.undo()
    train.main(["--eval-only", "--best", "--out", str(run), "--device", "cpu"])
    figures = read_json(run / "evaluation-qa-best.json")
    assert figures["config"]["resume_adapter"] == str(run / "adapter-best")
    with pytest.raises(UserError, match="no adapter-best"):
        shutil.rmtree(run / "adapter-best")
        train.main(["--eval-only", "--best", "--out", str(run), "--device", "cpu"])


def test_a_second_epoch_starts_from_the_first_and_is_measured_to_the_base(first_run, tmp_path):
    """A fresh optimiser and schedule; the policy is the first's, the reference the base."""
    run = tmp_path / "second"
    trained = {name: tensor.clone() for name, tensor in adapter(first_run).items()}
    cfg = train.Config(resume_adapter=str(first_run / "adapter"), base=str(base_of(first_run)))
    model, _ = train.load(cfg, torch.device("cpu"), torch.float32)
    train.adapt(cfg, model)
    for name, parameter in lora.lora_parameters(model).items():
        same(parameter, trained[f"base_model.model.{transformers_name(name)}.weight"])
    resumed = {"base": base_of(first_run), "resume_adapter": first_run / "adapter"}
    train.main(tiny("--seed 1 --update-prompts 4", out=run, **resumed))
    # Before any update: to the first epoch's policy it would be 0.
    assert metrics(run)[0]["kl"] > 1e-4
    assert metrics(run)[0]["lr"] == learning_rate(train.Config.lr, 0.05, 1 / 4)
    last = load_file(run / "checkpoints/policy/step-000004/tensors.safetensors")
    assert {tensor.item() for name, tensor in last.items() if name.startswith("step.")} == {4}
    results = [read_json(folder / "results.json") for folder in (first_run, run)]
    assert results[0]["base"] == results[1]["base"]


def test_evaluation_swaps_the_audio(first_run, tmp_path, monkeypatch):
    heard = []
    prompts = data.Split.prompts

    def listening(self, model, indices, audio_of=None):
        heard.append((indices, audio_of))
        return prompts(self, model, indices, audio_of)

    monkeypatch.setattr(data.Split, "prompts", listening)
    rows = synthetic.rows("qa", {"train": 24, "validation": 4, "test": 6}, 0)["test"]
    train.main(["--eval-only", "--out", str(first_run), "--device", "cpu"])
    every = list(range(6))
    assert heard == [(every, None)] * 2 + [(every, data.swapped_audio(rows))]
    evaluation = read_json(first_run / "evaluation-qa.json")
    base = read_json(first_run / "scores-base.json")
    assert base.keys() < evaluation.keys() and base["mean reward x100, ceiling"] < 100
    assert len([name for name in base if name.startswith("heard %, ")]) == len(synthetic.FIELDS)


@pytest.mark.parametrize("slots", [{}, {"slots": []}, {"slots": {}}])
def test_rows_without_slots_have_no_scores_of_them(slots, tmp_path, monkeypatch):
    rows = [{"audio": "a.wav", "prompt": AUDIO, "reference": "Anna", **slots}] * 2
    monkeypatch.setattr(train, "answer", lambda model, tokenizer, split, *_, **__: ["Anna", "Bob"])
    split = types.SimpleNamespace(rows=rows)
    scores = train.evaluate(None, None, split, train.Config(), tmp_path / "predictions.jsonl")
    assert scores["exact match %"] == 50 and all(map(math.isfinite, scores.values()))
    assert not [name for name in scores if "heard" in name or "ceiling" in name]


# A machine with what the default run needs and no more: not IBM's tokenizer and chat template, nor
# what Windows lacks.
PLAIN_MACHINE = """
import runpy, sys
for name in ("tokenizers", "jinja2", "torchaudio", "resource", "fcntl"):
    sys.modules[name] = None  # makes its import fail
import filelock
filelock.FileLock = filelock.SoftFileLock
import leaf, model, lora, data, train
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
print("imported:", [name for name in sys.modules if name.partition(".")[0] == "released"])
"""


def test_a_default_run_needs_no_more_than_the_five_files(tmp_path):
    flags = tiny("--ctc-steps 1 --sft-steps 1 --steps 1 --eval-every 1", out=tmp_path / "run")
    command = [sys.executable, "-c", PLAIN_MACHINE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
    results = read_json(tmp_path / "run" / "results.json")
    assert math.isnan(results["peak_memory_gb"]) and "BLEU greedy" in results["trained"]


@pytest.mark.parametrize("transcripts", [True, False])
def test_a_corpus_of_ones_own(transcripts, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "tones", transcripts)
    train.main(tiny("--train-rows 2", data=corpus, out=tmp_path / "run"))
    out = capsys.readouterr().out
    assert "tones: 12 train, 4 validation, 6 test rows" in out  # the first is not limited
    results = read_json(tmp_path / "run" / "results.json")
    before = results["base"]["mean reward x100"]
    after = results["trained"]["mean reward x100"]
    shown = next(line.split() for line in out.splitlines() if line.startswith("mean reward"))
    assert shown == f"mean reward x100 {before:.2f} {after:.2f} {after - before:+.2f}".split()
    assert ("CTC is skipped" in out) != transcripts and ("BLEU greedy, g" in out) == transcripts
    assert (tmp_path / "base-tones-seed0" / "ctc.jsonl").exists() == transcripts


def test_a_bad_corpus_is_refused_whole(tmp_path, capsys):
    """Every bad row is counted, no folder is made; --skip-bad-rows goes on without them and says
    how many."""
    corpus = write_corpus(tmp_path / "tones")
    with open(corpus / "train.jsonl", "a") as file:
        file.write('{"audio": "gone.wav", "prompt": "<|audio|>?", "reference": "x"}\n{')
    command = tiny(data=corpus, out=tmp_path / "run")
    words = r"(?s)2 bad rows.*train.jsonl, line 13: .*gone.wav.*line 14: not JSON"
    with pytest.raises(DataError, match=words):
        train.main(command)
    assert {p.name for p in tmp_path.iterdir()} == {"tones", "checked.json"}
    train.main([*command, "--skip-bad-rows"])
    assert "skipping 2 bad rows" in capsys.readouterr().out
    other = tiny(data=corpus, out=tmp_path / "other")
    (corpus / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match="validation.jsonl has no rows"):
        train.main(other)
    (corpus / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="validation.jsonl is missing"):
        train.main(other)


def test_text_beyond_ascii_is_escaped_where_it_must_be(first_run, tmp_path):
    corpus = write_corpus(tmp_path / "tones")
    text = (corpus / "test.jsonl").read_text().replace("Tone a", "Größe, приём, 東京")
    (corpus / "test.jsonl").write_text(text, encoding="utf-8")
    flags = tiny(
        "--steps 1 --eval-every 0", data=corpus, base=base_of(first_run), out=tmp_path / "r"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | ascii_only)
    assert done.returncode == 0, done.stderr
    assert rb"reference  Gr\xf6\xdfe, \u043f\u0440\u0438\u0451\u043c, \u6771" in done.stdout


def test_an_encoder_with_lora_is_trained_and_never_heard_stale(first_run, tmp_path, monkeypatch):
    """Its adapters move, and after that sampler and scorer still agree: both hear with the
    encoder as it is."""
    run = tmp_path / "run"
    flags = f"--lora-targets {SUFFIXES} --lr 0.02"
    train.main(tiny(flags, base=base_of(first_run), out=run), reward=by_letters)
    of_encoder = {n: t for n, t in adapter(run).items() if "encoder" in n and "lora_B" in n}
    moved = [t.abs().max() for t in of_encoder.values()]
    assert len(moved) == 8 and min(moved) > 1e-4
    assert all(row["first_ratio_gap"] < 1e-5 for row in metrics(run))
    results = read_json(run / "results.json")
    base = read_json(first_run / "results.json")["base"]
    for name, value in base.items():  # measured with LoRA off
        assert results["base"][name] == value or "reward" in name


def test_which_model_is_meant(first_run, tmp_path, monkeypatch):
    """A run by its --out, wherever one stands; a checkpoint otherwise."""
    monkeypatch.chdir(tmp_path)
    run = ["--out", str(first_run)]
    base = ["--base", str(base_of(first_run))]
    cfg, _ = train.parse(["--eval-only", "--init", "ck", "--data", "d"])
    assert (cfg.init, cfg.resume_adapter, str(cfg.run_folder)) == ("ck", "", "runs/d-ck-evaluation")
    cfg, _ = train.parse(["--eval-only", *base])
    assert (cfg.base, cfg.resume_adapter) == (base[1], "")
    assert cfg.out == "runs/qa-base-qa-seed0-evaluation"
    for flags in (run, [*run, *base]):
        cfg, eval_only = train.parse(["--eval-only", *flags])
        assert eval_only and cfg.resume_adapter == str(first_run / "adapter")
        assert cfg.lora_r == 4 and cfg.base_folder.samefile(base_of(first_run))
    with pytest.raises(UserError, match="no finished run"):
        train.parse(["--eval-only"])
    with pytest.raises(SystemExit):
        train.parse(["--init", "a", "--base", "b"])
    config = read_json(first_run / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base_of(first_run))


def test_a_run_is_evaluated_with_what_it_learned(first_run, tmp_path):
    """Its own command with --eval-only, --resume-adapter included, means the run; unfinished, it
    is refused."""
    for resumed in (first_run / "adapter", "elsewhere"):
        command = tiny("--eval-only", base=base_of(first_run), resume_adapter=resumed)
        cfg, _ = train.parse([*command, "--out", str(first_run)])
        assert cfg.resume_adapter == str(first_run / "adapter")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no finished run"):
        train.parse([*command, "--out", str(tmp_path)])
    outs = {train.parse(["--eval-only", "--init", ck, "--data", "d"])[0].out for ck in ("a", "b")}
    assert len(outs) == 2  # the second checkpoint's figures do not replace the first's


def test_a_moved_base_gets_one_line(first_run, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match="the base .*gone is missing"):
        train.main(["--eval-only", "--out", str(first_run), "--base", gone, "--device", "cpu"])


def test_the_readmes_fork_is_a_whole_run(first_run, tmp_path, capsys):
    """Its folder remembers rule and reward; who has others sees answers, and no figures of theirs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import torch\nimport train.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "fork.py").write_text(code)
    run = tmp_path / "run"
    script = [sys.executable, str(tmp_path / "fork.py"), *tiny(base=base_of(first_run), out=run)]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=paths)
    assert done.returncode == 0 and "mean reward" in done.stdout, done.stderr
    config = read_json(run / "config.json")
    assert config["credit"].startswith("rloo ") and config["reward"].startswith("exact_match ")
    kept = read_json_lines(run / "samples.jsonl")
    assert [line["step"] for line in kept] == [0, 2, 4] and len(kept[0]["rows"]) == 4
    for row in kept[2]["rows"]:
        r = torch.tensor([float(a.split() == row["reference"].split()) for a in row["answers"]])
        assert row["rewards"] == r.tolist()
        others = [(r.sum() - r[k]) / (len(r) - 1) for k in range(len(r))]
        for k, credit in enumerate(row["credit"]):
            assert credit == pytest.approx(
                [float(r[k] - others[k])] * len(row["tokens"][k]), abs=1e-6
            )
    train.main(["--eval-only", "--out", str(run), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "has the reward exact_match" in said and "BLEU greedy" in said
    assert "mean reward" not in said
    asked = [str(run), str(run / "example.wav"), "What happened?", "--device", "cpu"]
    ask.main([*asked, "--samples", "4", "--reference", "Anna"])
    said = capsys.readouterr().out
    assert "has the credit rloo" in said and "root  n=4\n" in said and "A=" not in said
    with pytest.raises(UserError, match="(?s)another configuration.*credit: 'rloo"):
        train.main(tiny(base=base_of(first_run), out=run))


def test_what_the_loop_says(first_run, tmp_path, capsys):
    """In lines of 100 columns; of rewards that teach nothing once."""

    def constant(answer, row):
        return 1.0

    flags = "--steps 3 --eval-every 1 --no-multiplicity"
    train.main(tiny(flags, base=base_of(first_run), out=tmp_path / "run"), reward=constant)
    said = capsys.readouterr().out
    assert said.count("all answers earn the same") == 1
    assert said.count("validation BLEU") == 3
    figures = {"validation_bleu": 100.0, "validation_reward": -1.0, "reward": -1.0, "kl": 99.0}
    longest = train.VALIDATION.format(step=99_999, usable_fork_fire=1.0, **figures)
    assert len(longest) <= 100


def test_the_readmes_width_is_a_base_of_its_own(tmp_path):
    """Whose decoder is that wide, and with adapters that fit it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import pretrain.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "wide.py").write_text(code)
    command = tiny("--steps 1 --eval-every 0", base=tmp_path / "wide", out=tmp_path / "run")
    script = [sys.executable, str(tmp_path / "wide.py"), *command]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=paths)
    assert done.returncode == 0, done.stderr
    text = read_json(tmp_path / "wide" / "config.json")["text_config"]
    scale = (text["hidden_size"] / text["num_attention_heads"]) ** -0.5
    assert text["hidden_size"] > 128 and text["attention_multiplier"] == scale
    sizes = {
        tensor.shape[1]
        for name, tensor in adapter(tmp_path / "run").items()
        if "q_proj.lora_A" in name
    }
    assert sizes == {text["hidden_size"]}


def test_ctc_has_a_class_for_every_character(tmp_path, monkeypatch):
    """And one more, 0, which is CTC's blank."""
    seen = {}

    def stop_before(cfg, model, training, transcripts, folder):
        seen.update(model=model, rows=training.rows, transcripts=transcripts)
        raise KeyError

    monkeypatch.setattr(pretrain, "train_ctc", stop_before)
    with pytest.raises(KeyError):
        train.main(tiny(out=tmp_path / "run"))
    said = "".join(row["transcript"] for row in seen["rows"])
    classes = [c for transcript in seen["transcripts"] for c in transcript]
    pairs = set(zip(said, classes, strict=True))
    assert sorted(c for _, c in pairs) == list(range(1, 1 + len(set(said))))
    assert seen["model"].encoder.out.out_features == 1 + len(set(said))
