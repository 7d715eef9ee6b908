"""The speech-aware language model, and how it is sampled and scored.

One architecture, that of IBM's Granite Speech (arXiv 2505.08699), in any size:

    log-mel (T, 160)  two 80-mel frames stacked, 50 per second (data.py)
      -> encoder      Conformer: block-wise attention, Shaw's positions, self-conditioned CTC
      -> projector    window Q-Former: 15 frames -> 3 embeddings, 10 per second
      -> decoder      Granite: llama-like, with multipliers on what is added up

Module names are the released safetensors names. Shapes in comments: B batch, T frames or response
tokens, C channels, H heads, D head width, P prompts, K responses per prompt, L prompt length,
S sequence length, V vocabulary.

Padding never changes a result: every convolution, attention and statistic that could see a padded
frame masks it or finds zeros there.

What K responses to one prompt share is computed once: the prompt's keys and values, which each
response has before its own while it is sampled (DecodingCache) and when it is scored (PromptCache);
equal responses are scored as one.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from lora import lora_for_sampling
from upkeep.errors import errors_of_reading
from upkeep.files import read_json
from upkeep.tensors import read_tensors

# All attention here has a mask, and its shapes differ from batch to batch. cuDNN's kernels, which
# PyTorch prefers on recent cards, plan for every new shape anew, which takes up to a second, and
# keep each plan for good; the memory-efficient ones do not.
torch.backends.cuda.enable_cudnn_sdp(False)

# --------------------------------------------------------------------------------------------------
# Shape of the model. Field names and file format are those of a Granite Speech config.json.


@dataclass
class EncoderConfig:
    input_dim: int = 160
    num_layers: int = 10
    hidden_dim: int = 1024
    feedforward_mult: int = 4
    num_heads: int = 8
    dim_head: int = 128
    output_dim: int = 42  # CTC classes, blank = 0 included
    context_size: int = 200  # frames per attention block
    max_pos_emb: int = 512
    dropout: float = 0.1
    conv_kernel_size: int = 15
    conv_expansion_factor: int = 2
    cat_hidden_layers: list = field(
        default_factory=list
    )  # joined to the last layer's; 0: the input


@dataclass
class ProjectorConfig:
    hidden_size: int = 1024
    num_hidden_layers: int = 2
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    encoder_hidden_size: int = 1024
    cross_attention_frequency: int = 1
    layer_norm_eps: float = 1e-12


@dataclass
class TextConfig:
    vocab_size: int = 49160
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # default: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # the scale of q k^T
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it


@dataclass
class SpeechConfig:
    encoder_config: EncoderConfig = field(default_factory=EncoderConfig)
    projector_config: ProjectorConfig = field(default_factory=ProjectorConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    audio_token_index: int = 49159
    window_size: int = 15
    downsample_rate: int = 5
    tie_word_embeddings: bool = True


# --------------------------------------------------------------------------------------------------
# Encoder: Conformer (Gulati et al. 2020) with Shaw's relative positions (2018) and self-conditioned
# CTC (Nozaki & Komatsu 2021). `mask` (B, T) is true on real frames.


class ConformerFeedForward(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.pre_norm = nn.LayerNorm(c.hidden_dim)
        self.up_proj = nn.Linear(c.hidden_dim, c.hidden_dim * c.feedforward_mult)
        self.down_proj = nn.Linear(c.hidden_dim * c.feedforward_mult, c.hidden_dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        x = self.dropout(F.silu(self.up_proj(self.pre_norm(x))))
        return self.dropout(self.down_proj(x))


class ConformerAttention(nn.Module):
    """Self-attention in blocks of `context_size` frames, with an embedding of each distance."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        inner = c.num_heads * c.dim_head
        self.num_heads = c.num_heads
        self.context_size = c.context_size
        self.max_pos_emb = c.max_pos_emb
        self.pre_norm = nn.LayerNorm(c.hidden_dim)
        self.to_q = nn.Linear(c.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(c.hidden_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, c.hidden_dim)
        self.rel_pos_emb = nn.Embedding(2 * c.max_pos_emb + 1, c.dim_head)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, mask):
        B, T, _ = x.shape
        block = min(self.context_size, T)  # a short clip needs no padding up to a whole block
        n_blocks = math.ceil(T / block)
        pad = n_blocks * block - T
        x = F.pad(self.pre_norm(x), (0, 0, 0, pad))
        mask = F.pad(mask, (0, pad)).view(B * n_blocks, 1, 1, block)

        def heads(y):  # (B, n_blocks * block, H * D) -> (B * n_blocks, H, block, D)
            return y.view(B * n_blocks, block, self.num_heads, -1).transpose(1, 2)

        q = heads(self.to_q(x))
        k, v = map(heads, self.to_kv(x).chunk(2, dim=-1))
        scale = q.shape[-1] ** -0.5
        position = torch.arange(block, device=x.device)
        distance = position[:, None] - position + self.max_pos_emb  # (block, block)
        bias = torch.einsum("bhqd,qkd->bhqk", q, self.rel_pos_emb(distance)) * scale
        # A very negative number and not -inf: a block of padding alone must not turn into NaN.
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out = out.transpose(1, 2).reshape(B, T + pad, -1)[:, :T]
        return self.dropout(self.to_out(out))


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over real frames only: in training, padded frames enter no statistic."""

    def forward(self, x, mask):  # (B, T, C) -> (B, T, C)
        if not self.training:  # its statistics are given, so padded frames do no harm
            return super().forward(x.flatten(0, 1)).view_as(x)
        out = torch.zeros_like(x)
        out[mask] = super().forward(x[mask])
        return out


class ConformerConv(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        inner = c.hidden_dim * c.conv_expansion_factor
        self.norm = nn.LayerNorm(c.hidden_dim)
        self.up_conv = nn.Conv1d(c.hidden_dim, 2 * inner, 1)
        depthwise = nn.Conv1d(inner, inner, c.conv_kernel_size, groups=inner, bias=False)
        self.depth_conv = nn.ModuleDict({"conv": depthwise})
        self.padding = (c.conv_kernel_size // 2, (c.conv_kernel_size - 1) // 2)
        self.batch_norm = MaskedBatchNorm(inner)
        self.down_conv = nn.Conv1d(inner, c.hidden_dim, 1)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, mask):
        x = F.glu(self.up_conv(self.norm(x).transpose(1, 2)), dim=1)  # (B, C, T)
        # Beyond the end is silence, as for a single recording.
        x = F.pad(x * mask[:, None], self.padding)
        x = self.depth_conv["conv"](x)
        x = F.silu(self.batch_norm(x.transpose(1, 2), mask))
        return self.dropout(self.down_conv(x.transpose(1, 2)).transpose(1, 2))


class ConformerBlock(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.ff1 = ConformerFeedForward(c)
        self.attn = ConformerAttention(c)
        self.conv = ConformerConv(c)
        self.ff2 = ConformerFeedForward(c)
        self.post_norm = nn.LayerNorm(c.hidden_dim)

    def forward(self, x, mask):
        x = x + 0.5 * self.ff1(x)
        x = x + self.attn(x, mask)
        x = x + self.conv(x, mask)
        x = x + 0.5 * self.ff2(x)
        return self.post_norm(x)


class CTCEncoder(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.input_linear = nn.Linear(c.input_dim, c.hidden_dim)
        self.layers = nn.ModuleList(ConformerBlock(c) for _ in range(c.num_layers))
        self.out = nn.Linear(c.hidden_dim, c.output_dim)
        self.out_mid = nn.Linear(c.output_dim, c.hidden_dim)
        self.cat_hidden_layers = c.cat_hidden_layers

    def forward(self, mel, lengths):
        """mel (B, T, 160), lengths (B,) in frames -> frames (B, T, C), of cat_hidden_layers and the
        last layer side by side, and the middle layer's CTC logits (B, T, classes)."""
        mask = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        x = self.input_linear(mel)
        kept = [x] if 0 in self.cat_hidden_layers else []
        middle_logits = None
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x, mask)
            if i == len(self.layers) // 2:  # later layers are told the transcript so far
                middle_logits = self.out(x)
                x = x + self.out_mid(middle_logits.softmax(-1))
            if i in self.cat_hidden_layers:
                kept.append(x)
        x = torch.cat((*kept, x), dim=-1)
        # Zeros past the end are what the projector's last window must see.
        return x * mask[..., None], middle_logits


