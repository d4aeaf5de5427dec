"""`KVM_EXTRA_FLAGS`: which of QEMU's options `extra_flags` may hold on a host."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain.argv import HostSide, host_problems
from kvmsupervisor.domain.flags import ANY_FLAGS, WITHOUT_ARGUMENT, AllowedFlags
from kvmsupervisor.domain.spec import Spec

QEMU = "qemu-system-x86_64"
NONE = AllowedFlags(frozenset())
SOME = AllowedFlags(frozenset({"device", "S", "name"}))


def refused(allowed: AllowedFlags, *words: str) -> str | None:
    """What the problem shows, None without one."""
    problems = allowed.problems(words)
    assert len(problems) <= 1
    return problems[0].found if problems else None


def test_any() -> None:
    """Law: without a list everything is allowed."""
    assert ANY_FLAGS.problems(("-drive", "file=/etc/shadow", "disk.img")) == ()
    assert str(ANY_FLAGS) == "any"


def test_none() -> None:
    """Law: a host that allows none refuses every word, and nothing where there is none."""
    assert NONE.problems(()) == ()
    assert refused(NONE, "-S") == "'-S'"
    assert refused(NONE, "disk.img") == "'disk.img'"
    assert "allows none" in NONE.problems(("-S",))[0].wanted
    assert str(NONE) == "none"


def test_a_list() -> None:
    """Law: the options of the list are allowed, in both spellings, with any argument; others are named, each once."""
    assert refused(SOME, "-device", "e1000", "--device", "x", "-S", "--S", "-name", "-") is None
    assert refused(SOME, "-device", "e1000", "-drive", "file=x", "-drive", "file=y", "--usb") == "'-drive' '--usb'"
    (problem,) = SOME.problems(("-usb",))
    assert problem.key == "extra_flags"
    assert "KVM_EXTRA_FLAGS allows S,device,name" in problem.wanted


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("disk.img",), "'disk.img'"),
        (("-S", "disk.img"), "'disk.img'"),
        (("--S", "disk.img"), "'disk.img'"),
        (("-S", ""), "''"),
        (("-S", "-"), "'-'"),
        (("-name", "n", "disk.img"), "'disk.img'"),
        (("-S", "device"), "'device'"),
    ],
)
def test_an_image_is_an_option_without_a_name(words: tuple[str, ...], found: str) -> None:
    """Law: a word that QEMU would open as a disk image is refused, also behind an option that takes no argument."""
    assert refused(SOME, *words) == found


@pytest.mark.parametrize("words", [("-name", "-name", "disk.img"), ("-device", "-name", "disk.img")])
def test_an_option_as_an_argument_hides_no_image(words: tuple[str, ...]) -> None:
    """Law: QEMU takes whatever follows `-name` for its argument, an allowed option too; what is next is an image."""
    assert refused(SOME, *words) is not None


def test_a_refused_option_is_a_problem_of_the_host() -> None:
    """Law: a machine with options that its host does not allow cannot be run there, and elsewhere it can."""
    spec = Spec(ram_mib=64, extra_flags=("-usb",))
    assert [p.key for p in host_problems(spec, HostSide(qemu=QEMU, accel="tcg", flags=SOME))] == ["extra_flags"]
    assert host_problems(spec, HostSide(qemu=QEMU, accel="tcg")) == ()


def as_qemu_reads(words: Sequence[str], bare: frozenset[str] = WITHOUT_ARGUMENT) -> tuple[set[str], list[str]]:
    """Options and images in `words`, as softmmu/vl.c's `qemu_init` takes them apart."""
    options, images, rest = set(), [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            images.append(word)
            continue
        name = word[1:].removeprefix("-")
        if name.startswith("-"):
            # It ends, before it did anything.
            return set(), []
        options.add(name)
        if name not in bare:
            next(rest, None)
    return options, images


_words = st.lists(
    st.sampled_from(["-S", "--S", "-device", "--device", "-drive", "-usb", "--name", "-", "--", "---S", "", "x", "S"]),
    max_size=8,
)


@given(_words, st.sets(st.sampled_from(["S", "device", "drive", "usb", "name"])))
def test_what_qemu_would_do_was_allowed(words: list[str], options: set[str]) -> None:
    """Law: words that pass hold no option that is not allowed, and no image, as QEMU reads them."""
    if AllowedFlags(frozenset(options)).problems(words):
        return
    found, images = as_qemu_reads(words)
    assert found <= options
    assert images == []


@given(st.lists(st.sampled_from(["-S", "--device", "-name"]), max_size=5))
def test_what_is_allowed_passes(options: list[str]) -> None:
    """Law: allowed options, those with an argument followed by one, pass."""
    words = [word for option in options for word in ((option,) if option == "-S" else (option, "a,b=c"))]
    assert refused(SOME, *words) is None


def test_qemu_agrees_which_options_take_an_argument() -> None:
    """Law: of all options of a real QEMU, exactly those of the table take no argument; it tells before it does any."""
    help_text = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
    names = {*re.findall(r"^-([A-Za-z0-9][A-Za-z0-9-]*)", help_text, flags=re.MULTILINE), *WITHOUT_ARGUMENT}
    assert len(names) > 90
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(sorted(names), pool.map(_asked, sorted(names)), strict=True))
    known = {name for name, answer in answers.items() if "invalid option" not in answer}
    takes_none = {name for name in known if "requires an argument" not in answers[name]}
    assert takes_none == known & WITHOUT_ARGUMENT


def _asked(name: str) -> str:
    return subprocess.run([QEMU, "-version", f"-{name}"], capture_output=True, text=True, check=False).stderr
