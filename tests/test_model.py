"""model.py: parity with transformers, padding, sampling, scoring, files."""

import contextlib
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from model import (
    DecodingCache,
    LanguageModel,
    MaskedBatchNorm,
    PromptCache,
    Prompts,
    SpeechLM,
    TextConfig,
    draw_token,
)
from released import load_model
from released.config import from_dict
from tests.helpers import (
    PADDINGS,
    V,
    causal_logits,
    edit_json,
    first_run,
    growth_in_loading,
    make_large_model,
    make_model,
    make_prompts,
    make_transformers,
    near,
    odd_config,
    rand,
    randn,
    roughly,
    same,
    score_alone,
    seeded,
    shake,
    their_logits,
    truncated,
)
from upkeep.files import read_json

__all__ = ["first_run", "seeded"]  # fixtures


def their_decoder(theirs):
    """Their decoder as GraniteForCausalLM, which does divide by logits_scaling."""
    model = pytest.importorskip("transformers").GraniteForCausalLM(theirs.config.text_config).eval()
    model.model = theirs.model.language_model
    model.lm_head = theirs.lm_head
    return model


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_same_as_transformers(seed, tmp_path):
    """Weights and config.json as they write them. In a ragged batch of ours, every row has the
    frames, embeddings, logits and 20 greedy tokens that theirs has alone."""
    theirs = make_transformers(seed, tmp_path)
    ours = load_model(tmp_path).eval()
    decoder = their_decoder(theirs)
    assert from_dict(theirs.config.to_dict()) == ours.config == odd_config(seed)
    mels = [randn(n, 160, seed=n) for n in (7, 1, 65, 2, 31, 13, 20, 47)]
    frames = ours.encode(mels)
    sounds = ours.project(frames)
    prompts = ours.embed_prompts([[4, V, 5, 6]] * len(mels), sounds)
    assert (prompts.valid.diff(dim=1).int() >= 0).all() and prompts.valid[:, -1].all()
    rollout = ours.sample(prompts, torch.zeros(len(mels), 1, 20), eos_id=-1, temperature=0)
    greedy = rollout.tokens[:, 0].tolist()
    for i, mel in enumerate(mels):
        hidden = theirs.model.encoder(mel[None]).last_hidden_state
        near((frames[i], sounds[i]), (hidden[0], theirs.model.projector(hidden)[0]), atol=3e-5)
        x = prompts.x[i][None, prompts.valid[i]]
        ids, logits = their_logits(theirs, mel[None])
        roughly(causal_logits(ours, x), logits)
        roughly(logits, decoder(inputs_embeds=x).logits)
        want = theirs.generate(
            input_ids=ids, input_features=mel[None], do_sample=False, max_new_tokens=20
        )
        assert greedy[i] == want[0, ids.shape[1] :].tolist()
        assert len(sounds[i]) == ours.projector.count(len(mel))
    assert len(set(sum(greedy, []))) > 6


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_loads_as_it_is(tied):
    """The README says so: weights and sizes by the names that transformers gives them, multipliers
    of 1 and attention scaled as usual."""
    hf = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": V,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-3,
    }
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = hf.LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=tied)
    theirs = shake(hf.LlamaForCausalLM(config), 0.3)
    c = TextConfig(**sizes, rope_theta=500.0, attention_multiplier=10**-0.5)
    ours = LanguageModel(c, tied).eval()
    weights = theirs.state_dict()
    if tied:
        del weights["lm_head.weight"]  # the same tensor as that of embed_tokens
    ours.load_state_dict(weights)
    ids = (V * rand(2, 17)).long()
    positions = torch.arange(17).expand(2, 17)
    sees = torch.ones(2, 17, 17, dtype=torch.bool).tril()
    hidden = ours.model(ours.model.embed_tokens(ids), positions, sees)
    near(ours.logits(hidden), theirs(input_ids=ids).logits)


