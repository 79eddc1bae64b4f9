"""Which run becomes its order's champion: like is compared with like."""

import json

import pytest

from gainlora.tracking.folder import read_run
from gainlora.tracking.promotion import decide
from tests.fake_run import TASKS, write_run

R = [[84.0], [81.0, 88.0], [82.0, 87.0, 71.0]]
"""AP 80, FT 1.5."""
THREE = TASKS[:3]


@pytest.fixture
def champion(tmp_path):
    return read_run(write_run(tmp_path, R, tasks=THREE, seed=1))


def run(tmp_path, R=R, **options):
    return read_run(write_run(tmp_path, R, **{"tasks": THREE, "seed": 2, **options}))


def change(folder, task, **values):
    data = json.loads((folder / "data.json").read_text())
    data[task] |= values
    (folder / "data.json").write_text(json.dumps(data))
    return read_run(folder)


def test_the_first_run_is_promoted_unless_it_forgets(tmp_path):
    assert decide(run(tmp_path), None, 5.0).promoted
    forgets = run(tmp_path, [[80.0], [30.0, 85.0]], tasks=THREE[:2], seed=3)
    assert decide(forgets, None, 5.0).reason == "stays: FT 50.00 is above promote.max_forgetting (5)"
    assert decide(forgets, None, None).promoted


@pytest.mark.parametrize("last, promoted", [(71.0, True), (70.9, False), (90.0, True)])
def test_AP_decides_and_equal_is_enough(tmp_path, champion, last, promoted):
    decision = decide(run(tmp_path, [*R[:2], [82.0, 87.0, last]]), champion, 5.0, "champion (version 7)")
    assert decision.promoted == promoted
    assert (
        f"{80 + (last - 71) / 3:.2f} is {'not ' if promoted else ''}lower than 80.00 of champion (vers"
        in decision.reason
    )


@pytest.mark.parametrize("old, promoted", [(82.0, True), (81.0, False)])
def test_one_more_task_counts_only_where_both_know_it(tmp_path, champion, old, promoted):
    more = run(tmp_path, [*R, [old, 87.0, 71.0, 3.0]], tasks=TASKS)
    decision = decide(more, champion, 5.0)
    assert decision.promoted == promoted and list(decision.tasks) == list(THREE)
    table = decision.markdown(1)
    assert f"| AP of 3 common tasks | {(old + 87 + 71) / 3:.1f} | 80.0 |" in table
    assert "| review_or_plot | 3.0 | - |" in table and champion.run_id in table
    fewer = decide(champion, more, 5.0, "champion (version 8)")
    assert fewer.reason == "stays: champion (version 8) also knows review_or_plot"


def test_what_cannot_be_compared_stays(tmp_path, champion):
    better = write_run(tmp_path, [*R[:2], [82.0, 87.0, 99.0]], tasks=THREE, seed=2)
    assert decide(read_run(better), champion, 5.0).promoted
    for values in ({"sha256": "0" * 64}, {"test": 19}):
        decision = decide(change(better, "news_topic", **values), champion, 5.0, "it")
        assert decision.reason == "stays: it was tested on other examples of news_topic"
    first_only = run(tmp_path, options={"data.references": "first"}, seed=4)
    assert "other examples of movie_sentiment, news_topic" in decide(first_only, champion, 5.0).reason
    assert decide(champion, champion, 5.0, "champion (version 1)").reason.endswith(
        "is the champion (version 1) already"
    )
    bound = run(tmp_path, [[99.0] * 3], method="multitask", at_once=True)
    assert "multitask is a bound" in decide(bound, champion, None).reason
