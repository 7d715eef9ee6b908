"""GPU memory of a training step of the released models in the paper's setting, without a GPU.

    python -m experiments.footprint     a table in Markdown; experiments/results/footprint.json

The step is experiments.bench's of the workload "2b", with LoRA's dropout; its lengths are multiples
of nothing, as those of most batches are. COMPUTED: the same functions run through all layers on fake
tensors, which have a size but no contents, and a meter adds up what is alive at every operation.
They take the CPU's path; where that keeps more or less for the backward pass than CUDA's kernels
do, or asks for contents, a replacement stands in. No two responses share a prefix: the largest
case. In float32 sampling holds each adapted weight with its update added, too.

Beside the step stand the audio embeddings that a run holds: as much as the default --cache-gb lets
it, of the training rows, and those of the validation and test rows. Not counted: memory inside
kernels and of CUDA graphs, fragmentation and CUDA's context, for which the column "with allowance"
adds a tenth and 1 GB. experiments.gpu measures the same step on a card.
"""

import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from experiments import bench
from experiments.common import RESULTS, environment, table
from lora import apply_lora, lora_layers
from model import SpeechConfig, SpeechLM, TextConfig
from upkeep.files import write_json

# As in config.json of the released models on Hugging Face; of the 8B, as its model card (encoder,
# projector) and granite-3.1-8b-instruct say (decoder).
GRANITE_2B = bench.CONFIGS["2b"]
GRANITE_1B = SpeechConfig(
    replace(GRANITE_2B.encoder_config, output_dim=348),
    text_config=TextConfig(
        100353, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4
    ),
    tie_word_embeddings=False,
)
GRANITE_8B = SpeechConfig(
    GRANITE_2B.encoder_config, text_config=TextConfig(hidden_size=4096, intermediate_size=12800)
)
MODELS = {
    "granite-4.0-1b-speech": (GRANITE_1B, torch.bfloat16),
    "granite-speech-3.3-2b": (GRANITE_2B, torch.bfloat16),
    "granite-speech-3.3-2b, float32": (GRANITE_2B, torch.float32),
    "granite-speech-3.3-8b": (GRANITE_8B, torch.bfloat16),
}


class Meter(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def free(self, size: int):
        self.live -= size

    def restart(self):
        self.peak = self.live


class Card:
    """The same of a GPU, by PyTorch's own meter."""

    @property
    def peak(self):
        return torch.cuda.max_memory_allocated()

    def restart(self):
        torch.cuda.reset_peak_memory_stats()


def dropout(x, p, training, inplace):
    """As on CUDA, which keeps a mask of one byte per element; the CPU's keeps two."""
    return torch.native_dropout(x, p, training)[0] if training else x


def square(x, shape, weight, eps):
    """Stands in for F.rms_norm: for the backward pass it keeps its input alone, as CUDA's kernel
    does; the CPU's keep copies in float32, too."""
    return x.square()


attend = F.scaled_dot_product_attention


def attention(q, k, v, attn_mask=None, scale=None):
    """As on CUDA, which for the backward pass also keeps a copy of a mask whose rows do not begin at
    multiples of 8."""
    if attn_mask is not None and any(stride % 8 for stride in attn_mask.stride()[:-1]):
        length = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, 8 - length % 8))[..., :length]
    return attend(q, k, v, attn_mask=attn_mask, scale=scale)


def make_model(config: SpeechConfig, dtype) -> SpeechLM:
    torch.set_default_dtype(dtype)
    model = SpeechLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def a_step(model: SpeechLM, meter, work=bench.WORKLOADS["2b"]) -> dict[str, float]:
    """GB at most, by the meter, of sampling and of an update."""
    P, K, T = work.prompts, work.responses, work.tokens
    text = [1] * (work.text // 2)
    apply_lora(model, r=work.rank, alpha=2 * work.rank, dropout=0.05)
    case = bench.Case(
        mels=[],
        prompts=[[*text, model.config.audio_token_index, *text]] * P,
        tokens=torch.zeros(P, K, T, dtype=torch.int64),
        lengths=torch.full((P, K), T),
        logp=torch.zeros(P, K, T),
        advantages=torch.ones(P, K, T),
        update_prompts=work.update_prompts,
    )
    ours = bench.Ours(model, case)
    # Plain numbers, which fake tensors do not have; no two tokens are the same.
    ours.on_host = (np.arange(P * K * T).reshape(P, K, T), np.full((P, K), T))
    with torch.no_grad():
        ours.prompts = model.embed_prompts(case.prompts, list(heard(model, work)))
    meter.restart()
    ours.sample()
    sampling = meter.peak / 1e9
    meter.restart()
    ours.updates = ours.updates[:2]  # the first makes AdamW's moments, the second has them
    for layer in lora_layers(model).values():
        layer.train()
    ours.update(case.logp, case.logp)
    return {"sampling_gb": sampling, "update_gb": meter.peak / 1e9}


def heard(model: SpeechLM, work: bench.Workload) -> torch.Tensor:
    """Silence of a workload's length, as embeddings."""
    width = model.config.text_config.hidden_size
    return torch.zeros(
        work.prompts, model.projector.count(50 * work.audio), width, dtype=model.dtype
    )


def compute(config: SpeechConfig, dtype, work=bench.WORKLOADS["2b"]) -> dict[str, float]:
    """Parameters, GB of a step, and of what a run holds beside it."""
    with (
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(F, "rms_norm", square),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch("model.sort_ascending", lambda q: q.sort(-1).values),
        # sample() asks whether all responses have ended: yes after the second token, by when all
        # that is large was there.
        mock.patch.object(torch.Tensor, "all", side_effect=[False, True]),
        FakeTensorMode(allow_non_fake_inputs=True),  # the tokens, from the host
        Meter() as meter,
    ):
        model = make_model(config, dtype)
        parameters = sum(p.numel() for p in model.parameters())
        sizes = a_step(model, meter, work)
        of_a_row = heard(model, work)[0].nbytes / 1e9
    rows = train.Config.validation_rows + train.Config.test_rows
    held = train.Config.cache_gb + rows * of_a_row
    allowed = 1.1 * (max(sizes.values()) + held) + 1
    return {"parameters": parameters, **sizes, "held_gb": held, "with_allowance_gb": allowed}


def main():
    rows = []
    result = {"environment": environment(), "models": {}}
    for name, model in MODELS.items():
        sizes = result["models"][name] = compute(*model)
        parameters, *gigabytes = sizes.values()
        cells = [f"{gb:.1f} GB" for gb in gigabytes]
        rows.append([f"{name}, {parameters / 1e9:.2f}e9", *cells])
    print(table(["model, parameters", "sampling", "update", "held", "with allowance"], rows))
    write_json(RESULTS / "footprint.json", result)


if __name__ == "__main__":
    main()