@torch.no_grad()
def test_padded_audio_gives_the_same():
    """Every length from 1 to 65 in one batch, whatever stands in the padding, is what the
    recording is alone."""
    model = make_model(scale=0.1)
    lengths = (torch.arange(65) * 8) % 65 + 1
    mel = randn(65, 70, 160)
    frames, middle = model.encoder(mel, lengths)
    sound, counts = model.projector(frames, lengths)
    for i, n in enumerate(lengths.tolist()):
        one = model.encoder(mel[i : i + 1, :n], torch.tensor([n]))
        near((frames[i, :n], middle[i, :n]), (one[0][0], one[1][0]))
        near(sound[i, : counts[i]], model.projector(one[0], torch.tensor([n]))[0][0])
        assert not frames[i, n:].any() and counts[i] == 2 * math.ceil(n / 8)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_rollout_does_not_depend_on_padding_or_company(padding):
    """A response is its own noise's: alone, in any batch and place, with 1 or 8 to a prompt,
    with more time to come."""
    model = make_model()
    prompts = make_prompts([5, 1, 9, 4, 6], padding)
    u = rand(5, 8, 10)
    whole = model.sample(prompts, u, 2, top_p=0.9)
    scored = model.response_logp(prompts, whole.tokens, whole.lengths)
    assert len({tuple(r) for r in whole.tokens.flatten(0, 1).tolist()}) > 30
    assert scored.isfinite().all()
    for rows, K, T in [
        *(([i], 8, 10) for i in range(5)),
        ([4, 1], 8, 10),
        ([3, 0, 2, 1, 4], 2, 10),
        ([1, 3], 1, 4),
    ]:
        some = prompts[rows]
        if len(rows) == 1:  # without its padding
            some = Prompts(some.x[some.valid][None], some.valid[some.valid][None])
        part = model.sample(some, u[rows, :K, :T], 2, top_p=0.9)
        same(part.lengths, whole.lengths[rows, :K].clamp(max=T))
        for name in ("tokens", "logq", "logp"):
            near(getattr(part, name)[part.mask], getattr(whole, name)[rows, :K, :T][part.mask])
        again = model.response_logp(some, whole.tokens[rows, :K, :T], part.lengths)
        near(again, scored[rows, :K, :T] * part.mask)


def test_batch_norm_sees_real_frames_only():
    """In training: output, gradient and running statistics are BatchNorm1d's on the real frames,
    end to end."""
    ours = shake(MaskedBatchNorm(6)).train()
    plain = shake(nn.BatchNorm1d(6)).train()
    mask = torch.arange(9) < torch.tensor([[5], [1], [9]])
    for seed in range(3):
        x = torch.where(mask[..., None], 3 * randn(3, 9, 6, seed=seed) + 1, 1e4).requires_grad_()
        y = x.detach()[mask].requires_grad_()
        got = ours(x, mask)[mask]
        want = plain(y)
        for out in (got, want):
            (out.sin() * torch.arange(len(out))[:, None]).sum().backward()
        near((got, x.grad[mask]), (want, y.grad))
    near(list(ours.buffers()), list(plain.buffers()))


def test_what_is_shared_is_computed_once(monkeypatch):
    """The decoder sees each prompt once, and then each distinct response, in a batch as wide as the
    longest needs; logits are made of what predicts their tokens, and of nothing else."""
    model = make_model()
    prompts = make_prompts([4, 9, 2], (2, 1.0))
    tokens = (V * rand(3, 5, 9)).long()
    lengths = torch.tensor([[7, 2, 7, 4, 4], [1, 1, 1, 1, 1], [6, 6, 6, 3, 2]])
    tokens[0, 4, :4] = tokens[0, 3, :4]  # equal, with other junk behind
    tokens[1] = 5  # all equal, and to other prompts' first tokens
    tokens[2, :3, 0] = 5
    tokens[2, 3, :3] = tokens[2, 0, :3]  # stops where another goes on
    distinct = [4, 1, 5]
    scored = (7 + 2 + 7 + 4) + 1 + (6 + 6 + 6 + 3 + 2)
    seen = []
    made = []
    decoder = model.language_model.model
    decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    make_logits = model.language_model.logits

    def logits_of_hidden(hidden):
        made.append(len(hidden))
        return make_logits(hidden)

    monkeypatch.setattr(model.language_model, "logits", logits_of_hidden)
    logp = model.response_logp(prompts, tokens, lengths)
    assert seen == [(3, 11, 24), (sum(distinct), 6, 24)] and made == [scored]
    assert logp.shape == (3, 5, 9)
    for i, k in itertools.product(range(3), range(5)):
        n = lengths[i, k]
        _, want = score_alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :n])
        near(logp[i, k, :n], want)
        assert not logp[i, k, n:].any()


