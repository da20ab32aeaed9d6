"""A run as one web page, report.html, which needs no other file and no network.

It has the curves, success per task at each evaluation, what the run's numbers say, and the videos.
"""
import base64
import html
import io
import re
from pathlib import Path

import ript
from scripts.symptoms import sentences

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 980px;
      margin: 2em auto; padding: 0 1em}
h1 {font-size: 1.5em; margin: 0; overflow-wrap: anywhere} h2 {font-size: 1.1em; margin: 2em 0 .6em}
p {margin: .3em 0; overflow-wrap: anywhere} code {white-space: nowrap} .quiet {color: #666}
svg {width: 100%; height: auto}
.note {border-left: 4px solid #e0a030; background: #fdf7ea; padding: .5em .9em; margin: .5em 0}
table {border-collapse: collapse; font-variant-numeric: tabular-nums} .wide {overflow-x: auto}
th {font-weight: 600; text-align: left; padding: .25em .8em .25em 0; white-space: nowrap}
td {padding: .25em .8em; text-align: center; border: 2px solid #fff}
td.text {text-align: left; padding-left: 0}
.videos {display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1em}
figure {margin: 0} video {width: 100%; background: #000; border-radius: 4px} figcaption {font-size: .85em}
"""
# What each panel shows of the rows of metrics.jsonl.
PANELS = {
    "success": {"eval_success": "evaluation, by the mean", "rollout_success": "rollouts, with noise"},
    "groups": {"kept": "kept", "all_success": "all succeed", "all_fail": "all fail"},
    "seconds": {"seconds_rollouts": "rollouts", "seconds_update": "update"},
    "approx_kl, nats per action step": {"approx_kl": ""},
    "clip, share of action steps": {"clip_frac": "gradient cut", "outside_clip": "outside its range"},
    "norm of the gradient": {"grad_norm": ""}}
COLOURS = {"kept": "#3b7dbd", "all_success": "#7fbf7f", "all_fail": "#d98c8c"}


def curves(history: list[dict]) -> str:
    """The panels as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    for axes, (title, metrics) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        below = [0] * len(history)
        for name, label in metrics.items():
            rows = [row for row in history if name in row]
            x = [row["iteration"] for row in rows]
            y = [row[name] for row in rows]
            if title == "groups":  # one on another
                below = below[len(below) - len(rows):]
                axes.bar(x, y, bottom=below, label=label, color=COLOURS[name])
                below = [a + b for a, b in zip(below, y)]
            else:
                axes.plot(x, y, "o-", ms=3.5, lw=1.4, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylim(0, 1.03 if title == "success" else None)
        axes.set_xlim(-0.5, max(1, history[-1]["iteration"]) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        if len(metrics) > 1 and any(name in row for row in history for name in metrics):
            axes.legend(fontsize=8, frameon=False)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata=dict(Date=None))
    return text.getvalue()[text.getvalue().index("<svg"):]


def shade(share: float) -> str:
    """A colour for a share of successes, from red over yellow to green."""
    return f"hsl({120 * share ** 2:.0f} 55% {82 - 8 * share:.0f}%)"


def heat_map(contexts: list[ript.Context], evaluations: dict[str, list]) -> str:
    """A table of success per task and evaluation: {name: an outcome for each of contexts}."""
    rows = {context.task: context.instruction for context in contexts}
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name in evaluations) + "</tr>"]
    for task, text in [*rows.items(), (None, "all tasks")]:
        chosen = [i for i, context in enumerate(contexts) if task in (context.task, None)]
        cells = []
        for outcomes in evaluations.values():
            won = sum(outcomes[i] for i in chosen)
            share = won / len(chosen)
            cells.append(f'<td style="background: {shade(share)}" title="{won} of {len(chosen)}">'
                         f'{share:.0%}</td>')
        lines.append(f'<tr><td class="text">{html.escape(text)}</td>{"".join(cells)}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def video(path: Path, title: str) -> str:
    """A film, as a part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return ('<figure><video controls loop muted playsinline preload="metadata" '
            f'src="data:video/mp4;base64,{data}"></video>'
            f'<figcaption>{html.escape(title)}</figcaption></figure>')


def is_current(film: Path, history: list[dict]) -> bool:
    """Whether there is a film that is newer than the evaluation that it belongs to."""
    name = "success" if not history else "SFT" if "_before" in film.name else "RIPT"
    evaluation = film.with_name(f"evaluation_{name}.json")
    both = film.exists() and evaluation.exists()
    return both and film.stat().st_mtime_ns >= evaluation.stat().st_mtime_ns


def page(run: Path, cfg: ript.Config, lines: list[str], contexts: list[ript.Context],
         evaluations: dict[str, list], history: list[dict], running: bool) -> str:
    """The page of a run.

    lines: what the table's head and foot say. evaluations: {name: an outcome for each of contexts}. history:
    the rows of metrics.jsonl. While the run goes on, the browser loads the page again every ten seconds.
    """
    done = history[-1]["iteration"] if history else 0
    state = "an evaluation" if cfg.eval else f"iteration {done} of {cfg.iterations}"
    if running:
        state += ", still going on"
    parts = [f"<h1>{html.escape(str(run))}</h1>", f"<p><b>{state}</b></p>"]
    parts += [f'<p class="quiet">{html.escape(line)}</p>' for line in lines]
    for iteration, sentence in sentences(history).values():
        text = re.sub(r"--\w+", r"<code>\g<0></code>", html.escape(sentence))  # options are not broken up
        parts.append(f'<p class="note">Iteration {iteration}: {text}</p>')
    if len(history) > 1:
        parts += ["<h2>Per iteration</h2>", curves(history)]
    if evaluations:
        parts += ["<h2>Success on held-out contexts, acting with the mean</h2>",
                  heat_map(contexts, evaluations)]
    films = []
    for task, text in {context.task: context.instruction for context in contexts}.items():
        for ending, stage in (("_before", "before"), ("", "after" if history else "")):
            path = run / f"task{task}{ending}.mp4"
            if is_current(path, history):
                films.append(video(path, f"{text} ({stage})" if stage else text))
    if films:
        parts += ["<h2>The first held-out context of each task</h2>",
                  f'<div class="videos">{"".join(films)}</div>']
    refresh = '<meta http-equiv="refresh" content="10">' if running else ""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
            f'<meta name="viewport" content="width=device-width"><title>{html.escape(run.name)}</title>'
            f'<style>{STYLE}</style></head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n")
