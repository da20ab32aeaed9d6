"""The claims of policies/checkpoints.py: what a checkpoint says is used or refused, with the file's name."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ript
from policies.openvla_oft import OpenVLAOFT
from policies.tiny import Tiny
from scripts import sft
from tests.conftest import GOLDEN, LORA, ROOT, SCALE, config, copy_of, other_sentences, small_policy

LONG_7B = "--model openvla-oft --suite libero_10 --out {tmp}/out "
OFT = LONG_7B + "--task 2 --checkpoint {tmp}/oft "
EVAL = LONG_7B + "--eval "
MISTAKES = [  # of the released form; {tmp} is prepared below
    (LONG_7B + "--scale_head=", "explores with a scale head"),
    (EVAL + "--checkpoint nobody/nothing", "cannot read nobody/nothing"),
    (OFT + "--eval --suite libero_goal", "is for libero_10_no_noops, not 'libero_goal'"),
    (OFT + "--scale_head {tmp}/oft/config.json", "cannot read {tmp}/oft/config.json"),
    (OFT + "--scale_head {tmp}/none.pth", "cannot read {tmp}/none.pth"),
    (OFT + "--scale_head {tmp}/part.pth", "cannot read {tmp}/part.pth: RuntimeError"),
    (OFT + "--adapter nobody/nothing/inside", "cannot read nobody/nothing/inside"),
    (OFT + "--adapter {tmp}/none", "cannot read {tmp}/none"),
    (OFT + "--adapter {tmp}/rank", "{tmp}/rank/adapter_model.safetensors: RuntimeError: Error(s) in loading"),
    (OFT + "--adapter {tmp}/fewer", "2 weights are missing or of no adapter, among them"),
    (OFT + "--adapter {tmp}/base", "{tmp}/base/adapter_model.safetensors: ValueError"),
    (OFT + "--adapter {tmp}/cut", "cannot read {tmp}/cut/adapter_model.safetensors"),
    (OFT + "--adapter {tmp}/headless", "cannot read {tmp}/headless/openvla_headers.pt"),
    (OFT + "--adapter {tmp}/one_head", "{tmp}/one_head/openvla_headers.pt: KeyError: 'scale_header'"),
    (OFT + "--adapter {tmp}/use_dora", "adapter_config.json: ValueError: adapters with use_dora = True"),
    (OFT + "--adapter {tmp}/peft_type", "adapters with peft_type = 'IA3' are not supported"),
    (OFT + "--adapter {tmp}/alpha_pattern", "adapters with alpha_pattern = {{'q_proj': 8}}"),
    (OFT + "--adapter {tmp}/target_modules", "{tmp}/target_modules/adapter_model.safetensors: ValueError"),
    (EVAL + "--checkpoint {tmp}/half", "cannot read {tmp}/half/model-00002-of-00003.safetensors"),
    (EVAL + "--checkpoint {tmp}/less", "cannot read {tmp}/less/model-00003-of-00003.safetensors"),
    (EVAL + "--checkpoint {tmp}/unlisted", "{tmp}/unlisted: RuntimeError: Error(s) in loading state_dict"),
    (EVAL + "--checkpoint {tmp}/pickle", "{tmp}/pickle/action_head--1000_checkpoint.pt"),
    (EVAL + "--checkpoint {tmp}/two_heads", "--1000_checkpoint.pt, action_head--2000_checkpoint.pt"),
    (EVAL + "--checkpoint {tmp}/statistics", "dataset_statistics.json: ValueError: q01 of proprio"),
    (EVAL + "--checkpoint {tmp}/wordless", "cannot read {tmp}/wordless/tokenizer.json"),
    (EVAL + "--checkpoint {tmp}/words", "{tmp}/words/tokenizer.json: ValueError: it is not Llama's")]
BAD_ADAPTERS = dict(use_dora=True, peft_type="IA3", alpha_pattern=dict(q_proj=8),
                    target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("checkpoints")
    for name in ("oft", "half", "less", "unlisted", "pickle", "two_heads", "statistics", "wordless", "words"):
        copy_of("tiny_oft", tmp / name)
    for name in ("rank", "fewer", "base", "cut", "headless", "one_head", *BAD_ADAPTERS):
        copy_of(LORA, tmp / name)
    break_bases(tmp)
    break_adapters(tmp)
    header = torch.load(tmp / "oft/scale_header.pth", weights_only=True)
    del header["log_b_head"]["bias"]
    torch.save(header, tmp / "part.pth")
    return tmp


def break_bases(tmp):
    shard = tmp / "half/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    (tmp / "less/model-00003-of-00003.safetensors").unlink()
    index = json.loads((tmp / "unlisted/model.safetensors.index.json").read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if "00002" not in shard}
    (tmp / "unlisted/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"weight": Path("no tensor")}, tmp / "pickle/action_head--1000_checkpoint.pt")
    head = tmp / "two_heads/action_head--1000_checkpoint.pt"
    shutil.copyfile(head, tmp / "two_heads/action_head--2000_checkpoint.pt")
    statistics = json.loads((tmp / "statistics/dataset_statistics.json").read_text())
    statistics["libero_10_no_noops"]["proprio"]["q01"].pop()
    (tmp / "statistics/dataset_statistics.json").write_text(json.dumps(statistics))
    (tmp / "wordless/tokenizer.json").unlink()
    tokenizer = json.loads((tmp / "words/tokenizer.json").read_text())
    tokenizer |= dict(added_tokens=[], post_processor=None)
    tokenizer["model"] = dict(type="WordLevel", vocab={"<unk>": 0, "lift": 1}, unk_token="<unk>")
    (tmp / "words/tokenizer.json").write_text(json.dumps(tokenizer))


def break_adapters(tmp):
    settings = json.loads((tmp / "rank/adapter_config.json").read_text())
    (tmp / "rank/adapter_config.json").write_text(json.dumps(settings | dict(r=16)))
    for name, value in BAD_ADAPTERS.items():
        (tmp / name / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
    weights = load_file(tmp / "fewer/adapter_model.safetensors")
    one = next(name for name in weights if "lora_A" in name)
    fewer = {name: p for name, p in weights.items() if name not in (one, one.replace("lora_A", "lora_B"))}
    save_file(fewer, tmp / "fewer/adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): p for name, p in weights.items()}
    save_file(renamed, tmp / "base/adapter_model.safetensors")
    cut = tmp / "cut/adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp / "headless/openvla_headers.pt").unlink()
    heads = torch.load(tmp / "one_head/openvla_headers.pt", weights_only=True)
    torch.save(dict(action_header=heads["action_header"]), tmp / "one_head/openvla_headers.pt")


def test_each_checkpoint_that_does_not_fit_gets_a_sentence(no_simulators, tmp):
    assert not other_sentences(ript, MISTAKES, tmp=tmp)
    assert not list(tmp.glob("out/[!.]*"))


def test_a_bad_file_raises_an_error_that_a_caller_can_catch(tmp):
    with pytest.raises(ValueError, match="cannot read .*half"):
        OpenVLAOFT.from_pretrained(tmp / "half", "libero_10")
    with pytest.raises(ValueError, match="config.json"):
        Tiny.from_pretrained(tmp / "rank")


def test_a_shard_that_the_index_does_not_name_is_not_read(oft, tmp_path):
    folder = copy_of("tiny_oft", tmp_path / "oft")
    save_file({"projector.fc1.bias": torch.zeros(3)}, folder / "model-00004-of-00004.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings["dtype"] = settings.pop("torch_dtype")  # as newer versions of transformers write it
    (folder / "config.json").write_text(json.dumps(settings))
    found = OpenVLAOFT.from_pretrained(folder, "libero_10", scale_head=GOLDEN / SCALE).state_dict()
    assert all((value == found[name]).all() for name, value in oft[0]().state_dict().items())


# -------------------------------------------------------------------------------------- what it was made for
ORIGIN = [("--suite libero_object --task 0", "made for --suite tabletop, not libero_object"),
          ("--image_size 128", "made for --image_size 64, not 128"),
          ("--collision false", "made for --collision True, not False")]


@pytest.mark.parametrize("program", [ript, sft])
def test_a_policy_is_used_for_what_it_was_made_for(no_simulators, finished, tmp_path, program):
    mistakes = [(f"{arguments} --checkpoint {finished[0]}/last --out {tmp_path}", sentence)
                for arguments, sentence in ORIGIN]
    assert not other_sentences(program, mistakes)
    assert not list(tmp_path.glob("[!.]*"))


ORIGIN_OF_ADAPTERS = [("--attention_mode prompt", "made for --attention_mode exact, not prompt"),
                      ("--checkpoint {tmp}/other", "made for --checkpoint oft, not other"),
                      ("--image_size 128", "made for --image_size 256, not 128"),
                      ("--scale_head {tmp}/oft/scale_header.pth", "--adapter brings a scale head of its own")]


def test_an_adapter_is_used_for_what_it_was_made_for(no_simulators, tmp_path):
    for name in ("oft", "other"):
        copy_of("tiny_oft", tmp_path / name)
    arguments = OFT.format(tmp=tmp_path).split()
    scale_head = tmp_path / "oft/scale_header.pth"
    OpenVLAOFT.load(config(*arguments, "--scale_head", scale_head)).save(tmp_path / "adapter")
    cfg = config(*arguments, "--adapter", tmp_path / "adapter")
    assert OpenVLAOFT.load(cfg).trained_with["prefix"] == "exact"
    wrong = [(OFT + "--adapter {tmp}/adapter " + more, sentence) for more, sentence in ORIGIN_OF_ADAPTERS]
    (tmp_path / "other_kind").mkdir()
    (tmp_path / "other_kind/ript.json").write_text(json.dumps(dict(base="pi0")))
    wrong.append((OFT + "--adapter {tmp}/other_kind", "is of another kind: choose its --model"))
    assert not other_sentences(ript, wrong, tmp=tmp_path)


# --------------------------------------------------------------------------- files that belong to one another
def mixtures(one, other):
    """One after another, folders with a file of the second policy among those of the first."""
    for name in sorted(path.name for path in one.iterdir()):
        if (one / name).read_bytes() != (other / name).read_bytes():
            kept = (one / name).read_bytes()
            shutil.copyfile(other / name, one / name)
            yield name
            (one / name).write_bytes(kept)


def test_a_small_policy_of_two_moments_is_refused(tmp_path):
    for seed in (0, 1):
        small_policy(seed).save(tmp_path / str(seed))
    mixed = 0
    for name in mixtures(tmp_path / "0", tmp_path / "1"):
        with pytest.raises(ript.UserError, match="model.safetensors was not written together with the files"):
            Tiny.from_pretrained(tmp_path / "0")
        mixed += 1
    assert mixed == 2
    Tiny.from_pretrained(tmp_path / "0")
    assert not list(tmp_path.rglob("*.tmp*"))


def test_adapters_and_heads_of_two_moments_are_refused(oft, tmp_path):
    """As after a run that was killed while it wrote them."""
    policy = OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", GOLDEN / LORA)
    policy.save(tmp_path / "0")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "action_head" in name:
                p += 0.01
    policy.save(tmp_path / "1")
    seen = []
    for name in mixtures(tmp_path / "0", tmp_path / "1"):
        with pytest.raises(ript.UserError, match="was not written together with the files beside it"):
            OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path / "0")
        seen.append(name)
    assert seen == ["adapter_model.safetensors", "openvla_headers.pt", "ript.json"]
    for folder in ("0", "1"):
        OpenVLAOFT.from_pretrained(GOLDEN / "tiny_oft", "libero_10", tmp_path / folder)


def test_what_else_decides_actions_is_part_of_a_fingerprint(tmp_path):
    shutil.copytree(ROOT / "policies/tabletop", tmp_path / "policy")
    before = ript.fingerprint(Tiny.from_pretrained(tmp_path / "policy"))
    assert before == ript.fingerprint(Tiny.from_pretrained(tmp_path / "policy"))
    settings = json.loads((tmp_path / "policy/config.json").read_text())
    settings["statistics"]["proprio"]["q99"][2] += 0.01
    (tmp_path / "policy/config.json").write_text(json.dumps(settings))
    assert ript.fingerprint(Tiny.from_pretrained(tmp_path / "policy")) != before
