"""On the device: what only a GPU can show. These run wherever CUDA is; LEAF_TEST_DEVICE=cpu (or mps)
runs the same checks there, so that they are checked themselves."""

import contextlib
import math
import os
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import leaf
import lora
import train
from model import Prompts, Sampling, SpeechLM, draw_token, pad_ragged
from tests.helpers import (
    EOS,
    PLAIN,
    V,
    adapter,
    even_config,
    first_run,
    make_model,
    make_prompts,
    metrics,
    near,
    odd_config,
    rand,
    randn,
    same,
    seeded,
    stopping_at,
    tiny,
)
from upkeep.checkpoints import load_checkpoint, save_checkpoint
from upkeep.machine import choose_device, peak_memory
from upkeep.optim import Updater

__all__ = ["first_run", "seeded"]  # fixtures

DEVICE = torch.device(os.environ.get("LEAF_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
on_device = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="no CUDA here; LEAF_TEST_DEVICE=cpu tries it"
)


FLOAT32_AND_BFLOAT16 = [(torch.float32, 1e-4), (torch.bfloat16, 0.25)]
WIDTHS = pytest.mark.parametrize("config", [odd_config, even_config])
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION  # takes masks: all real runs on a GPU use it


def kernel_of_real_runs(model):
    """A context in which a model of even widths that is on a GPU runs that kernel, or raises. The
    CPU has none, nor have cards without bfloat16 in that."""
    if model.device.type != "cuda" or model.config.encoder_config.dim_head % 8:
        return contextlib.nullcontext()
    if model.dtype == torch.bfloat16 and not has_bfloat16():
        return contextlib.nullcontext()
    return sdpa_kernel(EFFICIENT)


def has_bfloat16():
    return torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture
def exact_float32():
    """CUDA's convolutions round to TF32 otherwise; its matrix products do not."""
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = usual


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def spoil_freed_memory():
    """NaN into what the allocator hands out next: whoever reads what he freed will show it."""
    sizes = [2**n for n in range(6, 22, 2)]
    blocks = [torch.full((n,), math.nan, device=DEVICE) for n in sizes for _ in range(8)]
    del blocks


def on(device, prompts):
    return Prompts(prompts.x.to(device), prompts.valid.to(device))


def adapted_model(config, dtype, device, targets=lora.DECODER_TARGETS):
    """Equal to the last bit wherever it is put: made on the CPU, and rounded there."""
    model = make_model(config=config).to(dtype)
    lora.apply_lora(model, targets, r=3, alpha=6.0)
    with torch.no_grad():
        for seed, parameter in enumerate(lora.lora_parameters(model).values()):
            parameter.copy_(0.2 * randn(*parameter.shape, seed=seed))
    return model.to(device)


def eager_rollout(model, prompts, u, temperature, top_p):
    """As a CUDA graph steps, with the whole cache looked at, but one kernel after the other."""
    with torch.no_grad(), lora.lora_for_sampling(model):
        state = Sampling(model, prompts, u, EOS, temperature, top_p)
        state.first_token(prompts)
        for _ in range(u.shape[2] - 1):
            state.next_token(state.L + u.shape[2])
    return state.rollout


@on_device
@WIDTHS
@pytest.mark.parametrize("dtype, tolerance", FLOAT32_AND_BFLOAT16)
def test_on_device_a_graph_draws_what_eager_steps_draw(config, dtype, tolerance, exact_float32):
    """And the scorer agrees, in six calls of changing shapes, with a backward pass and spoilt
    memory in between."""
    model = adapted_model(config, dtype, DEVICE)
    shapes = [(3, 4, 12), (1, 2, 30), (4, 8, 5), (2, 3, 2), (5, 1, 17), (3, 4, 12)]
    drawn = compared = 0
    for call, (P, K, T) in enumerate(shapes):
        prompts = on(DEVICE, make_prompts([2 + (3 * i + call) % 7 for i in range(P)]))
        prompts.x = prompts.x.to(dtype)
        u = rand(P, K, T, seed=call).to(DEVICE)
        top_p = 0.9 if call % 2 else 1.0
        with kernel_of_real_runs(model):
            rollout = model.sample(prompts, u, EOS, 1.0, top_p)
            spoil_freed_memory()
            eager = eager_rollout(model, prompts, u, 1.0, top_p)
            host = rollout.to("cpu")
            logp = model.response_logp(prompts, host.tokens, host.lengths)
        mask = rollout.mask
        if not ON_GPU or T == 2:  # no graph: less of the cache is looked at, and bf16 may part
            mask = mask & (rollout.tokens == eager.tokens).cumprod(-1).bool()
        drawn += int(rollout.mask.sum())
        compared += int(mask.sum())
        assert torch.equal(rollout.tokens[mask], eager.tokens[mask])
        for name in ("logq", "logp"):
            got, want = (getattr(r, name)[mask] for r in (rollout, eager))
            near(got, want, atol=tolerance, rtol=0)
        near(logp[mask], rollout.logp[mask], atol=tolerance, rtol=0)
        logp[mask].sum().backward()
        assert all(p.grad.isfinite().all() for p in lora.lora_parameters(model).values())
        spoil_freed_memory()
    assert compared > 0.5 * drawn


@on_device
@WIDTHS
@pytest.mark.parametrize("dtype, tolerance", FLOAT32_AND_BFLOAT16)
@pytest.mark.parametrize("targets", [lora.DECODER_TARGETS, PLAIN], ids=["decoder", "encoder too"])
def test_on_device_gradients_are_those_of_the_cpu(config, dtype, tolerance, targets, exact_float32):
    """From log-mels, one with a block of padding alone, to LoRA, through logits in parts. Those of
    the CPU are of the same rounded weights, in float32."""
    tokens = (V * rand(2, 3, 6)).long()
    lengths = torch.tensor([[6, 3, 1], [2, 6, 5]])
    mels = [randn(n, 160, seed=n) for n in (23, 46)]  # in blocks of 23

    def gradients(device, compute_dtype):
        model = adapted_model(config, dtype, device, targets).to(compute_dtype)
        model.token_logp = partial(model.token_logp, max_logits=3 * V)
        with kernel_of_real_runs(model):
            audio = model.project(model.encode(mels))
            prompts = model.embed_prompts([[1, V, 2], [3, 4, V, 5]], audio)
            logp = model.response_logp(prompts, tokens, lengths)
        mask = torch.arange(6, device=device) < lengths[..., None].to(device)
        flat = [x.flatten(0, 1) for x in (logp, logp.detach(), logp.detach() - 0.1, mask)]
        advantages = randn(6, 6).to(device)
        leaf.policy_loss(*flat[:3], advantages, flat[3])[0].backward()
        grads = {n: p.grad.float().cpu() for n, p in lora.lora_parameters(model).items()}
        return torch.cat([grads[name].flatten() for name in sorted(grads)])

    got = gradients(DEVICE, dtype)
    want = gradients(torch.device("cpu"), torch.float32)
    assert (got - want).norm() <= tolerance * want.norm() and want.norm() > 1e-3


@on_device
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.7, 0.5)])
def test_on_device_a_large_vocabulary_is_drawn_from_truly(temperature, top_p):
    """u lies in the drawn token's step of the distribution, which is computed in float64; as many
    tokens are kept, but for one at the edge of the nucleus."""
    logits = 3 * randn(64, 49160)
    u = rand(64, seed=1)
    drawn = [x.cpu() for x in draw_token(logits.to(DEVICE), u.to(DEVICE), temperature, top_p)]
    for row, (token, logq, logp) in enumerate(zip(*drawn)):
        p = (logits[row].double() / temperature).softmax(-1)
        likely_first, order = p.sort(descending=True)
        n_kept = int((likely_first.cumsum(0) - likely_first < top_p - 1e-12).sum())
        q = torch.zeros_like(p)
        q[order[:n_kept]] = likely_first[:n_kept]
        mass = (q / q.sum()).cumsum(0)
        edge = 1e-5 + likely_first[n_kept - 1] * (top_p < 1)
        assert q[token] > 0 or p[token] >= likely_first[n_kept] - 1e-12
        assert mass[token] - p[token] / q.sum() - edge <= u[row] <= mass[token] + edge
        near(logq.double(), (p[token] / q.sum()).log(), atol=1e-3, rtol=0)
        near(logp.double(), logits[row].double().log_softmax(-1)[token], atol=1e-4, rtol=0)


