"""The base model, made as Granite Speech was: CTC on the encoder; freeze it; next-token on projector
and decoder. `cfg` is train.Config here.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from model import EncoderConfig, ProjectorConfig, SpeechConfig, SpeechLM, TextConfig, pad_ragged
from upkeep.checkpoints import Rescue, load_checkpoint, save_checkpoint
from upkeep.errors import errors_of_writing
from upkeep.files import check_same, is_there, lock, sync, write_file
from upkeep.log import Log, StopSignals, keep_lines
from upkeep.optim import Updater, learning_rate

# What a random stream is for: the second number of its seed; train.py has the others.
CTC_ORDER, SFT_ORDER = 1, 2


def make_base(cfg, training: data.Split, fingerprint: str, folder: Path, device):
    """Train the base unless it is there; waits where another run is training the same one.
    fingerprint: of the rows, with which alone it goes on."""
    settings = {name: getattr(cfg, name) for name in cfg.BASE} | {"rows": fingerprint}
    defaults = asdict(type(cfg)())
    whole = folder / "model.safetensors"  # the last to be written; then the checkpoints go
    if is_there(folder / "checkpoints") or not is_there(whole):
        with lock(folder, wait=True):
            if not is_there(whole):
                check_same(folder, settings, "base.json", defaults)
                train_base(cfg, training, folder, device)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    check_same(folder, settings, "base.json", defaults)


def train_base(cfg, training: data.Split, work: Path, device):
    """Train the compact model from scratch; saves a folder that SpeechLM.from_pretrained reads."""
    write_file(work / "tokenizer.model", data.Tokenizer.train(training.rows))
    tokenizer = data.Tokenizer(work / "tokenizer.model")
    spoken = [row.get("transcript", "") for row in training.rows]
    class_of = {c: i for i, c in enumerate(sorted(set("".join(spoken))), start=1)}  # 0: the blank
    config = compact(tokenizer.vocab_size, 1 + len(class_of), tokenizer.audio_id)
    model = init_weights(SpeechLM(config), cfg.base_seed).to(device)
    print(f"training a base model of {sum(p.numel() for p in model.parameters()):,} parameters")

    transcripts = [[class_of[c] for c in text] for text in spoken]
    has_transcripts = any(transcripts)
    if has_transcripts:
        train_ctc(cfg, model, training, transcripts, work)
    else:
        print("no row has a transcript: CTC is skipped, and the encoder learns with the rest")
    train_sft(cfg, model, tokenizer, training, work, freeze_encoder=has_transcripts)
    whole = work / "checkpoints" / "whole"
    with errors_of_writing(whole):
        model.save(whole)
        sync(whole / "model.safetensors")
        for name in ("config.json", "model.safetensors"):
            os.replace(whole / name, work / name)


def compact(vocab_size: int, ctc_size: int, audio_token_index: int) -> SpeechConfig:
    """About 1.8 million parameters: trained from scratch in minutes on two CPU cores."""
    encoder = EncoderConfig(
        num_layers=4,
        hidden_dim=96,
        num_heads=4,
        dim_head=24,
        output_dim=ctc_size,
        context_size=50,
        max_pos_emb=50,
        dropout=0.0,
    )
    projector = ProjectorConfig(
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=192,
        encoder_hidden_size=96,
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
        attention_multiplier=1 / 32**0.5,
        residual_multiplier=0.5,
    )
    return SpeechConfig(encoder, projector, text, audio_token_index=audio_token_index)


def ends_of_branches(model: SpeechLM) -> list[nn.Module]:
    """The layers whose outputs the encoder's blocks add up."""
    ends = []
    for block in model.encoder.layers:
        ends += [block.ff1.down_proj, block.attn.to_out, block.conv.down_conv, block.ff2.down_proj]
    return ends


