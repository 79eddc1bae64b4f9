"""Which run becomes its order's champion: like is compared with like, and what was learned by more than chance."""

import json
from dataclasses import replace

import pytest

from gainlora.runs.records import read_run
from gainlora.sections import PromoteConfig
from gainlora.tracking.promotion import decide
from gainlora.training.metrics import lower_bound
from tests.fake_run import BASE, MAJORITY, TASKS, THREE, R, write_run

USUAL = PromoteConfig()


@pytest.fixture
def champion(tmp_path):
    return read_run(write_run(tmp_path, R, tasks=THREE, seed=1))


def run(tmp_path, R=R, **options):
    return read_run(write_run(tmp_path, R, **{"tasks": THREE, "seed": 2, **options}))


def changed(folder, file, **values):
    content = json.loads((folder / file).read_text())
    for name, value in values.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(content))
    return read_run(folder)


def test_the_first_run_is_promoted_unless_it_forgets(tmp_path):
    assert decide(run(tmp_path), None, USUAL).promoted
    forgets = run(tmp_path, [[80.0], [60.0, 85.0]], tasks=THREE[:2], seed=3)
    assert decide(forgets, None, USUAL).reason == "stays: FT 20.00 is above promote.max_forgetting (5)"
    for most in (20, None):
        assert decide(forgets, None, PromoteConfig(max_forgetting=most)).promoted


def test_a_run_that_lost_much_outside_its_tasks_is_not_promoted(tmp_path):
    mine = run(tmp_path, [[90.0]], tasks=TASKS[:1])  # its loss on plain text is 0.25 above the base model's
    strict = PromoteConfig(max_general_loss=0.2)
    assert "rose by 0.25 nats a token over the base model's, more than promote.max_general_loss (0.2)" in (
        decide(mine, None, strict).reason
    )
    for most in (0.25, None):
        assert decide(mine, None, PromoteConfig(max_general_loss=most)).promoted


@pytest.mark.parametrize("last, promoted", [(71.0, True), (70.9999, True), (70.9, False), (90.0, True)])
def test_AP_decides_and_equal_is_enough(tmp_path, champion, last, promoted):
    decision = decide(run(tmp_path, [*R[:2], [82.0, 87.0, last]]), champion, USUAL, "champion (version 7)")
    assert decision.promoted == promoted
    is_lower = "not lower" if promoted else "lower"
    assert f"{80 + (last - 71) / 3:.2f} is {is_lower} than 80.00 of champion (vers" in decision.reason


@pytest.mark.parametrize("old, promoted", [(82.0, True), (81.0, False)])
def test_one_more_task_counts_only_where_both_know_it(tmp_path, champion, old, promoted):
    more = run(tmp_path, [*R, [old, 87.0, 71.0, 66.0]], tasks=TASKS)
    assert decide(more, champion, USUAL).promoted == promoted
    fewer = decide(champion, more, USUAL, "champion (version 8)")
    assert fewer.reason == "stays: champion (version 8) also knows review_or_plot"


@pytest.mark.parametrize(
    "score, examples, promoted",
    [(66.0, 20, True), (50.0, 20, False), (50.0, 100, True), (0.0, 100, False), (100.0, 2, False), (100.0, 8, True)],
)
def test_a_new_task_must_gain_more_than_chance_explains(tmp_path, champion, score, examples, promoted):
    """Over the better of base model (10) and most frequent label (25), at the lower end of the 95 % interval."""
    more = run(tmp_path, [*R, [82.0, 87.0, 71.0, score]], tasks=TASKS)
    more.data["review_or_plot"]["test"] = examples
    decision = decide(more, champion, USUAL)
    assert decision.promoted == promoted
    bound = lower_bound(score, max(BASE, MAJORITY), examples)
    assert (bound > 0) == promoted
    if not promoted:
        assert f"always its most frequent label 25.00: the lower 95 % bound of the difference, {bound:.2f}, is not" in (
            decision.reason
        )
        assert decide(more, champion, PromoteConfig(min_gain=None)).promoted


def test_a_task_that_the_champion_knows_need_not_gain_again(tmp_path):
    low = [*R[:2], [82.0, 87.0, 20.0]]  # below its most frequent label
    assert decide(run(tmp_path, low), run(tmp_path, low, seed=1), USUAL).promoted


def test_the_bound_is_newcombes():
    """Newcombe (1998), table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339, for equal n close to it."""
    assert lower_bound(80.0, 60.0, 75) == pytest.approx(5.3, abs=0.4)
    assert lower_bound(50.0, 50.0, 10**6) == pytest.approx(0, abs=0.2)


def test_a_run_with_limits_of_its_own_and_one_without_base_scores_need_a_person(tmp_path):
    folder = write_run(tmp_path, R, tasks=THREE)
    smoke = changed(folder, "config.json", overridden_limits=["data.test_limit"])
    said = decide(smoke, None, USUAL).reason
    assert said.startswith("stays: data.test_limit was given for this run alone") and "gainlora promote RUN" in said
    old = run(tmp_path)
    steps = [replace(s, values={k: v for k, v in s.values.items() if k.metric != "base"}) for s in old.steps]
    assert (
        "the base model's score on movie_sentiment is not recorded"
        in decide(replace(old, steps=steps), None, USUAL).reason
    )


def test_what_cannot_be_compared_stays(tmp_path, champion):
    better = write_run(tmp_path, [*R[:2], [82.0, 87.0, 99.0]], tasks=THREE, seed=2)
    assert decide(read_run(better), champion, USUAL).promoted
    for values in ({"sha256": "0" * 64}, {"test": 19}):
        decision = decide(changed(better, "data.json", news_topic=values), champion, USUAL, "it")
        assert decision.reason.startswith("stays: it was tested on other examples of news_topic; learn its order again")
    first_only = run(tmp_path, options={"data.references": "first"}, seed=4)
    assert "other examples of movie_sentiment, news_topic" in decide(first_only, champion, USUAL).reason
    again = decide(champion, champion, USUAL, "champion (version 1)").reason
    assert again == "stays: this run is champion (version 1) already"
    bound = run(tmp_path, [[99.0] * 3], method="multitask", at_once=True)
    assert "multitask is a bound" in decide(bound, champion, USUAL).reason
