"""tools.report: what its page says, and how a browser shows it."""

import itertools
import json
import re
import shutil

import pytest
import torch

import data
import leaf
import train
from released.test_released import checkpoint
from tests.helpers import base_of, first_run, read_json_lines, seeded, tiny, write_corpus
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


def paths(block, so_far=()):
    """Every leaf of the tree with the blocks above it."""
    so_far = (*so_far, block)
    if block["leaf"]:
        assert not block["children"]
        yield so_far
    for child in block["children"]:
        yield from paths(child, so_far)


def check_against_leaf(
    shown, tokenizer, row, tokens, lengths, logq, logp, std_floor=1 / 3, budget=2
):
    """The page's tree, response by response, against leaf.py on the same tokens."""
    K = len(tokens)
    rewards = [data.reward(tokenizer.decode(t[:n].tolist()), row) for t, n in zip(tokens, lengths)]
    wanted = {"GRPO": leaf.grpo_advantages(rewards, lengths, std_floor)}
    for rule, terms in (("LEAF", "both"), ("GA only", "global"), ("LA only", "local")):
        wanted[rule] = leaf.leaf_advantages(tokens, lengths, -logq, rewards, budget, terms)
    assert shown["boundaries"] == leaf.select_boundaries(-logq, lengths, budget)
    nodes = leaf.build_tree(tokens, lengths, rewards, shown["boundaries"])
    blocks = {}
    responses = set()
    for path in paths(shown["tree"]):
        blocks |= {id(block): block for block in path[1:-1]}
        for i in (member - 1 for member in path[-1]["members"]):
            responses.add(i)
            own = [node for node in nodes if i in node.members]
            told = [([m - 1 for m in b["members"]], b["value"]) for b in path[1:-1]]
            assert told == [(n.members, pytest.approx(n.value, abs=1e-5)) for n in own]
            assert path[-1]["value"] == pytest.approx(rewards[i], abs=1e-5)
            n = int(lengths[i])
            parts = [part for block in path for part in block["tokens"]]
            assert [part[0] for part in parts] == tokenizer.pieces(tokens[i, :n].tolist())
            # A token at the nucleus's edge may be in by one's rounding and out by another's.
            assert [part[1] for part in parts] == pytest.approx(logq[i, :n].tolist(), abs=2e-3)
            assert [part[2] for part in parts] == pytest.approx(logp[i, :n].tolist(), abs=2e-5)
            at = 0
            for block in path:
                assert block["start"] == at
                for rule, credit in wanted.items():
                    if not block["tokens"]:
                        continue
                    of_members = credit[[m - 1 for m in block["members"]], at]
                    told = block["credit"][rule]
                    assert told["after"] == pytest.approx(float(of_members.mean()), abs=1e-4)
                    assert told["least"] - 1e-4 <= credit[i, at] <= told["most"] + 1e-4
                    if rule != "GRPO":  # one number for all that share a span
                        assert told["least"] == pytest.approx(told["most"], abs=1e-5)
                    assert (credit[i, at : at + len(block["tokens"])] == credit[i, at]).all()
                at += len(block["tokens"])
            assert at == n
    assert responses == set(range(K)) and len(blocks) == len(nodes)
    assert shown["tree"]["value"] == pytest.approx(sum(rewards) / K, abs=1e-5)


class Letters:
    def decode(self, ids):
        return "".join("abcdE"[i] for i in ids)

    def pieces(self, ids):
        return list(self.decode(ids))


