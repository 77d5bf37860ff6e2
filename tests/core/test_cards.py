"""Model cards: a head that YAML reads, and text of others that starts nothing in Markdown."""

import yaml

from lightspan.core.cards import Card, bullets, code, fence, plain, table


def test_the_head_is_yaml_and_leaves_out_what_is_not_known() -> None:
    card = Card("A title", {"license": "mit", "library_name": None, "tags": ["a: b", "- c"]})
    card.section("Empty", "", "")
    card.section("Full", "one", "", "two")
    head, _, rest = card.text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head) == {"license": "mit", "tags": ["a: b", "- c"]}
    assert rest == "\n# A title\n\n## Full\n\none\n\ntwo\n"


def test_text_of_others_stays_text() -> None:
    hostile = "a|b\n# c <script>`x`[y](z)\x1b[31m"
    shown = plain(hostile)
    assert shown == r"a\|b\n# c &lt;script>\`x\`\[y\](z)\x1b\[31m"
    assert code("a`b|c\nd") == r"`a'b│c\nd`"


def test_a_fence_is_longer_than_those_inside() -> None:
    assert fence("x", "python") == "```python\nx\n```"
    assert fence("```\n````\nx") == "`````\n```\n````\nx\n`````"


def test_tables_and_lists_without_content_are_nothing() -> None:
    assert table(("a", "b"), []) == bullets(["", ""]) == ""
    assert table(("a", "b"), [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert bullets(["x", "", "y"]) == "- x\n- y"
