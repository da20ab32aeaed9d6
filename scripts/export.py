"""A 7B run's last/ as an OpenVLA-OFT directory, for evaluators that know nothing of adapters.

    python scripts/export.py runs/openvla-oft_libero_10/last --out DIR
    python scripts/export.py OWNER/NAME/FOLDER --out DIR --checkpoint BASE    adapters of others

The base is the one that the run's config.json names, or --checkpoint, a directory or hub id. What is written:

    model*.safetensors    the base's weights, in its dtype and under its names, with the adapters merged
    action_head--*_checkpoint.pt, proprio_projector--*_checkpoint.pt    as openvla-oft's loaders look for them
    scale_header.pth      the scale head of stage 3, with which ript.py can go on
    *.json and the rest   the base's own: config, statistics, preprocessor, tokenizer

The base may have adapters merged already, those of its own fine-tuning; these here are stage 3's and come on
top. It takes 3 GB of memory beside the system's cache of files: shards are copied, and each weight that
changes is written into its copy.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import shutil
from functools import partial
from typing import Optional

import torch
from safetensors import safe_open
from torch import nn

import ript
from policies.checkpoints import (check_trained_with, fetch, fill, find_parts, find_shards, read_json,
                                  read_origin, weights_of)
from policies.openvla_oft import OpenVLAOFT
from ript import reading, require


def find_base(adapter: Path, checkpoint: str) -> tuple[str, dict]:
    """The base that adapters belong to, as --checkpoint or the run's config.json names it; and what the file
    ript.json beside the adapters says about them, which those of others do not have."""
    origin = read_origin(adapter)
    run = adapter.resolve().parent / "config.json"
    if not checkpoint and run.exists():
        with reading(run):
            checkpoint = read_json(run).get("checkpoint", "")
    require(checkpoint, f"no config.json of a run beside {adapter} says what its adapters are for: "
            "--checkpoint must name the OpenVLA-OFT that they were trained on")
    check_trained_with(origin, origin | dict(checkpoint=Path(checkpoint).name), adapter)
    return checkpoint, origin


def read_policy(base: Path, adapter: Path) -> OpenVLAOFT:
    """The policy without the base's weights, which stay on the meta device: its adapters and heads are read.

    Raises UserError where anything does not fit, as OpenVLAOFT.from_pretrained does."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    with reading(base / "dataset_statistics.json"):
        suite = min(read_json(base / "dataset_statistics.json"))  # any: it is copied whole
    arguments, _ = OpenVLAOFT.describe(base, suite)
    with reading(base / "config.json"), torch.device("meta"):
        policy = OpenVLAOFT(**arguments)
    with reading(adapter / "adapter_config.json"):
        policy.add_lora(read_json(adapter / "adapter_config.json"))
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.lora_A.to_empty(device="cpu")
            layer.lora_B.to_empty(device="cpu")
    policy.action_head.to_empty(device="cpu")
    with reading(adapter / "adapter_model.safetensors"):
        policy.read_adapter(adapter / "adapter_model.safetensors")
    with reading(adapter / "openvla_headers.pt"):
        fill(adapter / "openvla_headers.pt", **policy.heads())
    return policy


def adapted_weights(policy: OpenVLAOFT) -> dict[str, Optional[nn.Module]]:
    """Of each weight in the base's shards, by its name there, PEFT's layer that changes it, or None."""
    layers = {}
    for name in policy.state_dict():
        module, _, kind = name.rpartition(".base_layer.")
        if module:
            layer = policy.get_submodule(module) if kind == "weight" else None
            layers[f"{module}.{kind}"] = layer
        elif "lora_" not in name and not name.startswith(("action_head", "scale_head", "proprio_projector")):
            layers[name] = None
    return layers


