"""What happens in a story, and when, is what its text says; and docs/reliability.md quotes that."""

from __future__ import annotations

import pytest

from tests.simulation.stories import PAGE, STORIES, quoted
from tests.simulation.stories.happenings import Unknown
from tests.simulation.stories.story import play


@pytest.mark.parametrize("name", STORIES)
def test_it_is_told_as_it_happens(name: str) -> None:
    """Line for line, second for second, and no law is broken. `make stories` writes what happens now."""
    text = STORIES[name].read_text()
    played, violations = play(text)
    assert played == text
    assert not violations


def test_the_page_quotes_them() -> None:
    page = PAGE.read_text()
    assert quoted(page) == page, "`make stories` writes the page"


def test_a_sentence_that_nobody_knows_is_none() -> None:
    """A typo is no silence."""
    with pytest.raises(Unknown, match="loses weight"):
        play("A story\n\nweb runs on alpha; it has no disk.\n\n  +0 s  > alpha loses weight\n  +1 s  > the end\n")