@torch.no_grad()
def test_responses_of_one_token_are_scored():
    """Where no response has a second token, the prompts are all that the decoder sees."""
    model = make_model()
    prompts = make_prompts([4, 9])
    tokens = (V * rand(2, 3, 5)).long()
    lengths = torch.ones(2, 3, dtype=torch.int64)
    logp = model.response_logp(prompts, tokens, lengths)
    assert logp.shape == tokens.shape and not logp[..., 1:].any()
    for i, k in itertools.product(range(2), range(3)):
        _, want = score_alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :1])
        near(logp[i, k, :1], want)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_cached_decoding_is_the_full_forward_pass(seed):
    """Some tokens at once and the others one by one, with keys and values kept: the hidden states
    of one pass over all, whose logits are those of the weights written out."""
    model = make_model(seed)
    decoder = model.language_model.model
    B, S, first = 3, 9, 4
    x = randn(B, S, 24)
    positions = torch.arange(S).expand(B, S)
    sees = torch.ones(B, S, S, dtype=torch.bool).tril()
    whole = decoder(x, positions, sees)
    near(model.language_model.logits(whole), causal_logits(model, x))
    prompts = PromptCache()
    near(
        decoder(x[:, :first], positions[:, :first], sees[:, :first, :first], prompts),
        whole[:, :first],
    )
    K = 2  # the same sequence twice
    cache = DecodingCache(prompts, K, S - first + 2)
    for t in range(first, S):
        cache.slots = torch.tensor([t])
        cache.end = t + 1
        step = (y[:, t : t + 1].repeat_interleave(K, 0) for y in (x, positions, sees[..., : t + 1]))
        hidden = decoder(*step, cache)
        near(hidden, whole[:, t : t + 1].repeat_interleave(K, 0))
    prompts.prompt_of = torch.tensor([2, 0, 1, 2])  # or all at once, in any order
    rest = (y[prompts.prompt_of, first:] for y in (x, positions, sees))
    near(decoder(*rest, prompts), whole[prompts.prompt_of, first:])


def test_logits_in_parts_are_the_same():
    model = make_model(seed=1)
    hidden = randn(11, 24).requires_grad_()
    tokens = (V * rand(11)).long()
    weights = [hidden, model.language_model.model.embed_tokens.weight]  # tied
    whole, parts = (model.token_logp(hidden, tokens, limit) for limit in (2**25, 3 * V))
    near(whole, parts)
    near(*(torch.autograd.grad((x * x).sum(), weights) for x in (whole, parts)), atol=1e-4)


def test_attention_kernels_may_lay_out_memory_as_they_like(monkeypatch):
    """CUDA's memory-efficient kernel returns (B, H, S, D) that lies in memory as (B, S, H, D)."""
    model = make_model()
    prompts = make_prompts([4, 9, 2])
    group = ((V * rand(3, 4, 7)).long(), torch.full((3, 4), 7))
    plain = model.response_logp(prompts, *group)
    mel = randn(20, 160)
    frames = model.encode([mel])[0]
    attend = F.scaled_dot_product_attention

    def other_layout(*args, **kwargs):
        return attend(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other_layout)
    same(model.response_logp(prompts, *group), plain)
    same(model.encode([mel])[0], frames)
    model.project([frames])
    model.sample(prompts, rand(3, 4, 3), 2)


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.5, 0.8), (2.0, 0.3), (1.0, 1e-6)]
)
def test_draw_follows_the_distribution(temperature, top_p):
    """Evenly spaced noise reproduces each probability to 1 / N, random noise to its standard
    error."""
    N = 4001
    for seed in range(5):
        logits = 2 * randn(13, seed=seed)
        q, _ = truncated(logits, temperature, top_p)
        for u, slack in (
            ((torch.arange(N) + 0.5) / N, 0),
            (rand(N, seed=seed), 4.5 * (q * (1 - q) / N).sqrt()),
        ):
            token, logq, logp = draw_token(logits.expand(N, 13), u, temperature, top_p)
            count = torch.bincount(token, minlength=13)
            assert ((count / N - q).abs() <= slack + 1.01 / N).all() and not count[q == 0].any()
            near((logp, logq.exp()), (logits.log_softmax(-1)[token], q[token]))


