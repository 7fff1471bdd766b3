"""How often are the package's verdicts wrong, and how often do they see a real difference? In these studies the truth
is known.

Every cell counts studies with at least one false "can be told from noise". The share may be .06 at most, beyond
what the number of studies leaves open. The short table always runs. To run the long one:
python -m pytest tests/test_simulations.py -m simulation -n 2 -s"""

import numpy as np
import pytest

import nli_ft.claims
import nli_ft.differences
import nli_ft.paired
import nli_ft.seeds
from nli_ft.power import cluster_ids, right_answers
from studies import DIFFERENCES, DIFFICULTY, INDEPENDENT, STRONG, of_clusters, rows_of

LIMIT = 0.06


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    "statsmodels' multipletests collects garbage at every call. That would take nine tenths of the time."
    monkeypatch.setattr("gc.collect", lambda *args: 0)


def error(share, n):
    return (max(share, LIMIT) * (1 - max(share, LIMIT)) / n) ** 0.5


def report(what, share, n):
    print(f"{what}: {share:.3f} ± {error(share, n):.3f}")
    return share


def told_runs(rng, accuracies, groups, kind):
    "The runs that a study distinguishes from its first, by the printed verdict."
    base, *others = [rows_of(r, groups) for r in right_answers(rng, accuracies, groups, **kind)]
    return [": can be told" in nli_ft.paired.verdict(r) for r in nli_ft.differences.paired(base, others)]


def told_configs(rng, seeds, accuracies, sd, groups, kind):
    "The configs that a study distinguishes from its first. Accuracies vary over seeds with this standard deviation."
    arms = []
    for n, mean in zip(seeds, accuracies):
        of_seeds = np.clip(mean + sd * rng.standard_normal(n), 0.02, 0.98)
        arms.append(right_answers(rng, of_seeds, groups, **kind))
    return [bool(r and r["told"]) for r in nli_ft.seeds.over_seeds(arms, list(groups))]


def false_share(study, n):
    rng = np.random.default_rng(11)
    return np.mean([any(study(rng)) for _ in range(n)])


def check_runs(name, groups, kind, comparisons, n):
    found = false_share(lambda rng: told_runs(rng, [0.8] * (comparisons + 1), groups, kind), n)
    assert report(f"{name}, {comparisons} comparisons, false", found, n) <= LIMIT + 2 * error(found, n)


def check_configs(name, seeds, sd, groups, kind, n):
    found = false_share(lambda rng: told_configs(rng, seeds, [0.8] * len(seeds), sd, groups, kind), n)
    assert report(f"{name}, seeds {seeds}, sd {100 * sd:.0f}, false", found, n) <= LIMIT + 2 * error(found, n)


RUNS = {
    "independent items": (cluster_ids(240, 1), INDEPENDENT),
    "clustered difficulty": (cluster_ids(240, 4), DIFFICULTY),
    "clustered differences": (cluster_ids(240, 4), DIFFERENCES),
    "strongly clustered differences": (cluster_ids(240, 4), STRONG),
    "unequal clusters": (cluster_ids(240, [1, 1, 2, 4, 12]), DIFFERENCES),
    "2 clusters": (of_clusters(240, 2), DIFFERENCES),
    "5 clusters": (of_clusters(240, 5), DIFFERENCES),
    "10 clusters": (of_clusters(240, 10), DIFFERENCES),
}


@pytest.mark.parametrize("name", RUNS)
def test_equal_runs_are_rarely_told_apart(name):
    check_runs(name, *RUNS[name], comparisons=1, n=200)


@pytest.mark.parametrize("name", ["clustered differences", "strongly clustered differences"])
def test_nor_are_fourteen_runs_of_one_family(name):
    check_runs(name, *RUNS[name], comparisons=14, n=60)


@pytest.mark.parametrize("seeds", [(3, 3), (2, 5), (3, 3, 3, 3, 3)])
@pytest.mark.parametrize("sd", [0.01, 0.05])
def test_equal_configs_are_rarely_told_apart(seeds, sd):
    check_configs("400 items", seeds, sd, cluster_ids(400, 4), DIFFERENCES, n=200)


