"""How many bad inputs over the tasks' formats are refused with a message that a test holds to its words."""

from __future__ import annotations

import test_task_file_refusals as files
import test_task_refusals as rows

KINDS = {
    "rows": rows.ROWS,
    "columns": rows.COLUMNS,
    "CoNLL": files.CONLL,
    "files": files.FILES,
    "SQuAD": files.SQUAD,
    "parallel text": files.PARALLEL,
    "folders of images": files.FOLDERS,
    "sounds": files.SOUNDS,
}


def test_bad_inputs_of_every_format_are_many_and_differ() -> None:
    for name, cases in KINDS.items():
        assert len({repr(case[:-1]) for case in cases}) == len(cases) >= 3, f"{name}: the same input twice, or too few"
    assert sum(map(len, KINDS.values())) >= 100