@on_device
def test_on_device_four_updates_are_two_and_a_checkpoint_and_two(tmp_path):
    def train_some(updates, folder, start=0):
        weights = {"a": randn(5, 3).to(DEVICE), "b": randn(4, seed=1).to(DEVICE)}
        named = {name: tensor.requires_grad_() for name, tensor in weights.items()}
        updater = Updater(named.values(), grad_clip=1.0)
        assert load_checkpoint(folder, named, updater.adam) == start
        for n in range(start, updates):
            for p in named.values():
                p.grad = randn(*p.shape, seed=n).to(DEVICE)
            updater.step(0.1)
        save_checkpoint(folder, updates, named, updater.adam)
        return [tensor.detach().cpu() for tensor in named.values()]

    want = train_some(4, tmp_path / "straight")
    train_some(2, tmp_path / "in two")
    same(train_some(4, tmp_path / "in two", start=2), want)


@on_device
@WIDTHS
def test_on_device_the_encoder_learns_as_on_the_cpu(config, exact_float32):
    """CTC's gradients and BatchNorm's statistics, ragged."""
    mels = [randn(n, 160, seed=n) for n in (40, 23, 31)]
    labels = [[1, 2, 2, 3], [4], [3, 1]]

    def learn(device):
        model = make_model(config=config).to(device)
        encoder = model.encoder.train()
        mel, lengths = pad_ragged(mels, device)
        with kernel_of_real_runs(model):
            _, logits = encoder(mel, lengths)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor(sum(labels, [])).to(device),
            lengths.cpu(),
            torch.tensor([len(one) for one in labels]),
        )
        loss.backward()
        grads = [p.grad.cpu().flatten() for p in encoder.parameters() if p.grad is not None]
        return loss.detach().cpu(), torch.cat(grads), [b.cpu() for b in encoder.buffers()]

    loss, grads, buffers = learn(DEVICE)
    want_loss, want_grads, want_buffers = learn(torch.device("cpu"))
    near((loss, buffers), (want_loss, want_buffers), atol=1e-4, rtol=1e-4)
    assert (grads - want_grads).norm() <= 1e-3 * want_grads.norm() and want_grads.norm() > 1e-3


