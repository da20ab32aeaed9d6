"""What policies read and write: files of a release or of the hub, of which everything counts or is refused.

Nothing that was downloaded is executed. Errors are of whatever kind; ript.read makes one sentence of them.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ript import read, require

def fetch(path) -> Path:
    """A local path as it is; OWNER/NAME or OWNER/NAME/PATH in the Hugging Face hub, downloaded."""
    path = Path(path)
    if (path / "run.pt").exists():
        raise ValueError("it is a run, its policies are in last/ and best/")
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) < 2:
        raise FileNotFoundError("no such file or directory")
    repository = "/".join(path.parts[:2])
    inside = "/".join(path.parts[2:])
    wanted = [inside, f"{inside}/*"] if inside else ["*.json", "*.safetensors", "*_checkpoint.pt"]
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

def fill(path, **modules):
    """Fill modules from a file that has the weights of each by its name."""
    saved = read_weights(path)
    for name, module in modules.items():
        module.load_state_dict(bare(saved[name]))

def read_index(path):
    """The shards that an index names. Others in its directory do not count."""
    return sorted({path.with_name(name) for name in read_json(path)["weight_map"].values()})

def read_base(folder):
    """Yield names and tensors of a released checkpoint, file by file: the 7B is 15 GB, its largest file 7."""
    parts = sorted(folder.glob("*--*_checkpoint.pt"))
    names = [file.name.split("--")[0] for file in parts]
    require(names == ["action_head", "proprio_projector"],
            f"cannot read {folder}: it must have one action_head--*_checkpoint.pt and one proprio_projector--"
            f"*_checkpoint.pt, it has {', '.join(file.name for file in parts) or 'none'}")
    index = folder / "model.safetensors.index.json"
    shards = read(index, read_index) if index.exists() else [folder / "model.safetensors"]
    for file in shards:
        yield from read(file, load_file).items()
    for part, file in zip(names, parts):
        for name, value in read(file, lambda path: bare(read_weights(path))).items():
            yield f"{part}.{name}", value

def check_origin(origin, wanted, folder):
    """Raise UserError where a saved policy was made under other settings than it is wanted for.

    Both are of origin_of; origin is empty for files that others have made, which do not say."""
    for name, value in origin.items():
        # A suite of the user's own may be a variation of the one that the policy is for.
        own = name == "suite" and ":" in value + wanted[name]
        require(value == wanted[name] or own,
                f"the policy in {folder} is made for --{name} {value}, not {wanted[name]}")

def check_statistics(statistics):
    """Raise an error unless there are bounds q01 and q99 of "action", 7 numbers, and of "proprio", 8."""
    for kind, size in (("action", 7), ("proprio", 8)):
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
    check_statistics(statistics[name])
    return statistics[name]

def read_tokenizer(path):
    """Llama's tokenizer, from a tokenizer.json."""
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<PAD>")
    if tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) != [1, 2]:
        raise ValueError("it is not Llama's")
    return tokenizer
