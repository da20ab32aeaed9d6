"""Of a finished run: the table with intervals, the curve, CSV files, and a video of every task.

    python scripts/report.py runs/tabletop               also of an evaluation, runs/tabletop_eval
    python scripts/report.py runs/tabletop --no_video

It writes evaluation.csv (the outcome of every held-out context), metrics.csv and curve.png (a row and a point
per iteration) and task0.mp4, task1.mp4, ... (the policy in the first held-out context of each task).
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import csv
import io
import json
from collections import Counter
from dataclasses import replace

import torch

import ript


def interval(won, number) -> str:
    """'won/number share [low, high]', with Wilson's 95% interval."""
    from scipy.stats import binomtest
    low, high = binomtest(int(won), number).proportion_ci(method="wilson")
    return f"{won}/{number} {won / number:.0%} [{low:.0%}, {high:.0%}]"


def mcnemar(before, after):
    """-> contexts gained and lost between two lists of bool of the same contexts, and the exact p-value."""
    from scipy.stats import binomtest
    pairs = Counter(zip(before, after))
    gained = pairs[False, True]
    lost = pairs[True, False]
    return gained, lost, binomtest(gained, max(gained + lost, 1)).pvalue


def table(contexts, results) -> str:
    """Success per task of each column {name: list of bool}; of two columns, their exact McNemar test."""
    lines = [" " * 40 + "".join(f"{name:>30}" for name in results)]
    # By number: some tasks of LIBERO-90 share an instruction.
    rows = [(context.task, context.instruction) for context in contexts]
    for task, text in [*dict.fromkeys(rows), (None, "all tasks")]:
        chosen = [i for i, context in enumerate(contexts) if task in (context.task, None)]
        cells = [interval(sum(column[i] for i in chosen), len(chosen)) for column in results.values()]
        lines.append(f"{text[:39]:<40}" + "".join(f"{cell:>30}" for cell in cells))
    if len(results) == 2:
        gained, lost, p = mcnemar(*results.values())
        lines.append(f"paired: {gained} contexts gained, {lost} lost, exact McNemar p = {p:.2g}")
    return "\n".join(lines)


def write_csv(path, rows):
    """Dicts as a table, with a column for every key of any."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with ript.writing(path) as file:
        file.write_text(text.getvalue())


def write_curve(path, history):
    """Success, what becomes of the groups, and seconds, against iterations."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 7))
    panels = [("eval_success", "rollout_success"), ("kept", "all_success", "all_fail"),
              ("seconds_rollouts", "seconds_update")]
    for axes, names in zip(figure.subplots(len(panels), sharex=True), panels):
        for name in names:
            rows = [row for row in history if name in row]
            axes.plot([row["iteration"] for row in rows], [row[name] for row in rows], "o-", label=name)
        axes.set(xlabel="iteration", ylim=(0, None))
        axes.legend()
    with ript.writing(path) as file:
        figure.savefig(file, bbox_inches="tight")


def read_outcomes(path, cfg):
    """The outcomes in an evaluation_NAME.json, 1 or 0 by context, and the fingerprint of the policy that they
    are of. Raises ript.UserError where they are of other settings than cfg, the run's. Files of earlier
    versions have outcomes alone."""
    with ript.reading(path):
        found = json.loads(path.read_text())
        if "outcomes" not in found:
            return found, None
        other = [name for name, value in found["settings"].items() if getattr(cfg, name) != value]
        ript.require(not other, f"{path} is of another --{' and --'.join(other)} than config.json says: the "
                     "last evaluation there was not finished, start it again")
        return found["outcomes"], found["policy"]


def policy_of(run, cfg):
    """The policy that a run ended with, or the one that an evaluation was of."""
    last = run / "last"
    if (last / "adapter_config.json").exists():
        cfg = replace(cfg, adapter=str(last))
    elif last.exists():
        cfg = replace(cfg, checkpoint=str(last))
    return ript.load_policy(cfg.model).load(cfg)