@on_device
def test_on_device_a_run_stops_and_goes_on(tmp_path):
    """The default run in miniature, with the dtype that fits; base and policy."""
    run = tmp_path / "run"
    command = tiny(f"--device {DEVICE.type} --lr 1e-3 --save-every 50", out=run)
    with sdpa_kernel(EFFICIENT) if ON_GPU else contextlib.nullcontext():
        for update in (5, 5):  # in next-token training, and then in the policy's second step
            with pytest.raises(SystemExit), stopping_at(update):
                train.main(command)
        before = metrics(run)
        train.main(command)
    after = metrics(run)
    assert [row["step"] for row in after] == [1, 2, 3, 4] and after[: len(before)] == before
    assert all(math.isfinite(row["loss"]) and row["first_ratio_gap"] < 0.1 for row in after)
    assert all(tensor.isfinite().all() for tensor in adapter(run).values())


@on_device
@WIDTHS
def test_on_device_new_shapes_cost_no_more_than_old_ones(config):
    """With the kernel that PyTorch chooses by itself: cuDNN's, if that were on and widths even."""
    model = adapted_model(config, choose_device(DEVICE.type, "auto")[1], DEVICE)

    def score(n):  # a prompt of n tokens, responses of n
        prompts = on(DEVICE, make_prompts([n]))
        prompts.x = prompts.x.to(model.dtype)
        tokens = (V * rand(1, 2, n, seed=n)).long()
        model.response_logp(prompts, tokens, torch.tensor([[n, n]])).sum().backward()
        wait()

    score(100)
    began = time.perf_counter()
    for _ in range(20):
        score(100)
    old = time.perf_counter() - began
    began = time.perf_counter()
    for n in range(80, 100):
        score(n)
    assert time.perf_counter() - began < 3 * old


