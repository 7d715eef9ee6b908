"""The speech-aware language model, and how it is sampled and scored.

One architecture, that of IBM's Granite Speech (arXiv 2505.08699), in any size:

    log-mel (T, 160)  two 80-mel frames stacked, 50 per second (data.py)
      -> encoder      Conformer with block-wise attention, Shaw relative positions, self-conditioned CTC
      -> projector    window Q-Former: 15 frames -> 3 embeddings, 10 per second
      -> decoder      Granite: llama-like, with multipliers on embeddings, attention, residuals and logits

Module names are the released safetensors names, so a checkpoint loads with a plain load_state_dict. Shapes in
comments: B batch, T frames or response tokens, C channels, H heads, D head width, P prompts, K responses per prompt,
L prompt length, S sequence length, V vocabulary.

Padding never changes a result: every convolution, attention and statistic that could see a padded frame masks it.

The K responses to a prompt share it. The sampler computes it once and copies its keys and values to each of them; the
scorer, which training goes through, computes it once, and once whatever several responses have in common (Row).
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from lora import lora_rounded, read_tensors

# ---------------------------------------------------------------------------------------------------------------------
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

    @classmethod
    def from_dict(cls, config: dict) -> "SpeechConfig":
        """From a config.json; keys that do not shape the model are ignored. ValueError: positions that are not here."""

        def pick(kind, values):
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})

        text = config["text_config"] | (config["text_config"].get("rope_parameters") or {})  # newer files nest them
        if text.get("rope_scaling") or text.get("rope_type", "default") != "default":
            raise ValueError("scaled rotary positions are not implemented")
        config = {"tie_word_embeddings": text.get("tie_word_embeddings", True)} | config | {"text_config": text}
        parts = {"encoder_config": EncoderConfig, "projector_config": ProjectorConfig, "text_config": TextConfig}
        return pick(cls, config | {name: pick(kind, config[name]) for name, kind in parts.items()})

    @classmethod
    def compact(cls, vocab_size: int, ctc_size: int, audio_token_index: int) -> "SpeechConfig":
        """About 1.8 million parameters: small enough to train from scratch in minutes on two CPU cores."""
        return cls(
            EncoderConfig(num_layers=4, hidden_dim=96, num_heads=4, dim_head=24, output_dim=ctc_size,
                          context_size=50, max_pos_emb=50, dropout=0.0, conv_kernel_size=15),
            ProjectorConfig(hidden_size=96, num_hidden_layers=1, num_attention_heads=4, intermediate_size=192,
                            encoder_hidden_size=96),
            TextConfig(vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                       num_attention_heads=4, num_key_value_heads=2, embedding_multiplier=12.0,
                       attention_multiplier=1 / 32**0.5, residual_multiplier=0.5, logits_scaling=1.0),
            audio_token_index=audio_token_index,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Encoder: Conformer (Gulati et al. 2020) with Shaw's relative positions (2018) and self-conditioned CTC
# (Nozaki & Komatsu 2021). `mask` (B, T) is true on real frames.


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
    """Self-attention inside blocks of `context_size` frames, with a learned embedding of each distance."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        inner = c.num_heads * c.dim_head
        self.num_heads, self.context_size, self.max_pos_emb = c.num_heads, c.context_size, c.max_pos_emb
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
        distance = self.rel_pos_emb(position[:, None] - position + self.max_pos_emb)  # (block, block, D)
        bias = torch.einsum("bhqd,qkd->bhqk", q, distance) * scale
        # A very negative number and not -inf: a block of padding alone must not turn into NaN.
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out = out.transpose(1, 2).reshape(B, T + pad, -1)[:, :T]
        return self.dropout(self.to_out(out))


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over real frames only: in training, padded frames enter no statistic."""

    def forward(self, x, mask):  # (B, T, C) -> (B, T, C)
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
        x = F.pad(x * mask[:, None], self.padding)  # beyond the end is silence, as for a single recording
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

    def forward(self, mel, lengths):
        """mel (B, T, 160), lengths (B,) in frames -> frames (B, T, C), CTC logits halfway (B, T, classes)."""
        mask = torch.arange(mel.shape[1], device=mel.device) < lengths[:, None]
        x, middle = self.input_linear(mel), None
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x, mask)
            if i == len(self.layers) // 2:  # self-conditioning: later layers see the transcript so far
                middle = self.out(x)
                x = x + self.out_mid(middle.softmax(-1))
        return x * mask[..., None], middle  # zeros past the end: what the projector's last window must see


# ---------------------------------------------------------------------------------------------------------------------
# Projector: BLIP-2's Q-Former (Li et al. 2023), the same few queries in every window of 15 frames


def to_residual(size_in: int, c: ProjectorConfig):
    norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
    return nn.ModuleDict({"dense": nn.Linear(size_in, c.hidden_size), "LayerNorm": norm})


def add(output: nn.ModuleDict, x, residual):
    return output["LayerNorm"](output["dense"](x) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, c: ProjectorConfig, source_size: int):
        super().__init__()
        self.num_heads = c.num_attention_heads
        sizes = {"query": c.hidden_size, "key": source_size, "value": source_size}
        self.attention = nn.ModuleDict({name: nn.Linear(size, c.hidden_size) for name, size in sizes.items()})
        self.output = to_residual(c.hidden_size, c)

    def forward(self, x, source):
        q, k, v = (
            self.attention[name](y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name, y in (("query", x), ("key", source), ("value", source))
        )
        return add(self.output, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), x)


class QFormerLayer(nn.Module):
    def __init__(self, c: ProjectorConfig, index: int):
        super().__init__()
        self.attention = QFormerAttention(c, c.hidden_size)
        if index % c.cross_attention_frequency == 0:
            self.crossattention = QFormerAttention(c, c.encoder_hidden_size)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.intermediate_size)})
        self.output_query = to_residual(c.intermediate_size, c)

    def forward(self, x, frames):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, frames)
        return add(self.output_query, F.gelu(self.intermediate_query["dense"](x)), x)


class QFormer(nn.Module):
    def __init__(self, c: ProjectorConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(QFormerLayer(c, i) for i in range(c.num_hidden_layers))})

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
        """frames (B, T, C), zeros past lengths (B,) -> audio embeddings (B, N, C_text) and how many are real (B,)."""
        B, T, C = frames.shape
        n_windows = math.ceil(T / self.window_size)
        frames = F.pad(frames, (0, 0, 0, n_windows * self.window_size - T))
        frames = frames.view(B * n_windows, self.window_size, C)
        out = self.qformer(self.query.expand(B * n_windows, -1, -1), frames)
        return self.linear(out).view(B, n_windows * self.num_queries, -1), self.count(lengths)

    def count(self, n_frames):
        """Audio embeddings made from n_frames encoder frames (an int or a tensor)."""
        return (n_frames + self.window_size - 1) // self.window_size * self.num_queries


# ---------------------------------------------------------------------------------------------------------------------
# Decoder


def rotate(x, cos, sin):
    """Rotary positions on x (..., H, D); cos, sin (..., 1, D), the first half of sin negative."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attention(q, k, v, mask, scale: float):
    """What queries (P, B, H, S, D) find in keys and values (P, B, H_kv, S_kv, D), in B branches of each of P prompts.

    mask is added to the scores: (P, 1, H / H_kv * S, S_kv), or (P, 1, 1, S_kv) for all queries. -> (P, B, H, S, D)
    """
    # The queries of a group, which share a key-value head, as more rows: fused kernels take masks but not groups.
    rows = q.reshape(len(q), q.shape[1] * k.shape[2], -1, q.shape[-1])  # (P, B * H_kv, H / H_kv * S, D)
    return F.scaled_dot_product_attention(rows, k.flatten(1, 2), v.flatten(1, 2), mask, scale=scale).reshape(q.shape)


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, layer, attend):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.residual_multiplier = c.residual_multiplier

    def forward(self, x, cos, sin, layer, attend):
        x = x.add(self.self_attn(self.input_layernorm(x), cos, sin, layer, attend), alpha=self.residual_multiplier)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=self.residual_multiplier)


