"""tools.report: what its page says, and how a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

import data
import leaf
import train
from released.test_released import checkpoint
from tests.helpers import (
    ROOT,
    base_of,
    edit_json,
    first_run,
    read_json_lines,
    seeded,
    tiny,
    write_corpus,
)
from tools import report
from upkeep.errors import DataError, UserError
from upkeep.files import read_json

__all__ = ["checkpoint", "first_run", "seeded"]  # fixtures
CHROMIUM = shutil.which("chromium")


def content_of(page):
    """What is embedded in a page, as a browser reads it."""
    text = page.read_text(encoding="utf-8")
    script = r'<script type="application/json" id="content">(.*?)</script>'
    return json.loads(re.search(script, text, re.DOTALL)[1])


def make(out, *command):
    report.main([*map(str, command), "--device", "cpu", "--out", str(out)])
    return content_of(out)


class Letters:
    """A tokenizer in which a letter is a token, and E ends."""

    eos_id = 4

    def decode(self, ids):
        return "".join("abcd"[i] for i in ids if i != 4)

    def pieces(self, ids):
        return ["abcdE"[i] for i in ids]


def by_letters(text):
    """A reward that nothing in the repository knows: only what was kept tells it."""
    return len(set(text)) / 4 if text else 0.1


def random_row(seed, K=8, longest=6, letters=2):
    """K responses with shared prefixes, ends and duplicates everywhere, as samples.jsonl has a row;
    with the credit that LEAF gives them."""
    torch.manual_seed(seed)
    known = {}  # a prefix has one distribution
    row = {"tokens": [], "surprisal": [], "credit": []}
    for _ in range(K):
        ids = torch.randint(0, letters, (int(torch.randint(longest, ())),)).tolist() + [4]
        row["tokens"].append(ids)
        prefixes = [tuple(ids[: t + 1]) for t in range(len(ids))]
        surprisal = [known.setdefault(prefix, round(random(), 5)) for prefix in prefixes]
        row["surprisal"].append(surprisal)
    row["pieces"] = [Letters().pieces(ids) for ids in row["tokens"]]
    row["answers"] = [Letters().decode(ids) for ids in row["tokens"]]
    row["rewards"] = [by_letters(text) for text in row["answers"]]
    row |= {"reference": "a b c", "greedy": "a b d", "greedy_reward": 0.5}
    row["credit"] = of_responses(leaf.leaf_advantages(*tensors(row), row["rewards"]), row)
    return row


def random():
    return float(torch.rand(()))


def tensors(row):
    """tokens and surprisal (K, T), lengths (K,), in the order of leaf_advantages."""
    lengths = torch.tensor([len(ids) for ids in row["tokens"]])
    tokens, surprisal = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in row[name]], batch_first=True)
        for name in ("tokens", "surprisal")
    )
    return tokens, lengths, surprisal


def of_responses(credit, row):
    return [values[: len(ids)] for values, ids in zip(credit.tolist(), row["tokens"])]


def check_against_leaf(shown, row, cfg):
    """What is drawn, token by token of each response, against leaf.py on the same tokens."""
    tokens, lengths, surprisal = tensors(row)
    rewards = row["rewards"]
    rule = {"terms": cfg.terms, "multiplicity": cfg.multiplicity}
    final = leaf.leaf_advantages(tokens, lengths, surprisal, rewards, cfg.fork_budget, **rule)
    cuts = leaf.select_boundaries(surprisal, lengths, cfg.fork_budget)
    nodes = leaf.build_tree(tokens, lengths, rewards, cuts)
    raw = leaf.token_credits(leaf.span_credits(lengths, rewards, nodes, **rule), tokens)
    grpo = leaf.grpo_advantages(tokens, lengths, rewards, cfg.std_floor)
    near = partial(pytest.approx, abs=2e-5, rel=1e-4)
    assert shown["boundaries"] == cuts and shown["root"] == near(sum(rewards) / len(rewards))
    assert shown["surprisal"] == near(surprisal.amax(0).tolist())
    lines = shown["lines"]
    assert sorted(m for line in lines for m in line["members"]) == list(range(1, len(rewards) + 1))
    for at, line in enumerate(lines):
        blocks = [b for b in shown["blocks"] if b["line"] <= at < b["line"] + b["lines"]]
        spans = [(b["start"], b["end"]) for b in blocks]
        ends = [0, *(end for _, end in spans)]
        assert spans == list(zip(ends, ends[1:])) and all(start < end for start, end in spans)
        for i in (member - 1 for member in line["members"]):
            n = int(lengths[i])
            assert ends[-1] == n and line["pieces"] == row["pieces"][i]
            assert line["surprisal"] == near(row["surprisal"][i])
            assert (line["reward"], line["grpo"]) == near((rewards[i], float(grpo[i, 0])))
            for block in blocks:
                stretch = slice(block["start"], block["end"])
                size = block["end"] - block["start"]
                assert final[i, stretch].tolist() == near([block["final"]] * size)
                assert raw[i, stretch].tolist() == near([block["raw"]] * size)
    # Who shares a span stands together, and the values beside it are those of its nodes.
    values = {(node.boundary, tuple(node.members)): node.value for node in nodes}
    for block in shown["blocks"]:
        own = lines[block["line"] : block["line"] + block["lines"]]
        who = tuple(sorted(m - 1 for line in own for m in line["members"]))
        found = {b: v for (b, members), v in values.items() if members == who}
        if block["n"] > 1:
            assert block["n"] == len(who) and near(block["value"]) in found.values()
        else:
            assert block["lines"] == 1 and block["value"] == near(rewards[who[0]])
    count, mean, std = shown["z"]
    assert count == len(leaf.span_credits(lengths, rewards, nodes))
    for block in shown["blocks"] if std > 0.01 else []:  # by hand, from what is shown
        by_hand = (block["raw"] - mean) / std
        assert by_hand == pytest.approx(block["final"], abs=0.005)


def test_what_is_drawn_is_leafs_tree():
    """The worked example of leaf.py, whose numbers are known by hand; random groups."""
    row = {
        "tokens": [[0, 1, 2, 3, 4], [0, 1, 4], [0, 1, 4]],
        "surprisal": [[0.1, 0.1, 2.0, 0.3, 3.0], [0.1, 0.1, 0.4], [0.1, 0.1, 0.4]],
        "pieces": [list("abcdE"), list("abE"), list("abE")],
        "rewards": [1.0, 0.2, 0.2],
        "reference": "a", "greedy": "a", "greedy_reward": 1.0,
    }  # fmt: skip
    shown = report.drawn(train.Config(), row, "now")
    assert [line["members"] for line in shown["lines"]] == [[1], [2, 3]]
    told = [
        [block[name] for name in ("line", "lines", "start", "end", "n", "value", "raw", "final")]
        for block in shown["blocks"]
    ]
    assert told == [
        [0, 2, 0, 2, 3, 0.46667, 0.0, -0.09819],
        [0, 1, 2, 5, 1, 1.0, 1.06667, 1.91334],
        [1, 1, 2, 3, 2, 0.2, -0.37712, -0.80938],
    ]
    assert [line["grpo"] for line in shown["lines"]] == [1.1547, -0.57735]
    assert shown["z"][0] == 6 and shown["lines"][0]["own"] is None
    check_against_leaf(shown, row, train.Config())
    for seed in range(60):
        row = random_row(seed)
        del row["credit"]
        terms = ("both", "global", "local")[seed % 3]
        cfg = train.Config(
            std_floor=0.0, fork_budget=seed % 4, terms=terms, multiplicity=seed % 2 > 0
        )
        check_against_leaf(report.drawn(cfg, row, "now"), row, cfg)


def test_credit_of_another_rule_is_drawn_as_it_was_kept():
    """Not where it is LEAF's or GRPO's but for rounding; duplicates with credit of their own are
    lines of their own."""
    cfg = train.Config()
    for seed in range(20):
        row = random_row(seed)
        tokens, lengths, _ = tensors(row)
        rounded = [[round(a, 5) for a in credit] for credit in row["credit"]]
        grpo = of_responses(leaf.grpo_advantages(tokens, lengths, row["rewards"]), row)
        for credit in (rounded, grpo):
            shown = report.drawn(cfg, row | {"credit": credit}, "now")
            assert all(line["own"] is None for line in shown["lines"])
        own = [[i + t / 8 for t in range(len(ids))] for i, ids in enumerate(row["tokens"])]
        shown = report.drawn(cfg, row | {"credit": own}, "now")
        assert len(shown["lines"]) == 8
        assert all(line["own"] == own[line["members"][0] - 1] for line in shown["lines"])


def test_rows_are_chosen_to_tell_something():
    def row(greedy, rewards=(0.5, 0.5)):
        return {"greedy": greedy, "rewards": rewards}

    first = [row("a b c"), row("a b c", (0, 1)), row("a b c"), row("a b c"), row("a", (0, 0.4))]
    last = [row("a b c"), row("x y z"), row("x b c"), row("a b c"), row("a")]
    assert list(report.telling([{"rows": first}, {"rows": last}])) == [1, 2, 0]
    last[3]["slots"] = {"verb": "x|y", "name": "c"}
    chosen = report.telling([{"rows": first}, {"rows": last}])
    assert list(chosen) == [1, 2, 3] and "heard" in chosen[3]
    assert list(report.telling([{"rows": first[:2]}])) == [1, 0]  # at step 0, with few rows
    assert report.telling([{"rows": [row("a")] * 5}]).keys() == {0, 1, 2}


@pytest.fixture(scope="module")
def kept(first_run, tmp_path_factory):
    """A copy of the first run that kept samples of its own, with a reward of its own."""
    run = tmp_path_factory.mktemp("runs") / "kept"
    shutil.copytree(first_run, run)
    shutil.copytree(base_of(first_run), base_of(run))
    rows = train.load_rows(train.finished(run, {}), ("validation",))["validation"]
    lines = []
    for step in (0, 2, 4):
        line = {"step": step, "validation_bleu": 10.0 + step, "rows": []}
        for i, row in enumerate(rows):
            sampled = random_row(10 * i + step, letters=4) | {"row": i}
            asked = {name: row[name] for name in ("prompt", "reference")}
            slots = {"verb": "d|c" if step else "c", "name": "A"}  # the greedy answer is "a b d"
            line["rows"].append(sampled | asked | {"slots": slots})
        lines.append(line)
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_what_was_kept_is_shown_without_model_or_reward(kept, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError

    for owner, name in ((train, "load"), (data, "reward"), (data, "rewards_of")):
        monkeypatch.setattr(owner, name, fail)
    page = make(tmp_path / "page.html", kept)
    lines = read_json_lines(kept / "samples.jsonl")
    cfg = train.finished(kept, {"device": "cpu"})
    chosen = report.telling(lines)
    assert len(chosen) == 3 == len(page["examples"])
    for example, (i, why) in zip(page["examples"], chosen.items()):
        assert (example["title"], example["why"]) == (f"qa, validation row {i}", why)
        (model,) = example["models"]
        assert [state["label"] for state in model["states"]] == ["step 0", "step 2", "step 4"]
        for state, line in zip(model["states"], lines):
            check_against_leaf(state, line["rows"][i], cfg)
            words = " ".join(text for kind, text in state["greedy"] if kind != "missing")
            assert words == line["rows"][i]["greedy"]
            assert state["heard"] == {"verb": line["step"] > 0, "name": True}
    (run,) = page["runs"]
    assert run["curves"]["validation_bleu"]["points"][0] == [0, 10.0]
    lines[0]["rows"][1]["prompt"] += " Or not?"
    run = tmp_path / "kept"
    shutil.copytree(kept, run)
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="other rows"):
        make(tmp_path / "page.html", run)


def sampled_row(cfg, model, tokenizer, rows, number):
    """What a run would keep of one of the rows: sampled as in training, with the noise by which all
    of them are looked at."""
    split = data.Split("these", rows, cfg.cache_gb)
    split.hear(model, tokenizer)
    numbers = list(range(len(rows)))
    u = data.noise([cfg.base_seed, train.LOOK], numbers, cfg.responses, cfg.max_new_tokens, "cpu")
    prompts = split.prompts(model, numbers)
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, cfg.top_p)
    ids = [t[:n].tolist() for t, n in zip(rollout.tokens[number], rollout.lengths[number])]
    return {
        "tokens": ids,
        "pieces": [tokenizer.pieces(x) for x in ids],
        "surprisal": of_responses(-rollout.logq[number], {"tokens": ids}),
        "rewards": [data.reward(tokenizer.decode(x), rows[number]) for x in ids],
    }


def test_a_page_tells_the_truth_about_its_run(first_run, tmp_path):
    """Scores as in its results, metrics as logged, answers as in the predictions, trees as sampled."""
    page = make(tmp_path / "page.html", first_run, "--rows", "4,1")
    (run,) = page["runs"]
    results = read_json(first_run / "results.json")
    assert (run["base"], run["trained"]) == (results["base"], results["trained"])
    assert run["rows"] == results["test_rows"]
    logged = read_json_lines(first_run / "policy.jsonl")
    for name in ("reward", "kl", "grad_norm", "validation_bleu"):
        points = [[r["step"], pytest.approx(r[name], abs=1e-5)] for r in logged if name in r]
        assert run["curves"][name]["points"][-len(points) :] == points
    assert run["facts"]["flags"].startswith("--train-rows 24 ")
    seconds = sorted(line["seconds"] for line in logged)
    assert run["facts"]["time of a step"] == f"{(seconds[1] + seconds[2]) / 2:.2f} s (median)"

    cfg = train.finished(first_run, {"device": "cpu"})
    rows = train.load_rows(cfg, ("test",))["test"]
    titles = [example["title"] for example in page["examples"]]
    assert titles == ["qa, test row 4", "qa, test row 1"]
    for n, (example, number) in enumerate(zip(page["examples"], (4, 1))):
        assert example["reference"] == rows[number]["reference"]
        assert [model["name"] for model in example["models"]] == ["base", "trained"]
        for model, adapter in zip(example["models"], ("", cfg.resume_adapter)):
            (shown,) = model["states"]
            loaded = train.load(cfg, torch.device("cpu"), torch.float32, adapter)
            row = sampled_row(cfg, *loaded, [rows[4], rows[1]], n)
            check_against_leaf(shown, row, cfg)
            answered = read_json_lines(first_run / f"predictions-{model['name']}.jsonl")[number]
            words = [text for kind, text in shown["greedy"] if kind != "missing"]
            assert " ".join(words).split() == answered["greedy"].split()
            reward = data.reward(answered["greedy"], rows[number])
            assert shown["greedy_reward"] == pytest.approx(reward, abs=1e-5)
            fields = [name for name, _ in data.named_slots(rows[number])]
            for field in fields:
                accuracy = data.slot_accuracy([answered["greedy"]], [rows[number]], field)
                assert shown["heard"][field] == (accuracy == 1)


def test_a_run_of_another_reward_is_answered_without(kept, tmp_path, capsys):
    """With its name among the facts. What it kept is not touched by that."""
    run = tmp_path / "kept"
    shutil.copytree(kept, run)
    shutil.copytree(base_of(kept), base_of(run))
    edit_json(run / "config.json", reward="by_letters 0123", credit="rloo 4567")
    page = make(tmp_path / "page.html", run, "--rows", "0")
    assert "by_letters" in capsys.readouterr().out
    facts = page["runs"][0]["facts"]
    assert (facts["reward"], facts["method"]) == ("by_letters", "rloo")
    for model in page["examples"][0]["models"]:
        (state,) = model["states"]
        assert state["greedy_reward"] is None and model["rule"] == "rloo"
        assert not any(block["raw"] for block in state["blocks"])
    kept_page = make(tmp_path / "page.html", run)
    assert kept_page["examples"][0]["models"][0]["states"][0]["greedy_reward"] == 0.5


def test_runs_that_answer_alike_are_all_shown(first_run, tmp_path):
    """A copy of a run, in a folder of the same name: one base, and both of the trained."""
    copy = tmp_path / first_run.name
    shutil.copytree(first_run, copy)
    shutil.copytree(base_of(first_run), base_of(copy))
    page = make(tmp_path / "page.html", first_run, copy, "--rows", "0,1")
    names = [str(first_run), str(copy)]
    assert [run["name"] for run in page["runs"]] == names
    for example in page["examples"]:
        assert [m["name"] for m in example["models"]] == ["base", *(f"{n}, trained" for n in names)]


def test_a_folder_that_is_no_run(first_run, tmp_path):
    for folder in (tmp_path / "nowhere", base_of(first_run)):
        with pytest.raises(UserError, match="holds no run"):
            make(tmp_path / "page.html", folder)
    for name in ("policy.jsonl", "config.json"):  # of another program
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a run"):
        make(tmp_path / "page.html", tmp_path)


def test_curves_are_means_of_at_most_four_hundred_points():
    lines = [{"step": n, "x": float(n)} for n in range(1, 1001)]
    lines[3]["x"] = float("nan")
    found = report.curve(lines, "x")
    assert found["size"] == 3 and len(found["points"]) == 333
    assert found["points"][:2] == [(3, 2.0), (7, 6.0)] and found["points"][-1][0] == 1000
    assert report.curve(lines, "y") == {"size": 1, "points": []}


def test_differences_to_the_reference():
    assert report.marked("Anna sold hats .", "Anna sold two hats .") == [
        ("same", "Anna sold"), ("missing", "two"), ("same", "hats ."),
    ]  # fmt: skip
    assert report.marked("Ann sold", "Anna sold") == [("other", "Ann"), ("same", "sold")]
    assert report.marked("", "Anna") == [("missing", "Anna")] and report.marked("", "") == []


def pictures(example):
    """What is drawn of each model, but for the names."""
    states = [state for model in example["models"] for state in model["states"]]
    return [{name: x for name, x in state.items() if name != "label"} for state in states]


def test_a_run_that_is_not_finished(first_run, tmp_path, monkeypatch):
    """Its newest checkpoint, else the base; a missing file gets one line."""
    finished = make(tmp_path / "a.html", first_run, "--rows", "0,1,2")
    run = first_run.parent / "unfinished"
    shutil.copytree(first_run, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "adapter")
    kept = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(b"")  # as while the base is validated
    assert len(make(tmp_path / "c.html", run)["examples"]) == 3  # test rows, with the model
    (run / "samples.jsonl").write_bytes(kept)
    page = make(tmp_path / "b.html", run, "--rows", "0,1,2")
    flags = page["runs"][0]["facts"]["flags"]
    assert flags.startswith("--train-rows 24 ") and "--base " not in flags
    for one, other in zip(page["examples"], finished["examples"], strict=True):
        assert [model["name"] for model in one["models"]] == ["base", "step 4"]
        assert pictures(one) == pictures(other)
    assert page["runs"][0]["base"] == read_json(run / "scores-base.json")
    assert page["runs"][0]["trained"] is None
    assert page["runs"][0]["curves"] == finished["runs"][0]["curves"]
    shutil.rmtree(run / "checkpoints")
    page = make(tmp_path / "c.html", run, "--rows", "0")
    assert [model["name"] for model in page["examples"][0]["models"]] == ["base"]
    for file in ("policy.jsonl", "predictions-base.jsonl", "config.json"):
        (run / file).rename(tmp_path / file)
        command = [sys.executable, "-m", "tools.report", str(run), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and file in done.stderr and done.stderr.count("\n") == 1
        (tmp_path / file).rename(run / file)
    shutil.rmtree(run)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_from_a_checkpoint_without_validation(checkpoint, tmp_path):
    """It shows the same before results.json is there and after, but for the corpus to be named."""
    corpus = write_corpus(tmp_path / "tones")
    run = tmp_path / "run"
    train.main(
        tiny("--eval-every 0 --lora-targets up_proj", init=checkpoint[0], data=corpus, out=run)
    )
    assert not (run / "samples.jsonl").exists()
    finished = make(tmp_path / "a.html", run)
    assert finished["runs"][0]["curves"]["validation_bleu"]["points"] == []
    (run / "results.json").unlink()
    unfinished = make(tmp_path / "b.html", run, "--data", corpus)
    for one, other in zip(finished["examples"], unfinished["examples"], strict=True):
        assert len(pictures(one)) == 2 and pictures(one) == pictures(other)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--rows", "6"], "6 test rows"),
        (["--rows", "-1"], "--rows"),
        (["--rows", "a"], "--rows"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags(flags, word, first_run, tmp_path, capsys):
    with pytest.raises((SystemExit, UserError)) as stop:
        make(tmp_path / "page.html", first_run, *flags)
    assert word in capsys.readouterr().err + str(stop.value)
    assert not (tmp_path / "page.html").exists()


HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)> & \u2028"


@pytest.fixture(scope="module")
def pages(first_run, kept, tmp_path_factory):
    """The pages that a browser opens: two runs that kept samples, one of a rule of its own; test rows,
    of a reward that is known here and of one that is not; a corpus whose texts are HTML, from an unfinished run."""
    folder = tmp_path_factory.mktemp("pages")
    other = folder / "other"
    shutil.copytree(kept, other)
    shutil.copytree(base_of(kept), base_of(other))
    lines = read_json_lines(other / "samples.jsonl")
    for row in (row for line in lines for row in line["rows"]):
        row["credit"] = [[0.5 * t - i for t in range(len(x))] for i, x in enumerate(row["tokens"])]
    (other / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_json(other / "results.json")
    better = {name: score + 1.5 for name, score in results["trained"].items()}
    edit_json(other / "results.json", trained=better)
    two = make(folder / "two.html", kept, other)
    assert [len(example["models"]) for example in two["examples"]] == [2, 2, 2]
    make(folder / "rows.html", first_run, "--rows", "0")
    settings = (other / "config.json").read_text()
    edit_json(other / "config.json", reward="by_letters 0123")
    make(folder / "unknown.html", other, "--rows", "0")
    (other / "config.json").write_text(settings)

    corpus = write_corpus(folder / "tones")
    for file in corpus.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        hostile = {"reference": HOSTILE, "slots": {"<b>verb</b>": "broken"}}
        rows = [row | {"prompt": data.AUDIO + HOSTILE, **hostile} for row in rows]
        file.write_text("\n".join(map(json.dumps, rows)))
    run = folder / "own"
    train.main(tiny(data=corpus, out=run))
    (run / "results.json").unlink()
    with pytest.raises(DataError, match="--data"):
        make(folder / "own.html", run)
    own = make(folder / "own.html", run, "--data", corpus)
    assert own["examples"][0]["question"] == HOSTILE == own["examples"][0]["reference"]
    assert "http" not in (folder / "own.html").read_text(encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def numbers_on(state):
    """What stands on the blocks of LEAF's tree and on GRPO's answers."""
    credits = [block["raw"] for block in state["blocks"]]
    return credits + [line["reward"] - state["root"] for line in state["lines"]]


def pieces_on(state):
    """The tokens of LEAF's tree, one for all that share it, and of GRPO's answers."""
    lines = state["lines"]
    spans = [(lines[b["line"]]["pieces"], b["start"], b["end"]) for b in state["blocks"]]
    return [piece for pieces, start, end in spans for piece in pieces[start:end]] + [
        piece for line in lines for piece in line["pieces"]
    ]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["two", "rows", "unknown", "own"])
def test_a_browser_shows_it(name, width, browser, pages):
    content = content_of(pages / f"{name}.html")
    view = browser.new_page(viewport={"width": width, "height": 900})
    said = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: said.append(request.url) if "http" in request.url else None)
    view.goto((pages / f"{name}.html").as_uri())
    for scheme in ("light", "dark"):
        view.emulate_media(color_scheme=scheme)
        view.screenshot(path=pages / f"{name}-{scheme}-{width}.png", full_page=True)
    assert view.title().startswith("LEAF")  # no text of a row became markup
    assert view.evaluate("document.documentElement.scrollWidth") == width
    for run in content["runs"]:  # a field that is not heard can be read at the top of the page
        for scores, when in ((run["base"], "before"), (run["trained"], "after")):
            heard = {k: v for k, v in (scores or {}).items() if k.startswith(data.HEARD)}
            if heard:
                worst = min(heard, key=heard.get)
                told = f"{worst.removeprefix(data.HEARD)} {heard[worst]:.1f}% {when}"
                assert told in view.locator("#summary").inner_text()
    example = content["examples"][0]
    article = view.locator("article").first
    assert " ".join(example["question"].split()) in " ".join(article.inner_text().split())
    seconds = article.locator("audio").evaluate(
        """audio => new Promise((done, failed) => {
            const seek = () => { audio.currentTime = audio.duration / 2; };
            audio.addEventListener("seeked", () => done(audio.duration));
            audio.addEventListener("error", () => failed("cannot be played"));
            audio.readyState ? seek() : audio.addEventListener("loadedmetadata", seek);
        })"""
    )
    assert 0.3 < seconds < 10
    assert article.locator(".wave line").evaluate("l => l.getAttribute('x1')") == "150"

    slider = article.locator("input[type=range]")
    for model in example["models"]:
        if len(example["models"]) > 1:
            article.get_by_label(model["name"], exact=True).check()
        assert slider.is_visible() == (len(model["states"]) > 1)
        for n, state in enumerate(model["states"]):
            if n > 0:
                slider.press("ArrowRight")
            if state["greedy_reward"] is None:
                assert not "".join(article.locator(".credit b").all_inner_texts())
                continue
            own = state["lines"][0]["own"] is not None
            assert article.locator(".rule").count() == 2 + own
            count = len(state["blocks"]) + len(state["lines"])
            credits = article.locator(".credit b").all_inner_texts()[-count:]
            credits = [float(credit.replace("−", "-")) for credit in credits]
            assert credits == pytest.approx(numbers_on(state), abs=0.0051)
            pieces = article.locator(".token").evaluate_all("all => all.map((t) => t.textContent)")
            wanted = pieces_on(state)
            assert pieces[-len(wanted) :] == wanted
            assert article.locator(".band").count() == len(state["boundaries"])
            positions = article.locator(".position").all_inner_texts()
            assert positions == [str(t) for t in range(len(state["surprisal"]))]
            told = article.locator(".tree + p").inner_text()
            assert f"over {state['z'][0]} spans" in told and f"std {state['z'][2]:.4f}" in told
        for _ in model["states"][1:]:
            slider.press("ArrowLeft")

    if len(content["runs"]) == 2:  # what the second scores more than the first
        cells = view.locator("#scores td:last-child").all_inner_texts()
        assert cells == ["+1.50"] * len(content["runs"][0]["base"])

    # By the keyboard: from token to token, whose numbers stand below.
    view.mouse.move(0, 0)  # or a token that scrolls under it is told
    article.locator(".token").first.focus()
    for key in ("End", "Home", "ArrowRight", "ArrowDown", "ArrowUp"):
        view.keyboard.press(key)
    panel = article.locator(".panel").inner_text()
    focused = view.evaluate("document.activeElement.textContent")
    assert f"“{focused.strip()}”" in panel and "token 1 of answer" in panel
    curve = view.locator("#curve-reward")
    curve.locator("svg").first.press("ArrowRight")
    assert curve.locator(".readout").inner_text().startswith("step 1:")
    assert said == []
    view.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_long_answers_scroll_in_a_box_of_their_own(width, browser, pages):
    content = content_of(pages / "two.html")
    for state in content["examples"][0]["models"][0]["states"]:
        more = 60
        for line in state["lines"]:
            line["pieces"] = [*line["pieces"], *["word"] * more]
            line["surprisal"] = [*line["surprisal"], *[0.5] * more]
        state["surprisal"] += [0.5] * more
    (pages / "long.html").write_text(report.page(content), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 900})
    view.goto((pages / "long.html").as_uri())
    assert view.locator(".tree").first.evaluate("tree => tree.scrollWidth > tree.clientWidth")
    assert view.evaluate("document.documentElement.scrollWidth") == width
    view.close()


def test_a_rule_of_its_own_stands_above_the_others(browser, pages):
    """A number for each stretch of tokens that have one, as the run kept it."""
    (state, *_) = content_of(pages / "two.html")["examples"][0]["models"][1]["states"]
    view = browser.new_page(viewport={"width": 900, "height": 900})
    view.goto((pages / "two.html").as_uri())
    article = view.locator("article").first
    article.get_by_label("other", exact=True).check()
    wanted = [a for line in state["lines"] for a in line["own"]]
    credits = article.locator(".credit b").all_inner_texts()[: len(wanted)]
    credits = [float(credit.replace("−", "-")) for credit in credits]
    assert credits == pytest.approx(wanted, abs=0.0051)
    view.close()