# --------------------------------------------------------------------------------------------------
# Projector: BLIP-2's Q-Former (Li et al. 2023), the same few queries in every window of 15 frames


class AddAndNorm(nn.Module):
    """LayerNorm(W x + residual), the end of every part of a layer."""

    def __init__(self, size_in: int, c: ProjectorConfig):
        super().__init__()
        self.dense = nn.Linear(size_in, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, c: ProjectorConfig, source_size: int):
        super().__init__()
        self.num_heads = c.num_attention_heads
        sizes = {"query": c.hidden_size, "key": source_size, "value": source_size}
        self.attention = nn.ModuleDict(
            {name: nn.Linear(size, c.hidden_size) for name, size in sizes.items()}
        )
        self.output = AddAndNorm(c.hidden_size, c)

    def forward(self, x, source):  # (B, S, C), (B, S_source, C_source) -> (B, S, C)
        q, k, v = (
            self.attention[name](y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name, y in (("query", x), ("key", source), ("value", source))
        )  # (B, H, S or S_source, D)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output(out.transpose(1, 2).flatten(2), x)


class QFormerLayer(nn.Module):
    def __init__(self, c: ProjectorConfig, index: int):
        super().__init__()
        self.attention = QFormerAttention(c, c.hidden_size)
        if index % c.cross_attention_frequency == 0:
            self.crossattention = QFormerAttention(c, c.encoder_hidden_size)
        dense = nn.Linear(c.hidden_size, c.intermediate_size)
        self.intermediate_query = nn.ModuleDict({"dense": dense})
        self.output_query = AddAndNorm(c.intermediate_size, c)

    def forward(self, x, frames):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, frames)
        return self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)


