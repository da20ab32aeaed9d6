"""The claims about the repository: imports run one way, ript.py stands alone, no other package interferes."""
import ast
import json
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT, launch, libero_or_skip, rows_without_seconds

ROOMS = "policies", "simulators", "scripts", "experiments", "tests"
MAY_IMPORT = {"ript": {"ript"},  # itself, for the sake of what says `import ript`
              "policies": {"ript", "policies", "simulators"},
              "simulators": {"ript", "policies", "simulators"},
              "scripts": {"ript", "policies", "simulators", "scripts"},
              "experiments": {"ript", "policies", "simulators", "scripts", "experiments"}}
FINDS_THE_REPOSITORY = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"


def modules():
    """The parsed files of the repository, by the names of their modules."""
    files = [ROOT / "ript.py", *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return {name: ast.parse(file.read_text()) for name, file in zip(names, files)}


def imported(tree):
    """The modules that a file imports anywhere in it; for `from a import b`, a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0  # a script run by its path has no package
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_from_experiments_and_scripts_to_policies_and_simulators_to_ript():
    wrong = []
    for module, tree in modules().items():
        for name in imported(tree):
            room, target = module.split(".")[0], name.split(".")[0]
            if target in ("ript", "ript_test", *ROOMS) and target not in MAY_IMPORT.get(room, {target}):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_no_file_imports_itself_by_way_of_others():
    known = modules()
    graph = {module: (imported(tree) & known.keys()) - {module} for module, tree in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)  # it raises CycleError


def test_no_line_is_longer_than_110_columns():
    files = [ROOT / "ript.py", ROOT / "ript_test.py"]
    files += [file for room in ROOMS for file in (ROOT / room).glob("*.py")]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert not [(name, line) for name, line in lines if len(line) > 110]


def test_every_folder_is_a_package_so_that_no_other_of_its_name_is_found_first():
    assert all((ROOT / room / "__init__.py").exists() for room in ROOMS)


def test_only_the_first_lines_of_a_script_touch_the_path_of_imports():
    for module, tree in modules().items():
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        uses = [node.lineno for node in names if ast.unparse(node.value) == "sys.path"]
        if uses:
            assert module.split(".")[0] in ("scripts", "experiments"), module
            first = [ast.unparse(node) for node in tree.body[1:4]]
            assert first == ["import sys", "from pathlib import Path", FINDS_THE_REPOSITORY], module
            assert uses == [tree.body[3].lineno], module


# -------------------------------------------------------------------------------------- ript.py stands alone
TOY = """
import math
import numpy as np
import ript
import torch
from torch import nn

# For a quick test: short episodes, and every group is kept.
ript.LIBERO["libero_object"] = 16
ript.has_signal = lambda rewards: torch.ones(len(rewards), dtype=torch.bool)


class Toy(ript.LaplacePolicy):
    def __init__(self):
        super().__init__()
        self.action_head = nn.Linear(3, 7)
        self.scale_head = nn.Linear(3, 7)

    @classmethod
    def load(cls, cfg):
        return cls()

    @classmethod
    def preprocess(cls, raw):
        assert raw["agentview_image"].shape == (32, 32, 3)
        return raw["robot0_eef_pos"].astype(np.float32)

    def features(self, observations, instructions):
        return torch.tensor(np.stack(observations))[:, None].expand(-1, self.chunk, -1)

    def to_env_actions(self, normalised):
        return normalised.clamp(-1, 1).double().numpy()

    def save(self, directory):
        with ript.writing(directory / "toy.pt") as path:
            torch.save(self.state_dict(), path)
"""


@pytest.fixture
def alone(tmp_path):
    """A folder with ript.py alone, and a function that runs a command there."""
    shutil.copyfile(ROOT / "ript.py", tmp_path / "ript.py")

    def run(*command):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return tmp_path, run


def test_the_file_alone_gives_the_formulas_and_the_help_and_says_where_the_laptops_policy_is(alone):
    folder, run = alone
    formula = "import ript, torch; print(ript.leave_one_out_advantage(torch.eye(2)).tolist())"
    done = run("-c", formula)
    assert done.stdout == "[[1.0, -1.0], [-1.0, 1.0]]\n", done.stderr
    done = run("ript.py", "--help")
    assert done.returncode == 0 and "--groups" in done.stdout and not done.stderr
    done = run("ript.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "policies/tiny.py" in done.stderr
    assert {path.name for path in folder.iterdir()} <= {"ript.py", "__pycache__"}


def test_the_file_alone_trains_a_policy_of_the_users_on_libero_with_robosuites_own_step(alone):
    libero_or_skip()
    folder, run = alone
    (folder / "toy.py").write_text(TOY)
    done = run("ript.py", "--model", "toy.py:Toy", "--suite", "libero_object", "--task", "0", "--groups", "1",
               "--rollouts", "2", "--iterations", "1", "--eval_contexts", "1", "--max_rejected", "0",
               "--image_size", "32", "--workers", "2", "--device", "cpu", "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = rows_without_seconds(folder / "run")
    assert rows[1]["rollouts"] == 2 and rows[1]["env_steps"] == 32 and rows[1]["updates"] == 1
    assert json.loads((folder / "run/config.json").read_text())["control_step"] == "robosuite"
    assert (folder / "run/last/toy.pt").exists() and (folder / "run/evaluation_RIPT.json").exists()


# ------------------------------------------------------------------------------------ other people's packages
def test_packages_of_the_same_names_elsewhere_are_not_in_the_way(tmp_path):
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise ImportError('this is of another project')")
    for program in ("ript.py", "scripts/sft.py"):
        done = launch("--help", program=program, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0 and "--groups" in done.stdout, done.stderr
    done = launch("--model", "tiny", "--checkpoint", "nowhere", "--workers", 1, "--out", tmp_path / "out",
                  PYTHONPATH=str(tmp_path))
    assert "cannot read nowhere" in done.stderr and "another project" not in done.stderr
