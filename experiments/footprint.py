"""GPU memory and seconds of one training step at the size of the released models, with the paper's settings.

    python -m experiments.footprint           a table of all shapes, in Markdown, and experiments/results/footprint.json
    python -m experiments.footprint --load    host memory of loading a checkpoint of the 2B shape (6 GB of disk)

One step is 6 prompts x 8 responses x 200 tokens on 15 s of audio and 50 tokens of text: sampling without an
end-of-sequence token, reference log-probabilities with LoRA off, and 6 updates of LoRA (r 64, dropout 0.05, on the
decoder's seven projections) with AdamW, one prompt at a time. Weights are random and bf16.

With a GPU everything is MEASURED, with PyTorch's own counters. Without one everything is COMPUTED:

Memory: the same functions run on fake tensors of the true shapes, all layers, which have a size but no contents, and a
meter adds up what is allocated at every operation of forward, backward and optimiser. The fake tensors take the CPU's
path, whose fused attention keeps for the backward pass what CUDA's fused kernels keep: queries, keys, values, output,
mask and one number per row. Two things are done apart: a fake rollout stops after its first token, by when cache,
prefill and logits, all that is large in it, have been there; and audio is heard for real on the CPU by an encoder with
2 layers of true width, since without gradients the number of layers makes no difference but for their weights. Not in
the count are memory inside kernels, fragmentation and CUDA's context, for which a tenth and 0.5 GB are added.

Time: an update and a reference are their floating-point operations, which the meter counts too, at 40% of a GPU's
published dense bf16 rate. A decoding step reads all decoder weights, LoRA (float32, and a bf16 copy written and read)
and half of the final cache once, at the published bandwidth. Neither is faster than Python can launch the kernels; how
long that takes is measured on this machine's CPU: the same functions, real, on 40 layers too narrow for the arithmetic
to matter. That is rather more than a GPU's launches take on a fast processor. Not in the count: rewards, credit, and
hearing, which happens once per recording and not once per step.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import leaf
from experiments.keep import RESULTS, processor
from lora import apply_lora, lora_disabled, lora_layers, lora_parameters
from model import EncoderConfig, ProjectorConfig, SpeechConfig, SpeechLM, TextConfig

# Encoder and projector as in the model card (github.com/ibm-granite/granite-speech-models, revision 3.3.2); decoders as
# in config.json of granite-3.1-2b-instruct, granite-3.1-8b-instruct and granite-4.0-1b-speech on Hugging Face.
SHAPES = {
    "granite-4.0-1b-speech": SpeechConfig(
        EncoderConfig(num_layers=16, output_dim=348),
        text_config=TextConfig(vocab_size=100353, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4),
        audio_token_index=100352, tie_word_embeddings=False),
    "granite-speech-3.3-2b": SpeechConfig(EncoderConfig(num_layers=16, output_dim=256)),
    "granite-speech-3.3-8b": SpeechConfig(
        EncoderConfig(num_layers=16, output_dim=256), text_config=TextConfig(hidden_size=4096, intermediate_size=12800)),
}  # fmt: skip
NARROW = SpeechConfig(
    EncoderConfig(num_layers=2, hidden_dim=32, num_heads=2, dim_head=16),
    ProjectorConfig(hidden_size=32, num_attention_heads=2, intermediate_size=32, encoder_hidden_size=32),
    TextConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1),
    audio_token_index=63,
)
# GB of memory, GB/s, dense bf16 FLOP/s with float32 accumulation, from NVIDIA's data sheets (Ada's white paper for the
# RTX 4090; half of the sparse figures they print).
GPUS = {"RTX 4090": (24, 1008, 165.2e12), "L40S": (48, 864, 362.05e12), "H100 SXM": (80, 3350, 989.4e12)}
PROMPTS, RESPONSES, TOKENS, SECONDS, TEXT = 6, 8, 200, 15, 50

aten = torch.ops.aten
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward],
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Counts bytes of tensor storage alive, their peak, and floating-point operations."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.flops, self.seen = 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def free(self, size: int):
        self.live -= size


# ---------------------------------------------------------------------------------------------------------------------
# One step as train.train_policy takes it, in parts


def build(config: SpeechConfig, device):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = SpeechLM(config).eval()
    torch.set_default_dtype(torch.float32)
    apply_lora(model, r=64, alpha=128, dropout=0.05)
    return model, torch.optim.AdamW(lora_parameters(model).values(), lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0)


@torch.no_grad()
def hear(model, seconds: int):
    return model.project(model.encode([torch.randn(50 * seconds, 160, device=model.device)] * PROMPTS))


@torch.no_grad()
def embed(model, audio):
    return model.embed_prompts([[1] * (TEXT // 2) + [model.config.audio_token_index] + [1] * (TEXT // 2)] * PROMPTS, audio)


def sample(model, prompts, T: int):
    return model.sample(prompts, torch.rand(PROMPTS, RESPONSES, T, device=model.device), -1, 1.0, 0.9)


@torch.no_grad()
def reference(model, prompts, tokens):
    with lora_disabled(model):
        return model.response_logp(prompts, tokens)[0]


def update(model, adam, prompts, tokens, ref_logp):
    for layer in lora_layers(model).values():
        layer.train()
    logp = model.response_logp(prompts, tokens)[0]
    loss, _ = leaf.policy_loss(logp, ref_logp, ref_logp, torch.ones_like(logp), torch.ones_like(logp).bool())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    model.eval()


def measure(config: SpeechConfig, device: str, seconds: int, T: int, steps: int = 3) -> dict:
    """Seconds of each part, of the fastest of some real steps, and on a GPU its peak memory."""
    model, adam = build(config, device)
    gpu, took, peak = device == "cuda", {}, {}

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

    for _ in range(steps):
        with part("hearing"):
            audio = hear(model, seconds)
        prompts = embed(model, audio)
        with part("sampling"):
            tokens = sample(model, prompts, T).tokens
        each = range(PROMPTS)
        with part("reference"):
            ref_logp = [reference(model, prompts[[i]], tokens[[i]]) for i in each]
        with part("update"):
            for i in each:
                update(model, adam, prompts[[i]], tokens[[i]], ref_logp[i])
    return {"peak_gb": peak, "seconds": took}


# ---------------------------------------------------------------------------------------------------------------------
# The same without a GPU


def count(config: SpeechConfig) -> dict:
    """Bytes and floating-point operations of each part; those of reference and update are one prompt's."""
    shallow = dataclasses.replace(
        config, encoder_config=dataclasses.replace(config.encoder_config, num_layers=2),
        text_config=dataclasses.replace(config.text_config, num_hidden_layers=1))  # fmt: skip
    with Meter() as meter:
        model, _ = build(shallow, "cpu")
        before = meter.live
        n_audio = len(hear(model, SECONDS)[0])
        hearing = meter.peak - before
    del model

    # CUDA's dropout is one kernel that keeps a mask of one byte per element; the CPU's would keep two.
    def dropout(x, p, training, inplace):
        return torch.native_dropout(x, p, training)[0]

    peak, flops = {}, {}
    with FakeTensorMode(), Meter() as meter, mock.patch.object(F, "dropout", dropout):
        model, adam = build(config, "cpu")
        text = model.language_model
        lora = sum(p.numel() for p in lora_parameters(model).values())
        parameters = sum(p.numel() for p in model.parameters()) - lora
        decoder = sum(p.numel() for p in text.parameters()) - lora
        weights = meter.live - 4 * lora
        peak["hearing"] = meter.live + hearing
        prompts = embed(model, [torch.empty(n_audio, config.text_config.hidden_size, dtype=model.dtype)] * PROMPTS)
        tokens = torch.zeros(PROMPTS, RESPONSES, TOKENS, dtype=torch.int64)
        parts = {
            "sampling": lambda: sample(model, prompts, TOKENS),
            "reference": lambda: reference(model, prompts[[0]], tokens[[0]]),
            "first update": lambda: update(model, adam, prompts[[0]], tokens[[0]], torch.zeros(RESPONSES, TOKENS)),
        }
        parts["update"] = parts["first update"]  # from the second on, AdamW's moments are there
        for name, run in parts.items():
            meter.peak, meter.flops = meter.live, 0
            with contextlib.suppress(DataDependentOutputException):  # have all ended? A fake tensor does not know
                run()
            peak[name], flops[name] = meter.peak, meter.flops
    c = config.text_config
    width = c.num_key_value_heads * (c.head_dim or c.hidden_size // c.num_attention_heads)
    slots = PROMPTS * (n_audio + TEXT + RESPONSES * TOKENS)
    return {
        "parameters": parameters, "decoder_parameters": decoder, "lora_parameters": lora, "weights_gb": weights / 1e9,
        "cache_gb": c.num_hidden_layers * 2 * slots * width * 2 / 1e9,
        "peak_gb": {name: value / 1e9 for name, value in peak.items() if name != "first update"},
        "tflop": {name: flops[name] / 1e12 for name in ("reference", "update")},
    }  # fmt: skip


def estimate(counted: dict, host: dict, gpu: str) -> dict:
    """Seconds of each part of a step on a GPU."""
    _, bandwidth, rate = GPUS[gpu]
    read = (counted["decoder_parameters"] * 2 + counted["lora_parameters"] * 8) / 1e9 + counted["cache_gb"] / 2
    floor = {name: PROMPTS * counted["tflop"][name] * 1e12 / (0.4 * rate) for name in ("reference", "update")}
    floor["sampling"] = TOKENS * read / bandwidth
    return {name: max(host[name], floor[name]) for name in host}


# ---------------------------------------------------------------------------------------------------------------------
# Loading


LOADER = """
import resource, sys, time
from model import SpeechLM
import torch
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
began = time.time()
model = SpeechLM.from_pretrained(sys.argv[1], "cpu", torch.bfloat16)
for tensor in model.state_dict().values():
    tensor.max()  # the file is mapped: touch every page
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e9, time.time() - began)
"""


def load(config: SpeechConfig) -> dict:
    """Write a random checkpoint in parts of 2 GB, load it in another process, and say what that took of memory."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            state = SpeechLM(config).state_dict()
        files, shard, size, total = {}, {}, 0, 0
        for i, (name, tensor) in enumerate(tqdm(state.items(), desc="writing a checkpoint")):
            random = tensor.is_floating_point()
            shard[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_() if random else torch.zeros_like(tensor, device="cpu")
            size += shard[name].nbytes
            if size > 2e9 or i == len(state) - 1:
                file = f"model-{len(set(files.values())) + 1:05}.safetensors"
                save_file(shard, Path(folder, file))
                files |= dict.fromkeys(shard, file)
                shard, size, total = {}, 0, total + size
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        Path(folder, "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        printed = subprocess.run([sys.executable, "-c", LOADER, folder], check=True, capture_output=True, text=True).stdout
    memory, seconds = map(float, printed.split())
    return {"weights_gb": total / 1e9, "memory_gb": memory, "ratio": memory / (total / 1e9), "seconds": seconds}


# ---------------------------------------------------------------------------------------------------------------------


def show(step: dict):
    gpus = list(dict.fromkeys(gpu for shape in step["shapes"].values() for gpu in shape["seconds"]))
    parts = ("hearing", "sampling", "reference", "update")
    print(f"\n{step['how']}; GB is 1e9 bytes; seconds are sampling + reference + update\n")
    print("| model | parameters | " + " | ".join(f"{part}, GB" for part in parts) + " | with allowance | "
          + " | ".join(f"{gpu}, s per step" for gpu in gpus) + " |")  # fmt: skip
    print("|---" * (3 + len(parts) + len(gpus)) + "|")
    for name, shape in step["shapes"].items():
        cells = [name, f"{shape['parameters'] / 1e9:.2f}e9"] + [f"{shape['peak_gb'][part]:.1f}" for part in parts]
        cells.append(f"{shape['with_allowance_gb']:.1f}")
        for gpu in gpus:
            took = [shape["seconds"].get(gpu, {}).get(part) for part in parts[1:]]
            cells.append(f"{sum(took):.1f} = " + " + ".join(f"{t:.1f}" for t in took) if took[0] else "does not fit")
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="store_true", help="host memory of loading a checkpoint of the 2B shape")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": processor(), "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__}
    path = RESULTS / "footprint.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if args.load:
        result["load"] = load(SHAPES["granite-speech-3.3-2b"]) | {"machine": machine}
        print("loaded {weights_gb:.2f} GB of weights with {memory_gb:.2f} GB of memory, {ratio:.3f} times as much, "
              "in {seconds:.0f} s".format(**result["load"]))  # fmt: skip
    else:
        step = {"how": "measured" if gpu else "computed, see footprint.py", "machine": machine, "shapes": {}}
        host = None
        if not gpu:
            T = 16
            host = measure(NARROW, "cpu", seconds=1, T=T)["seconds"]
            step["host_seconds"] = host = {"sampling": host["sampling"] / T * TOKENS} | {
                part: host[part] for part in ("reference", "update")}  # fmt: skip
        for name, config in tqdm(SHAPES.items()):
            shape = measure(config, "cuda", SECONDS, TOKENS) if gpu else count(config)
            shape["with_allowance_gb"] = 1.1 * max(shape["peak_gb"].values()) + 0.5
            if not gpu:
                fits = [gpu for gpu, (memory, _, _) in GPUS.items() if shape["with_allowance_gb"] <= memory]
                shape["seconds"] = {gpu: estimate(shape, host, gpu) for gpu in fits}
            step["shapes"][name] = shape
        result["step"] = step
        show(step)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
