"""Of a run: what it is, the table with intervals, the curve, CSV files, a web page, and videos.

    python scripts/report.py runs/tabletop                  also of an evaluation, runs/tabletop_eval
    python scripts/report.py runs/tabletop --no_video
    python scripts/report.py runs/tabletop --follow         before that, report.html until the run has ended
    python scripts/report.py runs/tabletop --tensorboard    also its metrics for TensorBoard

It writes evaluation.csv (the outcome of every held-out context), metrics.csv and curve.png (a row and a point
per iteration), task0.mp4, task1.mp4, ... and task0_before.mp4, ... (the policy after and before stage 3, in
the first held-out context of each task), report.html, the run as a page, and tensorboard/.

The paper's number stands beside an evaluation of its model and suite. Fisher's exact test, two-sided, says
how likely such a difference is if both success rates are the same; below 5% they are not compatible.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import csv
import fcntl
import io
import json
import time
from collections import Counter
from dataclasses import asdict, replace

import torch

import ript
from scripts.page import page
from scripts.symptoms import sentences

OPTIONS = "--no_video", "--follow", "--tensorboard"
VERSIONS = "mujoco", "robosuite", "torch", "transformers"  # of which success may depend
PER_TASK = 50  # episodes of each task in the paper's evaluations
LOSSES = "loss", "ratio", "clip_frac", "approx_kl", "ratio_error", "act_std", "grad_norm"  # CleanRL's group


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


def p_of_equal_rates(won: int, number: int, percent: float, episodes: int) -> float:
    """Fisher's exact test, two-sided, of won of number against percent of episodes: the p-value."""
    from scipy.stats import fisher_exact
    theirs = round(percent * episodes / 100)
    return fisher_exact([[won, number - won], [theirs, episodes - theirs]]).pvalue


def beside_the_paper(cfg, contexts, results) -> list[str]:
    """A sentence for each column {name: list of bool} and number that the paper has for such a policy.

    The columns SFT and RIPT are of policies before and after stage 3. Of another, both numbers are shown.
    """
    published = getattr(ript.load_policy(cfg.model), "PUBLISHED", {})
    lines = []
    for name, column in results.items():
        for stage in [name] if name in published else published:
            # A number of the paper is of a whole suite.
            if cfg.task < 0 and cfg.suite in published[stage]:
                percent, number = published[stage][cfg.suite], len(column)
                episodes = PER_TASK * len({context.task for context in contexts})
                p = p_of_equal_rates(sum(column), number, percent, episodes)
                lines.append(f"{name} {interval(sum(column), number)}, {stage} in the paper {percent}% of "
                             f"{episodes}: {'' if p >= 0.05 else 'not '}compatible (p = {p:.2g})"
                             + (f"; {number} episodes are an interim answer" if number < episodes else ""))
    return lines


def what_it_is(run, cfg, contexts) -> list[str]:
    """Lines that say what a run is about, and with which versions of what matters."""
    tasks = len({context.task for context in contexts})
    start = ", ".join(f"{name} {value}" for name, value in asdict(cfg).items()
                      if name in ("checkpoint", "adapter", "scale_head") and value)
    lines = [f"{cfg.model} on {cfg.suite}: {tasks} {'tasks' if tasks > 1 else 'task'}, {cfg.eval_contexts} "
             f"held-out contexts each; seed {cfg.seed}, control step {cfg.control_step or 'its own'}", start]
    path = run / "versions.json"
    if path.exists():
        with ript.reading(path):
            versions = json.loads(path.read_text())
        lines.append(", ".join(f"{name} {versions.get(name, 'not installed')}" for name in VERSIONS))
    else:
        lines.append(f"the versions of {', '.join(VERSIONS)} were not kept")
    return [line for line in lines if line]


def write_csv(path, rows):
    """Dicts as a table, with a column for every key of any. Of a list, as seconds_waiting is, it has the
    largest."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: max(cell) if isinstance(cell, list) else cell for key, cell in row.items()})
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
        cfg = replace(cfg, adapter=str(last), scale_head="")  # it brings both heads
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
    """Videos of the policy in the first held-out context of each task, and of the one that it was before.
    evaluated: the fingerprint of the policy that the outcomes are of, where they say that."""
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        cfg = replace(cfg, device="cpu")  # a run from another machine
    ript.init_distributed(cfg.device)
    simulator = ript.load_suite(cfg.suite)(cfg.image_size, cfg.collision)
    first = {context.task: context for context in reversed(contexts)}.values()
    policy = policy_of(run, cfg)
    if evaluated not in (None, ript.fingerprint(policy)):
        print("the videos show another policy than the last evaluation was of: it has been changed since")
    film_policy(policy, simulator, first, run, "")
    del policy
    if (run / "last").exists():
        try:
            film_policy(ript.load_policy(cfg.model).load(cfg), simulator, first, run, "_before")
        except ript.UserError as error:  # the start may not be there any more
            print(f"the policy before stage 3 has no video: {error}")
    if simulator.env:
        simulator.env.close()


def film_policy(policy, simulator, contexts, run, ending):
    """A video of a policy in each of contexts. The memory of a 7B is free again afterwards."""
    import imageio
    for context in contexts:
        frames = film(policy, simulator, context)
        with ript.writing(run / f"task{context.task}{ending}.mp4") as file:
            imageio.mimwrite(file, frames, fps=20)


class Events:
    """The metrics of a run for TensorBoard, in its directory tensorboard/."""
    def __init__(self, run, cfg):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ript.UserError("--tensorboard needs one more package: pip install tensorboard")
        for old in run.glob("tensorboard/events.out.tfevents.*"):  # of an earlier report
            old.unlink()
        self.writer = SummaryWriter(run / "tensorboard")
        self.writer.add_text("settings", json.dumps(asdict(cfg), indent=1))
        self.written = set()

    def add(self, history):
        """Write the numbers of the rows that are not written yet, in CleanRL's groups, by iteration."""
        for row in history:
            for name, value in row.items():
                if isinstance(value, (int, float)) and (row["iteration"], name) not in self.written:
                    self.written.add((row["iteration"], name))
                    group = "losses" if name in LOSSES else "charts"
                    self.writer.add_scalar(f"{group}/{name}", value, row["iteration"])
        self.writer.flush()