def init_weights(model: SpeechLM, seed: int) -> SpeechLM:
    """For a model to be trained from scratch: weights of variance 1 / fan_in, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
    model.projector.query.data.normal_(0, 1, generator=generator)
    # What a Conformer block adds begins small: otherwise some seeds learn to spell much later.
    for last in ends_of_branches(model):
        last.weight.data *= 0.1
    return model


def train_ctc(cfg, model: SpeechLM, training: data.Split, transcripts, folder: Path):
    """The encoder learns to spell. The loss is the mean of the last and the middle CTC head's, per
    character; transcripts: a list of classes for each row, empty where there is none."""
    spoken = [i for i, transcript in enumerate(transcripts) if transcript]
    encoder = model.encoder.train()
    updater = Updater(encoder.parameters(), cfg.grad_clip, encoder.buffers())
    state = encoder.state_dict(keep_vars=True)
    checkpoints = folder / "checkpoints" / "ctc"
    start = load_checkpoint(checkpoints, state, updater.adam)
    keep_lines(folder / "ctc.jsonl", start)
    with (
        Rescue(checkpoints, state, updater.adam, start) as rescue,
        StopSignals() as stop,
        Log(folder / "ctc.jsonl", start, cfg.ctc_steps, stop) as log,
    ):
        for step in range(start, cfg.ctc_steps):
            first = step * cfg.base_batch
            drawn = data.order(len(spoken), [cfg.base_seed, CTC_ORDER], first, cfg.base_batch)
            rows = [spoken[i] for i in drawn]
            mel, lengths = pad_ragged(training.mels(rows), model.device)  # (B, T, 160), (B,)
            updater.zero_grad()
            rescue.updating = True  # BatchNorm's statistics move in the forward pass
            frames, middle_logits = encoder(mel, lengths)
            labels = torch.cat([torch.tensor(transcripts[i]) for i in rows]).to(model.device)
            label_lengths = torch.tensor([len(transcripts[i]) for i in rows])
            loss = 0
            for logits in (encoder.out(frames), middle_logits):  # (B, T, classes)
                logp = logits.float().log_softmax(-1).transpose(0, 1)
                loss += 0.5 * F.ctc_loss(
                    logp, labels, lengths.cpu(), label_lengths, zero_infinity=True
                )
            loss.backward()
            lr = learning_rate(cfg.base_lr, cfg.warmup, (step + 1) / cfg.ctc_steps)
            grad_norm = updater.step(lr)

            done = step + 1
            log.write(done, {"loss": loss.item(), "grad_norm": grad_norm, "lr": lr})
            rescue.done, rescue.updating = done, False
            if done % cfg.save_every == 0 or done == cfg.ctc_steps or stop.asked:
                log.sync()
                save_checkpoint(checkpoints, done, state, updater.adam)
            if stop.asked:
                raise SystemExit(stop.exit_code)
    encoder.eval()


def train_sft(cfg, model: SpeechLM, tokenizer, training, folder: Path, freeze_encoder: bool):
    """Projector and decoder learn the targets, token by token, from encoder frames that are
    computed once; without transcripts the encoder learns with them."""
    model.train()
    trained = [model.projector, model.language_model]
    if freeze_encoder:
        model.encoder.eval().requires_grad_(False)
        kept_frames = training.encode(model)
    else:
        trained.append(model.encoder)
    parameters = [p for module in trained for p in module.parameters()]
    updater = Updater(parameters, cfg.grad_clip, model.buffers())
    prompt_ids = [tokenizer.encode_prompt(row["prompt"]) for row in training.rows]
    answers = [torch.tensor(tokenizer.encode_answer(data.target(row))) for row in training.rows]
    state = model.state_dict(keep_vars=True)
    checkpoints = folder / "checkpoints" / "sft"
    start = load_checkpoint(checkpoints, state, updater.adam)
    keep_lines(folder / "sft.jsonl", start)
    with (
        Rescue(checkpoints, state, updater.adam, start) as rescue,
        StopSignals() as stop,
        Log(folder / "sft.jsonl", start, cfg.sft_steps, stop) as log,
    ):
        for step in range(start, cfg.sft_steps):
            first = step * cfg.base_batch
            rows = data.order(len(answers), [cfg.base_seed, SFT_ORDER], first, cfg.base_batch)
            heard = kept_frames(rows) if freeze_encoder else training.mels(rows)
            updater.zero_grad()
            rescue.updating = True
            audio = model.project(heard if freeze_encoder else model.encode(heard))
            prompts = model.embed_prompts([prompt_ids[i] for i in rows], audio)
            tokens, lengths = pad_ragged([answers[i] for i in rows], torch.device("cpu"))
            logp = model.response_logp(prompts, tokens[:, None], lengths[:, None])  # 0 past ends
            loss = -logp.sum() / int(lengths.sum())
            loss.backward()
            lr = learning_rate(cfg.base_lr, cfg.warmup, (step + 1) / cfg.sft_steps)
            grad_norm = updater.step(lr)

            done = step + 1
            log.write(done, {"loss": loss.item(), "grad_norm": grad_norm, "lr": lr})
            rescue.done, rescue.updating = done, False
            if done % cfg.save_every == 0 or done == cfg.sft_steps or stop.asked:
                log.sync()
                save_checkpoint(checkpoints, done, state, updater.adam)
            if stop.asked:
                raise SystemExit(stop.exit_code)
    model.eval()
