"""tools.export: a run on a released checkpoint as one, as transformers reads it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import train
from released import load_model
from released.checkpoint import INDEX
from released.test_released import checkpoint, make_checkpoint
from tests.helpers import (
    PLAIN,
    ROOT,
    causal_logits,
    first_run,
    make_large_model,
    near,
    odd_config,
    randn,
    roughly,
    same,
    seeded,
    shake_lora,
)
from tools.export import export, main
from upkeep.errors import UserError
from upkeep.files import read_json, write_json
from upkeep.tensors import our_name

__all__ = ["checkpoint", "first_run", "seeded"]  # fixtures


def make_run(run, checkpoint, targets=lora.DECODER_TARGETS):
    """What a finished run on a checkpoint leaves that export needs, with LoRA at random; the model
    as the run has it."""
    cfg = train.Config(init=str(checkpoint))
    model, _ = train.load(cfg, torch.device("cpu"), torch.float32)
    shake_lora(model, targets)
    lora.save_adapter(model, run / "adapter", targets, base=str(checkpoint))
    write_json(run / "config.json", {"base": os.path.relpath(checkpoint, run)})
    write_json(run / "results.json", {"config": {"data": ""}})
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("size, files", [(5 * 10**9, 1), (100_000, 3)])
@pytest.mark.parametrize("layout", ["3.3", "4.0"])
def test_an_exported_run_is_a_checkpoint_of_transformers(
    layout, size, files, checkpoint, tmp_path, capfd
):
    """3.3: LoRA of its own, several shards. 4.0: neither, and tied embeddings. Their from_pretrained
    takes every tensor of the export, and gives our logits and greedy tokens."""
    hf = pytest.importorskip("transformers")
    folder = checkpoint[0]
    if layout == "4.0":
        folder = tmp_path / "ck"
        make_checkpoint(folder, odd_config(1), max_shard_size="1GB")
    assert len(list(folder.glob("model*.safetensors"))) == {"3.3": 10, "4.0": 1}[layout]
    ours = make_run(tmp_path / "run", folder, PLAIN)
    out = tmp_path / "out"
    export(tmp_path / "run", out, size)
    assert not list(tmp_path.glob("out-*"))
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) >= files
    assert (out / INDEX).exists() == (len(shards) > 1)
    if len(shards) > 1:
        assert max(sum(t.nbytes for t in load_file(shard).values()) for shard in shards) <= size
        assert {shard.name for shard in shards} == set(
            read_json(out / INDEX)["weight_map"].values()
        )
    config = read_json(folder / "config.json") | {"has_lora_adapter": False}
    assert read_json(out / "config.json") == config
    weights = {INDEX, "adapter_config.json", "config.json"}
    for file in folder.glob("*.j*"):
        if file.name not in weights:
            assert (out / file.name).read_bytes() == file.read_bytes(), file
    assert not (out / "adapter_config.json").exists() and not (out / "README.md").exists()
    hf.AutoProcessor.from_pretrained(out)

    theirs, told = hf.GraniteSpeechForConditionalGeneration.from_pretrained(
        out, dtype="float32", output_loading_info=True
    )
    assert not any(told.values()), told
    theirs.eval().generation_config.eos_token_id = None
    mel = randn(33, 160, seed=5)  # no answer says <|audio|>, which is another embedding there
    sounds = ours.project(ours.encode([mel]))
    audio = ours.config.audio_token_index
    prompts = ours.embed_prompts([[4, audio, 5, 6]], sounds)
    ids = torch.tensor([[4] + [audio] * len(sounds[0]) + [5, 6]])
    logits = theirs(input_ids=ids, input_features=mel[None]).logits
    roughly(causal_logits(ours, prompts.x), logits / ours.config.text_config.logits_scaling)
    rollout = ours.sample(prompts, torch.zeros(1, 1, 20), eos_id=-1, temperature=0)
    greedy = theirs.generate(
        input_ids=ids, input_features=mel[None], do_sample=False, max_new_tokens=20
    )
    assert rollout.tokens[0, 0].tolist() == greedy[0, ids.shape[1] :].tolist()
    with lora.lora_disabled(ours):
        assert not torch.allclose(causal_logits(ours, prompts.x), logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_rounds_once(checkpoint, tmp_path):
    """In bfloat16, both LoRAs on one weight are added before it is rounded; what has none, and the
    dtype of each tensor, stay."""
    folder = shutil.copytree(checkpoint[0], tmp_path / "ck")
    stored = {}
    for file in {folder / name for name in read_json(folder / INDEX)["weight_map"].values()}:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and "encoder" not in name:
                tensors[name] = tensor.bfloat16()
        save_file(tensors, file)
        stored |= {our_name(name): tensor for name, tensor in tensors.items()}
    make_run(tmp_path / "run", folder, ["q_proj", "up_proj"])
    export(tmp_path / "run", tmp_path / "out")
    found = {our_name(n): t for n, t in load_file(tmp_path / "out/model.safetensors").items()}
    assert found.keys() == stored.keys()
    updates = dict.fromkeys(stored, 0)
    for adapter_folder, scale in ((folder, 3.0), (tmp_path / "run" / "adapter", 4.0)):
        tensors = load_file(adapter_folder / "adapter_model.safetensors")
        tensors = {our_name(name): tensor for name, tensor in tensors.items()}
        for name, A in tensors.items():
            if "lora_A" in name:
                B = tensors[name.replace("lora_A", "lora_B")]
                updates[name.replace("lora_A.", "")] += scale * (B.double() @ A.double())
    assert sum(torch.is_tensor(update) for update in updates.values()) == 2 * 3 + 3 + 8
    n_other = n_all = 0
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        if not torch.is_tensor(updates[name]):
            same(found[name], tensor)
            continue
        exact = tensor.double() + updates[name]
        near(found[name].double(), exact, atol=1e-6, rtol=torch.finfo(tensor.dtype).eps)
        if tensor.dtype == torch.bfloat16:
            n_other += int((found[name] != exact.bfloat16()).sum())
            n_all += tensor.numel()
    assert n_other < n_all / 200  # the sum in float32 may fall on the other side of a tie


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_overwrites_nothing_and_leaves_no_half(checkpoint, first_run, tmp_path, capsys):
    folder = shutil.copytree(checkpoint[0], tmp_path / "ck")
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(run, folder)

    def refused(words, run=run):
        with pytest.raises(UserError, match=words):
            export(run, out)
        assert not (out / "config.json").exists()

    refused("did not begin with --init", first_run)
    refused("holds no finished run", tmp_path)
    out.write_text("mine")
    refused("out is there already")
    out.unlink()
    out.mkdir()
    (out / "mine").write_text("mine")
    refused("out is there already")
    (out / "mine").unlink()
    leftover = tmp_path / "out-exporting"
    leftover.mkdir()
    (leftover / "model-00003-of-00009.safetensors").write_bytes(b"of an export that was killed")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: 1e30 * tensor for name, tensor in tensors.items()}, file)
    refused("q_proj.weight with LoRA is not finite")
    save_file(tensors, file)
    main([str(run), str(out)])
    assert "out is a whole checkpoint" in capsys.readouterr().out
    assert not leftover.exists()
    assert len(list(out.glob("*.safetensors"))) == 1
    load_model(out)


# Exports in its own process and prints by how much it grew at its peak, in bytes.
EXPORTING = r"""
import re, sys, torch
from pathlib import Path
from tools.export import export
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
torch.nn.Embedding(9, 9, device="meta").requires_grad_(False)  # these import a lot
torch.randn(9, device="meta")
torch.randn(99, 99) @ torch.randn(99, 99)
before = peak()
export(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_an_export_has_a_layer_in_memory_and_not_the_file(tmp_path):
    model = make_large_model()
    model.save(tmp_path / "ck")
    size = sum(p.nbytes for p in model.parameters())
    largest = max(4 * p.numel() for p in model.parameters())  # as float32
    shake_lora(model)
    run = tmp_path / "run"
    lora.save_adapter(model, run / "adapter", base=str(tmp_path / "ck"))
    del model
    write_json(run / "config.json", {"base": "../ck"})
    write_json(run / "results.json", {"config": {"data": ""}})
    command = [sys.executable, "-c", EXPORTING, str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > size > 200e6
    assert int(done.stdout) < 1.5 * largest, int(done.stdout) / largest
