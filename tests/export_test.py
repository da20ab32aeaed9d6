"""The claims of scripts/export.py: others read an OpenVLA-OFT, and it acts as the adapters do."""
import json
import resource

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from policies.openvla_oft import OpenVLAOFT
from scripts import export
from tests.conftest import (GOLDEN, LORA, PRETRAINED, assert_close, config, copy_of, mistake_of,
                            original_observations)

BASE = GOLDEN / "tiny_oft"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The original's tiny checkpoint with its adapters, as a directory."""
    out = tmp_path_factory.mktemp("export") / "oft"
    export.main([str(GOLDEN / LORA), "--out", str(out), "--checkpoint", str(BASE)])
    assert [path.name for path in out.parent.iterdir()] == ["oft"]
    return out


def shards_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("prefix,variant", [("exact", "a"), ("prompt", "b")])
def test_it_predicts_what_the_original_predicts_with_its_adapters(oft, exported, prefix, variant):
    _, g, texts = oft
    header = exported / "scale_header.pth"
    policy = OpenVLAOFT.from_pretrained(exported, "libero_10", scale_head=header, prefix=prefix)
    assert not policy.lora
    with torch.no_grad():
        mean, log_scale = policy.predict(original_observations(g), texts)
    assert_close(mean, g[f"lora_{variant}_mean"], 1e-5)
    assert_close(log_scale, g[f"lora_{variant}_logscale"], 1e-5)


def test_every_weight_is_what_peft_merges_and_all_else_is_the_bases(oft, exported):
    policy = OpenVLAOFT.from_pretrained(BASE, "libero_10", GOLDEN / LORA)
    layers = {name: layer for name, layer in policy.named_modules() if isinstance(layer, BaseTunerLayer)}
    head = layers.pop("language_model.lm_head")  # whose weight a policy does not keep
    before, after = shards_of(BASE), shards_of(exported)
    expected = dict(before)
    weight = before["language_model.lm_head.weight"]
    expected["language_model.lm_head.weight"] = (weight.float() + head.get_delta_weight("default")).to(weight)
    for name, layer in layers.items():
        layer.merge()
        expected[f"{name}.weight"] = layer.get_base_layer().weight.detach()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert_close(value, expected[name], 1e-6)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{name}.weight" for name in [*layers, "language_model.lm_head"]}
    for path in BASE.glob("*.json"):
        assert (exported / path.name).read_bytes() == path.read_bytes()


def test_the_files_have_the_names_and_forms_that_the_authors_loaders_look_for(exported):
    for part in ("action_head", "proprio_projector"):  # experiments/robot/openvla_utils.py looks for these
        found = [path.name for path in exported.iterdir() if part in path.name and "checkpoint" in path.name]
        assert found == [f"{part}--1000_checkpoint.pt"]
        theirs, ours = (torch.load(folder / found[0], weights_only=True) for folder in (BASE, exported))
        assert ours.keys() == theirs.keys() and all(name.startswith("module.") for name in ours)
    header = torch.load(GOLDEN / LORA / "openvla_headers.pt", weights_only=True)["action_header"]
    head = torch.load(exported / "action_head--1000_checkpoint.pt", weights_only=True)
    assert all(torch.equal(head[f"module.{name}"], value.float()) for name, value in header.items())
    for path in exported.glob("*.safetensors"):  # transformers refuses files that do not say it
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_run_with_a_bfloat16_base_is_exported_in_bfloat16_and_names_its_base_itself(oft, tmp_path, capsys):
    _, g, texts = oft
    base = copy_of("tiny_oft", tmp_path / "oft")
    for path in base.glob("*.safetensors"):
        weights = {name: value.bfloat16() for name, value in load_file(path).items()}
        save_file(weights, path, dict(format="pt"))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | dict(torch_dtype="bfloat16")))
    cfg = config("--model", "openvla-oft", "--suite", "libero_10", "--checkpoint", base, "--adapter",
                 GOLDEN / LORA, "--device", "cpu")
    policy = OpenVLAOFT.load(cfg)
    policy.save(tmp_path / "run/last")
    (tmp_path / "run/config.json").write_text(json.dumps(dict(checkpoint=str(base))))
    export.main([str(tmp_path / "run/last"), "--out", str(tmp_path / "new/out")])
    said = capsys.readouterr().out
    assert "--suite libero_10 --eval" in said and "attention_mode" not in said
    assert all(value.dtype == torch.bfloat16 for value in shards_of(tmp_path / "new/out").values())
    again = OpenVLAOFT.from_pretrained(tmp_path / "new/out", "libero_10")
    with torch.no_grad():
        ours, theirs, unmerged = (
            p.predict(original_observations(g), texts)[0]
            for p in (again, policy, OpenVLAOFT.from_pretrained(base, "libero_10")))
    # bfloat16 alone is off by 0.007, and the adapters here make a difference of 1.
    assert (ours - g["lora_a_mean"]).abs().mean() < 0.02 and (ours - theirs).abs().mean() < 0.02
    assert (unmerged - theirs).abs().mean() > 0.3
    headers = tmp_path / "run/last/openvla_headers.pt"
    changed = torch.load(headers, weights_only=True)
    next(iter(changed["action_header"].values())).mul_(2)
    torch.save(changed, headers)
    assert "openvla_headers.pt" in mistake_of(export, f"{tmp_path}/run/last --out {tmp_path}/new/other")


