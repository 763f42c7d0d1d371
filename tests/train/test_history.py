"""What a log tells of a run: every decision, and nothing that was none."""

import json
import math

from mptbook.train.history import decisions, plot_history, told


def step(n, loss, refused=""):
    return {"kind": "step", "step": n, "loss": loss, "grad_norm": loss, "refused": refused}


LIKED = {"kind": "step", "step": 1, "loss": 0.7, "accuracy": 0.5}  # of mptbook prefer

LINES = [
    {"kind": "started", "step": 0, "resumed": False},
    {"kind": "stage", "step": 0, "row_tokens": 16, "batch_tokens": 64, "domains": []},
    {"kind": "saved", "step": 0, "path": "step-000000"},
    step(1, 5.0),
    step(2, 4.0),
    step(3, 9.0, "far too high"),
    step(4, None, "the loss is nan"),
    {"kind": "rollback", "step": 4, "to": 1, "skipped": [1, 2, 3], "reason": "the loss is nan"},
    step(2, 3.0),
    {"kind": "unsaved", "step": 2, "error": "No space left"},
    {"kind": "stopped", "step": 2, "by": "SIGTERM"},
    {"kind": "started", "step": 2, "resumed": True},
    {
        "kind": "gathered",
        "step": 0,
        "conversations": {"mine": 1200, "theirs": 34},
        "left_out": [{"what": "no turns", "rows": 2, "first": ["line 5: no turns"]}],
        "overlaps": [["boolq", "near", 3], ["boolq", "exact", 4]],
    },
    {"kind": "damaged", "step": 2, "path": "step-000003", "what": "state.json is missing"},
    step(3, 2.0),
    {"kind": "heldout", "step": 3, "bits_per_byte": 1.0, "domains": {}},
]


def write(folder, lines):
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_decision_is_told_in_the_order_of_time(tmp_path):
    assert [told(line) for line in decisions(write(tmp_path, LINES))] == [
        "step 0  started",
        "step 3  not taken: far too high",
        "step 4  not taken: the loss is nan",
        "step 4  back to step 1, leaving out 3 batches: the loss is nan",
        "step 2  no checkpoint: No space left",
        "step 2  stopped by SIGTERM",
        "step 2  resumed",
        "step 0  1,234 conversations to learn from; left out 2 bad rows, and 7 that evaluation "
        "sets ask",
        "step 2  passed over step-000003: state.json is missing",
    ]


def test_the_picture_shows_taken_steps_as_a_line_and_refused_ones_as_marks(tmp_path):
    above = plot_history(write(tmp_path, LINES)).axes[0]
    line, crosses, triangles = above.lines[:3]
    assert [None if math.isnan(y) else y for y in line.get_ydata()] == [5, 4, None, None, 3, 2]
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([3], [9])
    assert list(triangles.get_xdata()) == [4]


def test_the_picture_names_what_happened_and_only_that(tmp_path):
    def names(lines):
        figure = plot_history(write(tmp_path, lines))
        return {text.get_text() for legend in figure.legends for text in legend.get_texts()}

    everything = {"refused", "refused, not finite", "went back", "resumed", "undone"}
    assert names(LINES) == everything | {"checkpoint damaged or unsaved"}
    assert names([step(1, 5.0), step(2, 4.0)]) == set()


def test_the_ground_of_what_was_undone_spans_its_steps(tmp_path):
    above = plot_history(write(tmp_path, LINES)).axes[0]
    (span,) = above.patches  # steps 2 to 4 were undone; the resume at step 2 undid none
    assert (span.get_x(), span.get_width()) == (1.5, 3.0)


def test_the_command_tells_and_draws(tmp_path, capsys):
    from mptbook.__main__ import main

    picture = tmp_path / "history.png"
    assert main(["history", str(write(tmp_path, LINES)), "--plot", str(picture)]) == 0
    assert "back to step 1" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_steps_of_a_run_that_refuses_none_are_no_decisions(tmp_path):
    started = {"kind": "started", "step": 0, "resumed": False}
    lines = "".join(json.dumps(line) + "\n" for line in [started, LIKED])
    (tmp_path / "log.jsonl").write_text(lines)
    assert decisions(tmp_path) == [started]
