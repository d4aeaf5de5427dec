"""No secret is in words that others may read, wherever it was written and however it comes back."""

from __future__ import annotations

import json
import shlex
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvmsupervisor.domain.exits import WaitStatus, classify
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.parse_keys import parse_wish, public_value
from kvmsupervisor.domain.removal import differing
from kvmsupervisor.domain.secrecy import cleaned, cleaned_flags, cleaned_words, hidden_url, secrets_in, secrets_of_url
from kvmsupervisor.domain.spec import RawValue

PLAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=70)
ANY = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=8, max_size=70).filter(
    lambda text: len(text.strip()) >= 8
)

OPTIONS = [
    "secret,id=s,data={},wrong=1",
    "file=https://h/x,file.password={}",
    "x,password={}",
    "name=opt/x,string={},y=1",
]


def _qemu_says(word: str) -> list[str]:
    return [
        f"qemu-system-x86_64: -object {word}: Parameter 'wrong' is unexpected",
        f"qemu-system-x86_64: {word}",
    ]


def _told(line: str, words: list[str], status: WaitStatus) -> str:
    return classify(shutdown=None, status=status, log_tail=[line], secrets=secrets_in(words)).text


@given(ANY, st.sampled_from(OPTIONS), st.sampled_from([WaitStatus(code=1), WaitStatus(signal=6), WaitStatus()]))
def test_what_qemu_repeats_holds_no_secret(secret: str, option: str, status: WaitStatus) -> None:
    """Law: an option that QEMU repeats as it was written is told without the secret in it."""
    word = option.format(secret.replace(",", ",,"))
    for line in _qemu_says(word):
        assert secret not in _told(line, ["-object", word], status)
        assert secret.replace(",", ",,") not in _told(line, ["-object", word], status)
    bare = f"qemu-system-x86_64: Invalid parameter '{secret}'"
    assert secret not in _told(bare, ["-object", word], status)


@given(ANY)
def test_what_qemu_repeats_of_json_holds_no_secret(secret: str) -> None:
    """Law: the same for an option in JSON, repeated or taken apart."""
    for word in (
        json.dumps({"qom-type": "secret", "id": "s", "data": secret, "wrong": 1}),
        json.dumps({"qom-type": "secret", "data": secret}, ensure_ascii=False),
    ):
        for line in (*_qemu_says(word), f"qemu-system-x86_64: '{secret}' is no number"):
            told = _told(line, ["-object", word], WaitStatus(code=1))
            assert secret not in told
            assert json.dumps(secret)[1:-1] not in told


@given(PLAIN, st.integers(1, 69))
def test_a_line_that_was_cut_off_holds_no_part_of_a_secret(secret: str, cut: int) -> None:
    """Law: where a log begins, or ends, in the midst of a secret, the rest of it is hidden, too."""
    part = secret[min(cut, len(secret) - 4) :]
    secrets = secrets_in([f"secret,data={secret.replace(',', ',,')}"])
    assert part not in cleaned(f"{part}\x00 was it", secrets)
    assert secret[:-1] not in cleaned(f"it was \x00{secret[:-1]}", secrets)


def _shown_of(secret: str) -> list[str]:
    """All that people are shown of URLs, however badly they are written, with a password or a token in them."""
    shown = []
    for url in (
        f"https://host/a?token={secret}",
        f"https://user:{quote(secret, safe='')}@host/a",
        f"https://user:{secret}@host/a",
        f"https://user:{secret}@host:0/a?b=c@d",
        f"ftp://host/a?x={secret}",
        f"host/a?x={secret} y",
        f"user:{secret}@host",
    ):
        keys = {b"cloud-config": RawValue(url.encode(), 1), b"ram": RawValue(b"none", 1)}
        shown += [*map(str, parse_wish(InstanceId("1"), keys).problems), str(differing(keys, {}))]
        shown += [public_value("cloud-config", url.encode()).decode(), hidden_url(url)]
    return shown


OUR_WORDS = " ".join(_shown_of("~~~~~~~~"))


@given(PLAIN)
@example("/[0f-secret-a")
@example("8443/secret-a")
@example("0000001?")
@example("0000001#")
def test_a_url_is_shown_without_its_secrets(secret: str) -> None:
    """Law: neither password nor token of a URL is in a problem or what `show` prints, however badly it is written."""
    # A piece of our own words, such as the name of the key, is no secret.
    assume(secret not in OUR_WORDS)
    assert not [shown for shown in _shown_of(secret) if secret in shown]
    written = quote(secret, safe="")
    for url in (f"https://host/a?token={written}", f"https://user:{written}@host/a?b=c"):
        assert secret not in cleaned(f"the server says: no {secret} for {url}", secrets_of_url(url))