def is_running(run) -> bool:
    """Whether a process works on a run."""
    try:
        with open(run / ".lock") as file:
            # Held for a moment; a run that starts within it would be refused.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def read_history(run) -> list[dict]:
    """The rows of metrics.jsonl, as far as there are any."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    with ript.reading(path):
        return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(run, cfg, contexts) -> dict[str, list]:
    """The outcomes of a run's evaluations in contexts, by their names."""
    names = [f"{cfg.suite} {context.task} {context.seed}" for context in contexts]
    results = {}
    # Before, then after: the paired test counts what RIPT has gained.
    for name in ("SFT", "RIPT", "success"):
        path = run / f"evaluation_{name}.json"
        if path.exists():
            outcomes, _ = read_outcomes(path, cfg)
            ript.require(set(names) == set(outcomes), f"{path} has other contexts than config.json")
            results[name] = [outcomes[key] for key in names]
    return results


class Page:
    """The file report.html of a run, which may still be going on."""
    def __init__(self, run):
        self.run = run
        self.evaluations = {}  # all that this object has seen: a run keeps its first and its last one

    def write(self, running):
        """Write it as the run's files are now."""
        cfg = ript.load_config(self.run)  # which a run writes when its policy is loaded
        contexts = ript.evaluation_contexts(cfg)
        history = read_history(self.run)
        results = {}
        if not (running and cfg.eval):  # what an evaluation finds of an earlier one is not its own
            results = read_results(self.run, cfg, contexts)
        evaluated = [row["iteration"] for row in history if "eval_success" in row]
        titles = dict(SFT="SFT", success="success", RIPT=f"iteration {max(evaluated, default=0)}")
        self.evaluations |= {titles[name]: column for name, column in results.items()}
        lines = what_it_is(self.run, cfg, contexts) + beside_the_paper(cfg, contexts, results)
        text = page(self.run, cfg, lines, contexts, self.evaluations, history, running)
        with ript.writing(self.run / "report.html") as file:
            file.write_text(text)


def follow(run, its_page, events=None, seconds=2.0):
    """Write the page, and TensorBoard's files, whenever metrics.jsonl has changed, until the run ends."""
    seen = None
    print(f"open {run / 'report.html'} in a browser; Ctrl-C ends this, and the run goes on", flush=True)
    while True:
        running = is_running(run)  # before the files are read, so that the last ones are read too
        history = read_history(run)
        if history != seen or not running:
            its_page.write(running)
            if events:
                events.add(history)
            seen = history
        if not running:
            return
        time.sleep(seconds)


def main(argv=None):
    """Report on the run in argv[0]."""
    argv = sys.argv[1:] if argv is None else argv
    known = argv and set(argv[1:]) <= set(OPTIONS)
    ript.require(known, f"report.py takes a run's directory, and {', '.join(OPTIONS)}")
    run = Path(argv[0])
    while "--follow" in argv and is_running(run) and not (run / "config.json").exists():
        time.sleep(1)  # it is starting
    try:
        cfg = ript.load_config(run)
    except ript.UserError as error:
        raise ript.UserError(f"{run} is not the directory of a run: {error}") from error
    its_page = Page(run)
    events = Events(run, cfg) if "--tensorboard" in argv else None
    if "--follow" in argv:
        follow(run, its_page, events)
        cfg = ript.load_config(run)
    contexts = ript.evaluation_contexts(cfg)
    results = read_results(run, cfg, contexts)
    ript.require(results, f"there is no evaluation in {run}")
    history = read_history(run)
    print("\n".join([*what_it_is(run, cfg, contexts), "", table(contexts, results)]))
    for line in beside_the_paper(cfg, contexts, results):
        print(line)
    for iteration, sentence in sentences(history).values():
        print(f"note on iteration {iteration}: {sentence}")
    rows = []
    for i, context in enumerate(contexts):
        row = dict(task=context.task, instruction=context.instruction, context=context.seed)
        for name, column in results.items():
            row[name] = int(column[i])
        rows.append(row)
    write_csv(run / "evaluation.csv", rows)
    if history:
        write_csv(run / "metrics.csv", history)
        write_curve(run / "curve.png", history)
    if events:
        events.add(history)
    its_page.write(is_running(run))
    if "--no_video" not in argv:
        _, evaluated = read_outcomes(run / f"evaluation_{[*results][-1]}.json", cfg)
        with ript.trying("the videos (--no_video leaves them out)", "make"):
            write_videos(run, cfg, contexts, evaluated)
        its_page.write(is_running(run))
    print(f"wrote report.html and its parts into {run}")


if __name__ == "__main__":
    ript.run_command(main)