@pytest.mark.parametrize("seeds", [(3, 1), (1, 3), (1, 1)])
def test_one_seed_never_gives_a_verdict_on_a_config(seeds):
    rng = np.random.default_rng(0)
    assert not any(
        told_configs(rng, seeds, [0.5, 0.9], 0.02, cluster_ids(400, 4), DIFFERENCES)[0] for _ in range(20)
    )


@pytest.mark.parametrize("kind, least", [(INDEPENDENT, 0.65), (DIFFERENCES, 0.4)])
def test_runs_ten_points_apart_are_mostly_told(kind, least):
    rng, groups = np.random.default_rng(12), cluster_ids(240, 4)
    seen = np.mean([told_runs(rng, [0.75, 0.85], groups, kind)[0] for _ in range(150)])
    assert report("10 points on 240 items, seen", seen, 150) > least


def test_configs_six_points_apart_are_mostly_told():
    rng, groups = np.random.default_rng(13), cluster_ids(2000, 4)
    seen = np.mean([told_configs(rng, (3, 3), [0.8, 0.86], 0.02, groups, DIFFERENCES)[0] for _ in range(100)])
    assert report("6 points over 3 and 3 seeds, seen", seen, 100) > 0.55


@pytest.mark.parametrize("kind", [INDEPENDENT, DIFFERENCES, STRONG])
def test_intervals_of_shares_hold_the_truth(kind):
    rng, groups = np.random.default_rng(14), cluster_ids(240, 4)
    held = []
    for _ in range(400):
        low, high = nli_ft.paired.share_right(right_answers(rng, [0.8], groups, **kind)[0], groups)[
            "accuracy_ci"
        ]
        held.append(low <= 0.8 <= high)
    assert report("coverage", np.mean(held), 400) > 0.92


# --- the long table

LONG_RUNS = RUNS | {
    "1000 items, clustered differences": (cluster_ids(1000, 4), DIFFERENCES),
    "1000 items, independent": (cluster_ids(1000, 1), INDEPENDENT),
    "30 clusters": (of_clusters(120, 30), DIFFERENCES),
}


@pytest.mark.simulation
@pytest.mark.parametrize("comparisons", [1, 4, 14])
@pytest.mark.parametrize("name", LONG_RUNS)
def test_size_of_the_verdict_on_runs(name, comparisons):
    check_runs(name, *LONG_RUNS[name], comparisons, n={1: 1000, 4: 600, 14: 300}[comparisons])


@pytest.mark.simulation
@pytest.mark.parametrize("sd", [0.01, 0.02, 0.05])
@pytest.mark.parametrize(
    "seeds",
    [
        (3, 3),
        (2, 2),
        (5, 5),
        (3, 2),
        (2, 3),
        (2, 5),
        (5, 2),
        (3, 5),
        (3, 10),
        (2, 10),
        (10, 2),
        (3, 1),
        (1, 3),
        (3,) * 5,
        (3,) * 15,
        (2, 3, 5, 3, 1),
    ],
)
def test_size_of_the_verdict_on_configs(seeds, sd):
    n = 800 if len(seeds) < 10 else 300
    check_configs("2000 items", seeds, sd, cluster_ids(2000, 4), DIFFERENCES, n)


@pytest.mark.simulation
@pytest.mark.parametrize("name", RUNS)
def test_size_of_the_verdict_on_configs_by_items(name):
    check_configs(name, (3, 3), 0.02, *RUNS[name], n=1000)


@pytest.mark.simulation
@pytest.mark.parametrize(
    "name, least",
    [
        ("independent items", 0.65),
        ("clustered difficulty", 0.85),
        ("clustered differences", 0.5),
        ("unequal clusters", 0.3),
        ("10 clusters", 0.05),
    ],
)
@pytest.mark.parametrize("comparisons", [1, 4])
def test_power_of_the_verdict_on_runs(name, least, comparisons):
    rng, (groups, kind) = np.random.default_rng(15), RUNS[name]
    seen = np.mean([told_runs(rng, [0.75] * comparisons + [0.85], groups, kind)[-1] for _ in range(500)])
    assert report(f"{name}, 10 points, {comparisons} comparisons, seen", seen, 500) > (
        least if comparisons == 1 else least / 2
    )