@given(ANY, st.sampled_from(OPTIONS))
def test_extra_flags_are_shown_without_their_secrets(secret: str, option: str) -> None:
    """Law: `show`, `argv`, problems and what a removal holds hide the secrets in `extra_flags`."""
    word = option.format(secret.replace(",", ",,"))
    text = f"-nodefaults -object {shlex.quote(word)}"
    assert secret not in " ".join(cleaned_words(shlex.split(text)))
    assert secret not in shlex.split(cleaned_flags(text))[2]
    assert secret not in cleaned_flags(f'{text} "')
    keys = {b"extra_flags": RawValue(f"-object {word} -uuid '".encode(), 1), b"ram": RawValue(b"16", 1)}
    assert secret not in str([str(problem) for problem in parse_wish(InstanceId("1"), keys).problems])
    assert secret not in str(differing(keys, {}))
    refused = AllowedFlags(frozenset({"nodefaults"})).problems(["-nodefaults", word])
    assert secret not in str([str(problem) for problem in refused])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("-object secret,id=s,data=a,wrong=1: Parameter 'wrong' is unexpected",) * 2,
        ("-drive file=rbd:pool/a:key=AQ==,if=none", "-drive file=rbd:pool/a:key=…,if=none"),
        ("password-secret=spice0,key-secret=ceph0",) * 2,
        ("-nonsense: invalid option",) * 2,
        ("QEMU refuses cont: Could not open '/a': No such file",) * 2,
        ("Could not open 'https://u:p@h/x?t=1': gone", "Could not open 'https://…@h/x?… gone"),
    ],
)
def test_the_rest_is_left_as_it_is(text: str, shown: str) -> None:
    """Law: what is no secret is told in full; names of objects that hold secrets are none."""
    assert cleaned(text) == shown.replace("data=a,", "data=…,")


def test_a_comma_in_a_password_is_no_way_out() -> None:
    """Law: the rest of a secret with a comma that was not doubled is hidden: QEMU takes it for a parameter."""
    word = "secret,id=s,data=hunter,2hunter,id=t"
    assert cleaned("Invalid parameter '2hunter'", secrets_in([word])) == "Invalid parameter '…'"
    assert cleaned_words([word]) == ("secret,id=s,data=…,id=t",)


def test_what_holds_no_secret_is_shown_as_it_was_written() -> None:
    """Law: `show` changes nothing without need."""
    text = "-rtc  base=localtime -append 'a \"b\"'"
    assert cleaned_flags(text) == text


@pytest.mark.parametrize(
    "name",
    ["spice_password", "spice_pasword", "spice-password", "spicepassword", "x-root-password", "token"],
)
def test_a_secret_whose_key_was_mistyped_is_not_shown(name: str) -> None:
    """Law: what is nearly the name of a secret key, or sounds like one, has no value that others see."""
    assert public_value(name, b"hunter2hunter2") == b"(not shown)"


def test_a_value_in_the_name_of_a_key_is_not_shown() -> None:
    """Law: who writes KEY=VALUE where two words belong has the value told nowhere, and learns what went wrong."""
    keys = {b"ram": RawValue(b"64", 1), b"spice_password=hunter2hunter2": RawValue(b"", 1)}
    (problem,) = parse_wish(InstanceId("a"), keys).problems
    assert "hunter2" not in str(problem)
    assert "did you mean spice_password, and its value as a word of its own?" in problem.found


@pytest.mark.parametrize("name", ["rbd", "disk/1", "description", "nonsense"])
def test_no_value_shows_a_secret_that_is_written_as_one(name: str) -> None:
    """Law: a secret in a key where none belongs is hidden wherever keys are shown; so is all of what is too long."""
    old = b"rbd:pool/image:id=admin:key=AQBsecretsecret==:conf=/etc/ceph.conf"
    assert b"AQBsecret" not in public_value(name, old)
    assert public_value(name, b"token=" + b"a" * 70_000) == b"(70006 bytes, not shown)"


def test_thousands_of_secrets_cost_no_time() -> None:
    """Law: who may write one key cannot keep the supervisor busy by it: so many are not looked for, all is hidden."""
    words = [f"x,data=secret{number}" for number in range(1000)]
    assert set(cleaned_words(words)) == {"…"}
    assert cleaned_words(words[:100])[7] == "x,data=…"
