"""The whole text of `plan` for one configuration: a change of any number or word shows here.

pytest tests/golden/test_golden_plan.py --update-golden
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselt_dist import plan

EXPECTED = Path(__file__).parent / "plan_base.txt"
ARGUMENTS = (
    "--config base --device a100 --nodes 2 --devices-per-node 4 --price-per-device-hour 2 data.train=none".split()
)


def test_the_plan_of_bert_base_on_two_nodes(capsys: pytest.CaptureFixture[str], update_golden: bool) -> None:
    assert plan.main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    if update_golden:
        EXPECTED.write_text(text)
    assert text.splitlines() == EXPECTED.read_text().splitlines()
