"""When does the content of a rationale matter? Synthetic chains, where the depth of reasoning is known.

The first study. Four papers report that the content of rationales hardly matters (arXiv 2505.13775, 2505.13792,
2511.02044, 2406.14511), and one that most rationale training loses to labels alone (2510.16686). This package once
reported 35 points for chain of thought, against a `label_only` that had learnt nothing in 40 steps.
`rationales_natural` asks the same of natural text.

Data (synthetic, a small set of templates: a thought walks down a chain of six people, one stated fact a step):
    nli_corpus --size small --depths 1,2,3 --out data/depths
    awk 'NR % 12 >= 1 && NR % 12 <= 4' data/depths/dev.jsonl > data/depths/dev_40.jsonl
Seen before the plan, on dev rows only and with one seed: a run of `cot` with 60 steps was right on 85 of 120 dev rows. A
walk that only names the people was right on 67 of 120 after 60 steps, and a thought that states its answer first stayed
at chance at depth 2 and 3 after 80. So 80 steps are the budget here.
Shrunk before anything ran, for two CPU cores: depth is crossed within the items (one test set for each depth), two
budgets and not three, 640 steps are out of reach, one learning rate (that of cpu_demo) and no search of it, three seeds.
`label_first` is left out (runs/LOG.md has it). test_direction and test_pairs are not judged: their categories are not
taught here.
Run:
    nli_study plan rationales
    nli_study run rationales --budget 170min
    nli_study report rationales
"""
question = "Does the content of a thought matter, and does it matter where the label cannot be read in one pass?"
prediction = """Content matters if and only if the label cannot be read in one forward pass at this size and budget. At depth 2 and 3
the label alone stays near chance in 80 steps, and the walk of the own row, one look at the premise a step, does not. The
walk of another row of the same label, the own words in random order, and dots are worth what the label alone is worth.
As many loss tokens for the label as for the thought do not bring the difference back. With 40 steps the walk may not be
learnt yet."""
checks = [
    "cot@long > label_only@long",
    "cot@long > shuffled@long",
    "abs(shuffled - label_only) < 0.10",
    "abs(permuted - label_only) < 0.10",
    "abs(filler - label_only) < 0.10",
    "abs(label_only_matched - label_only) < 0.10",
    "cot@long - label_only@long > cot@short - label_only@short",
]

base = "cpu_demo"                     # SmolLM2-135M in NF4, all linear layers, 16 rows a step, learning rate 1e-3
settings = dict(
    train_data="data/depths/train.jsonl",      # 2,568 rows, a third of each depth
    eval_data=dict(dev="data/depths/dev_40.jsonl"),
    test_data=dict(
        depth1="data/depths/test_depth1.jsonl",
        depth2="data/depths/test_depth2.jsonl",
        depth3="data/depths/test_depth3.jsonl",
    ),
    max_train_samples=None,                    # a step draws new rows: 80 steps see 1,280, each once
    max_eval_samples=None,                     # 120 rows in 30 crossed quadruples, each test set
    eval_before=False,
)
arms = dict(
    label_only=dict(completion="label_only"),
    cot=dict(),                                # the walk down the chain, then the label
    shuffled=dict(data_strategy="shuffled"),   # the walk of another row with the same label
    permuted=dict(data_strategy="permuted"),   # the own words in random order
    filler=dict(data_strategy="filler"),       # as many dots as the walk has tokens
    # as many tokens with loss as `cot` has in 40 steps (46 a row against 9): five times the rows, most of them twice
    label_only_matched=dict(completion="label_only", max_steps=None, max_loss_tokens=29_300),
)
conditions = dict(short=dict(max_steps=40), long=dict(max_steps=80))
only = dict(shuffled=["long"], permuted=["long"], filler=["long"], label_only_matched=["short"])
seeds = [1, 2, 3]
more_seeds = dict(label_only=[4, 5], cot=[4, 5])   # five on the primary contrast
pools = dict(deep=["depth2", "depth3"])        # the label cannot be read off one stated fact

contrast = ["label_only", "cot"]
at = "long"
on = "deep"
metric = "accuracy"
alpha = 0.05
smallest_effect = 0.20               # the headline that this may correct was 35 points
guess = dict(accuracy=0.5, seed_sd=0.05)
