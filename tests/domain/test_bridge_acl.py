"""bridge.conf as the helper reads it; `tests/adapters/test_network.py` asks the helper itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmsupervisor.domain.bridge_acl import Acl, BrokenAcl, can_be_named, missing, read_acl, with_lines, without_lines


def acl(text: str, **others: str) -> Acl:
    files = {"main": text, **others}
    return read_acl("main", lambda name: files[name].encode() if name in files else None)


def allowed(rules: Acl, bridge: str) -> bool:
    return rules.denial(bridge) is None and rules.permission(bridge) is not None


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("", False),
        ("allow br0", True),
        ("allow br0\n", True),
        ("  allow \t br0 \t\r\n", True),
        ("allow\tbr0\n", True),
        ("# allow br0\n", False),
        ("allow br0 # mine\n", False),
        ("allow br\n", False),
        ("allow br00\n", False),
        ("allow all\n", True),
        ("allow ALL\n", False),
        ("allow all\ndeny br0\n", False),
        ("deny br0\nallow br0\n", False),
        ("allow br0\ndeny all\n", False),
        ("allow br0\ndeny br1\n", True),
        ("include more\n", True),
        ("allow br0\ninclude less\n", False),
        ("allow br0\ninclude nowhere\n", True),
        ("include broken\nallow br1\n", True),
        ("include round\n", True),
    ],
)
def test_a_bridge_is_allowed_that_some_line_allows_and_none_denies(text: str, is_allowed: bool) -> None:
    """Law: the order does not matter; what is included counts as if it stood there, up to a line that is broken."""
    others = {
        "more": "allow br0\n",
        "less": "deny br0\n",
        "broken": "allow br0\npermit br1\ndeny br0\n",
        "round": "include main\nallow br0\n",
    }
    assert allowed(acl(text, **others), "br0") is is_allowed


@pytest.mark.parametrize("line", ["permit br0", "allow", "Allow br0", "deny", "allow\tbr0 #"])
def test_a_line_that_the_helper_does_not_know_is_named(line: str) -> None:
    """Law: the file's name, the line's number and text, and what would be right."""
    with pytest.raises(BrokenAcl, match=rf"^main line 3: {line} \(.*allow NAME, deny NAME"):
        acl(f"# mine\nallow br1\n{line}\nallow br0\n")


def test_a_rule_says_where_it_stands() -> None:
    """Law: an operator finds the line that stands in the way, in the file that holds it."""
    denial = acl("allow br0\ninclude more\n", more="\n\n deny  all \n").denial("br0")
    assert denial is not None
    assert denial.place == "more line 3: deny  all"


def test_only_the_length_of_an_interfaces_name_counts() -> None:
    """Law: the helper cuts a longer name; so it allows another bridge than the line seems to say."""
    assert allowed(acl("allow a-very-long-name-of-mine\n"), "a-very-long-nam")


def test_what_is_to_be_added() -> None:
    """Law: each bridge once; not what is allowed, not what is denied, not what cannot be named alone."""
    rules = acl("allow br0\ndeny br1\n")
    assert missing(rules, ["br2", "br0", "br1", "br2", "all", "a b", "br3"]) == ("br2", "br3")
    assert missing(acl("allow all"), ["br2"]) == ()
    assert missing(acl("deny all"), ["br2"]) == ()


@pytest.mark.parametrize("name", ["all", "", "a b", "br0\nallow all", "br0\t", "#br0", "sixteen-bytes-xx", "ä" * 8])
def test_a_name_that_would_allow_another_bridge_gets_no_line(name: str) -> None:
    """Law: no wish of one instance opens another bridge, least of all every one."""
    assert not can_be_named(name)


@pytest.mark.parametrize("name", ["br0", "all0", "br-ü", "fifteen-bytes-x", "a.b", "$(x)"])
def test_any_other_name_can_be_allowed(name: str) -> None:
    """Law: the line that is added allows exactly that bridge."""
    assert can_be_named(name)
    assert allowed(acl(with_lines(b"", [name]).decode()), name)


@pytest.mark.parametrize("before", [b"", b"allow br0\n", b"# no end", b"\xff\r\ndeny br9"])
def test_what_was_there_stays(before: bytes) -> None:
    """Law: byte for byte, and its last line stays a line of its own."""
    after = with_lines(before, ["br1", "br2"])
    assert after.startswith(before)
    assert after[len(before) :].lstrip(b"\n") == b"allow br1\nallow br2\n"
    assert b"\n\n" not in after
    assert with_lines(before, []) == before


OURS = "/kvmsupervisor/hosts/a"


@pytest.mark.parametrize("before", [b"", b"allow br0\n", b"# no end", b"\xff\r\ndeny br9"])
@pytest.mark.parametrize("behind", [b"", b"allow br5", b"\n\n# theirs\nallow br5\n"])
def test_own_lines_go_and_all_others_stay(before: bytes, behind: bytes) -> None:
    """Law: whatever stands around them, nothing but an own line and its mark goes, and no line runs into the next."""
    ends = b"" if not before or before.endswith(b"\n") else b"\n"
    both = with_lines(before, ["br1", "br2"], OURS) + behind
    one, gone = without_lines(both, {"br2"}, OURS)
    assert (one, gone) == (with_lines(before, ["br2"], OURS) + behind, ("br1",))
    assert without_lines(one, set(), OURS) == (before + ends + behind, ("br2",))
    assert without_lines(both, {"br1", "br2"}, OURS) == (both, ())


def test_the_last_line_may_have_lost_its_end() -> None:
    """Law: an editor that writes none makes an own line no other one's."""
    content = with_lines(b"", ["br1"], OURS).rstrip(b"\n")
    assert without_lines(content, set(), OURS) == (b"", ("br1",))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("allow br1", "deny br1"),
        lambda text: text.replace("allow br1", "allow br2"),
        lambda text: text.replace("allow br1", "  allow br1"),
        lambda text: text.replace("\nallow", "\n\nallow"),
        lambda text: text.partition("\n")[2],
        lambda text: text.partition("\n")[0] + "\nallow br3\n",
        lambda text: text.replace(OURS, OURS + "b"),
        lambda text: "  " + text,
    ],
)
def test_a_line_that_a_person_has_touched_is_the_persons(change: Callable[[str], str]) -> None:
    """Law: changed, moved, without its mark, or under another name, it stays."""
    content = change(with_lines(b"", ["br1"], OURS).decode()).encode()
    assert without_lines(content, set(), OURS) == (content, ())