class Decoder(nn.Module):
    """Everything but attention looks at one token at a time. So the caller chooses how tokens are laid out, and says
    who sees whom: attend(layer, q, k, v) gets the layer's queries (..., H, D), keys and values (..., H_kv, D), rotated,
    and returns what each query found (..., H, D).
    """

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, positions, attend):
        """Embeddings x (..., C) at positions (...) -> (..., C)."""
        x = x * self.config.embedding_multiplier
        D = self.layers[0].self_attn.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = positions[..., None, None].float() * frequency  # (..., 1, D / 2)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, i, attend)
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, c: TextConfig, tied: bool):
        super().__init__()
        self.model = Decoder(c)
        if not tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """Next-token logits in float32; log-softmax in bf16 would lose what the importance ratio is made of."""
        hidden = hidden / self.model.config.logits_scaling  # smaller than the logits are
        logits = self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.model.embed_tokens.weight)
        return logits.float()


# ---------------------------------------------------------------------------------------------------------------------
# One token drawn


def draw(logits, u, temperature: float, top_p: float):
    """One token per row of logits (..., V) by inverting the cumulative distribution at u (...) in [0, 1).

    Returns token, log q (after temperature and top-p truncation and renormalisation), log p (full softmax).
    """
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
        return token, torch.zeros_like(u), logp.gather(-1, token[..., None])[..., 0]
    q = nucleus((logits / temperature).softmax(-1), top_p)
    mass = q.cumsum(-1)
    total = mass[..., -1:]
    token = torch.searchsorted(mass, u[..., None] * total, right=True).clamp(max=q.shape[-1] - 1)
    # Where rounding steps past the end or, in a sum made in parallel, onto a token of no probability: the likeliest.
    token = torch.where(q.gather(-1, token) > 0, token, q.argmax(-1, keepdim=True))
    logq = (q.gather(-1, token) / total).log()
    return token[..., 0], logq[..., 0], logp.gather(-1, token)[..., 0]