def test_draw_at_its_edges():
    """Top-p keeps the smallest set that reaches it and its ties, exactly where masses are exact.
    u = 0 is the first token kept, the last float below 1 the last one, though a sum over a large
    vocabulary is not 1. Temperature 0 is greedy."""
    even = [1 / 8] * 8
    halves = [1 / 8, 1 / 4, 1 / 2, 1 / 8]
    for p, top_p, kept in (
        (even, 0.5, 8),
        (even, 0.51, 8),
        (even, 1, 8),
        (even, 0.1, 8),
        (halves, 0.5, 1),
        (halves, 0.51, 2),
        (halves, 0.75, 2),
        (halves, 0.76, 4),
    ):
        token, logq, _ = draw_token(
            torch.tensor(p).log().expand(1024, -1), torch.arange(1024) / 1024, 1.0, top_p
        )
        q = torch.zeros(len(p)).index_add(0, token.unique(), torch.tensor(p)[token.unique()])
        q = q / q.sum()
        near((logq.exp(), token.bincount(minlength=len(p)) / 1024), (q[token], q), atol=0.9 / 1024)
        assert len(token.unique()) == kept
    last = torch.full((8,), float(np.nextafter(np.float32(1), np.float32(0))))
    for size, spread, top_p in itertools.product(
        (3, 300, 20000), (0.1, 3.0, 30.0), (0.0, 0.3, 0.9, 1.0)
    ):
        logits = spread * randn(8, size)
        logits[:, ::3] = -1e9  # probability 0
        best = logits.argmax(-1)
        p = logits.double().softmax(-1)
        token, logq, _ = draw_token(logits, last, 1.0, top_p)
        above = torch.where(p > p.gather(-1, token[:, None]), p, 0).sum(-1)  # the mass before it
        assert (above < top_p + 1e-4).all() and (token % 3 > 0).all() and logq.isfinite().all()
        for i, first in enumerate(draw_token(logits, 0 * last, 1.0, top_p)[0].tolist()):
            q, _ = truncated(logits[i], 1.0, top_p + 1e-4)
            assert q[first] > 0 and (q[:first] < 1e-3).all() and (q[token[i] + 1 :] < 1e-3).all()
        assert top_p > 0 or torch.equal(token, best)
        near(draw_token(logits, last, 0, top_p), (best, 0 * last, p.amax(-1).log().float()))


@torch.no_grad()
def test_responses_end_at_the_first_eos():
    """The EOS counts, a response cut short has length T, and the decoder stops when everybody
    has ended."""
    model = make_model()
    prompts = make_prompts([3, 8, 1])
    u = rand(3, 5, 9)
    calls = []
    free = model.sample(prompts, u, eos_id=-1)
    model.language_model.model.register_forward_hook(lambda *_: calls.append(1))
    for eos in range(0, V, 6):
        rollout = model.sample(prompts, u, eos)  # the same noise: the same tokens up to the end
        for i, k in itertools.product(range(3), range(5)):
            tokens = free.tokens[i, k].tolist()
            n = rollout.lengths[i, k]
            assert n == (tokens.index(eos) + 1 if eos in tokens else 9)
            same(
                (rollout.tokens[i, k, :n], rollout.mask[i, k]),
                (free.tokens[i, k, :n], torch.arange(9) < n),
            )
            calls.clear()
            one = model.sample(prompts[[i]], u[[i], k : k + 1], eos)
            assert one.lengths.item() == n == len(calls)
    junk = torch.where(rollout.mask, rollout.tokens, (rollout.tokens + 5) % V)
    near(*(model.response_logp(prompts, t, rollout.lengths) for t in (rollout.tokens, junk)))


