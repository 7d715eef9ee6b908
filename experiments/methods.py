"""The methods under comparison: each is a set of train.py's flags, and `--algo leaf` is the paper's method.

`leaf.grpo_advantages` divides by max(std, floor): the authors' floor of 1/3 is above the spread that BLEU rewards
have, and a floor of 1 above what rewards in [0, 1] can have, so the latter is r - mean r: RLOO's advantage times
(K - 1) / K (Ahmadian et al. 2024).
"""

BASELINE, PLAIN = "GRPO, floor 1/3", "GRPO, plain std"
MAIN = {
    "LEAF": {},
    BASELINE: {"algo": "grpo"},
    PLAIN: {"algo": "grpo", "std_floor": 0.0},
}
ABLATIONS = {
    "mean baseline": {"algo": "grpo", "std_floor": 1.0},
    "GA only": {"terms": "global"},
    "LA only": {"terms": "local"},
    "no multiplicity": {"multiplicity": False},
    "random boundaries": {"boundaries": "random"},
    "even boundaries": {"boundaries": "even"},
    "B=1": {"fork_budget": 1},
    "B=4": {"fork_budget": 4},
    "B=8": {"fork_budget": 8},
}
OURS = "leave-one-out"  # see leaf.leave_one_out_credits
VARIANT = {OURS: {"terms": "leave-one-out"}}
METHODS = MAIN | VARIANT | ABLATIONS


def with_responses(overrides: dict, K: int, sampled: int = 64) -> dict:
    """A method with K responses to each prompt, and so many prompts per rollout batch that as many are sampled."""
    return overrides | {"responses": K, "prompts": sampled // K, "update_prompts": sampled // K // 2}