def nucleus(q, top_p: float):
    """Probabilities (..., V) with zeros outside the smallest set of most probable tokens whose mass reaches top_p."""
    if top_p == 1:
        return q
    values = ascending(q)
    mass = values.cumsum(-1)  # of a token and all less probable ones: it stays if that is more than may be cut
    cut = torch.searchsorted(mass, mass[..., -1:] - top_p, right=True).clamp(max=q.shape[-1] - 1)  # how many go
    least = values.gather(-1, cut)
    room = q.shape[-1] - cut - (q > least).sum(-1, keepdim=True)  # for tokens that are just as probable as the last
    ties = q == least
    return q.masked_fill((q < least) | ties & (ties.cumsum(-1, dtype=torch.float32) > room), 0)


def ascending(q):
    if q.device.type != "cpu":
        return q.sort(-1).values
    values = q.clone()
    values.numpy().sort(axis=-1)  # with vector instructions, ten times as fast as torch on the CPU
    return values


def first_copies(tokens, real):
    """Which tokens (P, K, T), of those that are real, end a prefix that no response before had: (P, K, T) bool; and the
    place k * T + t of the first to end the same prefix: (P, K * T)."""
    K, T = tokens.shape[1:]
    apart = ((tokens[:, :, None] != tokens[:, None]) | ~real[:, None]).cumsum(-1) > 0  # (P, K, K, T)
    first = apart.byte().argmin(2)  # (P, K, T)
    response, time = (torch.arange(n, device=tokens.device) for n in (K, T))
    return real & (first == response[:, None]), (first * T + time).flatten(1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole, sampled and scored


@dataclass
class Prompts:
    """P prompts as embeddings, audio included."""

    x: torch.Tensor  # (P, L, C)
    valid: torch.Tensor  # (P, L) bool, false on padding, which may be on either side

    def __getitem__(self, rows):
        return Prompts(self.x[rows], self.valid[rows])


@dataclass
class Rollout:
    """K responses to each of P prompts; entries past a response's length mean nothing."""

    tokens: torch.Tensor  # (P, K, T) int64
    lengths: torch.Tensor  # (P, K) int64, the end-of-sequence token included where it was sampled
    logq: torch.Tensor  # (P, K, T) log-probability under the sampling distribution: surprisal is -logq
    logp: torch.Tensor  # (P, K, T) log-probability under the full softmax at temperature 1

    def trimmed(self):
        T = int(self.lengths.max())
        return Rollout(self.tokens[..., :T], self.lengths, self.logq[..., :T], self.logp[..., :T])

    def to(self, device):
        return Rollout(*(x.to(device) for x in (self.tokens, self.lengths, self.logq, self.logp)))

    @property
    def mask(self):  # (P, K, T): from lengths and never from token ids, so that the EOS token is trained
        return torch.arange(self.tokens.shape[2], device=self.tokens.device) < self.lengths[..., None]


class PrefixTree:
    def __init__(self, tokens, lengths):
        self.tokens, self.lengths = tokens, lengths


class Row:
    """P prompts and K responses to each as one row of N tokens, in which nothing comes twice.

    A prompt has S = L + K * (T - 1) slots: its own L, and T - 1 for each response, whose last token predicts nothing.
    The row holds the slots' real tokens, and of a prefix that several responses share the first one's copy only: the
    prefix tree, one place for each of its inner nodes.
    """

    def __init__(self, valid, tokens, lengths):
        (P, K, T), L = tokens.shape, valid.shape[1]
        time = torch.arange(T, device=tokens.device)
        self.K, self.L, self.real = K, L, time < lengths[..., None]  # (P, K, T)
        inner, copy = first_copies(tokens[..., :-1], self.real[..., 1:])
        kept = torch.cat((valid, inner.flatten(1)), dim=1)  # (P, S)
        place = (kept.flatten().cumsum(0) - 1).clamp(min=0).view(kept.shape)  # of a slot in the row
        copies = place.gather(1, L + copy)  # (P, K * (T - 1))
        self.kept, self.source = kept.flatten().nonzero()[:, 0], torch.cat((place[:, :L], copies), dim=1).flatten()
        response_positions = (valid.sum(1)[:, None] + time[:-1]).repeat(1, K)
        self.positions = torch.cat((prompt_positions(valid), response_positions), dim=1)
        # Of tokens to be scored, too, each distinct one once: where its parent stands, the first at the prompt's end.
        distinct, copy = first_copies(tokens, self.real)
        last = place.gather(1, last_position(valid)[:, None])[..., None].expand(-1, K, 1)
        self.scored = distinct.flatten().nonzero()[:, 0]
        self.parent = torch.cat((last, copies.view(P, K, T - 1)), dim=2).flatten()[self.scored]
        self.rank = (distinct.flatten().cumsum(0) - 1).clamp(min=0).view(P, -1).gather(1, copy)

    def pack(self, x):
        """Slots (P, S, ...) -> the row (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.kept)

    def unpack(self, x):
        """The row (N, H, D) -> prompts (P, 1, H, L, D) and responses (P, K, H, T - 1, D), branches for attention()."""
        # To (P, H, S, D). An embedding is a gather whose backward pass is the fastest sum of what was gathered.
        x = F.embedding(self.source, x.flatten(1)).view(len(self.real), -1, *x.shape[1:]).transpose(1, 2)
        return x[:, None, :, : self.L], x[:, :, self.L :].unflatten(2, (self.K, -1)).transpose(1, 2)

    def unfold(self, logp):
        """One number for each token scored -> (P, K, T), zero past the responses' ends."""
        return logp[self.rank].view(self.real.shape).masked_fill(~self.real, 0)


def visible(valid, T: int = 0):
    """Who sees whom where T tokens follow a prompt's valid (P, L) ones: (P, L + T, L + T) bool."""
    see = F.pad(valid, (0, T), value=True)[:, None].repeat(1, valid.shape[1] + T, 1).tril()
    # Padding before a left-padded prompt sees at least itself: a softmax over nothing is NaN.
    return see | torch.eye(see.shape[1], dtype=torch.bool, device=see.device)


def additive(see, dtype, group: int = 1):
    """Who sees whom (P, S, S_kv) as attention() takes it: 0 or -inf, (P, 1, group * S, S_kv)."""
    return torch.zeros_like(see, dtype=dtype).masked_fill_(~see, -math.inf).repeat(1, group, 1)[:, None]


class SpeechLM(nn.Module):
    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config, self.cuda_graph, c = config, True, config.text_config
        self.scale, self.group = c.attention_multiplier, c.num_attention_heads // c.num_key_value_heads
        self.encoder = CTCEncoder(config.encoder_config)
        self.projector = Projector(config)
        self.language_model = LanguageModel(config.text_config, config.tie_word_embeddings)

    @property
    def device(self):
        return self.projector.query.device

    @property
    def dtype(self):
        return self.language_model.model.embed_tokens.weight.dtype

    def init_weights(self, seed: int):
        """For a model to be trained from scratch: weights of variance 1 / fan_in, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
                module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.data.zero_()
        self.projector.query.data.normal_(0, 1, generator=generator)
        return self

    # ---- audio

    def encode(self, mels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Log-mels (T, 160) -> encoder frames (T, C) each."""
        mel, lengths = pad(mels, self.device)
        frames, _ = self.encoder(mel.to(self.projector.query.dtype), lengths)
        return [f[:n].clone() for f, n in zip(frames, lengths.tolist())]

    def project(self, frames: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder frames (T, C) -> audio embeddings (N, C_text) each."""
        frames, lengths = pad(frames, self.device)
        audio, counts = self.projector(frames.to(self.projector.query.dtype), lengths)
        return [a[:n].clone() for a, n in zip(audio, counts.tolist())]

    # ---- prompts

    def embed_prompts(self, prompt_ids: list[list[int]], audio: list[torch.Tensor]) -> Prompts:
        """Token ids with one audio token each, and each prompt's audio embeddings (N, C), which take its place."""
        embed = self.language_model.model.embed_tokens
        rows = []
        for ids, sound in zip(prompt_ids, audio):
            at = ids.index(self.config.audio_token_index)
            ids = torch.tensor(ids, device=self.device)
            rows.append(torch.cat((embed(ids[:at]), sound.to(self.device, self.dtype), embed(ids[at + 1 :]))))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Prompts(x, torch.arange(x.shape[1], device=self.device) < lengths[:, None])

    # ---- scoring

    def response_logp(self, prompts: Prompts, trees) -> torch.Tensor:
        tokens = nn.utils.rnn.pad_sequence([t.tokens.T for t in trees], batch_first=True).mT.to(self.device)
        lengths = torch.stack([torch.as_tensor(t.lengths) for t in trees]).to(self.device)
        return self._response_logp(prompts, tokens, lengths)

    def _response_logp(self, prompts: Prompts, tokens, lengths) -> torch.Tensor:
        """Log-probabilities (P, K, T), full softmax, of the responses' tokens (P, K, T); zero past lengths (P, K).

        What is the same is computed once: a prompt for all its responses, a prefix for all responses that share it.
        """
        row, decoder, K = Row(prompts.valid, tokens, lengths), self.language_model.model, tokens.shape[1]
        slots = torch.cat((prompts.x, decoder.embed_tokens(tokens[..., :-1].flatten(1))), dim=1)  # (P, S, C)
        L, see = row.L, visible(prompts.valid, tokens.shape[2] - 1)
        in_prompt, in_response = (additive(part, self.dtype, self.group) for part in (see[:, :L, :L], see[:, L:]))

        def attend(layer, q, k, v):  # (N, H, D)
            (q0, q1), (k0, k1), (v0, v1) = map(row.unpack, (q, k, v))
            k1, v1 = (torch.cat((a.expand(-1, K, -1, -1, -1), b), dim=3) for a, b in ((k0, k1), (v0, v1)))
            found = attention(q0, k0, v0, in_prompt, self.scale), attention(q1, k1, v1, in_response, self.scale)
            return row.pack(torch.cat([x.transpose(2, 3).flatten(1, 2) for x in found], dim=1))

        hidden = decoder(row.pack(slots), row.pack(row.positions), attend)  # (N, C)
        return row.unfold(self.token_logp(hidden[row.parent], tokens.flatten()[row.scored]))

    def token_logp(self, hidden, tokens, held: int = 2**25):
        """Log-probabilities (M,) of tokens (M,) that hidden states (M, C) predict, with so many logits held at once."""

        def some(hidden, tokens):
            return -F.cross_entropy(self.language_model.logits(hidden), tokens, reduction="none")

        rows = held // self.config.text_config.vocab_size
        if len(tokens) <= rows:
            return some(hidden, tokens)
        parts = zip(hidden.split(rows), tokens.split(rows))
        return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, noise, eos_id: int, temperature: float = 1.0, top_p: float = 1.0) -> Rollout:
        """K responses of up to T tokens to each prompt. noise (P, K, T): one uniform number in [0, 1) per token.

        The caller makes the noise, so a response depends on its own numbers and not on who shares its batch.
        temperature 0 is greedy decoding (logq is then 0).
        """
        (P, K, T), L, c = noise.shape, prompts.x.shape[1], self.config.text_config
        decoder, n_prompt = self.language_model.model, prompts.valid.sum(1)
        # Keys and values of all layers. A prompt's are computed once and copied to each of its responses. Zeros, since
        # what nobody sees yet is multiplied by 0.
        shape = c.num_hidden_layers, 2, P, K, c.num_key_value_heads, L + T, decoder.layers[0].self_attn.head_dim
        cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        in_prompt = additive(visible(prompts.valid), self.dtype, self.group)
        seen = additive(F.pad(prompts.valid, (0, T))[:, None], self.dtype)  # (P, 1, 1, L + T)

        def prefill(layer, q, k, v):  # (P, L, H, D)
            q, k, v = (y[:, None].transpose(2, 3) for y in (q, k, v))
            cache[layer, 0, ..., :L, :], cache[layer, 1, ..., :L, :] = k, v
            return attention(q, k, v, in_prompt, self.scale)[:, 0].transpose(1, 2)

        def decode(layer, q, k, v):  # (P, K, H, D)
            for y, kept in ((k, cache[layer, 0]), (v, cache[layer, 1])):
                kept.index_copy_(3, L + t - 1, y[..., None, :])
            k, v = cache[layer, :, ..., :end, :]
            return attention(q[..., None, :], k, v, seen[..., :end], self.scale)[..., 0, :]

        tokens, lengths = (torch.zeros(n, dtype=torch.int64, device=self.device) for n in ((P, K, T), (P, K)))
        logq, logp = torch.zeros(2, P, K, T, device=self.device)
        done = torch.zeros(P, K, dtype=torch.bool, device=self.device)
        t = torch.zeros(1, dtype=torch.int64, device=self.device)  # how many tokens there are

        def emit(hidden):  # (P, K, C)
            u = noise.index_select(2, t)[..., 0]
            drawn = draw(self.language_model.logits(hidden), u, temperature, top_p)
            for kept, new in zip((tokens, logq, logp), drawn):
                kept.index_copy_(2, t, new[..., None])
            lengths.add_(~done)
            done.logical_or_(drawn[0] == eos_id)
            t.add_(1)

        def advance():
            """The next token of every response. Nothing here waits for the device: a CUDA graph can hold it."""
            seen.index_fill_(3, L + t - 1, 0)
            x = decoder.embed_tokens(tokens.index_select(2, t - 1)[..., 0])
            emit(decoder(x, (n_prompt[:, None] + t - 1).expand(P, K), decode))

        with lora_rounded(self):
            hidden = decoder(prompts.x, prompt_positions(prompts.valid), prefill)
            emit(hidden[torch.arange(P), last_position(prompts.valid)][:, None].expand(-1, K, -1))
            on_gpu = self.device.type == "cuda"
            as_graph = on_gpu and self.cuda_graph
            for n in range(1, T):
                if (n % 8 == 0 or not on_gpu) and done.all():  # a GPU waits to be asked: tokens too many cost less
                    break
                end = L + T if as_graph else L + n  # shapes in a graph never change
                if n == 2 and as_graph:  # once everything it needs has been loaded
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        advance()
                    advance = graph.replay
                advance()
        return Rollout(tokens, lengths, logq, logp)

    # ---- files

    def save(self, folder):
        """config.json and model.safetensors, readable by from_pretrained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None) -> "SpeechLM":
        """Load what save() wrote. Tensors go to the device one by one, in dtype (None: as stored).

        Raises ValueError where tensors are unknown, missing or of another shape than config.json says.
        """
        folder = Path(folder)
        model = cls.without_weights(folder / "config.json")
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(read_tensors([folder / "model.safetensors"], shapes, device, dtype), assign=True)
        return model

    @classmethod
    def without_weights(cls, file: Path) -> "SpeechLM":
        """The model of a config.json on the meta device, for load_state_dict(..., assign=True)."""
        config = json.loads(file.read_text())
        try:
            with torch.device("meta"):
                return cls(SpeechConfig.from_dict(config))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is of no model that this code knows: {error!r}") from None


def pad(tensors: list[torch.Tensor], device):
    """Ragged (n, ...) tensors -> (B, n_max, ...) with zeros, lengths (B,)."""
    lengths = torch.tensor([len(t) for t in tensors], device=device)
    return torch.nn.utils.rnn.pad_sequence([t.to(device) for t in tensors], batch_first=True), lengths


def prompt_positions(valid):
    """Positions that count real tokens only: (P, L) bool -> (P, L) int."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def last_position(valid):
    """Index of each prompt's last real token: (P, L) bool -> (P,)."""
    return valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
