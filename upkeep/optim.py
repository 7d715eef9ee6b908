"""The optimiser's step and its learning rate."""

import math

import torch
from tqdm import tqdm

from upkeep.errors import UserError


def learning_rate(peak: float, warmup: float, progress: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to a tenth of the peak; progress runs
    from 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (0.1 + 0.9 * cosine)


class Updater:
    """AdamW that clips the gradient's norm, skips gradients that are not finite, and gives up after
    ten of them in a row.

    buffers: what a forward pass changes (BatchNorm's statistics); a step that is skipped leaves
    them, too, as they were at zero_grad().
    """

    def __init__(self, parameters, grad_clip: float, buffers=()):
        self.parameters = list(parameters)
        self.grad_clip = grad_clip
        self.buffers = list(buffers)
        self.skipped = 0
        self.adam = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.zero_grad()

    def zero_grad(self):
        """Before the forward pass: forget the last step's gradients."""
        self.adam.zero_grad(set_to_none=True)
        self.buffers_before = [buffer.clone() for buffer in self.buffers]

    def step(self, lr: float) -> float:
        """Apply the gradients; returns their norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip))
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.skipped = 0
        else:
            for buffer, before in zip(self.buffers, self.buffers_before):
                buffer.copy_(before)
            self.skipped += 1
            tqdm.write(f"skipped an update: gradient norm {norm} ({self.skipped} in a row)")
            if self.skipped == 10:
                raise UserError(
                    "10 updates in a row were not finite; lower the learning rate, or --dtype float32"
                )
        return norm
