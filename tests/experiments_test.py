"""The claims of experiments/, at toy size: every one is accepted, and the suites are what they say."""
import argparse
import copy
import os
import pickle
import subprocess
import sys

import ript  # before torch is: it says how OpenMP's threads wait

import mujoco
import numpy as np
import pytest
import torch

from experiments import (ablations, adapters, bandit, cards, common, critic, flow, gpu, grpo, libero_suites,
                         tabletop_suites)
from ript import Context, Episode, load_suite
from ript_test import arguments
from tests.conftest import (PRETRAINED, ROOT, TASKS, config, demo_config, libero_or_skip, mistake_of,
                            pretrained, random_observations, rows_without_seconds)


# ------------------------------------------------------------------------------------------ the shared runner
SCRIPT = """
import sys
from pathlib import Path
place, out = sys.argv[-2:]
Path(out).mkdir(exist_ok=True)
Path(out, "log").open("a").write(f"{place} {' '.join(sys.argv[1:-2])}\\n")
Path(out, "run.pt").touch()
sys.exit(int(sys.argv[1]))
"""


def test_a_script_runs_once_and_goes_on_where_it_was_interrupted(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    with pytest.raises(ript.UserError, match="this failed: .*script.py 1 a"):
        common.run_once(out, script, 1, "a")
    assert not (out / "done").exists()
    assert common.run_once(out, script, 0, "b") == out
    common.run_once(out, script, 0, "b")
    with pytest.raises(ript.UserError, match="out was made with other settings or .*: delete it"):
        common.run_once(out, script, 0, "c")
    assert (out / "log").read_text() == "--out 1 a\n--resume 0 b\n"
    assert 0 < common.memory_gb(out) < 10
    (out / "done").write_text("0.620\n")
    with pytest.raises(ript.UserError, match="out was made with .* an earlier version: delete it"):
        common.run_once(out, script, 0, "b")


def test_an_interrupted_evaluation_goes_on_and_an_interrupted_stage_2_begins_again(tmp_path, monkeypatch):
    commands = []

    class Process:
        def __init__(self, command, **_):
            commands.append(command[2:])
            self.pid = os.spawnlp(os.P_NOWAIT, "true", "true")

    monkeypatch.setattr(common.subprocess, "Popen", Process)
    for name in ("evaluation", "sft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    common.run_once(tmp_path / "evaluation", "ript.py", "--eval")
    assert commands == [["--eval", "--resume", str(tmp_path / "evaluation")]]
    with pytest.raises(FileNotFoundError):  # this process makes no directory, so that done has no place
        common.run_once(tmp_path / "sft", "scripts/sft.py")
    assert commands[1] == ["--out", str(tmp_path / "sft")]


def test_what_another_process_works_on_is_left_alone(tmp_path):
    out = tmp_path / "sft"
    with ript.lock_run_dir(out):
        (out / "model.safetensors").touch()
        with pytest.raises(ript.UserError, match="another run is using .*sft: wait for its end"):
            common.run_once(out, "scripts/sft.py")
        assert (out / "model.safetensors").exists()


def test_a_table_of_other_seeds_takes_no_others_place(tmp_path):
    ablations.keep_table(tmp_path / "table.csv", [dict(seed=0)], [0])
    assert not (tmp_path / "table.csv").exists()
    ablations.keep_table(tmp_path / "table.csv", [dict(seed=0)], [0, 1, 2])
    assert common.read_csv(tmp_path / "table.csv") == [dict(seed="0")]


@pytest.mark.parametrize("program,words", [
    (ablations, "nothing"), (ablations, "tabletop nothing"), (ablations, "tabletop --seeds x"),
    (ablations, "senses nothing"), (critic, "nothing"), (critic, "critic nothing"), (flow, "nothing"),
    (adapters, "nothing"), (cards, "--nothing"), (gpu, "--nothing"), (gpu, "--rows x")])
def test_a_name_that_is_no_experiment_gets_a_sentence(program, words):
    assert mistake_of(program, words)


def test_a_curve_is_success_against_the_rollouts_so_far(tmp_path):
    metrics = [dict(iteration=0, eval_success=0.2), dict(iteration=1, rollouts=96),
               dict(iteration=2, rollouts=104, eval_success=0.5)]
    common.write_csv(tmp_path / "metrics.csv", metrics)
    for rows in (metrics, common.read_csv(tmp_path / "metrics.csv")):
        assert common.curve_of("a", "o-C0", rows).points == [(0, 20), (200, 50)]
    curve = common.curve_of("a", "o-C0", metrics)
    common.plot_curves(tmp_path / "new/curve.png", {common.SUCCESS: [curve], "another": [curve]})
    assert (tmp_path / "new/curve.png").read_bytes().startswith(b"\x89PNG")


def test_success_with_noise_is_in_each_row_with_an_evaluation_after_the_first(monkeypatch, tmp_path):
    for name in ("evaluate", "save_run"):
        monkeypatch.setattr(ript, name, getattr(ript, name))  # and back again
    common.add_noise_success()
    ript.main(arguments(iterations=3, eval_contexts=1, out=tmp_path))
    rows = rows_without_seconds(tmp_path)
    assert ["eval_success" in row for row in rows] == [True, False, True, True]
    assert ["noise_success" in row for row in rows] == [False, False, True, True]


# ---------------------------------------------------------------------------------------------- the ablations
def test_every_experiment_is_a_run_that_ript_accepts(tmp_path):
    for name, (shared, stage_2, stage_3) in ablations.EXPERIMENTS.items():
        if name == "libero":  # and those below it
            libero_or_skip()
        ript.check(demo_config(*shared.split(), *stage_2.split(), "--out", tmp_path))
        ript.check(config(*shared.split(), *stage_3.split(), "--out", tmp_path))


def test_grpo_divides_by_the_groups_standard_deviation_and_nothing_else_changes(monkeypatch, tmp_path):
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    advantage = grpo.grpo_advantage(rewards)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.866, 0.866, -0.866, -0.866],
                             [0.5, 0.5, 0.5, -1.5]])  # (R - mean) / 0.5, 0.577 and 0.5
    torch.testing.assert_close(advantage, expected, atol=5e-4, rtol=0)
    assert not grpo.grpo_advantage(torch.ones(2, 4, dtype=torch.bool)).any()
    monkeypatch.setattr(ript, "leave_one_out_advantage", ript.leave_one_out_advantage)  # and back again
    rows = {}
    for name, program in dict(ript=ript, grpo=grpo).items():
        program.main(arguments(max_rejected=0, iterations=1, eval_contexts=1, workers=1, out=tmp_path / name))
        rows[name] = rows_without_seconds(tmp_path / name)[1]
    other = {key for key in rows["ript"] if rows["ript"][key] != rows["grpo"][key]}
    assert {"grad_norm"} <= other <= {"grad_norm", "loss", "eval_success"}
    assert ablations.SCRIPTS.keys() <= ablations.EXPERIMENTS.keys()
    for name, other in ablations.START_OF.items():
        assert ablations.EXPERIMENTS[name][:2] == ablations.EXPERIMENTS[other][:2]  # one stage 2


