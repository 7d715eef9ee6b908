"""GPU memory and seconds of a training step at the size of the released models, with the paper's
settings.

    python -m experiments.footprint           a table of all shapes, in Markdown;
                                              experiments/results/footprint.json
    python -m experiments.footprint --load    host memory of loading a checkpoint of the 2B shape
                                              (6 GB of disk)

One step is 6 prompts x 8 responses x 200 tokens, on 15 s of audio and 50 tokens of text each:
sampling without an end-of-sequence token, the prefix trees of what was sampled, reference
log-probabilities with LoRA off, and 6 updates, a prompt at a time, of LoRA (r 64, dropout 0.05, on
the decoder's seven projections) with AdamW. Weights are random and bf16.

With a GPU all of it is MEASURED, with PyTorch's own counters. Without one it is COMPUTED:

Memory: the same functions run on fake tensors of the true shapes, which have a size but no
contents, through all layers, and a meter adds up what is alive at every operation of forward
(float32 copies of the logits included), backward and optimiser. They take the CPU's path; its fused
attention keeps for the backward pass what CUDA's fused kernels keep: queries, keys, values, output,
mask, and a number per row. Where the CPU's differ or ask for contents, replacements stand in. No
token is padding, and no two responses share a prefix: the largest case. A fake rollout stops after
its second token, by when cache, prefill and logits were there, all that is large in it. Beside the
parts stands what a run holds all the time: the audio embeddings that it keeps (as much as the
default --cache-gb lets it, of the training rows, and those of 96 validation and 300 test rows), the
pool of a CUDA graph, which keeps what a decoding step needs after the graph is gone, and cuBLAS's
workspaces. Not counted: memory inside kernels, fragmentation and CUDA's context, for which the
column "with allowance" adds a tenth and 0.5 GB.

Time: references and updates are their floating-point operations, also counted by the meter, at 40%
of the GPU's published dense bf16 rate, and not faster than Python builds the trees and launches the
kernels, which is measured: the same functions, for real, on this machine's CPU, with 40 layers too
narrow for the arithmetic to matter; rather more than launches take from a fast processor. So long,
too, take a rollout's first two tokens and the capture of a CUDA graph; then the graph is replayed.
A replayed token reads the decoder's weights, LoRA in bf16 and the whole cache at the published
bandwidth, and is not faster than its kernels start: one for each operator that makes or writes a
tensor, counted by the meter, at 2.5 microseconds, which is an ASSUMPTION and was measured nowhere.
Not counted: rewards, credit, hearing (once per recording, not per step), what a draw reads and
writes, and what an update's kernels do, which tells where bandwidth is low.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import leaf
from experiments.keep import RESULTS, processor
from lora import apply_lora, lora_disabled, lora_layers, lora_parameters
from model import (
    EncoderConfig,
    MaskedBatchNorm,
    PrefixTree,
    SpeechConfig,
    SpeechLM,
    TextConfig,
    head_dim,
)
from train import Config

# As in config.json of the released models on Hugging Face; of the 8B, as its model card (encoder,
# projector) and granite-3.1-8b-instruct say (decoder). Parameters come to 2.31, 3.01 (as published)
# and 8.65 billion.
ENCODER = EncoderConfig(num_layers=16, output_dim=256)
SHAPES = {
    "granite-4.0-1b-speech": SpeechConfig(
        replace(ENCODER, output_dim=348),
        text_config=TextConfig(
            100353, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4
        ),
        audio_token_index=100352,
        tie_word_embeddings=False,
    ),
    "granite-speech-3.3-2b": SpeechConfig(ENCODER),
    "granite-speech-3.3-8b": SpeechConfig(
        ENCODER, text_config=TextConfig(hidden_size=4096, intermediate_size=12800)
    ),
}
NARROW = replace(SpeechConfig.compact(64, 42, 63), text_config=TextConfig(64, 32, 32, 40, 2, 1))
# GB, GB/s, dense bf16 FLOP/s with float32 sums: NVIDIA's data sheets, its Ada white paper for the
# RTX 4090.
GPUS = {
    "RTX 4090": (24, 1008, 165.2e12),
    "L40S": (48, 864, 362.05e12),
    "H100 SXM": (80, 3350, 989.4e12),
}
# Seconds from one kernel of a CUDA graph to the next, where they are short: assumed.
LAUNCH = 2.5e-6
# GB: of cuBLAS and cuBLASLt, on the usual stream and on the one where a graph is captured; 32 MiB
# each is what NVIDIA recommends for Hopper, and 4 for older cards.
WORKSPACES = 4 * 2**25 / 1e9
PROMPTS = 6
RESPONSES = 8
TOKENS = 200
AUDIO = 15  # seconds
TEXT = 50  # tokens
PARTS = ("hearing", "sampling", "reference", "update")


class Meter(TorchDispatchMode):
    """Bytes of tensors alive and their peak, floating-point operations, and operators that make or
    write a tensor."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = self.kernels = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        made = [storage for storage in storages if storage not in self.seen]
        self.kernels += func._schema.is_mutable or bool(made) and "empty" not in func.__name__
        for storage in made:
            if storage not in self.seen:  # two outputs may lie in one
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        # The CPU's attention kernels are not in PyTorch's list of formulas; CUDA's of the same
        # arguments are.
        name = func._overloadpacket.__name__.replace("_for_cpu", "")
        packet = getattr(torch.ops.aten, name, None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def free(self, size: int):
        self.live -= size


# --------------------------------------------------------------------------------------------------
# One step in parts, as train.train_policy takes it


def build(config: SpeechConfig, device: str):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = SpeechLM(config).eval()
    torch.set_default_dtype(torch.float32)
    apply_lora(model, r=64, alpha=128, dropout=0.05)
    parameters = lora_parameters(model).values()
    return model, torch.optim.AdamW(parameters, lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0)


@torch.no_grad()
def embed(model, audio):
    text = [1] * (TEXT // 2)
    ids = [*text, model.config.audio_token_index, *text]
    return model.embed_prompts([ids] * PROMPTS, audio)


def sample(model, prompts, T: int):
    noise = torch.rand(PROMPTS, RESPONSES, T, device=model.device)
    return model.sample(prompts, noise, -1, 1.0, 0.9).tokens


def grow(tokens) -> PrefixTree:
    """The tree of one prompt's responses (K, T) on the host, none of which ended."""
    K, T = tokens.shape
    return PrefixTree(tokens, [T] * K)


@torch.no_grad()
def reference(model, prompt, tree):
    with lora_disabled(model):
        return model.response_logp(prompt, [tree])[0]


def update(model, adam, prompt, tree, ref_logp):
    for layer in lora_layers(model).values():
        layer.train()
    logp = model.response_logp(prompt, [tree])[0]
    mask = torch.ones_like(logp, dtype=torch.bool)
    loss, _ = leaf.policy_loss(logp, ref_logp, ref_logp, torch.ones_like(logp), mask)
    loss.backward()
    nn.utils.clip_grad_norm_(lora_parameters(model).values(), 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    model.eval()


def measure(config: SpeechConfig, device: str, seconds: int, T: int) -> dict:
    """Seconds of each part in the fastest of three real steps and, on a GPU, the most memory it
    took."""
    model, adam = build(config, device)
    mels = [torch.randn(50 * seconds, 160, device=device)] * PROMPTS
    gpu = device == "cuda"
    took, peak = {}, {}

    @contextlib.contextmanager
    def part(name):
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() / 1e9
        took[name] = min(took.get(name, 1e9), time.perf_counter() - began)

    for _ in tqdm(range(3), desc=f"steps on {device}", leave=False):
        with part("hearing"), torch.no_grad():
            audio = model.project(model.encode(mels))
        prompts = embed(model, audio)
        with part("sampling"):
            tokens = sample(model, prompts, T)
        with part("reference"):
            trees = [grow(group) for group in tokens.cpu()]
            ref_logp = [reference(model, prompts[[i]], trees[i]) for i in range(PROMPTS)]
        with part("update"):
            for i in range(PROMPTS):
                update(model, adam, prompts[[i]], trees[i], ref_logp[i])
    parameters = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    measured = {"parameters": parameters, "peak_gb": peak, "seconds": took}
    if gpu:
        measured["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        measured["seconds"] = {torch.cuda.get_device_name(): took}
    return measured


# --------------------------------------------------------------------------------------------------
# The same without a GPU


def dropout(x, p, training, inplace):
    """As on CUDA, which keeps a mask of one byte per element; the CPU's keeps two."""
    return torch.native_dropout(x, p, training)[0] if training else x


def batch_norm(self, x, mask):
    """As MaskedBatchNorm where no frame is padding: which are is nothing a fake tensor knows."""
    return torch.zeros_like(x) + nn.BatchNorm1d.forward(self, x.flatten(0, 1)).view_as(x)


class RMSNorm(torch.autograd.Function):
    """As on CUDA: one kernel, which keeps its input and a number per row; the CPU's many keep
    copies in float32."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(), None, None, None


def sort_ascending(q):
    """As on CUDA."""
    return q.sort(-1).values


def compute(config: SpeechConfig, host: dict) -> dict:
    """Memory of each part, and its seconds on every GPU that has so much; host: seconds that Python
    takes, for sampling a token's, for others the least of the part."""
    # Of plain numbers, which fake tensors do not have. All tokens are different.
    tree = grow(torch.arange(RESPONSES * TOKENS).view(RESPONSES, TOKENS))
    # What the meter says whenever sample() asks whether all responses have ended: before the second
    # token, and after it, when they have.
    asked = []

    def have_ended(done):
        asked.append((meter.kernels, meter.live, meter.peak))
        meter.peak = meter.live
        return len(asked) > 1

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(F, "dropout", dropout),
            mock.patch.object(F, "rms_norm", RMSNorm.apply),
            mock.patch.object(MaskedBatchNorm, "forward", batch_norm),
            mock.patch.object(torch.Tensor, "all", have_ended),
            mock.patch("model.sort_ascending", sort_ascending),
            FakeTensorMode(allow_non_fake_inputs=True),  # what a tree's mask is made of
        ):
            stack.enter_context(patch)
        meter = stack.enter_context(Meter())
        model, adam = build(config, "cpu")
        c, text = config.text_config, model.language_model
        lora = sum(p.numel() for p in lora_parameters(model).values())
        parameters = sum(p.numel() for p in model.parameters()) - lora
        decoder = sum(p.numel() for p in text.parameters()) - lora
        mel = torch.empty(PROMPTS, 50 * AUDIO, 160, dtype=model.dtype)
        frames = torch.full((PROMPTS,), 50 * AUDIO)
        count = model.projector.count(50 * AUDIO)
        heard = torch.empty(PROMPTS, count, c.hidden_size, dtype=model.dtype)
        prompts = embed(model, list(heard))
        ref_logp = torch.zeros(RESPONSES, TOKENS)

        @torch.no_grad()
        def hear():
            model.projector(model.encoder(mel, frames)[0], frames)

        peak, flops = {}, {}
        for name, run in (
            ("hearing", hear),
            ("sampling", lambda: sample(model, prompts, TOKENS)),
            ("reference", lambda: reference(model, prompts[[0]], tree)),
            ("update", lambda: update(model, adam, prompts[[0]], tree, ref_logp)),
            # Again, now that AdamW's moments are there.
            ("update", lambda: update(model, adam, prompts[[0]], tree, ref_logp)),
        ):
            meter.peak = meter.live
            meter.flops = 0
            run()
            if name == "sampling":
                (before, live, prefill), (after, _, step) = asked
                kernels = after - before
                pool = step - live
                meter.peak = max(prefill, step)
            peak[name] = meter.peak / 1e9
            flops[name] = meter.flops * PROMPTS
    width = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim(c)
    cache = 2 * width * PROMPTS * RESPONSES * (prompts.x.shape[1] + TOKENS)  # bytes
    recording = 2 * count * c.hidden_size / 1e9  # GB of its embeddings
    kept = Config.cache_gb + (Config.validation_rows + Config.test_rows) * recording
    held = {"embeddings": kept, "graph": pool / 1e9, "workspaces": WORKSPACES}
    seconds = {}
    for gpu, (memory, bandwidth, rate) in GPUS.items():
        if with_allowance(peak, held) <= memory:
            least = {name: flops[name] / (0.4 * rate) for name in ("reference", "update")}
            token = max(LAUNCH * kernels, (2 * decoder + 2 * lora + cache) / 1e9 / bandwidth)
            # Two tokens and the capture, then replays.
            seconds[gpu] = {"sampling": 3 * host["sampling"] + (TOKENS - 2) * token}
            seconds[gpu] |= {name: max(host[name], least[name]) for name in PARTS[2:]}
    sizes = {
        "parameters": parameters,
        "decoder": decoder,
        "lora": lora,
        "cache_gb": cache / 1e9,
        "kernels": kernels,
    }
    tflop = {name: flops[name] / 1e12 for name in PARTS[2:]}
    return {**sizes, "peak_gb": peak, "held_gb": held, "tflop": tflop, "seconds": seconds}


def with_allowance(peak: dict, held: dict) -> float:
    """GB: the largest part, what is held all the time, and room for what was not counted."""
    return 1.1 * (max(peak.values()) + sum(held.values())) + 0.5


def show(step: dict):
    gpus = list(dict.fromkeys(gpu for shape in step["shapes"].values() for gpu in shape["seconds"]))
    parts = [f"{part}, GB" for part in PARTS]
    heads = ["model", "parameters", *parts, "held, GB", "with allowance, GB", *gpus]
    print(f"\n{step['how']}; a step's seconds are sampling + reference + update\n")
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, shape in step["shapes"].items():
        peak = shape["peak_gb"]
        held = shape.get("held_gb", {})
        cells = [name, f"{shape['parameters'] / 1e9:.2f}e9"]
        memory = [*(peak[part] for part in PARTS), sum(held.values()), with_allowance(peak, held)]
        cells += [f"{gb:.1f}" for gb in memory]
        for gpu in gpus:
            if gpu not in shape["seconds"]:
                cells.append("too small")
                continue
            took = [shape["seconds"][gpu][part] for part in PARTS[1:]]
            cells.append(f"{sum(took):.1f} s = " + " + ".join(f"{t:.1f}" for t in took))
        print("| " + " | ".join(cells) + " |")


# --------------------------------------------------------------------------------------------------
# Loading


LOADER = """
import resource, sys, torch
from released import load_model
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = load_model(sys.argv[1], "cpu", torch.bfloat16)
for tensor in model.state_dict().values():
    tensor.max()  # files are mapped into memory: touch every page
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def load(config: SpeechConfig) -> dict:
    """Write a random checkpoint in parts of 2 GB, load it in another process; what that took of
    host memory."""
    with torch.device("meta"):
        state = SpeechLM(config).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        files, part = {}, {}
        size = total = 0
        for name, like in tqdm(state.items(), desc="writing a checkpoint"):
            part[name] = torch.zeros_like(like, device="cpu")
            if like.is_floating_point():
                part[name] = torch.randn(like.shape, dtype=torch.bfloat16)
            size += part[name].nbytes
            total += part[name].nbytes
            if size > 2e9 or len(files) + len(part) == len(state):
                file = f"model-{len(files):05}.safetensors"
                save_file(part, Path(folder, file))
                files |= dict.fromkeys(part, file)
                part = {}
                size = 0
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        Path(folder, "config.json").write_text(json.dumps(asdict(config)))
        command = [sys.executable, "-c", LOADER, folder]
        memory = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{total / 1e9:.2f} GB of weights took {memory / 1e9:.2f} GB of memory, "
        f"{memory / total:.3f} times as much"
    )
    return {"weights_gb": total / 1e9, "memory_gb": memory / 1e9, "ratio": memory / total}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", action="store_true", help="host memory of loading a checkpoint of the 2B shape"
    )
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "processor": processor(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path = RESULTS / "footprint.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if args.load:
        result["load"] = {**load(SHAPES["granite-speech-3.3-2b"]), "machine": machine}
    else:
        step = result["step"] = {
            "how": "measured" if gpu else "computed",
            "machine": machine,
            "shapes": {},
        }
        if not gpu:
            host = step["host_seconds"] = measure(NARROW, "cpu", 1, 20)["seconds"]
            host["sampling"] /= 20  # of a token
        for name, config in tqdm(SHAPES.items()):
            with contextlib.suppress(torch.OutOfMemoryError):  # then it is not in the table
                if gpu:
                    step["shapes"][name] = measure(config, "cuda", AUDIO, TOKENS)
                else:
                    step["shapes"][name] = compute(config, host)
        show(step)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
