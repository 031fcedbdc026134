"""docs/configuration.md says what the configuration classes say."""

from __future__ import annotations

from configuration_reference import PAGE, render


def test_the_page_is_that_of_the_classes() -> None:
    assert PAGE.read_text() == render(), "write it anew: python tests/configuration_reference.py"
