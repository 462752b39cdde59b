"""Text of the store on a page: letter for letter what it is, whatever Markdown makes of it."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from dashboard.words import JOINER, code, labels, listed, plain, visible
from tests.hostile_store import TEXTS

PARSERS = (
    MarkdownIt("commonmark", {"html": True}),
    MarkdownIt("js-default"),
    MarkdownIt("gfm-like", {"linkify": False}),
)
REWRITTEN = re.compile(
    r"https?://[-.\w]|www\.[-.\w]|[-.\w+]@[-\w]|:streamlit:|:material/|:[\w-]+:|:\w+\[|(?<!-)--(?!-)|->|<-|<=|>=|~="
)
"""What Streamlit 1.67 replaces in text after Markdown was read: links, its logo, icons, emoji, colours, arrows."""
MARKS = st.text(alphabet="!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \n\tab1wWAé\u202e\0\ud800", max_size=60)
ANY = st.one_of(st.sampled_from(TEXTS), st.text(max_size=120), MARKS)


def leaves(tokens: list[Token]) -> list[Token]:
    return [leaf for token in tokens for leaf in (leaves(token.children) if token.children else [token])]


def rendered(parser: MarkdownIt, markdown: str) -> str:
    """Return the text of a paragraph; anything but plain text is a fault."""
    tokens = parser.parse(markdown)
    assert [token.type for token in tokens] in ([], ["paragraph_open", "inline", "paragraph_close"]), markdown
    found = leaves(tokens[1].children or []) if tokens else []
    assert {leaf.type for leaf in found} <= {"text", "text_special"}, markdown
    return "".join(leaf.content for leaf in found)


@pytest.mark.parametrize("parser", PARSERS)
@given(text=ANY)
def test_markdown_shows_it_letter_for_letter(parser: MarkdownIt, text: str) -> None:
    shown = rendered(parser, plain(text))
    assert shown.replace(JOINER, "") == visible(text)
    assert not REWRITTEN.search(shown)


@pytest.mark.parametrize("parser", PARSERS)
@given(text=ANY)
def test_markdown_shows_it_so_in_the_middle_of_a_sentence_too(parser: MarkdownIt, text: str) -> None:
    around = f"in {plain(text)} out"
    shown = rendered(parser, around).replace(JOINER, "")
    assert shown == f"in {visible(text)} out"


@given(text=ANY, longest=st.integers(1, 50))
def test_it_is_one_bounded_line_of_what_can_be_seen(text: str, longest: int) -> None:
    shown = visible(text, longest)
    assert len(shown) <= longest
    assert shown == shown.strip()
    assert {unicodedata.category(letter) for letter in shown}.isdisjoint({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
    assert {unicodedata.bidirectional(letter) for letter in shown}.isdisjoint({"LRE", "RLE", "LRO", "RLO", "PDF"})
    shown.encode()  # no half of a surrogate pair
    assert len(plain(text, longest)) <= 3 * longest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand  more", "two lines and more"),
        ("\u202eabc", "\N{REPLACEMENT CHARACTER}abc"),
        ("a\0b", "a\N{REPLACEMENT CHARACTER}b"),
        (" ", ""),
        (3, "3"),
        (None, "None"),
        ("é 漢 😀", "é 漢 😀"),
        ("__proto__", "“__proto__”"),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_examples(text: object, shown: str) -> None:
    assert visible(text) == shown


@given(text=ANY)
def test_code_is_one_piece_of_code(text: str) -> None:
    if not visible(text, 1_000).strip():
        return
    (leaf,) = leaves(MarkdownIt().parse(code(text))[1].children or [])
    assert leaf.type == "code_inline"
    assert leaf.content == visible(text, 1_000)


@given(names=st.lists(ANY, unique=True, max_size=8), longest=st.integers(1, 40))
def test_labels_tell_names_apart(names: list[str], longest: int) -> None:
    found = labels(names, longest)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert all(label == visible(label) != "" for label in found.values())


def test_a_list_in_a_sentence_ends() -> None:
    assert listed(["ada", "b\nen"]) == "ada, b en"
    assert listed(list("abcdefgh"), most=2) == "a, b and 6 more"