class QFormer(nn.Module):
    def __init__(self, c: ProjectorConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        layers = nn.ModuleList(QFormerLayer(c, i) for i in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, queries, frames):
        x = self.layernorm(queries)
        for layer in self.encoder["layer"]:
            x = layer(x, frames)
        return x


class Projector(nn.Module):
    def __init__(self, c: SpeechConfig):
        super().__init__()
        self.window_size = c.window_size
        self.num_queries = c.window_size // c.downsample_rate
        self.query = nn.Parameter(torch.randn(1, self.num_queries, c.projector_config.hidden_size))
        self.qformer = QFormer(c.projector_config)
        self.linear = nn.Linear(c.projector_config.hidden_size, c.text_config.hidden_size)

    def forward(self, frames, lengths):
        """frames (B, T, C), zeros past lengths (B,) -> audio embeddings (B, N, C_text), and how
        many of them are real (B,)."""
        B, T, C = frames.shape
        n_windows = math.ceil(T / self.window_size)
        frames = F.pad(frames, (0, 0, 0, n_windows * self.window_size - T))
        frames = frames.view(B * n_windows, self.window_size, C)
        out = self.qformer(self.query.expand(B * n_windows, -1, -1), frames)
        return self.linear(out).view(B, n_windows * self.num_queries, -1), self.count(lengths)

    def count(self, n_frames):
        """Audio embeddings made from n_frames encoder frames (an int or a tensor)."""
        return (n_frames + self.window_size - 1) // self.window_size * self.num_queries


# --------------------------------------------------------------------------------------------------
# Decoder


class PromptCache:
    """Keys and values (P, H_kv, L, D) of P prompts in every layer, with their gradient. It serves
    two passes through the decoder. The first, over the prompts, stores them. Then use_for says which
    prompt each row continues, and the second, over the rows, has them before each row's own."""

    def __init__(self):
        self.layers = []  # (keys, values) of each
        self.prompt_of = None

    def use_for(self, prompt_of):
        """prompt_of (R,): the number of each row's prompt."""
        self.prompt_of = prompt_of

    def update(self, layer: int, k, v):
        """k, v (B, H_kv, S, D) of new tokens -> all that these attend to, their own included."""
        if self.prompt_of is None:
            self.layers.append((k, v))
            return k, v
        keys, values = (x.index_select(0, self.prompt_of) for x in self.layers[layer])
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


class DecodingCache:
    """Keys and values (P * K, H_kv, L + T, D) in every layer of K responses to each prompt, which
    grow token by token.

    Before a pass of S tokens, `slots` (S,) says where their keys and values go, and `end` how many
    of the positions are looked at. In a CUDA graph `slots` is computed from a tensor and so moves on
    with each replay; `end` is a constant there, L + T.
    """

    def __init__(self, prompts: PromptCache, K: int, T: int):
        self.layers = []
        for layer in prompts.layers:
            # Zeros, since what nobody sees yet is multiplied by 0.
            room = [F.pad(x.repeat_interleave(K, dim=0), (0, 0, 0, T)) for x in layer]
            self.layers.append(room)

    def update(self, layer: int, k, v):
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        return keys[:, :, : self.end], values[:, :, : self.end]


def head_dim(c: TextConfig) -> int:
    return c.head_dim or c.hidden_size // c.num_attention_heads


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021) on x (B, H, S, D): numbers i and i + D / 2 are a point, which
    is turned. cos, sin (B, 1, S, D); the rotation's minus sign is in sin's first half, see Decoder."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped queries: H / H_kv query heads share a key-value head."""

    def __init__(self, c: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim(c)
        self.scale = c.attention_multiplier
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, bias, cache):  # (B, S, C) -> (B, S, C)
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, S, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H_kv, S, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        # Grouped queries. Fused kernels refuse enable_gqa=True together with a mask. So the query
        # heads that share a key head are stacked along the positions, as one head of H / H_kv * S.
        # Decoder.forward repeats the rows of bias to match: (B, 1, H / H_kv * S, S_kv).
        B, H, S, D = q.shape
        q = q.reshape(B, k.shape[1], -1, D)  # (B, H_kv, H / H_kv * S, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        out = out.reshape(B, H, S, D).transpose(1, 2).flatten(2)  # (B, S, H * D)
        return self.o_proj(out)


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: TextConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.residual_multiplier = c.residual_multiplier

    def forward(self, x, cos, sin, bias, cache):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, bias, cache)
        x = x.add(attended, alpha=self.residual_multiplier)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.residual_multiplier)


class Decoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, positions, mask, cache=None):
        """Embeddings x (B, S, C) at positions (B, S) -> hidden states (B, S, C).

        mask (B, S, S_kv), bool: true where a token sees another, or what is in the cache. Every
        token must see at least one: a softmax over nothing is NaN.
        """
        c = self.config
        x = x * c.embedding_multiplier
        D = head_dim(c)
        exponent = torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D
        angle = positions[:, None, :, None] * c.rope_theta**-exponent  # (B, 1, S, D / 2)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1).to(x.dtype)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1).to(x.dtype)
        # The mask as numbers to add to the scores, repeated for each query head of a group (see
        # Attention). Padded and then cut, so that its rows begin at multiples of 8 in memory:
        # otherwise CUDA's kernels make an aligned copy in every layer, and keep it.
        group = c.num_attention_heads // c.num_key_value_heads
        S_kv = mask.shape[-1]
        mask = F.pad(mask, (0, -S_kv % 8)).repeat(1, group, 1)[:, None]
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)[..., :S_kv]
        for layer in self.layers:
            x = layer(x, cos, sin, bias, cache)
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, c: TextConfig, tied: bool):
        super().__init__()
        self.model = Decoder(c)
        if not tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """Next-token logits (..., V) of hidden states (..., C), in float32: a log-softmax in bf16
        would lose what the importance ratio is made of."""
        hidden = hidden / self.model.config.logits_scaling  # C numbers to divide, not V
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden).float()
        return F.linear(hidden, self.model.embed_tokens.weight).float()