@on_device
@WIDTHS
def test_on_device_memory_stays_flat_over_thirty_captures(config):
    model = adapted_model(config, torch.float32, DEVICE)
    prompts = on(DEVICE, make_prompts([5, 9, 2]))

    def held():
        if ON_GPU:
            return torch.cuda.memory_reserved()
        return peak_memory(DEVICE)

    for n in range(30):
        with kernel_of_real_runs(model):
            model.sample(prompts, rand(3, 8, 20 + n % 3, seed=n).to(DEVICE), EOS)
        if n == 5:
            before = held()
    assert held() <= before + 32e6


@on_device
def test_on_device_the_dtype_fits_the_card():
    device, dtype = choose_device(DEVICE.type, "auto")
    assert dtype == (torch.bfloat16 if ON_GPU and has_bfloat16() else torch.float32)
    assert device.type == DEVICE.type and (device.index is not None or not ON_GPU)


# --------------------------------------------------------------------------------------------------
# Without a GPU: what can be seen of the same on tensors that have no contents.


class NeverWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, and float64 on it, which Apple's lack."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if x.device.type == "cuda"]
        assert all(x.dtype != torch.float64 for x in on_gpu), function
        moved = "_to_copy" in str(function) and len(on_gpu) < len(tensors)
        assert not moved or kwargs.get("non_blocking"), function
        return out


def test_scoring_never_waits_for_the_gpu(monkeypatch):
    """Prompts, responses and the loss; that all is known from tokens on the host."""
    tokens = (V * rand(3, 4, 6)).long().numpy()
    lengths = np.array([[6, 3, 1, 2]] * 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = SpeechLM(odd_config(2)).eval()
            lora.apply_lora(model, PLAIN, r=3, alpha=6.0)
            mels = [torch.empty(n, 160) for n in (31, 44, 20)]
            mask = torch.ones(12, 6, dtype=torch.bool)
        with NeverWaits():
            audio = model.project(model.encode(mels))
            prompts = model.embed_prompts([[1, V, 2], [3, 4, V, 5], [V]], audio)
            logp = model.response_logp(prompts, tokens, lengths).flatten(0, 1)
            loss, _ = leaf.policy_loss(logp, logp.detach(), logp.detach(), logp.detach(), mask)
            assert loss.device.type == "cuda"
            refusals = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
            for waits in (loss.item, mask.nonzero, lambda: loss.to("cpu"), logp.double):
                with pytest.raises(refusals):
                    waits()


@pytest.mark.parametrize("length", range(5, 13))
def test_rows_of_masks_begin_at_multiples_of_8(length, monkeypatch):
    """Of prompts, of responses behind them, and while they grow: CUDA's kernels take no others, and
    copy them in every layer."""
    masks = []
    attend = F.scaled_dot_product_attention

    def noting(q, k, v, attn_mask, scale):
        assert attn_mask.shape[-2:] == (q.shape[2], k.shape[2])
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    model = make_model()
    prompts = make_prompts([length, 3])
    with torch.no_grad():
        model.response_logp(prompts, (V * rand(2, 2, 5)).long(), torch.tensor([[5, 2], [3, 4]]))
        model.sample(prompts, rand(2, 2, 4), eos_id=-1)
    assert {mask.shape[-1] for mask in masks} == set(range(length, length + 5))
    for mask in masks:
        *others, last = mask.stride()
        assert last == 1 and all(stride % 8 == 0 for stride in others), mask.stride()


@pytest.mark.parametrize("T, captures", [(1, 0), (2, 0), (3, 1), (7, 1)])
def test_a_graph_is_captured_only_where_it_is_replayed(T, captures, monkeypatch):
    """Whatever it costs: of T tokens the first is the prompt's, and the second a step to warm up."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    def graph(_):
        calls.append("capture")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = SpeechLM(odd_config(2)).eval()
        prompts = Prompts(torch.empty(2, 5, 24), torch.ones(2, 5, dtype=torch.bool))
        model.sample(prompts, torch.empty(2, 3, T), EOS)
    assert calls == ["capture"] * captures + ["replay"] * max(0, T - 2)


def test_cudnn_attention_is_off():
    """It plans for every new shape anew."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
