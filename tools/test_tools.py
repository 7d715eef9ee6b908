"""tools.ask and tools.picture, on a run in miniature."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lora
import train
from tests.helpers import ROOT, first_run, read_json_lines, seeded, tiny, write_corpus
from tools import ask, picture
from upkeep.errors import DataError, UserError
from upkeep.tensors import transformers_name

__all__ = ["first_run", "seeded"]  # fixtures

REFERENCE = "Anna bought the two red apples at the market on Monday."


def test_ask_answers_and_draws_the_tree(first_run, capsys):
    command = [str(first_run), str(first_run / "example.wav"), "What happened?", "--device", "cpu"]
    ask.main(command)
    answer = capsys.readouterr().out
    ask.main([*command, "--samples", "4", "--reference", REFERENCE])
    tree = capsys.readouterr().out
    assert tree.startswith(answer) and "root  n=4  V=" in tree and "boundaries [" in tree
    assert sum("response" in line and "r=" in line for line in tree.splitlines()) == 4
    assert " A=" in tree and len(tree.splitlines()) <= 3 + 4 + 4  # root, nodes at two cuts, answers
    with pytest.raises(DataError, match="missing.wav"):
        ask.main([str(first_run), "missing.wav", "What?", "--device", "cpu"])


def test_without_a_reference_the_tree_has_no_values(first_run, capsys):
    command = [str(first_run), str(first_run / "example.wav"), "What happened?", "--device", "cpu"]
    ask.main([*command, "--samples", "4"])
    tree = capsys.readouterr().out
    assert "root  n=4\n" in tree and "boundaries [" in tree
    assert "V=" not in tree and "r=" not in tree and "A=" not in tree
    assert sum("response" in line for line in tree.splitlines()) == 4


def test_the_answer_is_the_trained_models(first_run, tmp_path, monkeypatch, capsys):
    """With the run's adapter, which the example's answer of the evaluation shows, too; a recording
    from anywhere will do."""
    seen = []
    answer = train.answer

    def recording(model, *rest):
        seen.append(model)
        return answer(model, *rest)

    monkeypatch.setattr(train, "answer", recording)
    rows = read_json_lines(first_run / "predictions-trained.jsonl")
    question = rows[0]["prompt"].replace(data.AUDIO, "")
    ask.main([str(first_run), str(first_run / "example.wav"), question, "--device", "cpu"])
    assert capsys.readouterr().out == rows[0]["greedy"] + "\n"
    layers = lora.lora_layers(seen[0])
    assert layers and all(layer.lora_B.any() for layer in layers.values())
    run = first_run.parent / "asked for its best"  # whose weights are made to be other ones
    shutil.copytree(first_run, run)
    file = run / "adapter-best" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    ask.main([str(run), str(first_run / "example.wav"), question, "--device", "cpu", "--best"])
    best = load_file(file)
    for name, parameter in lora.lora_parameters(seen[1]).items():
        key = f"base_model.model.{transformers_name(name)}.weight"
        assert torch.equal(parameter, best[key])
    corpus = write_corpus(tmp_path / "tones")
    ask.main([str(first_run), str(corpus / "test0.wav"), "Which tone?", "--device", "cpu"])


def test_a_run_is_asked_by_its_folder_alone(first_run, tmp_path, monkeypatch):
    """From any working directory; one that is not finished, or whose base is gone, says so."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        ask.main(["nowhere", str(first_run / "example.wav"), "What?", "--device", "cpu"])
    cfg = train.finished(first_run, {"device": "cpu"})
    assert cfg.resume_adapter == str(first_run / "adapter") and cfg.lora_r == 4
    assert cfg.base_folder.samefile(first_run.parent / "base-qa-seed0") and cfg.device == "cpu"
    shutil.copytree(first_run, tmp_path / "elsewhere" / "moved")
    with pytest.raises(UserError, match="the base elsewhere/base-qa-seed0 is missing"):
        ask.main(["elsewhere/moved", str(first_run / "example.wav"), "?", "--device", "cpu"])