def test_the_tree_is_that_of_leaf(monkeypatch):
    """The worked example of leaf.py, whose numbers are known by hand; and random groups with shared
    prefixes, ends and duplicates everywhere."""
    monkeypatch.setattr(data, "reward", lambda answer, row: row["rewards"][answer])
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 4, 0, 0], [0, 1, 4, 0, 0]])
    surprisal = torch.tensor(
        [[0.1, 0.1, 2.0, 0.3, 3.0], [0.1, 0.1, 0.4, 0, 0], [0.1, 0.1, 0.4, 0, 0]]
    )
    group = (tokens, torch.tensor([5, 3, 3]), -surprisal, -surprisal)
    row = {"prompt": "?", "rewards": {"abcdE": 1.0, "abE": 0.2}}
    shown = report.sampled(train.Config(), Letters(), row, *group)
    (shared,) = shown["tree"]["children"]
    first, pair = shared["children"]
    assert shared["credit"]["LEAF"]["after"] == -0.09819 and shared["members"] == [1, 2, 3]
    assert first["credit"]["LEAF"] == {
        k: v
        for k, v in zip(("before", "after", "least", "most"), (1.06667, 1.91334, 1.91334, 1.91334))
    }
    assert (pair["value"], pair["members"], pair["credit"]["LEAF"]["before"]) == (
        0.2,
        [2, 3],
        -0.37712,
    )
    assert (
        shared["credit"]["GRPO"]["least"] == -0.57735 and shared["credit"]["GRPO"]["most"] == 1.1547
    )
    check_against_leaf(shown, Letters(), row, *group)
    for seed in range(40):
        torch.manual_seed(seed)
        tokens = torch.randint(0, 2, (8, 6))
        lengths = torch.randint(1, 7, (8,))
        surprisal = torch.rand(8, 6)
        known = {}  # a prefix has one distribution
        for i, t in itertools.product(range(8), range(6)):
            prefix = tuple(tokens[i, : t + 1].tolist())
            surprisal[i, t] = known.setdefault(prefix, surprisal[i, t].clone())
        texts = [Letters().decode(t[:n].tolist()) for t, n in zip(tokens, lengths)]
        row["rewards"] = {text: 0.1 * (i // 2) for i, text in enumerate(texts)}
        group = (tokens, lengths, -surprisal, -2 * surprisal)
        cfg = train.Config(std_floor=0.0, fork_budget=3)
        shown = report.sampled(cfg, Letters(), row, *group)
        check_against_leaf(shown, Letters(), row, *group, std_floor=0.0, budget=3)


def rollout_of(cfg, model, tokenizer, row, number):
    """K responses to a row, sampled as in training, with the noise of a row's examples."""
    split = data.Split("one", [row], cfg.cache_gb)
    split.hear(model, tokenizer)
    u = data.noise(
        [cfg.base_seed, train.EXAMPLES], [number], cfg.responses, cfg.max_new_tokens, "cpu"
    )
    rollout = model.sample(
        split.prompts(model, [0]), u, tokenizer.eos_id, cfg.temperature, cfg.top_p
    )
    return rollout.tokens[0], rollout.lengths[0], rollout.logq[0], rollout.logp[0]


def test_a_page_tells_the_truth_about_its_run(first_run, tmp_path, capsys):
    """Scores as printed, metrics as logged, answers as in the predictions, trees as sampled."""
    train.main(tiny(out=first_run))  # finished: prints its table
    printed = capsys.readouterr().out
    page = make(tmp_path / "page.html", first_run, "--rows", "4,1")
    (run,) = page["runs"]
    for score, *numbers in run["table"]:
        row = " +".join(map(re.escape, [score, *numbers])).replace("\N{MINUS SIGN}", "-")
        assert re.search(f"^{row}$", printed, re.M)
    logged = read_json_lines(first_run / "policy.jsonl")
    for name in ("reward", "kl", "grad_norm", "validation_bleu"):
        points = [[r["step"], pytest.approx(r[name], abs=1e-5)] for r in logged if name in r]
        assert run["curves"][name] == {"size": 1, "points": points}
    assert run["facts"]["command"].startswith("python train.py --train-rows 24 ")

    cfg = train.finished(first_run, {"device": "cpu"})
    rows = train.load_rows(cfg, ("test",))["test"]
    assert [example["title"] for example in page["examples"]] == [
        "qa, test row 4",
        "qa, test row 1",
    ]
    for example, number in zip(page["examples"], (4, 1)):
        assert example["reference"] == rows[number]["reference"]
        assert [model["name"] for model in example["models"]] == ["base", "trained"]
        for model, adapter in zip(example["models"], ("", cfg.resume_adapter)):
            loaded = train.load(cfg, torch.device("cpu"), torch.float32, adapter)
            group = rollout_of(cfg, *loaded, rows[number], number)
            check_against_leaf(model["shown"], loaded[1], rows[number], *group)
            answered = read_json_lines(first_run / f"predictions-{model['name']}.jsonl")[number]
            words = [text for kind, text in model["shown"]["greedy"] if kind != "missing"]
            assert " ".join(words).split() == answered["greedy"].split()
            reward = data.reward(answered["greedy"], rows[number])
            assert model["shown"]["greedy_reward"] == pytest.approx(reward, abs=1e-5)


def test_runs_that_answer_alike_are_all_shown(first_run, tmp_path):
    """A copy of a run, in a folder of the same name: one base, and both of the trained."""
    copy = tmp_path / first_run.name
    shutil.copytree(first_run, copy)
    shutil.copytree(base_of(first_run), base_of(copy))
    page = make(tmp_path / "page.html", first_run, copy)
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


def test_curves_are_means_of_at_most_a_hundred_points():
    lines = [{"step": n, "x": float(n)} for n in range(1, 251)]
    lines[3]["x"] = float("nan")
    found = report.curve(lines, "x")
    assert found["size"] == 3 and len(found["points"]) == 83
    assert found["points"][:2] == [(3, 2.0), (7, 6.0)] and found["points"][-1][0] == 250
    assert report.curve(lines, "y") == {"size": 1, "points": []}


def test_differences_to_the_reference():
    assert report.marked("Anna sold hats .", "Anna sold two hats .") == [
        ("same", "Anna sold"), ("missing", "two"), ("same", "hats ."),
    ]  # fmt: skip
    assert report.marked("Ann sold", "Anna sold") == [("other", "Ann"), ("same", "sold")]
    assert report.marked("", "Anna") == [("missing", "Anna")] and report.marked("", "") == []


def test_a_run_that_is_not_finished(first_run, tmp_path, monkeypatch):
    """Its newest checkpoint, else the base; a missing file gets one line."""
    finished = make(tmp_path / "a.html", first_run)
    run = first_run.parent / "unfinished"
    shutil.copytree(first_run, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "adapter")
    page = make(tmp_path / "b.html", run)
    flags = [shown["runs"][0]["facts"]["command"] for shown in (page, finished)]
    assert flags[0].startswith("python train.py --train-rows 24 ") and "--base " not in flags[0]
    for one, other in zip(page["examples"], finished["examples"]):
        assert [model["name"] for model in one["models"]] == ["base", "step 4"]
        shown = [[model["shown"] for model in example["models"]] for example in (one, other)]
        assert shown[0] == shown[1]
    table = page["runs"][0]["table"]
    base = read_json(run / "base.json")
    assert [line[0] for line in table] == [*base, "worst heard %"]
    assert [len(line) for line in table] == [2] * len(table)
    assert page["runs"][0]["curves"] == finished["runs"][0]["curves"]
    shutil.rmtree(run / "checkpoints")
    page = make(tmp_path / "c.html", run)
    assert [model["name"] for model in page["examples"][0]["models"]] == ["base"]
    for file in ("policy.jsonl", "predictions-base.jsonl", "config.json"):
        (run / file).rename(tmp_path / file)
        with pytest.raises(UserError, match=file) as told:
            make(tmp_path / "d.html", run)
        assert "\n" not in str(told.value)
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
    finished = make(tmp_path / "a.html", run)
    assert finished["runs"][0]["curves"]["validation_bleu"]["points"] == []
    (run / "results.json").unlink()
    unfinished = make(tmp_path / "b.html", run, "--data", corpus)
    for one, other in zip(finished["examples"], unfinished["examples"], strict=True):
        shown = [[model["shown"] for model in example["models"]] for example in (one, other)]
        assert len(shown[0]) == 2 and shown[0] == shown[1]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--rows", "6"], "6 test rows"),
        (["--rows", "-1"], "--rows"),
        (["--rows", "a"], "--rows"),
        (["--examples", "0"], "--examples"),
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
def pages(first_run, tmp_path_factory):
    """The pages that a browser opens: LEAF and GRPO together; a corpus whose texts are HTML, from
    an unfinished run."""
    folder = tmp_path_factory.mktemp("pages")
    grpo = folder / "grpo"
    train.main(tiny("--algo grpo", base=base_of(first_run), out=grpo))
    both = make(folder / "both.html", first_run, grpo)
    names = [model["name"] for model in both["examples"][0]["models"]]
    assert names == ["base", "first, trained", "grpo, trained"]

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


@pytest.mark.parametrize("name, width", [("both", 390), ("both", 1440), ("own", 390)])
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
    assert view.title().startswith("LEAF")  # no text of a row became markup
    assert view.evaluate("document.documentElement.scrollWidth") == width
    for run in content["runs"]:  # a field that is not heard can be read at the top of the page
        for line in run["table"]:
            if line[0] == "worst heard %":
                told = ", ".join(f"{cell}% {at}" for cell, at in zip(line[1:], ("before", "after")))
                assert f"Heard worst: {told}." in view.locator("#summary").inner_text()
    article = view.locator("article").first
    assert (
        article.locator("dd").first.inner_text().split()
        == content["examples"][0]["question"].split()
    )
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

    models = content["examples"][0]["models"]
    for model in models:
        article.get_by_label(model["name"], exact=True).check()
        for rule in ("LEAF", "GRPO", "GA only", "LA only"):
            article.get_by_label(rule, exact=True).check()
            blocks = []
            for path in paths(model["shown"]["tree"]):
                blocks += [block for block in path if not any(block is b for b in blocks)]
            credits = [block["credit"][rule]["after"] for block in blocks if block["tokens"]]
            chips = [text.rsplit(" ", 1)[1] for text in article.locator(".chip").all_inner_texts()]
            assert [float(chip.replace("−", "-")) for chip in chips] == pytest.approx(
                credits, abs=0.0051
            )
            pieces = [part[0] for block in blocks for part in block["tokens"]]
            assert (
                article.locator(".tree .token").evaluate_all("all => all.map((t) => t.textContent)")
                == pieces
            )

    # By the keyboard: from token to token, whose numbers stand below.
    article.locator(".tree .token").first.focus()
    view.keyboard.press("ArrowRight")
    told = article.locator(".panel").inner_text()
    second = [block for block in blocks for _ in block["tokens"]][1]
    for credit in second["credit"].values():
        assert f"{abs(credit['before']):.4f}" in told and f"{abs(credit['after']):.4f}" in told
    article.locator(".fold").first.click()
    assert article.locator(".tree .token").first.is_hidden()
    curve = view.locator("#curve-reward")
    curve.locator("> svg").press("ArrowRight")
    assert curve.locator(".readout").inner_text().startswith("step 1:")
    assert said == []
    view.close()


def test_a_wide_tree_scrolls_in_a_box_of_its_own(browser, pages):
    width = 1440  # where it is the tree that is too wide, and not the page too narrow
    content = content_of(pages / "both.html")
    shown = content["examples"][0]["models"][1]["shown"]
    inner = next(block for block in next(paths(shown["tree"])) if block["tokens"])
    for _ in range(30):
        inner = inner | {"leaf": False, "children": [inner]}
    shown["tree"]["children"].append(inner)
    (pages / "wide.html").write_text(report.page(content), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 900})
    view.goto((pages / "wide.html").as_uri())
    assert view.locator(".tree").first.evaluate("tree => tree.scrollWidth > tree.clientWidth")
    assert view.evaluate("document.documentElement.scrollWidth") == width
    view.close()
