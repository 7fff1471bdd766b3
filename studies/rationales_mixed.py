"""Is the difference between a thought and no thought one of the steps in which the rows come? A control of `rationales`.

Rows of similar length go together in a step, and in these data the length of a walk tells its label. So in `rationales`
the arms with a thought have rows of one label only in 48 of 80 steps, and `label_only` in none. That was noticed when 25
of its 28 runs had answered, and before any test row was looked at. Here both arms draw the same rows in the same steps.

Data: those of `rationales`, which says how to make them.
Shrunk before anything ran, for two CPU cores: two arms, one budget and four seeds.
Run:
    nli_study plan rationales_mixed
    nli_study run rationales_mixed --budget 170min
    nli_study report rationales_mixed
"""
question = "Is a walk down the chain still worth something where every arm draws the same rows in the same steps?"
prediction = """What `rationales` finds between `cot` and `label_only` after 80 steps is not due to steps with rows of one label:
it has the same sign here."""
checks = ["cot > label_only"]

base = "cpu_demo"
settings = dict(
    train_data="data/depths/train.jsonl",
    eval_data=dict(dev="data/depths/dev_40.jsonl"),
    test_data=dict(
        depth1="data/depths/test_depth1.jsonl",
        depth2="data/depths/test_depth2.jsonl",
        depth3="data/depths/test_depth3.jsonl",
    ),
    max_train_samples=None,
    max_eval_samples=None,
    eval_before=False,
    max_steps=80,
    group_by_length=False,               # the one thing that differs from `rationales`
)
arms = dict(label_only=dict(completion="label_only"), cot=dict())
seeds = [1, 2, 3, 4]
pools = dict(deep=["depth2", "depth3"])

contrast = ["label_only", "cot"]
on = "deep"
metric = "accuracy"
alpha = 0.05
smallest_effect = 0.20
guess = dict(accuracy=0.5, seed_sd=0.05)
tokens_per_s = 105                   # two cores with AVX2 and no AVX-512, beside light work
