"""Every statistic is checked against a source that is not the library behind it: published examples, closed forms,
or a second, plainer implementation."""

import itertools, json, math, random

import numpy as np
import pytest

import nli_ft.baselines
import nli_ft.evaluate
import nli_ft.paired
import nli_ft.reading
import nli_ft.reasoning
import nli_ft.report
from nli_ft.process import DataError, RecordError


def pred(i, label, said, p=None, **kw):
    return dict(
        dict(
            id=i,
            premise="A dog runs.",
            hypothesis="It runs.",
            label=label,
            predicted_label=said,
            p_entail=p,
            thought_process="so",
            completion="",
            outcome="strict" if said is not None else "truncated",
            n_tokens=5,
        ),
        **kw,
    )


def random_preds(n=137, seed=0, failing=0.1):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        p = round(rng.random(), 2)  # two digits: there will be ties
        rows.append(
            pred(i, int(rng.random() < 0.2 + 0.6 * p), int(p >= 0.5), p)
            if rng.random() > failing
            else pred(i, rng.randint(0, 1), None)
        )
    return rows


# --- intervals


@pytest.mark.parametrize(
    "right, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_newcombe_published(right, n, low, high):
    # R. G. Newcombe (1998), Two-sided confidence intervals for the single proportion, Statistics in
    # Medicine 17:857-872, table I, method 3
    assert nli_ft.paired.wilson(right, n) == pytest.approx([low, high], abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    z = 1.959963984540054
    for right, n in ((0, 7), (3, 10), (1755, 1977)):
        for bound in nli_ft.paired.wilson(right, n):
            assert (right / n - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)


# --- McNemar, Holm


def binomial_two_sided(k, n):
    return min(1, 2 * sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n)


def from_table(both, only_a, only_b, neither):
    cells = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return [a for a, _ in cells], [b for _, b in cells]


def test_mcnemar_on_agresti_approval_ratings():
    # A. Agresti, Categorical Data Analysis, table 10.1: 1,600 Britons asked twice, z = (86 - 150)/sqrt(236)
    # = -4.17, so p is about 3e-5
    r = nli_ft.paired.mcnemar(*from_table(794, 150, 86, 570))
    assert (r["only_a"], r["only_b"]) == (150, 86)
    assert r["p"] == pytest.approx(binomial_two_sided(86, 236), rel=1e-9)
    assert r["p"] == pytest.approx(
        math.erfc(64 / math.sqrt(236) / math.sqrt(2)), rel=0.5
    )  # the normal approximation of the book


@pytest.mark.parametrize("only_a, only_b", [(1, 9), (0, 5), (5, 5), (12, 3), (1, 0)])
def test_mcnemar_is_a_coin_toss_over_the_disagreements(only_a, only_b):
    assert nli_ft.paired.mcnemar(*from_table(30, only_a, only_b, 4))["p"] == pytest.approx(
        binomial_two_sided(only_a, only_a + only_b)
    )


def test_mcnemar_without_disagreement_says_nothing():
    assert nli_ft.paired.mcnemar(*from_table(5, 0, 0, 5))["p"] == 1.0


def test_pairing_unequal_or_no_items_is_refused():
    for a, b in (([1, 0], [1]), ([], [])):
        with pytest.raises(RecordError, match="same items"):
            nli_ft.paired.mcnemar(a, b)
        with pytest.raises(RecordError, match="same items"):
            nli_ft.paired.paired_test(a, b)


def test_holm_steps_down_as_defined():
    # by hand from the definition in S. Holm (1979), Scand. J. Statist. 6:65-70: 4 × .005, 3 × .01, 2 × .03,
    # then never falling
    adjusted = nli_ft.paired.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert nli_ft.paired.holm([]) == [] and nli_ft.paired.holm([0.9, 0.8]) == [1.0, 1.0]


# --- the test that decides


def all_flips(sums, sizes, difference=0.0):
    "A second implementation with every flip in a loop: p of the hypothesis that the difference is this one."
    left = [s - difference * m for s, m in zip(sums, sizes)]
    seen = abs(sum(left)) - 1e-9
    flips = itertools.product((1, -1), repeat=len(left))
    return np.mean([abs(sum(s * v for s, v in zip(signs, left))) >= seen for signs in flips])


def answers(sums, sizes):
    "The right and wrong answers of two runs that differ by these amounts per cluster, and the clusters."
    a, b, groups = [], [], []
    for k, (s, m) in enumerate(zip(sums, sizes)):
        b += [1] * max(s, 0) + [0] * (m - max(s, 0))
        a += [0] * max(s, 0) + [1] * max(-s, 0) + [0] * (m - abs(s))
        groups += [k] * m
    return a, b, groups


UNEQUAL = (
    [1, -1, 2, 0, 3, 0, -1, 2, 1, 5, 0, 1],
    [1, 4, 2, 1, 4, 3, 1, 2, 1, 6, 1, 2],
)  # ties, zeros, sizes 1 to 6


def test_p_is_the_share_of_all_flips_that_give_as_large_a_difference():
    a, b, groups = answers(*UNEQUAL)
    t = nli_ft.paired.paired_test(a, b, groups)
    assert t.n_clusters == 12 and t.difference == pytest.approx(13 / 28)
    assert t.p == pytest.approx(all_flips(*UNEQUAL))


def test_the_interval_holds_the_differences_that_flips_do_not_refuse():
    t = nli_ft.paired.paired_test(*answers(*UNEQUAL))
    for alpha in (0.05, 0.2):
        low, high = t.interval(alpha)
        for inside in (low + 1e-6, high - 1e-6):
            assert all_flips(*UNEQUAL, inside) > alpha
        for outside in (low - 1e-6, high + 1e-6):
            assert all_flips(*UNEQUAL, outside) <= alpha


def test_without_clusters_it_is_mcnemars_test():
    for only_a, only_b in ((1, 9), (0, 7), (12, 3), (5, 5)):
        a, b = from_table(8, only_a, only_b, 4)
        assert nli_ft.paired.paired_test(a, b).p == pytest.approx(binomial_two_sided(only_a, only_a + only_b))


def test_random_flips_agree_with_all_flips_and_are_the_same_each_time():
    a, b, groups = answers(*UNEQUAL)
    some = nli_ft.paired.paired_test(a, b, groups, n_flips=1000)
    assert (
        some.p == pytest.approx(all_flips(*UNEQUAL), abs=0.02)
        and some.p == nli_ft.paired.paired_test(a, b, groups, n_flips=1000).p
    )
    assert some.p >= 1 / 1001  # the observed difference is one of the flips


def test_the_names_of_clusters_and_the_order_of_items_do_not_matter():
    a, b, groups = map(np.array, answers(*UNEQUAL))
    order = np.random.default_rng(0).permutation(len(a))
    one, other = (
        nli_ft.paired.paired_test(a, b, groups),
        nli_ft.paired.paired_test(a[order], b[order], [f"group {g}" for g in groups[order]]),
    )
    assert [one.p, *one.interval()] == pytest.approx([other.p, *other.interval()])


def test_swapping_the_runs_turns_the_interval_round():
    a, b, groups = answers(*UNEQUAL)
    one, other = nli_ft.paired.paired_test(a, b, groups), nli_ft.paired.paired_test(b, a, groups)
    assert one.p == pytest.approx(other.p) and one.detectable() == pytest.approx(other.detectable())
    assert one.interval() == pytest.approx([-x for x in other.interval()[::-1]])


@pytest.mark.parametrize(
    "sums, sizes",
    [
        ([0] * 30, [4] * 30),
        ([1] + [0] * 29, [4] * 30),
        ([1] * 30, [4] * 30),
        ([4] * 30, [4] * 30),
        ([-4] * 30, [4] * 30),
        ([1, -1] * 15, [4] * 30),
        ([0], [4]),
        ([3], [4]),
        ([4] * 5, [4] * 5),
        ([1] * 6 + [0] * 60, [1] * 66),
        UNEQUAL,
        ([40] + [0, 1] * 6, [40] + [1] * 12),
    ],
)
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 14])
def test_p_interval_and_detectable_difference_never_contradict_each_other(sums, sizes, alpha):
    t = nli_ft.paired.paired_test(*answers(sums, sizes))
    low, high = t.interval(alpha)
    assert -1 <= low <= t.difference <= high <= 1 and low < high
    assert (low > 0 or high < 0) == (t.p <= alpha)
    seen = t.detectable(alpha)
    if t.p > alpha and seen is not None:
        assert abs(t.difference) < seen