def test_another_supervisors_line_is_nothing_to_rely_on() -> None:
    """Law: it may go at any time, so there is an own one beside it; a person's line, and an own one, are enough."""
    theirs = acl(with_lines(b"", ["br1"], "/other/hosts/a").decode())
    assert allowed(theirs, "br1")
    assert missing(theirs, ["br1"], OURS) == missing(theirs, ["br1"]) == ("br1",)
    assert missing(theirs, ["br1"], "/other/hosts/a") == ()
    assert missing(acl("allow br1\n"), ["br1"], OURS) == ()
    # One that denies is heeded, whatever stands above it.
    denied = with_lines(b"", ["br1"], "/other/hosts/a").replace(b"allow", b"deny").decode()
    assert missing(acl(denied), ["br1"], OURS) == ()


@pytest.mark.parametrize("owner", ["a b", "a\nallow all", "\t", "x" * 5000, "ü/\u2028", "a\r"])
def test_no_owner_makes_another_line_of_its_mark(owner: str) -> None:
    """Law: a strange prefix or lock opens no bridge, and breaks no file."""
    content = with_lines(b"", ["br1"], owner)
    assert len(content.splitlines()) == content.count(b"\n") == 2
    assert max(map(len, content.split(b"\n"))) < 4000
    rules = acl(content.decode())
    assert [rule.bridge for rule in rules.rules] == [b"br1"]
    assert without_lines(content, {"br1"}, owner) == (content, ())
