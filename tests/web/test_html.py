"""HTML that is right by construction."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.adapters.web.words import TEXT_LIMIT, visible
from kvmsupervisor.web.html import Html, join, tag


class Elements(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@given(text=st.text())
def test_text_stays_text(text: str) -> None:
    """Law: whatever a text is, it makes no element, no attribute and no end of one."""
    elements = Elements(tag("p", text, title=text))
    assert len(elements.found) == 1
    assert set(elements.found[0][1]) == {"title"}
    # A parser takes some characters for others; those that it leaves alone come out as they went in.
    if text.isprintable():
        assert elements.words == text
        assert elements.found[0][1]["title"] == text


def test_what_is_made_is_not_escaped_again() -> None:
    """Pieces are put together; text beside them is escaped."""
    made = tag("p", tag("b", "<"), "&", None, class_="a", data_id="b", hidden=True, title=None, open=False)
    assert made == '<p class="a" data-id="b" hidden><b>&lt;</b>&amp;</p>'
    assert join((Html("<br>"), "<br>")) == "<br>&lt;br&gt;"
    assert tag("input", name="q", type="search") == '<input name="q" type="search">'


@given(text=st.text(max_size=2 * TEXT_LIMIT))
def test_text_can_be_seen(text: str) -> None:
    """Law: nothing invisible, nothing that changes the direction of what stands beside it, nothing long."""
    found = visible(text)
    assert found.isprintable()
    assert len(found) <= 10 * (TEXT_LIMIT + 1)
    assert visible("a\u202eb\x1b[31m\n") == "a\\u202eb\\x1b[31m\\n"
