"""Simulated studies in which the truth is known. `nli_ft.power` makes the right and wrong answers."""

import json
from pathlib import Path

import numpy as np

from nli_ft.config_loader import config_hash
from nli_ft.power import cluster_ids, right_answers
from nli_ft.study import Study

# Share of the latent variance: an item's difficulty, a cluster's difficulty, and what one run has in one cluster.
INDEPENDENT = dict(item=0.0, cluster=0.0, run=0.0)
DIFFICULTY = dict(item=0.2, cluster=0.5, run=0.0)  # some clusters are hard, for every run alike
DIFFERENCES = dict(
    item=0.0, cluster=0.0, run=0.35
)  # a run is lucky with whole clusters: design effect 1.6 for clusters of four
STRONG = dict(item=0.0, cluster=0.0, run=0.95)  # a cluster is right or wrong as one


def of_clusters(n_items, count):
    "Cluster of each item, for a number of equal clusters."
    return np.arange(n_items) * count // n_items


def rows_of(right, groups):
    "Prediction rows with what a verdict is made of."
    return [
        dict(id=i, label=1, predicted_label=int(r), group_id=int(g))
        for i, (r, g) in enumerate(zip(right, groups))
    ]


DECLARED = """question = "Does a synthetic thought help?"
prediction = "It does while the budget is small, and the rank does not matter."
checks = [
    "cot > label_only",
    "abs(low_rank - label_only) < 0.03",
    "(cot - label_only)@short > (cot - label_only)@long",
    "label_only@long > cot@short on dev",
    "cot > low_rank on all",
]
base = "cpu_demo"
settings = dict(eval_before=False, eval_data=dict(dev="dev.jsonl"), test_data=dict(test="test.jsonl"))
arms = dict(label_only=dict(completion="label_only"), low_rank=dict(lora_r=4), cot=dict())
conditions = dict(short=dict(max_steps=10), long=dict(max_steps=40))
pools = dict(all=["dev", "test"])
seeds = [1, 2, 3]
contrast = ["label_only", "cot"]
"""
# true accuracies: cot is better by 20 points in the condition short, and by none in long
TRUTH = dict(label_only=(0.55, 0.75), low_rank=(0.55, 0.75), cot=(0.75, 0.75))


def of_truth(rng, run, groups):
    "Right (1) and wrong (0) answers of one run of the synthetic study."
    mean = TRUTH[run.arm][run.condition == "long"] + 0.01 * rng.standard_normal()
    return right_answers(rng, [mean], groups, run=0.1)[0]


def synthetic_study(folder, n_items=400, sets=("dev", "test"), seeds=(1, 2, 3), declared=DECLARED):
    "A study with its plan and its results, all made up. Of other seeds and sets there are no results yet."
    file = Path(folder) / "synthetic.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(declared)
    study, rng, groups = Study(file), np.random.default_rng(7), cluster_ids(n_items, 4)
    gold = "01" * (n_items // 2)
    lines = []
    runs = study.first_runs() + study.later_runs(dict.fromkeys(study.cells(), ()))
    for run in (r for r in runs if r.seed in seeds):
        name = run.label.replace(" ", "-")
        for which in sets:
            right = of_truth(rng, run, groups)
            answers = "".join(g if r else str(1 - int(g)) for r, g in zip(right, gold))
            judged = dict(what="judged", run=name, set=which, role=which, answers=answers, thoughts=None)
            lines.append(judged | dict(valid_rate=1.0, mean_tokens=20.0, look=1, at="2026-11-27T01:00:00Z"))
        facts = dict(what="run", hash=config_hash(study.config(run)), arm=run.arm, condition=run.condition)
        facts |= dict(
            seed=run.seed, grid={}, run=name, wall_s=60.0, loss_tokens_trained=500, tokens_trained=900
        )
        facts |= dict(
            command=f"nli_run --config {run.arm}", commit="ab" * 20, code_changed=False, packages={}
        )
        lines.append(facts)
    if "test" in sets and lines:
        look = dict(what="look", number=1, plan=study.hash(), runs=len(runs), at="2026-11-27T00:30:00Z")
        lines.insert(0, look)
    amended = dict(
        date="2026-11-26T01:00:00Z", commit=None, reason="a third seed", changed=dict(seeds=[[1, 2], 3])
    )
    plan = dict(sealed="2026-11-25T01:00:00Z", commit="cd" * 20, hash=study.hash(), runs=18, minutes=18.0)
    plan |= dict(
        amendments=[amended], warnings=["low_rank is small"], facts=study.facts(), power={}, cells=[]
    )
    plan |= dict(data={}, speed={})
    items = dict(sha256="ef" * 32, label_set="binary", gold=gold, clusters=groups.tolist())
    items["ids"] = list(range(n_items))
    study.folder.mkdir()
    (study.folder / "plan.json").write_text(json.dumps(plan))
    (study.folder / "items.json").write_text(json.dumps({which: items for which in sets}))
    (study.folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return study