@pytest.mark.parametrize(
    "more, word",
    [
        (["What?", "--samples", "1"], "--samples"),
        (["What?", "--samples", "-1"], "--samples"),
        (["What?", "--samples", "many"], "--samples"),
        (["What?", "--reference", "that"], "--samples"),
        (["What?", "--no-such-flag"], "no-such-flag"),
        ([data.AUDIO + "What?" + data.AUDIO], data.AUDIO),
        ([], "question"),
    ],
)
def test_a_bad_question_gets_exit_code_2(more, word, first_run, capsys):
    with pytest.raises(SystemExit) as stop:
        ask.main([str(first_run), str(first_run / "example.wav"), *more])
    assert stop.value.code == 2 and word in capsys.readouterr().err


PROMPTS = ["{}", "Listen to this: {} What tone is it?", '{}It\'s "that", $HOME; `x`?', "Which? {}"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_printed_line_asks_what_was_trained(prompt, first_run, tmp_path, monkeypatch, capsys):
    """The prompt of the example's row as it is, wherever its audio is, and without a word."""
    corpus = write_corpus(tmp_path / "tones", rows=4)
    prompt = prompt.format(data.AUDIO)
    for file in corpus.glob("*.jsonl"):
        rows = [row | {"prompt": prompt} for row in read_json_lines(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(tiny("--steps 1 --ctc-steps 1 --sft-steps 1", data=corpus, out=tmp_path / "run"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ask it"))
    asked = []
    monkeypatch.setattr(train, "answer", lambda m, t, split, cfg: [asked.append(split.rows[0])])
    command = shlex.split(line.removeprefix("ask it"))
    assert command[:3] == ["python", "-m", "tools.ask"]
    ask.main([*command[3:], "--device", "cpu"])
    assert asked[0]["prompt"] == prompt and asked[0]["audio"] == str(corpus / "test0.wav")


def test_ask_is_a_command(tmp_path):
    """`python -m tools.ask`: a mistake gets one line and exit code 2."""
    command = [sys.executable, "-m", "tools.ask", str(tmp_path), "nowhere.wav", "What?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no finished run" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_readmes_lines_answer_from_python(first_run, capsys):
    """What the README shows to load a run and ask it says what tools.ask says."""
    recording = str(first_run / "example.wav")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from pathlib import Path.*?)```", readme, re.DOTALL)[1]
    code = code.replace("runs/qa-leaf-seed0", str(first_run)).replace("clip.wav", recording)
    exec(code, {})
    said = capsys.readouterr().out
    ask.main([str(first_run), recording, "What happened?"])
    assert said == capsys.readouterr().out and said.strip()


def test_the_picture_has_both_rules_on_one_scale(first_run, tmp_path):
    """The example of leaf.py: raw credit by hand, as a share of the largest, which is LEAF's of cdE."""
    run = tmp_path / "run"
    shutil.copytree(first_run, run)
    row = {
        "tokens": [[0, 1, 2, 3, 4], [0, 1, 4], [0, 1, 4]],
        "pieces": [list("abcdE"), list("abE"), list("abE")],
        "surprisal": [[0.1, 0.1, 2.0, 0.3, 3.0], [0.1, 0.1, 0.4], [0.1, 0.1, 0.4]],
        "rewards": [1.0, 0.2, 0.2],
        "greedy": "abcd",
        "greedy_reward": 1.0,
        "reference": "abcd",
    }
    (run / "samples.jsonl").write_text(json.dumps({"step": 4, "rows": [row, row]}) + "\n")
    picture.main([str(run), "--step", "4", "--row", "1", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="no row 2"):
        picture.main([str(run), "--step", "4", "--row", "2"])
    for theme in ("light", "dark"):
        shapes = list(ElementTree.parse(tmp_path / f"picture-{theme}.svg").getroot())
        words = [shape.text for shape in shapes if shape.tag.endswith("text")]
        assert words[3:] == ["LEAF", *"abcd", "1.00", "2 × 0.20", "GRPO", "1.00", "2 × 0.20"]
        praise, blame = picture.THEMES[theme][4:]
        boxes = [shape for shape in shapes if "fill-opacity" in shape.keys()][
            9:
        ]  # after the scale's
        shares = [float(box.get("fill-opacity")) for box in boxes]
        assert shares == pytest.approx([0, 1, 0.5, 0.25], abs=1e-3)  # ab, cd; GRPO's
        assert [box.get("fill") for box in boxes[1:]] == [praise, praise, blame]
