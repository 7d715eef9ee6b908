"""When does a tree built afterwards lower the noise of a gradient? Formulas, which README.md derives,
against policies so small that their true gradient is known.

    python -m experiments.law          minutes on one thread; results/law.json, law.png
    python -m experiments.law --plot   the figure and the table again

A response is some decisions, then filler tokens. Decision k takes one of M options, uniformly, and
adds an effect to the reward that depends on all options so far; luck adds the rest. Effects are
normal, new for each prompt, and known. Boundary k stands behind token k. The policy has logits for
each place, so a token's gradient is its one-hot vector minus the probabilities there. Credit is
leaf.py's and methods.py's; noise is what a batch's gradient has beside its prompts' true one.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

import numpy as np
from tqdm import tqdm

import leaf
import train
from experiments import methods
from experiments.common import RESULTS, command_line, environment, rounded, save, table

RESPONSES = 64  # of a batch
BATCHES = 400


# --------------------------------------------------------------------------------------------------
# The formulas


def tail_variance(sizes: list[int], node: int, rho: float, weight: float = 1.0) -> float:
    """E (r_i - baseline)^2 of a response behind a node, over the variance inside of groups.

    sizes: of all groups at the one boundary, K together; node: which of them; rho: variance between
    groups over that inside; weight: of the leave-one-out node value, the root's having the rest
    (0: GRPO, 1: the tree). Exact where effects and luck are independent.
    """
    K = sum(sizes)
    n = sizes[node]
    others = sum(size**2 for size in sizes) - n**2
    of_root = 1 - weight + weight / n  # the root value's share of the baseline
    of_member = weight / n + of_root / (K - 1)
    outside = (K - n + rho * (others + (K - n) ** 2)) / (K - 1) ** 2
    return 1 + (n - 1) * of_member**2 + of_root**2 * outside


def chain_ratio(sizes: list[int], explained: list[float]) -> float:
    """Noise of the tree's credit over GRPO's, behind the last of any nodes on a path; leading order
    in 1 / K, if responses that leave the path go ways of their own. sizes: of the nodes; explained:
    the share of the reward's variance that each explains.
    """
    weights = []  # in the last node's value, of a response that leaves the path behind each node
    for n in sizes:
        weights = [*(weight / n for weight in weights), (1 + sum(weights[-1:])) / n]
    leaving = [n - after for n, after in zip(sizes, [*sizes[1:], 1])]  # the response itself: last
    rest = 1.0  # of the reward's variance, behind each node
    error = 0.0
    for k, share in enumerate(explained[: len(sizes)]):
        rest -= share
        known = sum(n * weight for n, weight in zip(leaving[k:], weights[k:]))
        error += share * (1 - known) ** 2 + leaving[k] * weights[k] ** 2 * rest
    return rest + error


def break_even(n: int, K: float = math.inf, weight: float = 1.0) -> float:
    """The rho above which equal groups of n gain."""
    return (1 - 1 / K) * weight / (2 * n - weight * (n - 1))


def predicted_gain(snr: float, noise_ratio: float) -> float:
    """In cosine, where nothing changes but the noise, by that factor; snr: GRPO's squared signal over
    its noise."""
    return math.sqrt((snr + 1) / (snr + noise_ratio)) - 1


# --------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Model:
    K: int = 8
    options: int = 2  # M, of each decision: some K / M responses share the first
    effects: tuple = (1 / 3, 1 / 3)  # variance of each decision's effect; luck has the rest of 1
    boundaries: int = 1  # B
    fillers: int = 4  # tokens without effect
    peak: float = 0.5  # probability of the likelier of a filler's two tokens

    @property
    def chances(self) -> np.ndarray:
        """Of the tokens at each place: (T, M), and at least two columns."""
        decisions = len(self.effects)
        chances = np.zeros((decisions + self.fillers, max(2, self.options)))
        chances[:decisions, : self.options] = 1 / self.options
        chances[decisions:, :2] = self.peak, 1 - self.peak
        return chances


def draw(model: Model, rng):
    """One prompt: tokens (K, T), rewards [K] and the true gradient (T, M)."""
    K, M = model.K, model.options
    decisions = rng.integers(M, size=(K, len(model.effects)))
    fillers = (rng.random((K, model.fillers)) > model.peak).astype(int)
    rewards = math.sqrt(1 - sum(model.effects)) * rng.standard_normal(K)
    truth = np.zeros_like(model.chances)
    for k, variance in enumerate(model.effects):
        effect = math.sqrt(variance) * rng.standard_normal((M,) * (k + 1))
        if k > 0:  # a later decision has no part in the value of an earlier one
            effect -= effect.mean(-1, keepdims=True)
            effect *= math.sqrt(M / (M - 1))
        rewards += effect[tuple(decisions[:, : k + 1].T)]
        of_option = effect.reshape(-1, M).mean(0)
        truth[k, :M] = (of_option - of_option.mean()) / M
    return np.hstack([decisions, fillers]), rewards.tolist(), truth


def gradient(chances, tokens, spans) -> np.ndarray:
    """The mean over responses of credit times (one-hot - probabilities): (T, M)."""
    credits = np.zeros(tokens.shape)
    for i, start, end, credit in spans:
        credits[i, start:end] = credit
    scores = np.eye(chances.shape[1])[tokens] - chances  # (K, T, M)
    return np.einsum("kt,ktm->tm", credits, scores) / len(tokens)


GRPO, TREE, HALF_WAY = "GRPO", methods.OURS, methods.HALF_WAY
WEIGHTS = {GRPO: 0.0, TREE: 1.0, HALF_WAY: 0.5}  # of the node value; these rules are unbiased
RULES = {  # (lengths, rewards, nodes) -> spans
    **{name: partial(leaf.leave_one_out_credits, node_weight=w) for name, w in WEIGHTS.items()},
    "LEAF": lambda *group: leaf.z_score(leaf.span_credits(*group)),
    "LEAF, no z-score": leaf.span_credits,
    "LEAF, no 1/sqrt n": lambda *group: leaf.z_score(leaf.span_credits(*group, multiplicity=False)),
}


class Prompt:
    """One prompt's rollouts, every rule's gradient, and the terms of the formulas."""

    def __init__(self, model: Model, rng):
        chances = model.chances
        B = model.boundaries
        tokens, rewards, self.truth = draw(model, rng)
        lengths = [tokens.shape[1]] * model.K
        surprisal = -np.log(chances[np.arange(tokens.shape[1]), tokens])
        bounds = list(range(1, B + 1))
        nodes = leaf.build_tree(tokens.tolist(), lengths, rewards, bounds)
        paths = [leaf.path_of(i, nodes) for i in range(model.K)]
        self.sizes = [[len(node.members) for node in path] for path in paths]
        self.whole = {}  # by rule: (T, M)
        self.behind = {}  # the same of fillers after the last boundary, behind a node: no truth
        for rule, credit in RULES.items():
            spans = credit(lengths, rewards, nodes)
            self.whole[rule] = gradient(chances, tokens, spans)
            if rule in WEIGHTS:
                shared = [span for span in spans if paths[span.response]]
                fillers = slice(max(len(model.effects), B), None)
                self.behind[rule] = gradient(chances, tokens, shared)[fillers]
        group = (tokens.tolist(), lengths, surprisal.tolist(), rewards, bounds)
        self.logged = leaf.gradient_noise(*group)
        first = np.bincount(tokens[:, 0]).tolist()
        rho = model.effects[0] / (1 - model.effects[0])
        self.exact = {  # squared credit behind nodes, summed over responses; for B = 1 alone
            rule: sum(n * tail_variance(first, g, rho, w) for g, n in enumerate(first) if n > 1)
            for rule, w in WEIGHTS.items()
        }


def measure(model: Model, batches: int = BATCHES, seed: int = 0) -> dict:
    """Noise over GRPO's and gain in cosine, as measured, as predicted and as logged."""
    rng = np.random.default_rng(seed)
    B = model.boundaries
    places = len(model.chances)
    noise = {rule: np.zeros(places) for rule in WEIGHTS}  # summed over batches
    signal = np.zeros(places)
    behind = {rule: 0.0 for rule in WEIGHTS}
    cosines = {rule: [] for rule in RULES}
    exact = {rule: 0.0 for rule in WEIGHTS}
    logged = np.zeros(2)
    sizes = []
    for _ in range(batches):
        prompts = [Prompt(model, rng) for _ in range(RESPONSES // model.K)]
        truth = np.mean([p.truth for p in prompts], 0)
        signal += (truth**2).sum(1)
        for rule in RULES:
            g = np.mean([p.whole[rule] for p in prompts], 0)
            cosines[rule].append((g * truth).sum() / np.linalg.norm(g) / np.linalg.norm(truth))
        for rule in WEIGHTS:
            for p in prompts:  # independent, so this is the noise of their mean
                noise[rule] += ((p.whole[rule] - p.truth) ** 2).sum(1) / len(prompts) ** 2
                behind[rule] += (p.behind[rule] ** 2).sum() / len(prompts) ** 2
            exact[rule] += sum(p.exact[rule] for p in prompts)
        logged += np.sum([p.logged for p in prompts], 0)
        sizes += [path for p in prompts for path in p.sizes]
    S = signal.sum()
    N = noise[GRPO].sum()
    # Of what the first decision adds, the M options of one prompt show 1 - 1 / M.
    variances = [model.effects[0] * (1 - 1 / model.options), *model.effects[1:]]
    total = sum(variances) + 1 - sum(model.effects)
    explained = [*(variance / total for variance in variances), *[0.0] * B][:B]
    result = {
        "model": asdict(model),
        "group size": fmean(path[-1] for path in sizes if path),
        "GRPO's cosine": fmean(cosines[GRPO]),
        "gain": {rule: relative(cosines[rule], cosines[GRPO]) for rule in RULES if rule != GRPO},
        "tails": {rule: behind[rule] / behind[GRPO] for rule in (TREE, HALF_WAY)},
        "noise": {rule: noise[rule].sum() / N for rule in (TREE, HALF_WAY)},
        "leading order": fmean(chain_ratio(path, explained) for path in sizes if path),
        "logged": leaf.noise_ratio(*logged),
    }
    if B > 1:  # the span from the first boundary to the second
        result["between"] = noise[TREE][1] / noise[GRPO][1]
        result["between, leading order"] = fmean(chain_ratio(p[:1], explained) for p in sizes)
        return result
    filler_noise = noise[GRPO][len(model.effects) :].sum()
    share = noise[GRPO][1:].sum() / N * behind[GRPO] / filler_noise  # f: of tails behind a node
    ratio = {rule: exact[rule] / exact[GRPO] for rule in (TREE, HALF_WAY)}
    result["predicted tails"] = ratio
    result["predicted gain"] = {
        rule: predicted_gain(S / N, 1 - share * (1 - ratio[rule])) for rule in ratio
    }
    return result


def relative(values, others) -> dict:
    """Mean difference over the others' mean, and half the width of its 95% interval."""
    difference = (np.array(values) - others) / fmean(others)
    half = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    return {"value": difference.mean(), "ci": half}


# --------------------------------------------------------------------------------------------------
# The identity: what shared tokens get from GA without 1 / sqrt n is what they get from GRPO


def departure(
    length_spread: float, ratio_spread: float, groups: int = 4000, seed: int = 0
) -> float:
    """How far apart the two are on the tokens before the first node: the rms of the difference over
    GRPO's rms. Spreads are standard deviations of the logarithms of the responses' lengths, by which
    the loss divides, and of a token's ratio, which its copies share and the loss clips at 1 +- 0.2.
    """
    rng = np.random.default_rng(seed)
    model = Model()
    totals = []
    for _ in range(groups):
        tokens, rewards, _ = draw(model, rng)
        lengths = np.exp(length_spread * rng.standard_normal(model.K))
        centred = np.array(rewards) - fmean(rewards)
        for option in range(model.options):
            through = tokens[:, 0] == option
            ratio = math.exp(ratio_spread * rng.standard_normal())
            each = centred[through]
            total = []
            for credit in (np.full(len(each), each.sum() / max(1, len(each))), each):
                kept = ratio * credit <= np.clip(ratio, 0.8, 1.2) * credit  # else: no gradient
                total.append((ratio * credit * kept / lengths[through]).sum())
            totals.append(total)
    ours, grpos = np.array(totals).T
    return float(np.sqrt(np.mean((ours - grpos) ** 2) / np.mean(grpos**2)))


# --------------------------------------------------------------------------------------------------
# All models, the figure


def grid() -> list[Model]:
    """Two decisions, over K, sharing, rho, B and how peaked tails are; then three."""

    def two(rho, **more):  # what decision one leaves open is half of decision two's, half luck
        explained = rho / (1 + rho)
        return Model(effects=(explained, (1 - explained) / 2), **more)

    models = [
        two(rho, K=K, options=M, peak=peak)
        for K in (4, 8, 16, 32, 64)
        for M in (2, 4, 8)
        if M < K
        for rho in (0.1, 0.25, 0.5, 1, 2)
        for peak in ((0.5, 0.9) if rho in (0.1, 0.5, 2) else (0.5,))
    ]
    for K in (8, 32, 64):
        models += [two(0.5, K=K, boundaries=B) for B in (2, 4)]
        models += [Model(K=K, effects=(a, 0.3, 0.1), boundaries=2) for a in (0.1, 0.2, 0.4)]
    return models


def compared(results: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """What is predicted, and what is measured, of all models that have it."""
    one = [r for r in results if "predicted tails" in r]
    more = [r for r in results if "between" in r]
    return {
        "tails, leave-one-out": [(r["predicted tails"][TREE], r["tails"][TREE]) for r in one],
        "tails, half-way": [(r["predicted tails"][HALF_WAY], r["tails"][HALF_WAY]) for r in one],
        "tails, B > 1, leading order": [(r["leading order"], r["tails"][TREE]) for r in more],
        "between nodes, leading order": [(r["between, leading order"], r["between"]) for r in more],
        "tails, B = 1, leading order": [(r["leading order"], r["tails"][TREE]) for r in one],
        "logged": [(r["logged"], r["noise"][TREE]) for r in results],
        "gain, leave-one-out": [(r["predicted gain"][TREE], r["gain"][TREE]["value"]) for r in one],
        "gain, half-way": [
            (r["predicted gain"][HALF_WAY], r["gain"][HALF_WAY]["value"]) for r in one
        ],
    }


def show(results: list[dict]):
    """How far prediction and measurement are apart, then every rule's gains over all models."""
    rows = []
    for name, values in compared(results).items():
        x, y = np.array(values).T
        even = 0 if name.startswith("gain") else 1
        apart = abs(x - y)
        cells = [f"{apart.mean():.3f}", f"{apart.max():.3f}", f"{np.corrcoef(x, y)[0, 1]:.3f}"]
        rows.append([name, len(x), *cells, f"{np.mean((x < even) == (y < even)):.0%}"])
    header = ["predicted against measured", "models", "mean gap", "largest", "correlation"]
    print(table([*header, "same side of break-even"], rows))
    rows = []
    for rule in RULES:
        if rule != GRPO:
            gains = [r["gain"][rule] for r in results]
            up = sum(gain["value"] > gain["ci"] for gain in gains)
            down = sum(-gain["value"] > gain["ci"] for gain in gains)
            values = [gain["value"] for gain in gains]
            correlation = np.corrcoef([1 - r["logged"] for r in results], values)[0, 1]
            span = f"{min(values):+.0%} to {max(values):+.0%}"
            rows.append([rule, span, up, down, f"{correlation:.2f}"])
    header = ["gain in cosine over GRPO", "range", "models above", "below"]
    print(table([*header, "correlation with 1 - logged"], rows))
    clear = [r for r in results if abs(r["gain"][TREE]["value"]) > r["gain"][TREE]["ci"]]
    right = sum((r["logged"] < 1) == (r["gain"][TREE]["value"] > 0) for r in clear)
    print(f"logged: the sign of {right} of {len(clear)} clear gains of {TREE}")


def plot(results: list[dict]):
    import matplotlib.pyplot as plt

    figure, (noise, gains, logged) = plt.subplots(1, 3, figsize=(13, 4.6))
    panels = (
        (noise, "(a) noise behind nodes, over GRPO's", "predicted", "measured"),
        (gains, "(b) gain in cosine over GRPO", "predicted", "measured"),
        (logged, "(c) gain in cosine over GRPO", "noise ratio as logged", "measured"),
    )
    for name, pairs in compared(results).items():
        if name not in ("logged", "tails, B = 1, leading order"):
            axes = gains if name.startswith("gain") else noise
            axes.plot(*zip(*pairs), "o", markersize=3, alpha=0.7, label=name)
    for rule in (TREE, "LEAF"):
        pairs = [(r["logged"], r["gain"][rule]["value"]) for r in results]
        logged.plot(*zip(*pairs), "o", markersize=3, alpha=0.7, label=rule)
    for axes, title, x, y in panels:
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes, corner in ((noise, 0.7), (gains, 0)):
        axes.axline((corner, corner), slope=1, color="gray")
    logged.axhline(0, color="gray")
    logged.axvline(1, color="gray")
    save(figure, "law")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--plot", action="store_true", help="from what is measured already")
    args = parser.parse_args()
    file = RESULTS / "law.json"
    if not args.plot:
        models = tqdm(grid(), desc="models", disable=None)
        made = environment() | {"numpy": np.__version__}
        results = [rounded(measure(model)) for model in models]
        identity = {
            "lengths": {spread: departure(spread, 0) for spread in (0, 0.1, 0.2, 0.4)},
            "ratio": {spread: departure(0, spread) for spread in (0.05, 0.1, 0.2)},
        }
        found = {"environment": made, "identity": rounded(identity), "models": results}
        train.write_json(file, found)
    found = train.read_json(file)
    results = found["models"]
    print("departure from the identity, by spread:", found["identity"])
    show(results)
    plot(results)


if __name__ == "__main__":
    main()