class Camera:
    """A simulator in this process that films every control step of an episode."""
    def __init__(self, simulator, preprocess):
        self.simulator = simulator
        self.preprocess = preprocess
        self.frames = []  # (256, 256, 3) uint8 each

    async def call(self, method, argument):
        """What ript.Simulator.call returns. Actions run one by one, and a picture follows each."""
        if method == "reset":
            answer = self.simulator.reset(argument)
        else:
            for ran, action in enumerate(argument, 1):
                answer = self.simulator.step(action[None])._replace(num_executed=ran)
                self.frames.append(self.simulator.render("agentview", 256, False)[::-1].copy())
                if answer.success:
                    break
        seen = answer.observation and self.preprocess(answer.observation)
        return answer._replace(observation=seen)


def film(policy, simulator, context):
    """The pictures (256, 256, 3) uint8 of an episode, one per control step."""
    camera = Camera(simulator, policy.preprocess)
    horizon = ript.horizon_of(simulator, context.task)
    episode = ript.Episode(context, deterministic=True)
    asyncio.run(ript.rollout(camera, episode, ript.Actor(policy, 1), horizon))
    return camera.frames


def write_videos(run, cfg, contexts, evaluated):
    """A video of the first held-out context of each task. evaluated: the fingerprint of the policy that the
    outcomes are of, where they say that."""
    import imageio
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        cfg = replace(cfg, device="cpu")  # a run from another machine
    ript.init_distributed(cfg.device)
    policy = policy_of(run, cfg)
    if evaluated not in (None, ript.fingerprint(policy)):
        print("the videos show another policy than the last evaluation was of: it has been changed since")
    simulator = ript.load_suite(cfg.suite)(cfg.image_size, cfg.collision)
    seen = set()
    for context in contexts:
        if context.task not in seen:
            seen.add(context.task)
            frames = film(policy, simulator, context)
            with ript.writing(run / f"task{context.task}.mp4") as file:
                imageio.mimwrite(file, frames, fps=20)
    if simulator.env:
        simulator.env.close()


def main(argv=None):
    """Report on the run in argv[0]."""
    argv = sys.argv[1:] if argv is None else argv
    known = argv and set(argv[1:]) <= {"--no_video"}
    ript.require(known, "report.py takes a run's directory, and --no_video")
    run = Path(argv[0])
    try:
        cfg = ript.load_config(run)
    except ript.UserError as error:
        raise ript.UserError(f"{run} is not the directory of a run: {error}") from error
    contexts = ript.evaluation_contexts(cfg)
    names = [f"{cfg.suite} {context.task} {context.seed}" for context in contexts]
    results = {}
    # Before, then after: the paired test counts what RIPT has gained.
    for name in ("SFT", "RIPT", "success"):
        path = run / f"evaluation_{name}.json"
        if path.exists():
            outcomes, evaluated = read_outcomes(path, cfg)
            ript.require(set(names) == set(outcomes), f"{path} has other contexts than config.json")
            results[name] = [outcomes[key] for key in names]
    ript.require(results, f"there is no evaluation in {run}")
    print(table(contexts, results))
    rows = []
    for i, context in enumerate(contexts):
        row = dict(task=context.task, instruction=context.instruction, context=context.seed)
        for name, column in results.items():
            row[name] = int(column[i])
        rows.append(row)
    write_csv(run / "evaluation.csv", rows)
    if (run / "metrics.jsonl").exists():
        with ript.reading(run / "metrics.jsonl"):
            lines = (run / "metrics.jsonl").read_text().splitlines()
            history = [json.loads(line) for line in lines]
        write_csv(run / "metrics.csv", history)
        write_curve(run / "curve.png", history)
    if "--no_video" not in argv:
        write_videos(run, cfg, contexts, evaluated)
    print(f"wrote the table, the curve and the videos into {run}")


if __name__ == "__main__":
    ript.run_command(main)