# --------------------------------------------------------------------------------------------------
# One token drawn


def draw_token(logits, u, temperature: float, top_p: float):
    """One token per row of logits (..., V), where the cumulative distribution passes u (...), which
    is uniform in [0, 1).

    Returns token (...), log q (after temperature and top-p truncation and renormalisation; 0 for
    temperature 0, which is greedy) and log p (full softmax).
    """
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
        logq = torch.zeros_like(u)
    else:
        q = nucleus((logits / temperature).softmax(-1), top_p)
        mass = q.cumsum(-1)
        total = mass[..., -1:]  # what top-p left of it
        token = torch.searchsorted(mass, u[..., None] * total, right=True)
        token = token.clamp(max=q.shape[-1] - 1)
        # Rounding may step past the end or, in a sum made in parallel, onto a token of no
        # probability: then the likeliest.
        token = torch.where(q.gather(-1, token) > 0, token, q.argmax(-1, keepdim=True))
        logq = (q.gather(-1, token) / total).log()[..., 0]
    return token[..., 0], logq, logp.gather(-1, token)[..., 0]


def nucleus(q, top_p: float):
    """Probabilities (..., V), zero outside the smallest set of likeliest tokens whose mass reaches
    top_p (Holtzman et al. 2020). Tokens as likely as the least of them stay, too."""
    if top_p == 1:
        return q
    ordered = sort_ascending(q)
    mass = ordered.cumsum(-1)
    # How many of the least likely tokens go: as many as together have no more than 1 - top_p.
    n_cut = torch.searchsorted(mass, mass[..., -1:] - top_p, right=True)
    least = ordered.gather(-1, n_cut.clamp(max=q.shape[-1] - 1))  # the least likely that stays
    return q.masked_fill(q < least, 0)


def sort_ascending(q):
    if q.device.type != "cpu":
        return q.sort(-1).values
    # numpy sorts with vector instructions: ten times as fast as torch on the CPU.
    return torch.from_numpy(np.sort(q.numpy(), axis=-1))


# --------------------------------------------------------------------------------------------------
# Prompts and responses


@dataclass
class Prompts:
    """P prompts as embeddings, audio included; padded on the left, so that all end together."""

    x: torch.Tensor  # (P, L, C)
    valid: torch.Tensor  # (P, L) bool, false on padding

    def __getitem__(self, rows):
        return Prompts(self.x[rows], self.valid[rows])

    @property
    def positions(self):  # (P, L): they count real tokens only
        return (self.valid.cumsum(1) - 1).clamp(min=0)

    @property
    def mask(self):  # (P, L, L): who sees whom. Padding sees itself, or its softmax would be NaN
        L = self.valid.shape[1]
        causal = torch.ones(L, L, dtype=torch.bool, device=self.valid.device).tril()
        itself = torch.eye(L, dtype=torch.bool, device=self.valid.device)
        return self.valid[:, None] & causal | itself


@dataclass
class Rollout:
    """K responses to each of P prompts; entries past a response's length mean nothing."""

    tokens: torch.Tensor  # (P, K, T) int64
    lengths: torch.Tensor  # (P, K) int64, the end-of-sequence token included where it was sampled
    logq: torch.Tensor  # (P, K, T) log-probability under the sampling distribution: -surprisal
    logp: torch.Tensor  # (P, K, T) log-probability under the full softmax at temperature 1

    @property
    def mask(self):  # (P, K, T): from lengths and not from token ids, so that EOS is trained
        T = self.tokens.shape[2]
        return torch.arange(T, device=self.tokens.device) < self.lengths[..., None]

    def trimmed(self) -> "Rollout":
        """Without what comes after the longest response."""
        T = int(self.lengths.max())
        return Rollout(self.tokens[..., :T], self.lengths, self.logq[..., :T], self.logp[..., :T])

    def to(self, device) -> "Rollout":
        return Rollout(*(tensor.to(device) for tensor in vars(self).values()))


