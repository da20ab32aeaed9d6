"""What the files of tests/ share: settings, policies, simulators, a finished run, the original's outputs."""
import atexit
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import ript  # before torch is: it says how OpenMP's threads wait

import h5py
import numpy as np
import pytest
import torch

from policies.openvla_oft import OpenVLAOFT
from policies.tiny import Tiny
from ript import Context
from scripts import sft

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = ROOT / "policies/tabletop"
TASKS = ["lift the red cube", "lift the green cube"]
LORA, SCALE = "tiny_oft/ript_lora", "tiny_oft/scale_header.pth"  # in GOLDEN


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run what takes minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, and runs only with --run-slow")
    config.addinivalue_line("filterwarnings", "ignore:The 'warn' method:DeprecationWarning")  # of robosuite


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="it takes minutes: --run-slow"))


# ------------------------------------------------------------------------------------- the original's outputs
def find_golden():
    """The directory of the original code's outputs: RIPT_GOLDEN, ../shared/golden, or tests/golden, whose
    README.md says what they are. If it has .xz files, a temporary copy where they are unpacked."""
    folder = ROOT / ".." / "shared" / "golden"
    if not folder.exists():
        folder = ROOT / "tests/golden"
    folder = Path(os.environ.get("RIPT_GOLDEN", folder))
    packed = [path.relative_to(folder) for path in folder.rglob("*.xz")]
    if not packed:
        return folder
    copy = Path(tempfile.mkdtemp(prefix="ript_golden_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.xz"), dirs_exist_ok=True)
    for path in packed:
        (copy / path.with_suffix("")).write_bytes(lzma.decompress((folder / path).read_bytes()))
    return copy


GOLDEN = find_golden()


def golden(name):
    """Arrays of the original code's outputs."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    if "pixel_bytes" in arrays:  # pixel_values, packed: bytes, and what a tower makes of each of 256 values
        tower, channel, _, _ = np.ogrid[:2, :3, :1, :1]
        pixels = arrays["pixel_levels"][tower, channel, arrays["pixel_bytes"][:, :, None]]
        arrays["pixel_values"] = pixels.reshape(3, 12, 224, 224)  # camera, tower, colour
    return {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind != "U"}


def original_observations(g):
    """The original's own pictures, read back from SigLIP's normalisation, and proprio."""
    pictures = (g["pixel_values"].unflatten(1, (2, 2, 3))[:, :, 1] * 0.5 + 0.5).mul(255).round().byte()
    pictures = pictures.permute(0, 1, 3, 4, 2).numpy()
    return [dict(pictures=pictures[i], proprio=g["state"][i].numpy()) for i in range(3)]


@pytest.fixture(scope="session")
def oft():
    """(prefix, with adapter) -> the original's tiny checkpoint; its outputs; its instructions."""
    g, loaded = golden("golden_oft"), {}

    def policy(prefix="exact", lora=False):
        if (prefix, lora) not in loaded:
            source = dict(adapter=GOLDEN / LORA) if lora else dict(scale_head=GOLDEN / SCALE)
            folder = GOLDEN / "tiny_oft"
            loaded[prefix, lora] = OpenVLAOFT.from_pretrained(folder, "libero_10", prefix=prefix, **source)
        return loaded[prefix, lora]

    return policy, g, json.loads((GOLDEN / "golden_oft.json").read_text())["_instructions"]


def copy_of(folder, place):
    """A copy of a golden directory that may be written to."""
    shutil.copytree(GOLDEN / folder, place, copy_function=shutil.copyfile)
    place.chmod(0o755)
    return place


# ------------------------------------------------------------------------------------- settings and policies
def config(*argv):
    return ript.parse_config([str(word) for word in argv])


def demo_config(*argv):
    return ript.parse_config([str(word) for word in argv], sft.ImitationConfig, "IMITATION")