def test_table_and_figure_are_of_the_csv_files_and_a_wrong_name_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    for seed in (0, 1):
        before, after = [1, 0, 0, 0], [1, 1, 1, seed]
        contexts = [dict(task=0, SFT=one, RIPT=other) for one, other in zip(before, after)]
        common.write_csv(tmp_path / f"k4/evaluation_{seed}.csv", contexts)
        metrics = [dict(iteration=0, eval_success=0.25),
                   dict(iteration=1, rollouts=40, kept=6, all_success=1, all_fail=3, seconds_rollouts=2,
                        seconds_update=1, eval_success=0.75 + seed / 4)]
        common.write_csv(tmp_path / f"k4/metrics_{seed}.csv", metrics)
    ablations.table(["k4"], [0, 1])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| k4 | 0 | 1/4 25% [") and rows[2].endswith(" | 2, 0, 0.5 | 40 | 40% | 3 |")
    assert ablations.figure(["k4"], [0, 1]) == tmp_path / "k4/curve.png"
    with pytest.raises(ript.UserError, match="tabletop, long, .*imitation, offsets, passes, gif"):
        ablations.main([])
    with pytest.raises(ript.UserError, match="senses is of one of tabletop, one_scene"):
        ablations.main(["senses", "k4"])


def test_the_controls_are_suites_with_the_offsets_and_seeds_that_they_say():
    file = tabletop_suites.__file__
    assert len(tabletop_suites.OFFSETS) == 8 == len({kind.SLIP for kind in tabletop_suites.OFFSETS})
    for kind in tabletop_suites.OFFSETS:
        suite = load_suite(f"{file}:{kind.__name__}")
        assert suite.SLIP == kind.SLIP and suite.IMITATION == load_suite("tabletop").IMITATION
    assert tabletop_suites.Slip14.SLIP == load_suite("tabletop").SLIP
    simulators = load_suite(f"{file}:Fresh")(64, True), load_suite("tabletop")(64, True)
    places = []
    for simulator, seed in zip(simulators, (7, 157)):
        simulator.reset(Context(0, TASKS[0], seed))
        places.append(simulator.cube().copy())
        simulator.env.close()
    assert (places[0] == places[1]).all()


def test_the_table_of_cards_is_computed_from_what_gpu_py_has_printed(tmp_path, monkeypatch, capsys):
    printed = common.RESULTS / "gpu/h100.txt"
    kept = common.read_csv(cards.MEASURED)
    rows = cards.read_printed(printed)
    assert [{key: str(value) for key, value in row.items()} for row in rows] == kept
    assert dict(measure="act", batch=8, value=25.63, file="h100.txt") in rows
    assert not any(row["measure"] == "peak_of_24_gib" and row["batch"] > 4 for row in rows)  # 8 does not fit
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    cards.main([])
    table = (tmp_path / "gpu/cards.csv").read_text()
    assert table == (common.RESULTS / "gpu/cards.csv").read_text()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + 12 and all(line in (ROOT / "docs/DETAILS.md").read_text() for line in said)
    # By hand, on the card that was measured: what was measured, but for the fit of a line.
    acted, kept = 24 * 8 * 40 / 25.63, 24 * 8 * 40 * (1 / 26.62 + 1 / 19.43)  # seconds
    measured = {name: {row["batch"]: row["value"] for row in rows if row["measure"] == name}
                for name in cards.LINES}
    minutes, _ = cards.hours_of(cards.CARDS[-1], 1, 24, measured)
    assert minutes == pytest.approx((acted + kept) / 60, rel=0.05)
    assert cards.hours_of(cards.CARDS[-1], 4, 24, measured)[0] == pytest.approx(minutes / 4)
    (tmp_path / "cut.txt").write_text(printed.read_text()[:3000])
    with pytest.raises(ript.UserError, match="has no line of gpu.py for act, gradient"):
        cards.read_printed(tmp_path / "cut.txt")
    (tmp_path / "another.txt").write_text(printed.read_text().replace("H100", "L40S"))
    with pytest.raises(ript.UserError, match="is not of an H100"):
        cards.read_printed(tmp_path / "another.txt")
    few = "\n".join(line for line in printed.read_text().splitlines() if "micro_batch 16" not in line)
    (tmp_path / "few.txt").write_text(few)
    monkeypatch.setattr(cards, "MEASURED", tmp_path / "measured.csv")
    with pytest.raises(ript.UserError, match="of which some are missing"):
        cards.main(["--read", str(tmp_path / "few.txt")])
    assert not (tmp_path / "measured.csv").exists()


@pytest.fixture(scope="module")
def random_episodes():
    """8 groups of 8 with a query each, whose success is chance: what they teach does not matter here."""
    generators = [np.random.default_rng(i) for i in range(64)]
    chunks = pretrained().act(random_observations(64), TASKS * 32, generators)
    episodes = []
    for number, chunk in enumerate(chunks):
        context = Context(number % 2, TASKS[number % 2], number)
        seed_key = 0, 0, number // 8, number % 8
        success = bool(np.random.default_rng(number).random() < 0.5)
        episodes.append(Episode(context, number // 8, seed_key, [chunk], [8], success))
    return episodes


def test_with_the_clip_a_second_pass_takes_back_much_of_the_first_and_without_it_adds_to_it(random_episodes):
    def kl(passes, clip):
        cfg = config("--checkpoint", PRETRAINED, "--ppo_epochs", passes, "--clip_coef", clip)
        policy = ablations.updated(random_episodes, cfg)
        return ablations.moved(pretrained(), policy, random_episodes)["approx_kl"]

    assert kl(2, 0.1) < 0.7 * kl(1, 0.1) and kl(2, 1e6) > 2 * kl(1, 0.1)


def test_where_a_step_leaves_the_clip_the_next_gradient_points_back(random_episodes):
    rewards = ript.rewards_of([random_episodes]).view(8, 8)
    advantage = ript.leave_one_out_advantage(rewards).flatten()
    chunks = [episode.chunks[0] for episode in random_episodes]
    start = pretrained()
    old = start.log_prob(chunks).detach()

    def gradient(policy, clip):
        log_prob = policy.log_prob(chunks)
        weight = ript.loss_weight(torch.ones(old.shape, dtype=torch.bool))
        loss, _ = ript.ppo_clip_loss(log_prob, old, advantage, weight, clip)
        policy.zero_grad()
        loss.backward()
        return torch.nn.utils.parameters_to_vector([p.grad for p in policy.parameter_groups()[0]["params"]])

    first = gradient(start, 0.1)
    for lr, with_clip, without in ((2e-4, (-1, -0.5), (0, 1)), (1e-5, (0.9, 1), (0.9, 1))):
        policy = pretrained()
        gradient(policy, 0.1)
        torch.optim.AdamW(policy.parameter_groups(), lr, (0.0, 0.999)).step()
        for clip, (low, high) in ((0.1, with_clip), (1e6, without)):
            assert low < torch.cosine_similarity(first, gradient(policy, clip), 0) < high


# ------------------------------------------------------------------------------- the 7B's path on the laptop
def adapted(arm, *words):
    """The settings and the policy of an arm."""
    _, model, settings = adapters.ARMS[arm]
    words = ["--model", f"{adapters.__file__}:{model.__name__}", *settings.split(), *words]
    cfg = config(*words, "--checkpoint", PRETRAINED)
    torch.manual_seed(0)
    return cfg, model.load(cfg)


def test_the_laptops_policy_trains_as_the_7b_does_and_the_arms_differ_in_what_they_say(random_episodes):
    cfg, policy = adapted("release")
    assert (cfg.lr, cfg.clip_coef, cfg.minibatch, cfg.adam_beta1) == (5e-5, 0.1, 16, 0.9)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 190_279
    assert {p.dtype for p in trained.values()} == {torch.float32}
    base = [p for name, p in policy.named_parameters() if "lora_" not in name and "head" not in name]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {name.split(".")[0] for name in trained} == {"language_model", "action_head"}
    episodes = random_episodes[:16]
    watch = adapters.Watch(policy, episodes)
    watch.step()
    assert watch.rows[0]["outside"] == watch.rows[0]["true_std"] == watch.rows[0]["change_std"] == 0
    rows = adapters.steps_of("release", cfg, episodes), adapters.steps_of("step", cfg, episodes)
    assert [len(its) for its in rows] == [1, 1]  # 16 episodes are a minibatch of the release's
    for one, in rows:
        # The policy moves, and rounding is a small part of what is seen of that.
        assert 0 < one["rounding_std"] < 0.3 * one["true_std"] < 0.3
    assert rows[1][0]["approx_kl"] > rows[0][0]["approx_kl"]  # of the larger learning rate


def test_an_arm_has_the_papers_learning_rates_and_one_keeps_its_weights_in_bfloat16():
    _, policy = adapted("paper")
    rates = {group["lr"]: len(group["params"]) for group in policy.parameter_groups()}
    assert rates == {1e-4: 28, 1e-5: 16}
    _, rounded = adapted("rounded")
    optimizer = torch.optim.AdamW(rounded.parameter_groups(), 5e-5)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = optimizer.param_groups[0]["params"]
    assert all((p == p.bfloat16()).all() for p in after)
    # Of larger weights the step is lost, and of small ones it is not.
    kept = torch.cat([(a == b).flatten() for a, b in zip(before, after)])
    assert 0.05 < kept.float().mean() < 0.95


def test_in_one_scene_the_instruction_decides_what_succeeds():
    libero_or_skip()
    file = libero_suites.__file__
    suite = load_suite(f"{file}:OneScene")
    assert load_suite(f"{file}:OneSceneMisled").INSTRUCTIONS == suite.INSTRUCTIONS[::-1]
    assert all((a == b).all() for a, b in zip(suite.eval_init_states(0, 50), suite.eval_init_states(1, 50)))
    simulator = suite(64, True)
    places = []
    for task, text in enumerate(suite.INSTRUCTIONS):
        thing = suite.THINGS[task]
        assert thing.removesuffix("_1").replace("_", " ") in text
        assert simulator.demonstrate(Context(task, text, 5)).success
        data, numbers = simulator.env.sim.data, simulator.env.obj_body_id
        assert np.abs(data.body_xpos[numbers[thing]] - data.body_xpos[numbers["basket_1"]])[:2].max() < 0.1
        simulator.make_env(1 - task)
        assert not simulator.success()
        simulator.reset(Context(task, text, 5))
        places.append(data.qpos.copy())
    assert (places[0] == places[1]).all()
    simulator.env.close()


# ---------------------------------------------------------------------------------------- the bandit, the GPU
def test_the_bandit_learns_and_with_the_sign_flipped_it_does_not():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    levels = {1: [], -1: []}
    for sign, found in levels.items():
        for seed in range(3):
            end = bandit.learn(seed, sign=sign)[-3:]
            found.append(np.mean([row["success"] for row in end]))
    torch.set_num_threads(threads)
    assert min(levels[1]) > 0.70 and max(levels[-1]) < 0.35


@pytest.fixture(scope="module")
def bench():
    bench = gpu.Bench(argparse.Namespace(tiny=True, device="cpu", scene=""))
    bench.build()
    return bench


def test_the_gpu_benchmark_has_adapters_as_they_were_and_as_they_are(bench):
    layer = bench.policy.language_model.model.layers[0].self_attn.q_proj
    dtypes = []
    hook = layer.lora_A["default"].register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    acted = [bench.act(1, 1)]
    with gpu.float32_adapters(bench.policy):
        acted.append(bench.act(1, 1))
    acted.append(bench.act(1, 1))
    hook.remove()
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    before, between, after = (chunks[0]["sample"] for chunks in acted)
    assert (before == after).all() and 0 < np.abs(before - between).max() < 0.3


def test_the_gpu_benchmark_drops_the_mask_and_puts_it_back(bench):
    def mean():
        with torch.no_grad():
            return bench.policy.density(bench.observations[:1], gpu.TEXTS[:1])[0]

    masked = mean()
    with gpu.no_mask(bench.policy):
        without = mean()
    with gpu.no_mask(bench.policy, causal=True):
        causal = mean()
    assert (masked - without).abs().max() < 0.05 < (masked - causal).abs().max()
    assert (mean() == masked).all()


def test_the_gpu_benchmark_notices_what_overflows(bench):
    policy = copy.deepcopy(bench.policy)
    policy.language_model.model.layers[1].mlp.down_proj.base_layer.weight.data[0, 0] = float("inf")
    with gpu.largest_outputs(policy) as largest:
        policy.density(bench.observations[:1], gpu.TEXTS[:1])
    broken = {kind for kind, value in largest.items() if not value.isfinite()}
    assert "language_model.model.layers.*.mlp.down_proj" in broken
    assert "projector.fc1" in largest.keys() - broken


def test_a_scene_is_written_in_mujocos_own_form_and_a_pickle_is_refused(tmp_path):
    model = mujoco.MjModel.from_xml_string(gpu.Scene.XML.format(gpu.Scene.BLOCK.format(0.1, 0.2)))
    qpos = np.arange(7.0)
    gpu.write_scene(tmp_path / "scene.npz", model, qpos)
    again, where = gpu.read_scene(tmp_path / "scene.npz")
    assert (where == qpos).all() and (again.geom_size == model.geom_size).all() and again.nq == 7
    assert again.camera("agentview").pos[2] == 1 and list(tmp_path.iterdir()) == [tmp_path / "scene.npz"]
    (tmp_path / "pickle").write_bytes(pickle.dumps((1, qpos)))
    np.savez(tmp_path / "objects.npz", model=np.array([model], dtype=object), qpos=qpos)
    for name in ("pickle", "objects.npz"):
        with pytest.raises(ript.UserError, match=f"cannot read .*{name}.*allow_pickle=False"):
            gpu.read_scene(tmp_path / name)


def test_every_row_of_the_gpu_benchmark_runs_with_a_small_policy_on_a_cpu():
    command = [sys.executable, common.ROOT / "experiments/gpu.py", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.partition(". ")[0].isdigit()]
    assert len(rows) == len(gpu.ROWS) == 16
    assert "FAILED" not in done.stdout and "not measured" not in done.stdout
