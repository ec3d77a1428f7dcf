"""The report of a run: which steps its numbers are averaged over, and which points it draws."""

from statistics import fmean

import pytest

from rlkl.run import report
from rlkl.run.report import average, draw, first_and_last, running_mean

BEFORE = {"accuracy": 0.25, "greedy": 0.5}
AFTER = {"accuracy": 0.75, "greedy": 1.0}


def row(step: int, **more: float) -> dict:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "seconds": 2.0,
        "reward": step / 100,
        "frac_reward_zero_std": 0.5,
        "entropy": 1.0,
        "response_length": 4.0,
        "kl_pi_ref_token": 0.1 * step,
        "kl_old_pi": 1e-3,
        "grad_norm/policy": 1.0,
        **more,
    }


def points(figure, title: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each line of a panel that the legend names."""
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(xy) for xy in line.get_xydata()] for line in lines}


# ------------------------------------------------------------------ averages


@pytest.mark.parametrize("count", range(1, 30))
def test_the_first_and_the_last_steps_never_overlap_and_are_at_most_ten(count):
    rows = [row(step) for step in range(1, count + 1)]
    first, last = first_and_last(rows)
    assert first == rows[: len(first)]
    assert last == rows[len(rows) - len(last) :]
    assert len(first) + len(last) <= count
    expected = (1, 0) if count == 1 else (min(10, count // 2),) * 2
    assert (len(first), len(last)) == expected


def test_an_average_is_over_the_steps_that_have_the_metric():
    rows = [{"a": 1.0}, {"a": 2.0, "b": 4.0}, {}]
    assert [average(rows, name) for name in ("a", "b", "c")] == ["1.5", "4", "-"]
    assert average([], "a") == "-"


def test_the_table_of_the_page_says_of_how_many_steps_a_number_is_the_mean(tmp_path):
    (tmp_path / "provenance.json").write_text('{"command": "python train.py"}')
    for count, head, cells in (
        (1, "the first step | -", "0.01 | -"),
        (3, "the first step | the last step", "0.01 | 0.03"),
        (7, "the first 3 steps | the last 3 steps", "0.02 | 0.06"),
        (25, "the first 10 steps | the last 10 steps", "0.055 | 0.205"),
    ):
        rows = [row(step) for step in range(1, count + 1)]
        page = report.run_page(tmp_path, rows, BEFORE, AFTER, has_figure=False)
        assert f"| metric, mean of | {head} |" in page
        assert f"| reward | {cells} |" in page


def test_a_metric_that_only_later_steps_have_is_in_the_table(tmp_path):
    """Such as the gradient norm of the policy while only the critic is trained."""
    (tmp_path / "provenance.json").write_text('{"command": "python train.py"}')
    rows = [row(step) for step in (1, 2, 3, 4)]
    for early in rows[:2]:
        del early["grad_norm/policy"]
    page = report.run_page(tmp_path, rows, BEFORE, AFTER, has_figure=False)
    assert "| grad_norm/policy | - | 1 |" in page


# ------------------------------------------------------------------ the figure


def test_the_held_out_curve_begins_before_the_first_step_and_ends_after_the_last():
    """The number after the last step has more responses than one measured in that step."""
    rows = [row(1), row(2, **{"eval/accuracy": 0.5}), row(3), row(4, **{"eval/accuracy": 0.7})]
    curves = points(draw(rows, BEFORE, AFTER), "reward and held-out accuracy")
    assert curves["held-out accuracy"] == [(0, 0.25), (2, 0.5), (4, 0.75)]
    assert [x for x, _ in curves["reward on training prompts"]] == [1, 2, 3, 4]


def test_a_figure_can_be_drawn_of_the_rows_so_far_again_and_again():
    """As a notebook does: before the first step, during the run, and after it."""
    title = "reward and held-out accuracy"
    assert points(draw([]), title) == {}
    assert points(draw([], BEFORE), title) == {"held-out accuracy": [(0, 0.25)]}
    for count in (1, 2, 50):
        rows = [row(step) for step in range(1, count + 1)]
        figure = draw(rows, BEFORE)
        curves = points(figure, title)
        assert curves["held-out accuracy"] == [(0, 0.25)]
        assert len(curves["reward on training prompts"]) == count
        figure.canvas.draw()


def test_the_legend_says_between_what_each_kl_is_and_both_can_be_seen():
    """They differ by orders of magnitude, so the axis is logarithmic, and 0 is not drawn."""
    rows = [row(step) for step in range(1, 5)]
    rows[0]["kl_pi_ref_token"] = 0.0
    figure = draw(rows)
    curves = points(figure, "the two KLs, nats per token")
    of_reference, of_old = curves
    assert of_reference.startswith("KL(pi ‖ ref): ")
    assert of_old.startswith("KL(pi_old ‖ pi): ")
    assert [x for x, _ in curves[of_reference]] == [2, 3, 4]
    (axes,) = [axes for axes in figure.axes if axes.get_title().startswith("the two KLs")]
    assert axes.get_yscale() == "log"
    assert len(axes.get_legend().get_texts()) == 2
    for nothing in (row(1, kl_pi_ref_token=0.0, kl_old_pi=0.0), {"step": 1, "seconds": 1.0}):
        draw([nothing]).canvas.draw()


def test_there_are_panels_for_the_gradient_norm_and_for_groups_of_equal_scores():
    figure = draw([row(1), row(2)])
    assert points(figure, "gradient norm, before clipping") == {"policy": [(1, 1), (2, 1)]}
    share = points(figure, "prompts whose responses all score the same, share")
    assert share == {"share of prompts": [(1, 0.5), (2, 0.5)]}


def test_with_a_critic_its_explained_variance_and_gradient_norm_are_drawn():
    critic = {"explained_variance": 0.3, "grad_norm/critic": 9.0}
    figure = draw([row(1, **critic), row(2, **critic)])
    titles = [axes.get_title() for axes in figure.axes]
    assert not [title for title in titles if title.startswith("prompts whose")]
    (title,) = [title for title in titles if title.startswith("explained variance")]
    assert points(figure, title) == {"explained variance": [(1, 0.3), (2, 0.3)]}
    assert points(figure, "gradient norm, before clipping")["critic"] == [(1, 9), (2, 9)]


def test_a_running_mean_does_not_lag_behind_a_straight_line_and_removes_noise():
    line = [3.0 * i + 1 for i in range(40)]
    assert running_mean(line) == pytest.approx(line)
    noise = [(-1.0) ** i for i in range(40)]
    assert max(map(abs, running_mean(noise)[5:-5])) < 0.1
    assert running_mean(noise)[20] == pytest.approx(fmean(noise[15:26]))
    assert running_mean([]) == []
