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

The K responses to a prompt share it. Both the sampler and the scorer lay a prompt and its responses out as one
sequence, the prompt's L slots and then the responses interleaved by time,

    slot:    0 .. L-1 | L .. L+K-1       | L+K .. L+2K-1    | ...
    holds:   prompt   | token 0 of all K | token 1 of all K | ...

in which token t of response k sees the prompt and tokens 0..t of response k. So the prompt is computed and cached
once, whatever K is, and a decoding step appends K neighbouring slots to the cache.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from lora import fold, load_adapter, read_tensors

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


class DepthwiseConv(nn.Module):
    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.padding = (kernel_size // 2, (kernel_size - 1) // 2)
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class ConformerConv(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        inner = c.hidden_dim * c.conv_expansion_factor
        self.norm = nn.LayerNorm(c.hidden_dim)
        self.up_conv = nn.Conv1d(c.hidden_dim, 2 * inner, 1)
        self.depth_conv = DepthwiseConv(inner, c.conv_kernel_size)
        self.batch_norm = MaskedBatchNorm(inner)
        self.down_conv = nn.Conv1d(inner, c.hidden_dim, 1)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x, mask):
        x = F.glu(self.up_conv(self.norm(x).transpose(1, 2)), dim=1)  # (B, C, T)
        x = self.depth_conv(x * mask[:, None])  # beyond the end is silence, as for a single recording
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


class QFormerHeads(nn.Module):
    def __init__(self, c: ProjectorConfig, source_size: int):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(source_size, c.hidden_size)
        self.value = nn.Linear(source_size, c.hidden_size)

    def forward(self, x, source):
        q, k, v = (
            f(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for f, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class QFormerOutput(nn.Module):
    def __init__(self, size_in: int, c: ProjectorConfig):
        super().__init__()
        self.dense = nn.Linear(size_in, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class QFormerAttention(nn.Module):
    def __init__(self, c: ProjectorConfig, source_size: int):
        super().__init__()
        self.attention = QFormerHeads(c, source_size)
        self.output = QFormerOutput(c.hidden_size, c)

    def forward(self, x, source):
        return self.output(self.attention(x, source), x)


class QFormerLayer(nn.Module):
    def __init__(self, c: ProjectorConfig, index: int):
        super().__init__()
        self.attention = QFormerAttention(c, c.hidden_size)
        if index % c.cross_attention_frequency == 0:
            self.crossattention = QFormerAttention(c, c.encoder_hidden_size)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.intermediate_size)})
        self.output_query = QFormerOutput(c.intermediate_size, c)

    def forward(self, x, frames):
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, frames)
        return self.output_query(F.gelu(self.intermediate_query["dense"](x)), x)


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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class KVCache:
    """Keys and values of every layer in one preallocated tensor; `length` slots are filled."""

    def __init__(self, c: TextConfig, batch: int, size: int, dtype, device):
        head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        shape = c.num_hidden_layers, 2, batch, c.num_key_value_heads, size, head_dim
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k, v):
        """Write k, v (B, H, S, D) behind what is there; return all keys and values so far."""
        end = self.length + k.shape[2]
        self.kv[layer, 0, :, :, self.length : end] = k
        self.kv[layer, 1, :, :, self.length : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


def rotate(x, cos, sin):
    """Rotary positions on x (B, H, S, D); cos, sin (B, 1, S, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        self.scale = c.attention_multiplier
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, layer, cache):
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # The queries of a group, which share a key-value head, as more rows: fused kernels take masks but not groups.
        grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, H_kv, G * S, D)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=self.scale).reshape(q.shape)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.residual_multiplier = c.residual_multiplier

    def forward(self, x, cos, sin, mask, layer, cache):
        x = x + self.residual_multiplier * self.self_attn(self.input_layernorm(x), cos, sin, mask, layer, cache)
        return x + self.residual_multiplier * self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, positions, mask, cache: KVCache | None = None):
        """Embeddings x (B, S, C), positions (B, S), mask (B, 1, S, cached + S), true where seen -> (B, S, C)."""
        x = x * self.config.embedding_multiplier
        D = self.layers[0].self_attn.head_dim
        frequency = self.config.rope_theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
        angle = (positions[..., None].float() * frequency).repeat(1, 1, 2)[:, None]  # (B, 1, S, D)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = mask.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -math.inf)  # or each layer would convert it
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, i, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, c: TextConfig, tied: bool):
        super().__init__()
        self.model = Decoder(c)
        if not tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden):
        """Next-token logits in float32; log-softmax in bf16 would lose what the importance ratio is made of."""
        logits = self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.model.embed_tokens.weight)
        return logits.float() / self.model.config.logits_scaling


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

    @property
    def mask(self):  # (P, K, T): from lengths and never from token ids, so that the EOS token is trained
        return torch.arange(self.tokens.shape[2], device=self.tokens.device) < self.lengths[..., None]


def visible(valid, K: int, T: int):
    """Who sees whom among a prompt's L slots and its responses' K * T slots: (P, 1, L + K*T, L + K*T) bool."""
    P, L = valid.shape
    slot = torch.arange(L + K * T, device=valid.device)
    branch = torch.where(slot < L, -1, (slot - L) % K if K else slot)  # -1: the trunk, which every branch sees
    see = (slot <= slot[:, None]) & ((branch == -1) | (branch == branch[:, None]))
    see = see & F.pad(valid, (0, K * T), value=True)[:, None]
    # Padding before a left-padded prompt sees at least itself: a softmax over nothing is NaN.
    return (see | (slot == slot[:, None]))[:, None]


class SpeechLM(nn.Module):
    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.config = config
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
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                fan_in = module.weight[0].numel()
                module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.data.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.data.normal_(0, module.embedding_dim**-0.5, generator=generator)
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

    def response_logp(self, prompts: Prompts, tokens) -> torch.Tensor:
        """Log-probabilities (P, K, T), full softmax, of the responses' tokens (P, K, T): one pass, prompts shared."""
        P, K, T = tokens.shape
        L = prompts.x.shape[1]
        n_prompt = prompts.valid.sum(1)  # (P,)
        by_time = tokens.transpose(1, 2).reshape(P, T * K)  # slot order
        x = torch.cat((prompts.x, self.language_model.model.embed_tokens(by_time)), dim=1)
        response_position = torch.arange(T, device=x.device).repeat_interleave(K) + n_prompt[:, None]
        positions = torch.cat((prompt_positions(prompts.valid), response_position), dim=1)
        hidden = self.language_model.model(x, positions, visible(prompts.valid, K, T))  # (P, L + T*K, C)
        # Token 0 is predicted at the prompt's last position, token t + 1 at token t's.
        first = hidden[torch.arange(P), last_position(prompts.valid)][:, None].expand(-1, K, -1)
        hidden = torch.cat((first, hidden[:, L : L + (T - 1) * K]), dim=1)  # (P, T*K, C)
        logits = self.language_model.logits(hidden).flatten(0, 1)
        logp = -F.cross_entropy(logits, by_time.flatten(), reduction="none")
        return logp.view(P, T, K).transpose(1, 2)

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, noise, eos_id: int, temperature: float = 1.0, top_p: float = 1.0) -> Rollout:
        """K responses of up to T tokens to each prompt. noise (P, K, T): one uniform number in [0, 1) per token.

        The caller makes the noise, so a response depends on its own numbers and not on who shares its batch.
        temperature 0 is greedy decoding (logq is then 0).
        """
        (P, K, T), L = noise.shape, prompts.x.shape[1]
        decoder, n_prompt = self.language_model.model, prompts.valid.sum(1)
        cache = KVCache(decoder.config, P, L + K * T, self.dtype, self.device)
        hidden = decoder(prompts.x, prompt_positions(prompts.valid), visible(prompts.valid, 0, 0), cache)
        hidden = hidden[torch.arange(P), last_position(prompts.valid)][:, None].expand(-1, K, -1)  # (P, K, C)
        # Response k sees the prompt and every K-th slot after it: its own.
        own = torch.eye(K, dtype=torch.bool, device=self.device).repeat(1, T)
        see = torch.cat((prompts.valid[:, None].expand(-1, K, -1), own.expand(P, -1, -1)), dim=-1)[:, None]

        out = Rollout(
            torch.full((P, K, T), eos_id, device=self.device), torch.full((P, K), T, device=self.device),
            torch.zeros(P, K, T, device=self.device), torch.zeros(P, K, T, device=self.device),
        )  # fmt: skip
        done = torch.zeros(P, K, dtype=torch.bool, device=self.device)
        for t in range(T):
            token, logq, logp = draw(self.language_model.logits(hidden), noise[..., t], temperature, top_p)
            out.tokens[..., t], out.logq[..., t], out.logp[..., t] = token, logq, logp
            ends = (token == eos_id) & ~done
            out.lengths[ends] = t + 1
            done |= ends
            if t == T - 1 or done.all():
                break
            hidden = decoder(
                decoder.embed_tokens(token), (n_prompt + t)[:, None].expand(P, K), see[..., : L + (t + 1) * K], cache
            )
        return out

    # ---- files

    def save(self, folder):
        """config.json and model.safetensors, readable by from_pretrained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None) -> "SpeechLM":
        """Load a released checkpoint, or what save() wrote: config.json, and model.safetensors or its numbered parts.

        Tensors go to the device one by one, in dtype (None: as stored), so that memory holds little more than the
        weights. A LoRA that lies in the folder is part of the checkpoint (Granite Speech 3.3 has one for when it
        listens) and is merged into the weights. Raises ValueError with the tensors that are unknown, missing or of
        another shape than config.json says.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        try:
            with torch.device("meta"):
                model = cls(SpeechConfig.from_dict(config))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} is of no model that this code knows: {error!r}") from None
        index = folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        tensors = read_tensors([folder / file for file in sorted(files)], shapes, device, dtype)
        model.load_state_dict(tensors, assign=True)
        if (folder / "adapter_config.json").exists():
            load_adapter(model, folder)
            fold(model.requires_grad_(True))
        elif config.get("has_lora_adapter"):
            raise ValueError(f"{folder}: adapter_config.json and adapter_model.safetensors are missing, which by "
                             "config.json belong to it (has_lora_adapter: false if they are merged)")  # fmt: skip
        return model


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


def draw(logits, u, temperature: float, top_p: float):
    """One token per row of logits (..., V) by inverting the cumulative distribution at u (...) in [0, 1).

    Returns token, log q (after temperature and top-p truncation and renormalisation), log p (full softmax).
    Top-p keeps the smallest set of most probable tokens whose mass reaches top_p.
    """
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
        return token, torch.zeros_like(u), logp.gather(-1, token[..., None])[..., 0]
    q, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass = q.cumsum(-1)
    cut = mass - q >= top_p  # a token stays if the mass before it is still short of top_p
    cut[..., 0] = False
    q = q.masked_fill(cut, 0)
    mass = q.cumsum(-1)
    total = mass[..., -1:]
    rank = (mass <= u[..., None] * total).sum(-1, keepdim=True)  # kept tokens wholly below u
    last = (q > 0).sum(-1, keepdim=True) - 1
    rank = rank.minimum(last).clamp(min=0)  # rounding must not step past the last kept token, nor nan before the first
    token = order.gather(-1, rank)[..., 0]
    logq = (q.gather(-1, rank) / total).log()[..., 0]
    return token, logq, logp.gather(-1, token[..., None])[..., 0]