# --------------------------------------------------------------------------------------------------
# Responses while they are sampled


class Sampling:
    """K responses to each of P prompts while they are sampled, as B = P * K sequences.

    All tensors keep their shape and place from token to token, and nothing here waits for the
    device: so a CUDA graph can hold a step.
    """

    def __init__(self, model: "SpeechLM", prompts: Prompts, noise, eos_id, temperature, top_p):
        P, K, T = noise.shape
        device = model.device
        self.model, self.noise, self.eos_id = model, noise, eos_id
        self.temperature, self.top_p = temperature, top_p
        self.L = prompts.x.shape[1]
        integers = {"dtype": torch.int64, "device": device}
        self.rollout = Rollout(
            tokens=torch.zeros(P, K, T, **integers),
            lengths=torch.zeros(P, K, **integers),
            logq=torch.zeros(P, K, T, device=device),
            logp=torch.zeros(P, K, T, device=device),
        )
        self.ended = torch.zeros(P, K, dtype=torch.bool, device=device)
        self.t = torch.zeros(1, **integers)  # how many tokens each response has

        self.last_position = prompts.positions[:, -1:].repeat_interleave(K, dim=0)  # (B, 1)
        seen = F.pad(prompts.valid, (0, T))  # (P, L + T): the prompt, and no token yet
        self.seen = seen.repeat_interleave(K, dim=0)[:, None]  # (B, 1, L + T)

    def first_token(self, prompts: Prompts):
        """The prompts, once each: their last hidden states give the first token of K responses."""
        _, K, T = self.noise.shape
        cache = PromptCache()
        decoder = self.model.language_model.model
        hidden = decoder(prompts.x, prompts.positions, prompts.mask, cache)
        self.cache = DecodingCache(cache, K, T)
        self.append(hidden[:, -1:].expand(-1, K, -1))

    def append(self, hidden):
        """Draw the token that follows hidden states (P, K, C), and store it."""
        u = self.noise.index_select(2, self.t)[..., 0]  # (P, K)
        logits = self.model.language_model.logits(hidden)
        token, logq, logp = draw_token(logits, u, self.temperature, self.top_p)
        self.rollout.tokens.index_copy_(2, self.t, token[..., None])
        self.rollout.logq.index_copy_(2, self.t, logq[..., None])
        self.rollout.logp.index_copy_(2, self.t, logp[..., None])
        self.rollout.lengths.add_(~self.ended)  # before `ended` changes: EOS counts
        self.ended.logical_or_(token == self.eos_id)
        self.t.add_(1)

    def next_token(self, end: int):
        """One more token for every response; end: how many positions of the cache to look at."""
        decoder = self.model.language_model.model
        newest = self.rollout.tokens.index_select(2, self.t - 1).view(-1, 1)  # (B, 1)
        self.cache.slots = self.L + self.t - 1  # (1,), where it goes
        self.cache.end = end
        self.seen.index_fill_(2, self.cache.slots, True)
        x = decoder.embed_tokens(newest)  # (B, 1, C)
        positions = self.last_position + self.t
        hidden = decoder(x, positions, self.seen[..., :end], self.cache)
        self.append(hidden.view(*self.ended.shape, -1))


# --------------------------------------------------------------------------------------------------
# The whole