@pytest.mark.simulation
@pytest.mark.parametrize(
    "seeds, sd, least",
    [
        ((3, 3), 0.01, 0.9),
        ((3, 3), 0.02, 0.6),
        ((5, 5), 0.02, 0.9),
        ((3, 5), 0.02, 0.6),
        ((3, 3), 0.05, 0.1),
        ((10, 10), 0.05, 0.6),
    ],
)
def test_power_of_the_verdict_on_configs(seeds, sd, least):
    rng, groups = np.random.default_rng(16), cluster_ids(2000, 4)
    seen = np.mean([told_configs(rng, seeds, [0.8, 0.86], sd, groups, DIFFERENCES)[0] for _ in range(400)])
    assert report(f"6 points, seeds {seeds}, sd {100 * sd:.0f}, seen", seen, 400) > least


@pytest.mark.simulation
@pytest.mark.parametrize("share", [0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("name", [n for n in RUNS if n not in ("2 clusters", "5 clusters")])
def test_coverage_of_the_intervals_of_shares(name, share):
    rng, (groups, kind) = np.random.default_rng(17), RUNS[name]
    held = []
    for _ in range(1000):
        low, high = nli_ft.paired.share_right(right_answers(rng, [share], groups, **kind)[0], groups)[
            "accuracy_ci"
        ]
        held.append(low <= share <= high)
    least = 0.92 if share < 0.95 else 0.9  # if only two clusters are wrong, their design effect is a guess
    assert report(f"{name}, share {share}, coverage", np.mean(held), 1000) > least


@pytest.mark.simulation
@pytest.mark.parametrize("name", [n for n in RUNS if n not in ("2 clusters", "5 clusters")])
def test_coverage_of_the_intervals_of_differences(name):
    rng, (groups, kind) = np.random.default_rng(18), RUNS[name]
    held = []
    for _ in range(1000):
        a, b = right_answers(rng, [0.75, 0.85], groups, **kind)
        low, high = nli_ft.paired.paired_test(a, b, groups).interval()
        held.append(low <= 0.1 <= high)
    assert report(f"{name}, 10 points, coverage", np.mean(held), 1000) > 0.92


@pytest.mark.parametrize("check", ["a > b", "abs(a - b) < 0.2", "a@x - b@x > a@y - b@y"])
def test_the_chance_of_a_claim_is_how_often_its_verdict_holds(check):
    "The same simulated studies, judged by `judge_claim` as a report judges them."
    cells = [(arm, condition) for arm in "ab" for condition in ("xy" if "@" in check else [""])]
    (claim,) = nli_ft.claims.claims_of(check, cells)
    groups, counts, level, n = cluster_ids(240, 4), [3 + i % 2 for i in range(len(claim.terms))], 0.02, 60
    true = list(nli_ft.claims.true_accuracies(claim, 0.2, 0.6).values())
    rng, arm_of = np.random.default_rng(0), np.repeat(range(len(counts)), counts)
    held = 0
    for _ in range(n):
        means = np.clip(np.repeat(true, counts) + 0.02 * rng.standard_normal(len(arm_of)), 0.02, 0.98)
        right = right_answers(rng, means, groups, run=0.2, arm=0.1, arm_of=arm_of)
        parts = [(w, right[arm_of == i]) for i, w in enumerate(claim.terms.values())]
        test = nli_ft.paired.contrast_test(parts, groups)
        held += nli_ft.claims.judge_claim(claim, test, level)["outcome"] == nli_ft.claims.HELD
    how = dict(level=level, smallest_effect=0.2, accuracy=0.6, seed_sd=0.02, shares=dict(run=0.2, arm=0.1))
    found = nli_ft.claims.simulated_claim(claim, groups, dict(zip(claim.terms, counts)), n_sim=n, **how)
    assert found["chance"] == held / n and 0 < held < n
