"""A trained run as one whole checkpoint, for transformers, vLLM and llama.cpp.

    python -m tools.export RUN OUT

RUN is a finished run that began with --init. OUT gets that checkpoint's files, in which its own
LoRA, if it has one, and the run's are part of the weights: added in float32, rounded once. No more
than one layer is in memory at a time.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

import train
from lora import read_adapter
from released.checkpoint import INDEX, weight_files
from released.config import without_weights
from upkeep.errors import DataError, UserError, command, errors_of_reading, errors_of_writing
from upkeep.files import is_there, read_json, sync
from upkeep.tensors import is_finite, our_name

# What else belongs to a checkpoint: settings, tokenizer, preprocessor, chat template.
KEPT = (".json", ".jinja", ".model", ".txt")
NOT_KEPT = ("adapter_config.json", "config.json", INDEX)  # no longer so, or written anew


def export(run: Path, out: Path, max_shard_size: int = 5 * 10**9):
    """Write the checkpoint; max_shard_size in bytes. Raises UserError, and leaves nothing under the
    name `out`, where something does not fit."""
    cfg = train.finished(run, {})
    out = out.resolve()
    checkpoint = cfg.base_folder
    if is_there(checkpoint / "tokenizer.model"):
        raise UserError(
            f"{run} did not begin with --init: its base, {checkpoint}, is no released checkpoint, "
            "and nothing but this code reads it"
        )
    if is_there(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already, and not empty: choose another folder")
    adapters = [Path(cfg.resume_adapter)]
    if is_there(checkpoint / "adapter_config.json"):
        adapters.append(checkpoint)
    updates = lora_updates(checkpoint, adapters)
    shards = plan_shards(weight_files(checkpoint), max_shard_size)
    in_shards = {our_name(key) for shard in shards for key in shard}
    for name in updates:
        if name not in in_shards:
            raise DataError(f"{checkpoint}: its files hold no {name}, which LoRA is for")

    work = out.with_name(out.name + "-exporting")  # renamed when it is complete
    with errors_of_writing(out):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [
                f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
            ]
            index = {"metadata": {}, "weight_map": {}}
            for name, shard in zip(names, shards):
                index["weight_map"] |= dict.fromkeys(shard, name)
            (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, shard in zip(names, shards):
            write_shard(work / name, shard, updates)
        config = read_json(checkpoint / "config.json") | {"has_lora_adapter": False}
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in checkpoint.iterdir():
            if file.suffix in KEPT and file.name not in NOT_KEPT:
                shutil.copyfile(file, work / file.name)
        for file in work.iterdir():
            sync(file)
        if out.exists():
            out.rmdir()  # it is empty
        os.rename(work, out)


def lora_updates(checkpoint: Path, adapters: list[Path]) -> dict[str, list[tuple]]:
    """By the name of a weight (out, in), what is to be added to it: (scale, B (out, r), A (r, in)),
    from adapters in all these folders."""
    model = without_weights(checkpoint / "config.json")
    updates = {}
    for folder in adapters:
        settings, layers, tensors = read_adapter(model, folder)
        scale = settings["lora_alpha"] / settings["r"]
        for layer in layers:
            A, B = (tensors[f"{layer}.lora_{part}.weight"].float() for part in "AB")
            updates.setdefault(f"{layer}.weight", []).append((scale, B, A))
    return updates


def plan_shards(files: list[Path], max_size: int) -> list[dict[str, tuple]]:
    """The tensors of all files in their order, in shards of up to max_size bytes: by each tensor's
    name the file that it comes from, and its entry in the header of the shard."""
    shards = [{}]
    end = 0
    for file in files:
        with errors_of_reading(file, "safetensors"), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                n_bytes = tensors.get_tensor(key).nbytes  # mapped: nothing is read
                if end + n_bytes > max_size and shards[-1]:
                    shards.append({})
                    end = 0
                stored = tensors.get_slice(key)
                entry = {"dtype": stored.get_dtype(), "shape": stored.get_shape()}
                entry["data_offsets"] = [end, end + n_bytes]
                shards[-1][key] = (file, entry)
                end += n_bytes
    return shards


def write_shard(path: Path, shard: dict[str, tuple], updates: dict[str, list[tuple]]):
    """A file of safetensors: the length of a header in JSON, the header, the tensors' bytes.

    Tensor by tensor; the library's own save_file would want all of them in memory.
    """
    header = {"__metadata__": {"format": "pt"}}
    header |= {key: entry for key, (_, entry) in shard.items()}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as written:
        written.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, (file, _) in shard.items():
            written.write(merged(file, key, updates).view(-1).view(torch.uint8).numpy())


def merged(file: Path, key: str, updates: dict[str, list[tuple]]) -> torch.Tensor:
    """A tensor of a file with its updates, rounded to the dtype that it is stored in."""
    # The file is opened for each tensor, so that none stays mapped when it is done.
    with errors_of_reading(file, "safetensors"), safe_open(file, framework="pt") as tensors:
        stored = tensors.get_tensor(key)
        if our_name(key) not in updates:
            return stored
        total = stored.to(torch.float32, copy=True)
        for scale, B, A in updates[our_name(key)]:
            total.addmm_(B, A, alpha=scale)
        weight = total.to(stored.dtype)
        if not is_finite(weight):
            raise ValueError(f"{key} with LoRA is not finite as {stored.dtype}")
        return weight


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a finished run that began with --init")
    parser.add_argument("out", type=Path, help="folder to be made")
    args = parser.parse_args(argv)
    export(args.run, args.out)
    print(f"{args.out} is a whole checkpoint")


if __name__ == "__main__":
    command(main)