def merge_shard(shard: Path, copy: Path, layers: dict[str, Optional[nn.Module]]) -> int:
    """Copy a safetensors file, with the adapters of layers added to its weights: -> how many have changed.

    Neither dtypes nor shapes change, so the copy's header stays as it is and each weight has its place."""
    shutil.copyfile(shard, copy)
    changed = 0
    with open(copy, "r+b") as file, safe_open(shard, "pt") as weights:
        # The format: 8 bytes with the header's length, the header as JSON, the data.
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in weights.keys():
            if layers[name] is None:
                continue
            with reading(shard):
                weight = weights.get_tensor(name)
            delta = layers[name].get_delta_weight("default").detach()  # float32, with the factor alpha / r
            require(delta.shape == weight.shape, f"{name} in {shard} has the shape {tuple(weight.shape)}, "
                    f"and its adapter is for {tuple(delta.shape)}")
            merged = (weight.float() + delta).to(weight.dtype)
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(merged.contiguous().flatten().view(torch.uint8).numpy())
            changed += 1
    return changed


def names_in(shards: list[Path]) -> list[str]:
    """The names of all weights in safetensors files, whose data is not read."""
    names = []
    for shard in shards:
        with reading(shard), safe_open(shard, "pt") as weights:
            names += weights.keys()
    return names


def export(adapter: Path, base: Path, folder: Path) -> int:
    """Write the OpenVLA-OFT that base is with an adapter folder into a directory: -> how many weights differ
    from the base's. Raises UserError where the files do not fit."""
    policy = read_policy(base, adapter)
    shards, parts = find_shards(base), find_parts(base)
    layers = adapted_weights(policy)
    wrong = sorted(layers.keys() ^ set(names_in(shards)))
    require(not wrong, f"{len(wrong)} weights in {base} are missing or unknown, among them {wrong[:1]}")
    size = sum(path.stat().st_size for path in shards) + 1.5e9  # bytes; both heads take 1.4e9
    free = shutil.disk_usage(folder).free
    require(size < free, f"there are {free / 1e9:.1f} GB of free disk for --out, of which {size / 1e9:.1f} "
            "are needed: choose another --out")
    for path in base.iterdir():
        # Not the base's own weights, nor what is hidden, nor its lora_adapter, which is merged already.
        kept = path.suffix not in (".safetensors", ".pt", ".pth", ".bin") and path.name[0] != "."
        if path.is_file() and kept:
            shutil.copyfile(path, folder / path.name)
    projector, head = parts["proprio_projector"], parts["action_head"]
    shutil.copyfile(projector, folder / projector.name)
    # Released files were saved from DistributedDataParallel.
    weights = {f"module.{name}": value for name, value in weights_of(policy.action_head).items()}
    torch.save(weights, folder / head.name)
    scale = {name: weights_of(module) for name, module in policy.scale_parts().items()}
    torch.save(scale, folder / "scale_header.pth")
    return sum(merge_shard(shard, folder / shard.name, layers) for shard in shards)


def main(argv: Optional[list[str]] = None):
    """Write the directory under a temporary name, and rename it at the end."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = partial(require, False)
    parser.add_argument("adapter", help="last/ of a run, or a folder of adapters in the hub")
    parser.add_argument("--out", required=True, help="directory to write, which must not exist or be empty")
    parser.add_argument("--checkpoint", default="", help="the base, where the run's config.json is not there")
    options = parser.parse_args(argv)
    out = Path(options.out)
    free = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(free, f"{out} exists already: choose another --out")
    with reading(options.adapter):
        adapter = fetch(options.adapter)
    require((adapter / "adapter_config.json").exists(), f"{adapter} has no adapters (adapter_config.json): "
            "export.py is for last/ of a run of --model openvla-oft, which has some")
    checkpoint, origin = find_base(adapter, options.checkpoint)
    with reading(checkpoint):
        base = fetch(checkpoint)
    with ript.writing(out.absolute()) as folder:
        folder.mkdir()
        changed = export(adapter, base, folder)
    print(f"{out} is {checkpoint} with the adapters and heads of {adapter}: {changed} weights have changed.")
    mode = origin.get("prefix")
    evaluation = f"python ript.py --model openvla-oft --suite {origin.get('suite', 'SUITE')} --eval"
    words = " --attention_mode prompt" if mode == "prompt" else ""
    print(f"To evaluate it here: {evaluation} --checkpoint {out}{words}")
    if mode is None:
        print("Its adapters do not say how they were trained. Those of RIPT-VLA's authors need "
              "--attention_mode prompt, too.")
    if mode != "exact":
        print("openvla-oft's own code has the attention of --attention_mode exact, which makes another "
              "function of adapters that were trained with prompt.")


if __name__ == "__main__":
    ript.run_command(main)