class SpeechLM(nn.Module):
    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
        self.cuda_graph = True  # on CUDA, sampling replays a recorded step
        self.encoder = CTCEncoder(config.encoder_config)
        self.projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, config.tie_word_embeddings)

    @property
    def device(self):
        return self.projector.query.device

    @property
    def dtype(self):
        return self.language_model.model.embed_tokens.weight.dtype

    # ---- audio and prompts

    def encode(self, mels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Log-mels (T, 160) -> encoder frames (T, C) each."""
        mel, lengths = pad_ragged(mels, self.device)
        frames, _ = self.encoder(mel.to(self.dtype), lengths)
        return [f[: len(m)].clone() for f, m in zip(frames, mels)]  # and the padding is freed

    def project(self, frames: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder frames (T, C) -> audio embeddings (N, C_text) each."""
        counts = [self.projector.count(len(f)) for f in frames]
        frames, lengths = pad_ragged(frames, self.device)
        audio, _ = self.projector(frames.to(self.dtype), lengths)
        return [a[:n].clone() for a, n in zip(audio, counts)]

    def embed_prompts(self, prompt_ids: list[list[int]], audio: list[torch.Tensor]) -> Prompts:
        """Token ids with one audio token each, whose place the audio embeddings (N, C) take."""
        embed = self.language_model.model.embed_tokens
        rows = []
        for ids, sound in zip(prompt_ids, audio):
            at = ids.index(self.config.audio_token_index)
            sound = sound.to(self.device, self.dtype)
            ids = to_device(ids, self.device)
            rows.append(torch.cat((embed(ids[:at]), sound, embed(ids[at + 1 :]))))
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        L = x.shape[1]
        lengths = to_device([len(row) for row in rows], self.device)
        return Prompts(x, torch.arange(L, device=self.device) >= L - lengths[:, None])

    # ---- scoring

    def response_logp(self, prompts: Prompts, tokens, lengths) -> torch.Tensor:
        """Log-probabilities (P, K, T), full softmax, of the tokens of K responses to each prompt;
        zero past a response's end. tokens (P, K, T) int, lengths (P, K) int, on the host.

        The prompts go through the decoder once; then each distinct response to a prompt is a row
        behind that prompt's keys and values.
        """
        P, K, T = tokens.shape
        rows, prompt_of, row_of = distinct_responses(tokens, lengths)  # (R, S), (R,), (P * K,)
        prompt_of = to_device(prompt_of, self.device)
        R, S = rows.shape

        # The prompt's last token predicts a row's first, each token of a row the next.
        decoder = self.language_model.model
        cache = PromptCache()
        hidden = decoder(prompts.x, prompts.positions, prompts.mask, cache)
        hidden = hidden[:, -1:].index_select(0, prompt_of)  # (R, 1, C)
        if S > 1:
            x = decoder.embed_tokens(to_device(rows[:, :-1].clip(min=0), self.device))
            steps = torch.arange(1, S, device=self.device)
            positions = prompts.positions[:, -1:].index_select(0, prompt_of) + steps
            prompt = prompts.valid.index_select(0, prompt_of)[:, None].expand(-1, S - 1, -1)
            before = (steps[:, None] >= steps).expand(R, -1, -1)
            mask = torch.cat((prompt, before), dim=2)  # (R, S - 1, L + S - 1)
            cache.use_for(prompt_of)
            hidden = torch.cat((hidden, decoder(x, positions, mask, cache)), dim=1)  # (R, S, C)

        # Logits only where there is a token to score: at M places.
        scored = rows >= 0
        places = to_device(scored.flatten().nonzero()[0], self.device)  # (M,)
        hidden = hidden.flatten(0, 1).index_select(0, places)
        logp = self.token_logp(hidden, to_device(rows[scored], self.device))  # (M,)
        # index[r, t]: where in logp row r's token t is; past its end M, the place of F.pad's zero.
        index = np.full((R, T), len(places))
        index[:, :S][scored] = np.arange(len(places))
        index = to_device(index[row_of], self.device)
        return F.pad(logp, (0, 1))[index].view(P, K, T)

    def token_logp(self, hidden, tokens, max_logits: int = 2**25):
        """Log-probabilities (M,) of tokens (M,) that hidden states (M, C) predict.

        No more than max_logits logits are in memory at once: they are made in parts, and again in
        the backward pass.
        """

        def log_probabilities(hidden, tokens):
            return -F.cross_entropy(self.language_model.logits(hidden), tokens, reduction="none")

        rows = max_logits // self.config.text_config.vocab_size
        if len(tokens) <= rows:
            return log_probabilities(hidden, tokens)
        parts = zip(hidden.split(rows), tokens.split(rows))
        logp = [checkpoint(log_probabilities, *part, use_reentrant=False) for part in parts]
        return torch.cat(logp)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, noise, eos_id: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> Rollout:
        """K responses of up to T tokens to each prompt. noise (P, K, T): one uniform number in
        [0, 1) per token.

        The caller makes the noise, so a response depends on its own numbers and not on who shares
        its batch. temperature 0 is greedy decoding (logq is then 0).
        """
        T = noise.shape[2]
        on_gpu = self.device.type == "cuda"
        graph = None
        with lora_for_sampling(self):
            state = Sampling(self, prompts, noise, eos_id, temperature, top_p)
            state.first_token(prompts)
            for n in range(1, T):  # n tokens are there
                # The CPU looks for the end after every token; a GPU would have to be waited for,
                # and a few tokens too many cost less.
                if (n % 8 == 0 or not on_gpu) and state.ended.all():
                    break
                if graph is not None:
                    graph.replay()
                elif on_gpu and self.cuda_graph and T > 2:
                    # One step to warm up, then one that is recorded and gives no token. Shapes in a
                    # graph never change, so both look at the whole cache. One graph is alive at a time:
                    # with several, the end of one frees memory of all (pytorch issue 193402).
                    state.next_token(state.L + T)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        state.next_token(state.L + T)
                else:
                    state.next_token(state.L + n)
        return state.rollout

    # ---- files

    def save(self, folder):
        """config.json and model.safetensors, readable by from_pretrained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None) -> "SpeechLM":
        """Load what save() wrote. Tensors go to the device one by one, in dtype (None: as stored).

        Raises ValueError where tensors are unknown, missing or of another shape than config.json
        says. IBM's checkpoints are loaded by released.load_model.
        """
        folder = Path(folder)
        file = folder / "config.json"
        values = read_json(file)
        with errors_of_reading(file, "the config.json of a model that was saved here"):
            values["encoder_config"] = EncoderConfig(**values["encoder_config"])
            values["projector_config"] = ProjectorConfig(**values["projector_config"])
            values["text_config"] = TextConfig(**values["text_config"])
            with torch.device("meta"):
                model = cls(SpeechConfig(**values))
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        tensors = read_tensors([folder / "model.safetensors"], shapes, device, dtype)
        model.load_state_dict(tensors, assign=True)
        return model


def distinct_responses(tokens, lengths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The R distinct pairs of a prompt and a response among K responses to each of P prompts, tokens
    (P, K, T) and lengths (P, K). Returns the tokens of each pair (R, S), -1 past its end, S the
    longest length; the prompt of each (R,); and the pair of every response (P * K,)."""
    P, K, T = tokens.shape
    lengths = np.asarray(lengths)
    ended = np.arange(T) >= lengths[..., None]
    responses = np.where(ended, -1, np.asarray(tokens)).reshape(P * K, T)[:, : lengths.max()]
    keyed = np.column_stack((np.arange(P).repeat(K), responses))  # (P * K, 1 + S), prompt first
    distinct, row_of = np.unique(keyed, axis=0, return_inverse=True)
    return distinct[:, 1:], distinct[:, 0], row_of


def pad_ragged(tensors: list[torch.Tensor], device):
    """Ragged (n, ...) tensors -> (B, n_max, ...) with zeros, lengths (B,)."""
    lengths = to_device([len(tensor) for tensor in tensors], device)
    return to_device(nn.utils.rnn.pad_sequence(tensors, batch_first=True), device), lengths


def to_device(values, device: torch.device) -> torch.Tensor:
    """Numbers or a tensor, on the device. An ordinary copy to a GPU first waits until all that was
    asked of it is done; one from page-locked memory does not."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