class OnDevice(TorchDispatchMode):
    """Refuses tensors that are not on CUDA: a copy from the host may wait, which fake tensors do
    not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, out))
        places = {x.device.type for x in values if isinstance(x, torch.Tensor)}
        assert places <= {"cuda"}, f"{function} on {places}"
        return out


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (0.0, 1.0)])
def test_a_cuda_graph_can_hold_the_sampler(temperature, top_p, monkeypatch):
    """On tensors of a GPU that have no contents, so that whatever waits for some raises, and
    whatever mixes devices. The third token on is captured once and replayed, up to the end;
    without graphs, the decoder runs for each."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        with OnDevice():
            yield
        calls.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = SpeechLM(odd_config(2)).eval()
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            half = {name: torch.empty(s, dtype=torch.bfloat16) for name, s in shapes.items()}
            model.load_state_dict(half, assign=True)
            # Contents, B's included, are unknown: none can be skipped.
            lora.apply_lora(model, r=3, alpha=6.0)
            x = torch.empty(3, 5, 24, dtype=torch.bfloat16)
            prompts = Prompts(x, torch.ones(3, 5, dtype=torch.bool))
            # Of 9 tokens and more, every eighth waits: have all ended?
            noise = torch.empty(3, 4, 8)
        model.language_model.model.register_forward_hook(lambda *_: calls.append("decoder"))
        for model.cuda_graph in (True, False):
            calls.clear()
            rollout = model.sample(prompts, noise, 2, temperature, top_p)
            want = ["decoder"] * 8
            if model.cuda_graph:
                want = ["decoder"] * 3 + ["captured"] + ["replay"] * 6
            assert calls == want
            assert {x.device.type for x in vars(rollout).values()} == {"cuda"}
            assert rollout.tokens.shape == (3, 4, 8)
        for waits in (
            lambda: rollout.lengths.max().item(),
            lambda: bool(rollout.mask.all()),
            rollout.mask.nonzero,
        ):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()


@torch.no_grad()
def test_bfloat16():
    """Logits and log-softmax are float32; sampler and scorer differ by rounding, so old_logp
    must be the sampler's."""
    model = make_model(scale=0.1).bfloat16()
    prompts = make_prompts([3, 8, 1, 5])
    prompts.x = prompts.x.bfloat16()
    rollout = model.sample(prompts, rand(4, 6, 12), 2)
    scored = model.response_logp(prompts, rollout.tokens, rollout.lengths)
    logits = model.language_model.logits(prompts.x)
    assert logits.dtype == scored.dtype == rollout.logp.dtype == torch.float32
    assert scored.isfinite().all() and (rollout.logp - scored)[rollout.mask].abs().max() < 0.1
    assert len(scored.unique()) > 200  # of 288; rounded to bfloat16's 8 bits they would coincide


@pytest.mark.parametrize("seed", [1, 2])
def test_model_files(seed, tmp_path):
    """What we save, we load; what does not fit is refused by name."""
    model = make_model(seed)
    model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    half = SpeechLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    half.save(tmp_path)
    same(SpeechLM.from_pretrained(tmp_path).state_dict(), half.state_dict())  # as stored

    def refused(*words):
        with pytest.raises(ValueError) as error:
            SpeechLM.from_pretrained(tmp_path)
        assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value

    name, tensor = next(item for item in weights.items() if "o_proj" in item[0])
    some = {n: w for n, w in weights.items() if n != name}
    save_file(some | {"encoder.extra": tensor}, tmp_path / "model.safetensors")
    refused("2 problems", f"missing {name}", "unknown encoder.extra")
    save_file(weights | {name: tensor[1:].contiguous()}, tmp_path / "model.safetensors")
    refused("1 problems", f"{name} is {tuple(tensor[1:].shape)}, not {tuple(tensor.shape)}")
    (tmp_path / "model.safetensors").write_bytes(b"Entry not found, says the server")
    refused("model.safetensors cannot be read")
    save_file(weights, tmp_path / "model.safetensors")
    config = read_json(tmp_path / "config.json")
    for value in (..., config["text_config"] | {"rope_scaling": {"type": "linear"}}):
        edit_json(tmp_path / "config.json", text_config=value)
        refused("config.json", "rope_scaling" if value is not ... else "text_config")


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    model = make_large_model()
    size = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path)
    del model
    grown = growth_in_loading(tmp_path, "from model import SpeechLM", "SpeechLM.from_pretrained")
    assert size > 200e6 and 0.9 < grown / size < 1.3, grown / size