def test_adapters_that_were_trained_with_the_release_attention_say_so(tmp_path, capsys):
    words = [f"--out={tmp_path}/out", f"--checkpoint={BASE}"]
    export.main([str(GOLDEN / LORA), *words])
    said = capsys.readouterr().out
    assert "do not say how they were trained" in said and "need --attention_mode prompt" in said
    adapter = copy_of(LORA, tmp_path / "lora")
    (adapter / "ript.json").write_text(json.dumps(dict(prefix="prompt", suite="libero_goal")))
    export.main([str(adapter), f"--out={tmp_path}/other", f"--checkpoint={BASE}"])
    said = capsys.readouterr().out
    assert f"libero_goal --eval --checkpoint {tmp_path}/other --attention_mode prompt" in said


def test_each_mistake_gets_a_sentence_and_leaves_nothing_behind(oft, tmp_path):
    taken, run, unlike, less = tmp_path / "taken", tmp_path / "run", tmp_path / "unlike", tmp_path / "less"
    for folder in (taken, run, unlike):
        folder.mkdir()
    (taken / "notes.txt").touch()
    (run / "run.pt").touch()
    (unlike / "ript.json").write_text(json.dumps(dict(checkpoint="openvla-7b")))
    (unlike / "adapter_config.json").touch()
    copy_of("tiny_oft", less)
    shard = less / "model-00003-of-00003.safetensors"
    weights = load_file(shard)
    weights.popitem()
    save_file(weights, shard)
    good, base = f"{GOLDEN / LORA}", f"--checkpoint {BASE}"
    mistakes = [(f"{good} {base} --out {taken}", f"{taken} exists already: choose another --out"),
                (f"{good} {base} --out {taken}/notes.txt", "notes.txt exists already"),
                (f"{run} {base} --out {tmp_path}/out", "it is a run, its policy is in last/"),
                (f"{PRETRAINED} {base} --out {tmp_path}/out", f"{PRETRAINED} has no adapters"),
                (f"{BASE} --out {tmp_path}/out", f"{BASE} has no adapters"),
                (f"{tmp_path}/none {base} --out {tmp_path}/out", f"cannot read {tmp_path}/none"),
                (f"{unlike} {base} --out {tmp_path}/out", "made for --checkpoint openvla-7b, not tiny_oft"),
                (f"{good} --checkpoint {less} --out {tmp_path}/out", f"1 weights in {less} are missing"),
                (f"{good} --out", "--out"), (good, "--out")]
    for arguments, sentence in mistakes:
        assert sentence in mistake_of(export, arguments), arguments
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "run", "unlike", "less"}
    adapter = copy_of(LORA, tmp_path / "alone")  # beside no run
    assert "--checkpoint must name the OpenVLA-OFT" in mistake_of(export, f"{adapter} --out {tmp_path}/out")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 21, resource.RLIM_INFINITY))
    try:
        said = mistake_of(export, f"{GOLDEN / LORA} --checkpoint {BASE} --out {tmp_path}/out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert f"cannot write {tmp_path}/out" in said and not list(tmp_path.iterdir())