def assert_close(a, b, tolerance=1e-6):
    a, b = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def small_policy(seed=0, trained=("action_head",)):
    torch.manual_seed(seed)
    policy = Tiny()
    policy.train_only(trained)
    return policy


def pretrained():
    """The laptop's policy after stage 1."""
    return Tiny.from_pretrained(PRETRAINED)


def trained(policy, parts):
    """Names and parameters that train, after train_only(parts)."""
    policy.train_only(parts)
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def random_observations(n, seed=0):
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8) for _ in range(n)]
    return [dict(pictures=picture, proprio=rng.standard_normal(8)) for picture in pictures]


# ----------------------------------------------------------------------------------- simulators and contexts
def libero_or_skip():
    from libero.libero import get_libero_path
    if not Path(get_libero_path("assets")).is_dir():
        pytest.skip("LIBERO's meshes are not there: run libero-download-assets")


def write_demonstration(path, steps=12, size=64, actions=None, state_size=79):
    """A file as LIBERO's are: upside-down pictures, actions, simulator states, as wide as LIBERO-Goal's."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = rng.uniform(-1, 1, (steps, 7)) if actions is None else actions
        demo["states"] = rng.standard_normal((steps, state_size))
        for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
            demo[f"obs/{name}"] = rng.standard_normal((steps, width))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{name}"] = rng.integers(0, 255, (steps, size, size, 3), dtype=np.uint8)


def fresh_context(number):
    return Context(number % 2, TASKS[number % 2], ript.TRAIN_SEEDS + number)


def flat_state(simulator):
    return simulator.env.sim.get_state().flatten()


@pytest.fixture(scope="module")
def simulator():
    """The tabletop, in this process."""
    simulator = ript.load_suite("tabletop_pretrain")(64, True)
    yield simulator
    simulator.env.close()


@pytest.fixture(scope="session")
def simulators():
    """Two simulators of the tabletop, in processes of their own."""
    with ript.open_simulators(config("--workers", 2)) as simulators:
        yield simulators


@pytest.fixture
def no_simulators(monkeypatch):
    """Simulators start before a policy is read. Without them a mistake that is not noticed fails at once."""
    monkeypatch.setattr(ript, "open_simulators", nullcontext)


# ------------------------------------------------------------------------------------------------ whole runs
QUICK = ["--checkpoint", PRETRAINED, "--groups", 2, "--rollouts", 3, "--max_rejected", 2, "--iterations", 1,
         "--eval_contexts", 2, "--eval_every", 1, "--workers", 2]


def launch(*argv, program="ript.py", timeout=600, **environment):
    """Run a script of the repository: -> returncode, stdout, stderr."""
    return subprocess.run([sys.executable, ROOT / program, *map(str, argv)], capture_output=True, text=True,
                          timeout=timeout, env=os.environ | environment)


def rows_without_seconds(out):
    """The metrics of a run, without those of time and memory."""
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if "second" not in key and "_gb" not in key} for row in rows]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run on the tabletop that nothing disturbed: its directory and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = launch(*QUICK, "--out", out)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return out, done.stdout


def children_of(pid):
    """The processes that a process has started."""
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()


def wait_for_the_end_of(pids):
    """Fail if one of these processes still runs in a minute. One that is dead and not waited for does not."""
    deadline = time.time() + 60
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.time() < deadline, f"process {pid} outlives the run"
                time.sleep(0.1)


# ----------------------------------------------------------------------------------------------- mistakes
def mistake_of(program, arguments):
    """The sentence of the UserError with which a command must end before any long work."""
    with pytest.raises(ript.UserError) as error:
        program.main(arguments.split())
    sentence = " ".join(str(error.value).split())
    assert sentence
    return sentence


def other_sentences(program, mistakes, **places):
    """The mistakes of a table, of arguments and what is said, for which a program says something else."""
    other = {}
    for arguments, sentence in mistakes:
        said = mistake_of(program, arguments.format(**places))
        if sentence.format(**places) not in said:
            other[arguments] = said
    return other
