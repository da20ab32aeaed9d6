"""Strict readers of checkpoints, local or on the hub: unknown or missing tensors are errors.

Nothing that was downloaded is executed. Errors are of any kind; ript.reading makes one sentence of them.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ript import RENAMED, Config, reading, require

# Of a whole repository in the hub: export.py copies the code and the tokenizer, which nothing runs here.
WANTED = ["*.json", "*.safetensors", "*_checkpoint.pt", "*.py", "tokenizer.model"]

def fetch(path) -> Path:
    """A local path as it is; OWNER/NAME or OWNER/NAME/PATH in the Hugging Face hub, downloaded."""
    path = Path(path)
    if (path / "run.pt").exists():
        raise ValueError("it is a run, its policy is in last/")
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) < 2:
        raise FileNotFoundError("no such file or directory")
    repository = "/".join(path.parts[:2])
    inside = "/".join(path.parts[2:])
    wanted = [inside, f"{inside}/*"] if inside else WANTED
    try:
        from huggingface_hub import snapshot_download
        # The adapters in the release's own lora_adapter are merged into its weights already.
        root = snapshot_download(repository, allow_patterns=wanted, ignore_patterns="lora_adapter/*")
    except Exception as error:  # the hub has many kinds
        raise FileNotFoundError(f"no such file or directory, and nothing from the hub: {error}")
    return Path(root, inside)

def read_json(path):
    """The content of a JSON file."""
    return json.loads(path.read_text())

def weights_of(module):
    """The weights of a module, to be written."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}

def read_weights(path):
    """What torch.save wrote to a file, if it is tensors and no code."""
    return torch.load(path, map_location="cpu", weights_only=True)

def bare(weights):
    """Weights in float32, without the "module." of DistributedDataParallel before their names."""
    return {name.removeprefix("module."): value.float() for name, value in weights.items()}

def checksums(folder, *names):
    """The checksums of files that are written together. The file that is written last keeps them."""
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found

def check_together(folder, settings):
    """Raise UserError unless the files of a policy are those that were written together, as far as its
    settings, from which their checksums are taken out, say that. Files of others do not."""
    for name, checksum in settings.pop("files", {}).items():
        with reading(folder / name):
            same = checksums(folder, name)[name] == checksum
        require(same, f"{folder / name} was not written together with the files beside it: one of them is of "
                "another moment or has been changed")

def read_origin(folder):
    """The settings in a policy's ript.json, which says what it is made for; empty where there is none. Raises
    UserError unless the files of the policy were written together."""
    path = folder / "ript.json"
    if not path.exists():
        return {}
    with reading(path):
        settings = read_json(path)
    check_together(folder, settings)
    return settings

def fill(path, **modules):
    """Fill modules from a file that has the weights of each by its name."""
    saved = read_weights(path)
    for name, module in modules.items():
        module.load_state_dict(bare(saved[name]))

def read_index(path):
    """The shards that an index names. Others in its directory do not count."""
    return sorted({path.with_name(name) for name in read_json(path)["weight_map"].values()})

def find_parts(folder):
    """The files of the action head and of the proprio projector in a released checkpoint, by their names."""
    parts = sorted(folder.glob("*--*_checkpoint.pt"))
    names = [file.name.split("--")[0] for file in parts]
    require(names == ["action_head", "proprio_projector"],
            f"cannot read {folder}: it must have one action_head--*_checkpoint.pt and one proprio_projector--"
            f"*_checkpoint.pt, it has {', '.join(file.name for file in parts) or 'none'}")
    return dict(zip(names, parts))

def find_shards(folder):
    """The files of a released checkpoint that have the other weights."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    with reading(index):
        return read_index(index)

def read_base(folder):
    """Yield names and tensors of a released checkpoint, file by file: the 7B is 15 GB, its largest file 7."""
    parts = find_parts(folder)
    for file in find_shards(folder):
        with reading(file):
            weights = load_file(file)
        yield from weights.items()
    for part, file in parts.items():
        with reading(file):
            weights = bare(read_weights(file))
        for name, value in weights.items():
            yield f"{part}.{name}", value

def refuse(cfg, *names):
    """Raise UserError where a setting is given that the policy would ignore."""
    for name in names:
        usual = getattr(Config, name)
        require(getattr(cfg, name) == usual, f"--{name} is not for --model {cfg.model}")

def check_trained_with(origin, wanted, folder):
    """Raise UserError where a saved policy was made under other settings than it is wanted for.

    Both are of settings_of; origin is empty for files that others have made, which do not say."""
    require(origin.keys() <= wanted.keys(), f"the policy in {folder} is of another kind: choose its --model")
    for name, value in origin.items():
        # A suite of the user's own may be a variation of the one that the policy is for.
        own = name == "suite" and ":" in value + wanted[name]
        require(value == wanted[name] or own,
                f"the policy in {folder} is made for --{RENAMED.get(name, name)} {value}, not {wanted[name]}")

def check_statistics(statistics, sizes=None):
    """Raise an error unless there are bounds q01 and q99 of "action" and of "proprio".

    sizes: how many numbers each must have, by kind; without it, q99 must have as many as q01."""
    for kind in ("action", "proprio"):
        size = sizes[kind] if sizes else len(statistics[kind]["q01"])
        for bound in ("q01", "q99"):
            numbers = np.array(statistics[kind][bound], dtype=float)
            if numbers.shape != (size,) or not np.isfinite(numbers).all():
                raise ValueError(f"{bound} of {kind} must be {size} numbers")

def read_statistics(path, suite):
    """The statistics of a suite in a dataset_statistics.json."""
    statistics = read_json(path)
    name = suite if suite in statistics else f"{suite}_no_noops"
    if name not in statistics:
        raise ValueError(f"it is for {', '.join(statistics)}, not {suite!r}")
    check_statistics(statistics[name], dict(action=7, proprio=8))
    return statistics[name]

def read_tokenizer(path):
    """Llama's tokenizer, from a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<PAD>")
    if tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) != [1, 2]:
        raise ValueError("it is not Llama's")
    return tokenizer