def test_equal_runs_have_p_1_and_no_difference_to_detect():
    t = nli_ft.paired.paired_test([1, 0] * 20, [1, 0] * 20, [i // 4 for i in range(40)])
    assert (t.difference, t.p, t.detectable()) == (0.0, 1.0, None)
    assert t.interval() == pytest.approx(
        [-(1 - 0.05**0.1), 1 - 0.05**0.1]
    )  # ten clusters without a difference are not all there are


def test_one_cluster_that_holds_nearly_everything_tells_nothing():
    sums, sizes = [40] + [0] * 12, [50] + [1] * 12
    t = nli_ft.paired.paired_test(*answers(sums, sizes))
    assert t.p == 1.0 and t.interval()[0] <= 0


def test_a_family_is_decided_as_holm_decides_and_each_interval_says_the_same():
    rng = np.random.default_rng(2)
    base = (rng.random(600) < 0.8).astype(int)
    groups = [i // 3 for i in range(600)]
    tests = [
        nli_ft.paired.paired_test(base, (rng.random(600) < p).astype(int), groups)
        for p in (0.9, 0.8, 0.89, 0.81, 0.66)
    ]
    for r, p in zip(nli_ft.paired.decide(tests), nli_ft.paired.holm([t.p for t in tests])):
        assert r["p_holm"] == p and r["told"] == (p <= 0.05)
        assert r["told"] == (r["ci"][0] > 0 or r["ci"][1] < 0)
        assert r["told"] or abs(r["difference"]) < r["detectable"]
    assert sum(r["told"] for r in nli_ft.paired.decide(tests)) >= 2


def test_interval_and_detectable_difference_are_at_the_level_of_the_family():
    # nine items of forty, all in one direction: p = 2/2^9, enough alone but not among fourteen
    base, better = [0] * 40, [1] * 9 + [0] * 31
    lone, one_of_many = (
        nli_ft.paired.paired_test(base, better),
        nli_ft.paired.decide(
            [nli_ft.paired.paired_test(base, better)] + [nli_ft.paired.paired_test(base, base)] * 13
        )[0],
    )
    assert lone.p == pytest.approx(2 / 2**9) and 0.05 / 14 < lone.p < 0.05
    assert nli_ft.paired.decide([lone])[0]["told"] and lone.interval(0.05)[0] > 0
    assert (
        one_of_many["told"] is False
        and one_of_many["ci"][0] <= 0
        and one_of_many["ci_level"] == 1 - 0.05 / 14
    )
    assert one_of_many["detectable"] == lone.detectable(0.05 / 14) > lone.detectable(0.05)


def test_what_was_seen_counts_among_the_random_flips():
    assert nli_ft.paired.paired_test(
        [0] * 600, [1] * 300 + [0] * 300, [i // 2 for i in range(600)], n_flips=99
    ).p == pytest.approx(1 / 100)


def test_below_ten_clusters_there_is_no_verdict_however_small_p_is():
    for count, told in ((9, None), (10, True)):
        [r] = nli_ft.paired.decide(
            [nli_ft.paired.paired_test([0] * 4 * count, [1] * 4 * count, [i // 4 for i in range(4 * count)])]
        )
        assert r["p"] == pytest.approx(2 / 2**count) and r["told"] is told
        said = nli_ft.paired.verdict(r | dict(n=4 * count, discordant=1.0))
        assert ("no verdict" in said) == (told is None) and f"({count} clusters)" in said


@pytest.mark.parametrize("n, size, share", [(300, 1, 0.3), (400, 4, 0.2)])
def test_the_detectable_difference_is_found_with_the_stated_power(n, size, share):
    rng, groups = np.random.default_rng(7), np.arange(n) // size

    def study(d):
        up, down = ((share + d) / 2, (share - d) / 2)
        moved = rng.choice([1, -1, 0], n // size, p=[up, down, 1 - share]).repeat(size)
        return nli_ft.paired.paired_test(moved < 0, moved > 0, groups)

    d = np.mean([study(0).detectable() for _ in range(20)])
    seen = np.mean([study(d).p <= 0.05 for _ in range(300)])
    assert seen == pytest.approx(0.8, abs=0.07)


# --- the interval of a share


def test_the_design_effect_agrees_with_its_definition_for_equal_clusters():
    rng = np.random.default_rng(4)
    right = (rng.random((60, 4)) < rng.beta(4, 1, 60)[:, None]).astype(int)
    deff, count, worth = nli_ft.paired.design_effect(right.ravel(), np.repeat(range(60), 4))
    between = right.mean(1).var(ddof=1) / 60
    binomial = right.mean() * (1 - right.mean()) / 239
    assert (deff, count, worth) == (pytest.approx(between / binomial), 60, 60.0)


def test_a_share_of_rows_that_all_agree_counts_its_clusters():
    for value in (0, 1):
        share = nli_ft.paired.share_right([value] * 40, [i // 4 for i in range(40)])
        assert share["deff"] == 4.0 and share["accuracy_ci"] != nli_ft.paired.wilson(40 * value, 40)
    assert nli_ft.paired.share_right([1, 0, 1], [1, 2, 3])["accuracy_ci"] == nli_ft.paired.wilson(2, 3)


def test_clusters_of_copies_give_the_interval_of_one_copy():
    once = nli_ft.paired.share_right([1] * 70 + [0] * 30, range(100))["accuracy_ci"]
    copied = nli_ft.paired.share_right(([1] * 70 + [0] * 30) * 3, list(range(100)) * 3)
    assert copied["deff"] == pytest.approx(3, abs=0.1) and copied["accuracy_ci"] == pytest.approx(
        once, abs=0.003
    )


def test_every_accuracy_interval_of_a_report_is_made_the_same_way():
    rows = [pred(i, 1, int(i % 12 > 3), 0.9, group_id=i // 4) for i in range(240)]
    made = nli_ft.report.report(rows)
    whole = nli_ft.paired.share_right([i % 12 > 3 for i in range(240)], [i // 4 for i in range(240)])
    for found in (
        made["scores"],
        made["slices"]["label"]["1"],
        nli_ft.evaluate.reliability_bins(
            *nli_ft.evaluate.confidences(rows), 1, nli_ft.evaluate.groups_of(rows)
        )[0],
    ):
        assert found["accuracy_ci"] == whole["accuracy_ci"] and found["deff"] == whole["deff"] > 3
    assert made["consistency"]["4"]["accuracy_ci"] == nli_ft.paired.wilson(40, 60)
    assert f"n = 240 in 60 clusters (95 % Wilson at n / {whole['deff']:.2f}" in nli_ft.report.report_text(
        made
    )


# --- seeds


def test_over_seeds_it_is_welchs_test_where_items_do_not_vary():
    # B. L. Welch (1947), and scipy's own implementation on the seeds' means
    from scipy.stats import ttest_ind

    means = ([0.60, 0.62, 0.67], [0.70, 0.71, 0.66])
    runs = [np.array([[1] * round(1000 * m) + [0] * round(1000 - 1000 * m) for m in arm]) for arm in means]
    t = nli_ft.paired.seed_test(*runs)
    items = t.se**2 - sum(np.var(m, ddof=1) / 3 for m in means)
    want = ttest_ind(means[1], means[0], equal_var=False)
    assert t.difference == pytest.approx(0.06) and 0 < items < 0.0002
    assert t.p == pytest.approx(want.pvalue, abs=0.02) and t.df >= want.df


def test_degrees_of_freedom_are_those_of_satterthwaite_and_no_more_than_the_smaller_arm_allows():
    rng = np.random.default_rng(5)

    def arm(k):
        return (rng.random((k, 400)) < rng.normal(0.7, 0.05, (k, 1))).astype(int)

    a, b = arm(3), arm(3)
    va, vb, difference = a.mean(1).var(ddof=1) / 3, b.mean(1).var(ddof=1) / 3, b.mean(0) - a.mean(0)
    items = difference.var(ddof=1) / 400
    seeds_df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    t = nli_ft.paired.seed_test(a, b)
    assert t.se**2 == pytest.approx(va + vb + items)
    assert t.df == pytest.approx((va + vb + items) ** 2 / ((va + vb) ** 2 / seeds_df + items**2 / 399))
    few, many = arm(3), arm(10)
    few[1:] = few[0]  # the three do not vary, the ten vary much
    seeds, items = many.mean(1).var(ddof=1) / 10, (many.mean(0) - few.mean(0)).var(ddof=1) / 400
    assert nli_ft.paired.seed_test(few, many).df == pytest.approx(
        (seeds + items) ** 2 / (seeds**2 / 4 + items**2 / 399)
    )  # Welch's would be 9, not 4
    assert nli_ft.paired.seed_test(few[:2], many).df == nli_ft.paired.seed_test(arm(2), arm(2)).df == 2.0


def test_a_contrast_of_four_arms_adds_the_variance_of_each_by_the_square_of_its_weight():
    rng = np.random.default_rng(9)
    arms = [(rng.random((3, 200)) < p).astype(int) for p in (0.6, 0.7, 0.65, 0.9)]
    weights, groups = (1, -1, -0.5, 0.5), [i // 4 for i in range(200)]
    t = nli_ft.paired.contrast_test(list(zip(weights, arms)), groups)
    of_items = sum(w * a.mean(0) for w, a in zip(weights, arms))
    assert t.difference == pytest.approx(of_items.mean())
    parts = [w**2 * a.mean(1).var(ddof=1) / 3 for w, a in zip(weights, arms)]
    left = [
        of_items[[g != k for g in groups]].mean() for k in range(50)
    ]  # without one cluster: the jackknife
    items = 49 / 50 * sum((x - of_items.mean()) ** 2 for x in left)
    assert t.se**2 == pytest.approx(sum(parts) + items)
    seeds_df = sum(parts) ** 2 / sum(v**2 / 2 for v in parts)
    assert t.df == pytest.approx((sum(parts) + items) ** 2 / (sum(parts) ** 2 / seeds_df + items**2 / 49))
    same = nli_ft.paired.contrast_test([(-1, arms[0]), (1, arms[1])], groups)
    assert same == nli_ft.paired.seed_test(arms[0], arms[1], groups)
    with pytest.raises(RecordError, match="not the same items"):
        nli_ft.paired.contrast_test([(1, arms[0]), (-1, arms[1][:, :9])])


def test_one_seed_in_either_arm_gives_no_test_and_an_untrained_model_needs_none():
    rng = np.random.default_rng(6)
    three, one = (rng.random((3, 90)) < 0.8), (rng.random((1, 90)) < 0.5)
    assert nli_ft.paired.seed_test(one, three) is None is nli_ft.paired.seed_test(three, one)
    assert nli_ft.paired.seed_test(one, three, seedless=(True, False)).p < 0.01
    with pytest.raises(RecordError, match="not the same items"):
        nli_ft.paired.seed_test(three, three[:, :9])


def test_equal_arms_and_arms_without_any_variance_have_an_answer():
    same = nli_ft.paired.seed_test([[1, 0] * 20] * 3, [[1, 0] * 20] * 3)
    assert (same.difference, same.p, same.detectable()) == (0.0, 1.0, None) and same.interval()[
        0
    ] < 0 < same.interval()[1]
    apart = nli_ft.paired.seed_test([[0] * 40] * 2, [[1] * 40] * 2, [i // 4 for i in range(40)])
    assert (apart.difference, apart.p) == (1.0, 2 / 2**10) and 0 < apart.interval()[0] < apart.interval()[
        1
    ] == 1.0


def test_seeds_that_differ_widen_the_interval_that_items_alone_would_give():
    rng = np.random.default_rng(6)
    apart = (rng.random((3, 400)) < [[0.6], [0.75], [0.9]]).astype(float)
    close = (rng.random((3, 400)) < 0.75).astype(float)

    def width(r):
        return r["accuracy_ci"][1] - r["accuracy_ci"][0]

    assert width(nli_ft.paired.seed_share(apart, range(400))) > 2 * width(
        nli_ft.paired.seed_share(close, range(400))
    )
    assert nli_ft.paired.seed_share(apart, range(400))["sd"] == pytest.approx(apart.mean(1).std(ddof=1))


# --- how many items a difference needs


@pytest.mark.parametrize("n, discordant", [(300, 0.3), (2000, 0.1), (1977, 0.05)])
def test_the_minimum_detectable_difference_is_found_with_the_stated_power(n, discordant):
    # second implementation: simulate paired answers with exactly this difference and count how often the
    # McNemar z test sees it
    d = nli_ft.paired.minimum_detectable_difference(n, discordant)
    rng = np.random.default_rng(7)
    cells = rng.multinomial(n, [(discordant + d) / 2, (discordant - d) / 2, 1 - discordant], 20_000)
    z = np.abs(cells[:, 0] - cells[:, 1]) / np.sqrt(cells[:, 0] + cells[:, 1])
    assert (z > 1.959964).mean() == pytest.approx(0.8, abs=0.02)


def test_too_few_items_resolve_nothing():
    assert (
        nli_ft.paired.minimum_detectable_difference(10, 0.2)
        is None
        is nli_ft.paired.minimum_detectable_difference(100, 0.0)
    )


def test_half_a_point_on_two_thousand_items_is_not_resolvable():
    # 89.2 against 89.6 % on 1,977 items, as one published table ranks runs
    acc = 0.894
    assert nli_ft.paired.minimum_detectable_difference(1977, 2 * acc * (1 - acc)) > 4 * 0.004


# --- classification scores


def test_scores_by_hand_with_failures_as_misses():
    rows = [
        pred(i, y, a)
        for i, (y, a) in enumerate(
            [(1, 1)] * 5 + [(1, 0)] * 2 + [(1, None)] * 3 + [(0, 0)] * 6 + [(0, 1)] * 2 + [(0, None)] * 2
        )
    ]
    s = nli_ft.evaluate.score(rows)
    assert (s["n"], s["accuracy"], s["coverage"], s["valid_rate"]) == (20, 11 / 20, 15 / 20, 15 / 20)
    assert s["parsed_accuracy"] == 11 / 15 and s["confusion"] == [[6, 2, 2], [2, 5, 3]]
    p1, r1, p0, r0 = 5 / 7, 5 / 10, 6 / 8, 6 / 10
    f1, f0 = 2 * p1 * r1 / (p1 + r1), 2 * p0 * r0 / (p0 + r0)
    assert (s["macro_precision"], s["macro_recall"], s["macro_f1"]) == pytest.approx(
        ((p0 + p1) / 2, (r0 + r1) / 2, (f0 + f1) / 2)
    )  # two classes, never three
    assert s["balanced_accuracy"] == pytest.approx((r0 + r1) / 2)
    assert s["outcomes"] == dict(strict=15, truncated=5)


def test_mcc_against_its_determinant_and_its_general_form():
    # binary: B. W. Matthews (1975). With a third column: J. Gorodkin (2004), R_K, from the confusion matrix
    def r_k(c):
        c = np.array(c, float)
        s, t, p = c.sum(), c.sum(1), c.sum(0)
        return (np.trace(c) * s - t @ p) / math.sqrt((s * s - p @ p) * (s * s - t @ t))

    for cells in (
        [(1, 1)] * 6 + [(1, 0)] * 2 + [(0, 1)] + [(0, 0)] * 3,
        [(1, 1)] * 4 + [(1, None)] * 2 + [(0, 0)] * 5 + [(0, 1)] + [(0, None)],
    ):
        s = nli_ft.evaluate.score([pred(i, y, a) for i, (y, a) in enumerate(cells)])
        assert s["mcc"] == pytest.approx(r_k(s["confusion"] + [[0, 0, 0]]))


def test_what_one_class_leaves_undefined_is_none_and_breaks_nothing():
    rows = [pred(i, 0, 0, 0.1, premise=f"A dog runs {i}.") for i in range(12)]  # all gold 0, all right
    made = nli_ft.report.report(rows, train=[dict(premise="A", hypothesis="B", label=0)] * 3)
    s = made["scores"]
    assert (s["macro_f1"], s["macro_precision"], s["balanced_accuracy"], s["mcc"]) == (None,) * 4
    assert (
        s["per_class"]["1"] == dict(precision=None, recall=None, f1=None, n=0)
        and s["per_class"]["0"]["f1"] == 1.0
    )
    text = nli_ft.report.report_text(made)
    assert (
        "macro-F1 undefined (one class), balanced accuracy undefined (one class), MCC undefined (one class)"
        in text
    )
    json.dumps(made, allow_nan=False)


def test_a_class_that_is_never_answered_has_no_precision_and_constant_answers_have_mcc_0():
    s = nli_ft.evaluate.score([pred(i, i % 2, 1) for i in range(10)])
    assert (s["per_class"]["0"]["precision"], s["macro_precision"], s["mcc"]) == (None, None, 0.0)
    assert (s["per_class"]["0"]["f1"], s["macro_f1"]) == (0.0, pytest.approx(1 / 3))


def test_a_gain_on_the_frequent_class_alone_is_called_one():
    gold = [0] * 180 + [1] * 20
    balanced = [0] * 150 + [1] * 30 + [1] * 18 + [0] * 2  # right on 168 of 200, both classes known
    rows = [pred(i, y, 0, group_id=i) for i, y in enumerate(gold)]  # always the frequent label: right on 180
    found = nli_ft.reasoning.compare_answers(rows, dict(balanced=balanced))["balanced"]
    assert (
        found["difference"] > 0
        and "but the other way by macro-F1 -" in found["verdict"]
        and "MCC -" in found["verdict"]
    )
    assert (
        "other way"
        not in nli_ft.reasoning.compare_answers(rows, dict(wrong=[1 - y for y in gold]))["wrong"]["verdict"]
    )


def test_the_valid_rate_counts_repairs_apart_and_coverage_counts_them_in():
    rows = [
        pred(1, 1, 1),
        pred(2, 1, 1, outcome="repaired"),
        pred(3, 1, None, outcome="wrong_schema"),
        pred(4, 1, None, outcome="empty"),
    ]
    s = nli_ft.evaluate.score(rows)
    assert (s["valid_rate"], s["coverage"], s["accuracy"]) == (0.25, 0.5, 0.5)
    assert s["outcomes"] == dict(strict=1, repaired=1, wrong_schema=1, empty=1)


# --- calibration


def test_ece_against_a_plain_second_implementation():
    rng = random.Random(1)
    conf = rng.sample([i / 1000 for i in range(500, 1000)], 150)  # no ties: 150 rows fill 15 bins of 10
    right = [int(rng.random() < c) for c in conf]
    order = sorted(range(150), key=conf.__getitem__)
    want = (
        sum(
            abs(sum(right[i] for i in b) - sum(conf[i] for i in b))
            for b in (order[k : k + 10] for k in range(0, 150, 10))
        )
        / 150
    )
    assert nli_ft.evaluate.ece(conf, right) == pytest.approx(want)


def test_ece_does_not_depend_on_the_order_of_rows_even_with_ties():
    rows = random_preds(200, failing=0)
    shuffled = random.Random(2).sample(rows, len(rows))
    assert nli_ft.evaluate.calibration(rows) == pytest.approx(nli_ft.evaluate.calibration(shuffled))
    assert nli_ft.evaluate.ece([0.8] * 10, [1] * 8 + [0] * 2) == pytest.approx(0)


def test_brier_and_nll_by_their_definitions_over_answered_rows_only():
    rows = random_preds()
    has = [r for r in rows if r["p_entail"] is not None and 0 < r["p_entail"] < 1]
    c = nli_ft.evaluate.calibration(has + [pred("x", 1, None)])
    assert c["n"] == len(has)
    assert c["brier"] == pytest.approx(sum((r["p_entail"] - r["label"]) ** 2 for r in has) / len(has))
    assert c["nll"] == pytest.approx(
        -sum(math.log(r["p_entail"] if r["label"] else 1 - r["p_entail"]) for r in has) / len(has)
    )


def test_risk_coverage_is_the_mean_over_all_orders_of_ties():
    rows = [
        pred(1, 1, 1, 0.9),
        pred(2, 0, 1, 0.8),
        pred(3, 0, 0, 0.2),
        pred(4, 1, 1, 0.8),
        pred(5, 1, None),
        pred(6, 0, 0, 0.45),
        pred(7, 0, None),
    ]

    def sure(r):
        return -1 if r["predicted_label"] is None else max(r["p_entail"], 1 - r["p_entail"])

    curves = []
    for order in itertools.permutations(rows):
        if all(sure(x) >= sure(y) for x, y in zip(order, order[1:])):
            wrong = list(itertools.accumulate(r["predicted_label"] != r["label"] for r in order))
            curves.append([w / k for k, w in enumerate(wrong, 1)])
    coverage, risk = nli_ft.evaluate.risk_coverage(rows)
    assert risk == pytest.approx(np.mean(curves, 0)) and coverage == pytest.approx(
        [k / 7 for k in range(1, 8)]
    )
    assert nli_ft.evaluate.calibration(rows)["aurc"] == pytest.approx(np.mean(curves))


def test_perfect_ranking_has_the_aurc_of_its_closed_form():
    # errors last: risk is 0 until the right answers are used up, then (k - right)/k
    rows = [pred(i, 1, 1, 0.99 - i / 1000) for i in range(80)] + [
        pred(100 + i, 0, 1, 0.6 - i / 1000) for i in range(20)
    ]
    assert nli_ft.evaluate.calibration(rows)["aurc"] == pytest.approx(
        sum((k - 80) / k for k in range(81, 101)) / 100
    )


def test_a_calibrated_model_is_off_by_as_much_as_its_simulated_ece_says():
    rng = np.random.default_rng(8)
    conf = rng.uniform(0.6, 1, 120)
    expected, high = nli_ft.evaluate.calibrated_ece(conf)
    honest = [nli_ft.evaluate.ece(conf, rng.random(120) < conf) for _ in range(400)]
    assert expected == pytest.approx(np.mean(honest), abs=0.004) and np.mean(
        np.array(honest) > high
    ) == pytest.approx(0.05, abs=0.035)


def test_a_random_ranking_has_the_aurc_that_stands_beside():
    rng = np.random.default_rng(9)
    rows = [pred(i, 1, int(rng.random() < 0.7), 0.0) for i in range(200)]
    for r in rows:
        r["p_entail"] = 0.5 + rng.random() / 2 if r["predicted_label"] else 0.5 - rng.random() / 2
    c = nli_ft.evaluate.calibration(rows)
    assert c["aurc_random"] == pytest.approx(1 - nli_ft.evaluate.accuracy(rows)["accuracy"])
    assert c["aurc"] == pytest.approx(c["aurc_random"], abs=0.08)


# --- slices, baselines, reasoning


def test_slices_partition_the_rows_and_add_up():
    rows = [
        r | dict(category="ab"[i % 2], thought_process="w " * (i % 13), premise="word " * (i % 5 + 1))
        for i, r in enumerate(random_preds())
    ]
    for name, values in nli_ft.evaluate.slices(rows).items():
        assert sum(v["n"] for v in values.values()) == len(rows), name
        assert sum(v["right"] for v in values.values()) == nli_ft.evaluate.accuracy(rows)["right"], name
    assert not {"relation", "hans"} & set(nli_ft.evaluate.slices(rows))


def test_neutral_and_contradiction_are_told_apart_inside_label_0():
    rows = [
        pred(1, 0, 0, relation="neutral"),
        pred(2, 0, 1, relation="neutral"),
        pred(3, 0, 0, relation="contradiction"),
        pred(4, 1, 1, relation="entailment"),
    ]
    found = nli_ft.evaluate.slices(rows)["relation"]
    assert {k: v["accuracy"] for k, v in found.items()} == dict(
        neutral=0.5, contradiction=1.0, entailment=1.0
    )


def test_quadruples_need_all_four_right_and_pairs_are_counted_apart():
    rows = [pred(i, 1, 1, group_id="q1") for i in range(4)] + [
        pred(i, 1, 1 if i > 10 else None, group_id="q2") for i in range(10, 14)
    ]
    rows += [
        pred(20, 1, 1, group_id="p"),
        pred(21, 0, 0, group_id="p"),
        pred(30, 1, 1, group_id="single"),
        pred(31, 1, 1),
    ]
    found = nli_ft.evaluate.consistency(rows)
    assert (found["4"]["n"], found["4"]["right"], found["2"]["accuracy"]) == (2, 1, 1.0) and set(found) == {
        "2",
        "4",
    }


def test_baselines_find_planted_shortcuts_and_nothing_where_none_is():
    rng = random.Random(3)

    def noun():
        return rng.choice("man dog cat boy cow owl fox hen".split())

    def rows(n, plant):
        return [
            dict(premise=f"The {noun()} and the {noun()} run.", label=y, **plant(y))
            for y in (rng.randint(0, 1) for _ in range(n))
        ]

    def acc(found, test):
        return {k: sum(a == r["label"] for a, r in zip(v, test)) / len(test) for k, v in found.items()}

    def negated(y):
        return dict(hypothesis=f"The {noun()} is " + ("here" if y else "not here"))

    def random_(y):
        return dict(hypothesis=f"The {noun()} is here")

    test = rows(200, negated)
    found = acc(nli_ft.baselines.baseline_labels(rows(200, negated), test), test)
    assert (
        found["hypothesis_only"] == found["overlap_negation"] == found["boosted_tree"] == 1.0
        and found["majority"] < 0.65
    )
    test = rows(400, random_)
    found = acc(nli_ft.baselines.baseline_labels(rows(200, random_), test), test)
    assert all(0.35 < a < 0.65 for a in found.values())
    assert set(nli_ft.baselines.baseline_labels([dict(premise="a", hypothesis="b", label=1)] * 3, test)) == {
        "majority"
    }
    with pytest.raises(DataError, match="none"):
        nli_ft.baselines.baseline_labels([], test)


def test_comparisons_with_baselines_are_paired_clustered_and_corrected():
    rows = [pred(i, i % 2, i % 2, group_id=i // 4) for i in range(40)]
    found = nli_ft.reasoning.compare_answers(
        rows, dict(majority=[0] * 40, same=[r["predicted_label"] for r in rows], mute=[None] * 40)
    )
    assert (found["majority"]["difference"], found["same"]["p"], found["mute"]["accuracy"]) == (0.5, 1.0, 0.0)
    assert found["majority"]["p"] == pytest.approx(2 / 2**10) and found["majority"][
        "p_holm"
    ] == pytest.approx(3 * 2 / 2**10)  # ten clusters decide
    assert found["majority"]["p_mcnemar"] == pytest.approx(2 / 2**20) and found["majority"][
        "verdict"
    ].startswith("+50.0 points: can be told from noise at n=40 (10 clusters)")
    assert found["same"]["verdict"] == "right and wrong on the same 40 items: no difference to test"


def test_an_untuned_model_on_other_items_is_not_compared():
    rows = [pred(i, 1, 1) for i in range(4)]
    assert (
        nli_ft.report.report(rows, before=rows[::-1])["baselines"]["untuned"]["difference"] == 0.0
    )  # same items in another order are the same items
    for other in (rows[:3], [r | dict(label=0) for r in rows]):
        with pytest.raises(RecordError, match="other items or labels"):
            nli_ft.report.report(rows, before=other)


def test_a_report_is_plain_json_also_for_the_poorest_rows():
    for rows in (
        [pred(1, 1, None)],
        [pred(1, 0, 0)],
        random_preds(3),
        random_preds(),
        [pred(1, 1, 1, 1.0), pred(2, 0, 1, 1.0)],
    ):
        json.dumps(nli_ft.report.report(rows), allow_nan=False)
        assert nli_ft.report.report_text(nli_ft.report.report(rows)).startswith("accuracy ")


@pytest.mark.parametrize(
    "thought, label",
    [
        ("the hypothesis can be inferred from the premise", 1),
        ("the hypothesis cannot be inferred from the premise", 0),
        (
            "based on the logical reasoning and lack of contradictory facts, the hypothesis can be "
            "inferred from the premise",
            1,
        ),
        ("it might be inferred at first, but it does not follow from the premise", 0),
        ("The premise contradicts the hypothesis.", 0),
        ("it is not entailed. No wait: the premise entails it.", 1),
        ("so the label is 1", 1),
        ("the answer is 0.", 0),
        ("dogs bark", None),
    ],
)
def test_the_last_verdict_in_a_thought_is_the_one_it_states(thought, label):
    assert nli_ft.reading.concludes(thought) == label


def test_reasoning_measures_see_a_thought_that_contradicts_its_label():
    rows = [pred(i, 1, 1, thought_process="The dog runs, so it can be inferred.") for i in range(3)] + [
        pred(9, 1, 1, thought_process="it cannot be inferred")
    ]
    r = nli_ft.reasoning.reasoning(rows)
    assert (r["n"], r["stated"], r["agreement"]) == (4, 1.0, 0.75)
    assert (
        nli_ft.reasoning.grounded_share(pred(1, 1, 1, thought_process="the dog flies")) == 0.5
        and nli_ft.reasoning.grounded_share(pred(1, 1, 1, thought_process="the")) is None
    )
