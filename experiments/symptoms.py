"""The sentences of scripts/symptoms.py, each provoked by a real run on the tabletop: docs/DETAILS.md's table.

    python experiments/symptoms.py            every run, about ten minutes on two cores, after scripts/sft.py
    python experiments/symptoms.py clipped    one of them

A run that has been made before, in runs/symptoms, is not made again. docs/results/symptoms/table.csv keeps
what each of them said.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import math

import torch

import ript
from experiments.common import RESULTS, RUNS, print_header, print_row, run_once, write_csv
from policies.tiny import Tiny
from scripts.symptoms import SYMPTOMS, sentences
from simulators.tabletop import Tabletop

START = "--checkpoint runs/tabletop_sft"
PRETRAINED = "--checkpoint policies/tabletop"  # its scale head was never fitted
SUITES = "experiments/tabletop_suites.py"
SHORT = "--iterations 1 --eval_contexts 5"
# The arguments of ript.py that provoke each symptom.
PROVOKED_BY = dict(
    all_fail=f"--suite {SUITES}:Slip20 {PRETRAINED} {SHORT}",
    all_success=f"--suite {SUITES}:NoSlip {PRETRAINED} --scale_multiplier 0.5 {SHORT}",
    clipped=f"{START} --ppo_epochs 4 {SHORT}",
    far=f"{START} --ppo_epochs 8 --clip_coef 1000 {SHORT}",
    apart=f"--model experiments/symptoms.py:Wide {START} {SHORT}",
    bounded=f"{PRETRAINED} {SHORT}",
    above_evaluation=f"{START} --lr 1e-6 --scale_multiplier 1.5 --max_rejected 0 --iterations 1")

class Wide(Tiny):
    """A policy with a mistake: it draws actions with a b that is five times the one that it scores with."""
    PRESET = dict(tabletop=Tabletop.PRESET["tiny"])

    @torch.no_grad()
    def act(self, observations, instructions, generators):
        """Chunks whose noise is five times as wide as log_prob takes it to be."""
        chunks = super().act(observations, instructions, generators)
        for chunk, g in zip(chunks, generators):
            if g is not None:
                mean, log_scale = self.density([chunk["observation"]], [chunk["instruction"]])
                sample = mean + 5 * (torch.tensor(chunk["sample"]) - mean)  # 1 H A
                wide = ript.laplace_log_prob(sample, mean, log_scale + math.log(5))  # 1 H
                chunk |= dict(sample=sample[0].numpy(), log_prob=wide[0].numpy(),
                              actions=self.to_env_actions(sample[0]))
        return chunks

def main(argv: list[str] | None = None) -> None:
    """Make what is missing of the runs, and print what they say."""
    names = (sys.argv[1:] if argv is None else argv) or list(PROVOKED_BY)
    ript.require(set(names) <= set(PROVOKED_BY), f"say which, of {', '.join(PROVOKED_BY)}")
    print_header("run", "symptom", "arguments", "iteration", "sentence")
    rows = []
    for name in names:
        out = run_once(RUNS / f"symptoms/{name}", "ript.py", *PROVOKED_BY[name].split(), quiet=True)
        history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for symptom, (iteration, sentence) in sentences(history).items():
            rows.append(dict(run=name, symptom=symptom, arguments=PROVOKED_BY[name], iteration=iteration,
                             sentence=sentence))
            print_row(*rows[-1].values())
    if len(names) == len(SYMPTOMS):
        write_csv(RESULTS / "symptoms/table.csv", rows)

if __name__ == "__main__":
    ript.run_command(main)
