"""Secrets in texts that others may read: QEMU's words, quotes in messages, the output of commands.

QEMU repeats a wrong option literally, `-object secret,data=…`, too, and a URL may hold a password or a token.
There are two nets. One knows the secrets: they are read from the options or the URL that hold them, and are hidden
wherever they appear. The other knows how secrets are written (`password=`, `?token=`, `user:password@`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from urllib.parse import unquote

from kvmsupervisor.domain.values import Unfit, shell_words

HIDDEN = "…"

SHORTEST = 4
"""Shortest secret that is searched for everywhere, in characters. Arbitrary: a shorter one protects nothing, and hiding
it would make holes in unrelated words. Behind its option's name it is hidden in any case."""

MOST_LOOKS = 20_000
"""Most searches for secrets in one command line: 0.2 s on a slow host, in which nothing else runs. Arbitrary; a long
command line has a hundred words and ten secrets."""

_NAME = (
    r"(?<![\w.-])(?:"
    r"[\w.-]*(?:password|passwd|passphrase|token|cookie|api[_-]?key)"
    # Whole names: `key-secret` and `password-secret` name an object, which is no secret.
    r"|(?:[\w-]+\.)*(?:data|key|pass|secret|string|value(?==io\.systemd\.credential))"
    r")"
)
"""Names of QEMU's options whose values may be secret: `data` of `-object secret`, `password` and `cookie` of block
drivers, `key` of RBD, `string` of `-fw_cfg` and credentials in `-smbios`, which give guests their secrets."""

_SECRET_WORD = re.compile(r"pass[_-]?(?:word|wd|wort|phrase)|secret|token|cookie|api[_-]?key", re.IGNORECASE)
"""In the name of an etcd key."""

_GIVEN = re.compile(rf"(?P<name>{_NAME})=(?P<value>(?:,,|[^,])*(?:,[^,=]+(?=,|\Z))*)", re.IGNORECASE)
"""In an option, where two commas stand for one. A following part without `=` counts as the rest of the secret: that is
how a password with a comma gets mistyped."""

_SAID = re.compile(rf"(?P<name>{_NAME})=(?:,,|[^,\s:]|:(?!\s|\Z))+", re.IGNORECASE)
"""In a sentence, where white space ends it, or a colon before white space."""

_JSON = re.compile(
    rf"""(?P<name>(?P<quote>["']){_NAME}(?P=quote)\s*:\s*)(?P<open>["'])(?P<value>(?:\\.|(?!(?P=open))[^\\])*)""",
    re.IGNORECASE,
)
"""In an option in JSON, where QEMU accepts single quotes, too."""

_PLAIN = re.compile(r"[ !#-\[\]-~]*")
"""Text that JSON writes in one form only."""

_URL = re.compile(r"(?<![A-Za-z0-9+.-])(?:[A-Za-z0-9+.-]*:)?//\S*")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_QUERY = re.compile(r"[?#]")


def cleaned(text: str, secrets: Collection[str] = ()) -> str:
    """`text` without `secrets`, and without what looks like a secret.

    Args:
        text: for people; one line at a time, or part of one.
        secrets: as `secrets_in` or `secrets_of_url` found them.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for secret in secrets:
        text = _without_part(text, secret)
    text = _JSON.sub(rf"\g<name>\g<open>{HIDDEN}", text)
    text = _SAID.sub(rf"\g<name>={HIDDEN}", text)
    return _URL.sub(lambda found: hidden_url(found[0]), text)


def cleaned_words(words: Sequence[str]) -> tuple[str, ...]:
    """A command line without its secrets; with thousands of secrets every word is hidden."""
    secrets = secrets_in(words)
    if len(words) * len(secrets) > MOST_LOOKS:
        return tuple(HIDDEN for _ in words)
    return tuple(cleaned(_GIVEN.sub(rf"\g<name>={HIDDEN}", word), secrets) for word in words)


def cleaned_flags(text: str) -> str:
    """The value of `extra_flags` without its secrets; unchanged when it has none."""
    try:
        words = shell_words(text)
    except Unfit:
        # The end of a value cannot be found here.
        begins = [found.end() for found in re.finditer(rf"{_NAME}[\"']?\s*[=:]|://", text, re.IGNORECASE)]
        return text[: min(begins)] + HIDDEN if begins else text
    shown = cleaned_words(words)
    return text if shown == words else shlex.join(shown)


def names_a_secret(name: str) -> bool:
    """Whether a key with this name may hold a secret."""
    return bool(_SECRET_WORD.search(name))


def hidden_url(text: str) -> str:
    """A text that may be a URL, also a bad one, without user, password, query and fragment."""
    head, at, tail = text.rpartition("@")
    if at:
        scheme, slashes, _ = head.partition("//")
        begin = f"{scheme}//" if slashes and _SCHEME.fullmatch(scheme) else ""
        if _QUERY.search(head):
            # The @ ends a password, or is part of the query: then hide everything.
            return begin + HIDDEN
        text = f"{begin}{HIDDEN}@{tail}"
    shown, *query = _QUERY.split(text, maxsplit=1)
    return f"{shown}?{HIDDEN}" if query else shown


def secrets_in(words: Iterable[str]) -> frozenset[str]:
    """The secrets in a command line of QEMU, in every form in which they may come back."""
    found: set[str] = set()
    for word in words:
        for pattern in (_GIVEN, _JSON):
            for match in pattern.finditer(word):
                found.update(_forms(match["value"]))
        for match in _URL.finditer(word):
            url = re.split(r"(?<!,),(?!,)|[\"']", match[0], maxsplit=1)[0]
            found |= secrets_of_url(url)
    return frozenset(found)


def secrets_of_url(url: str) -> frozenset[str]:
    """The secrets in a URL: user and password, and the query with each of its values."""
    user = (url.partition("//")[2] or url).rpartition("@")[0]
    query = "".join(_QUERY.split(url, maxsplit=1)[1:])
    # With several @ it is not known which one ends the password.
    parts = {user, query, *user.split("@"), *(part.partition("=")[2] for part in re.split(r"[&;\s]", query))}
    parts |= {part.partition(":")[2] for part in (user, *user.split("@"))}
    return frozenset(form for part in parts for form in _forms(part))


def _forms(value: str) -> Iterator[str]:
    """A secret as written, decoded, and in pieces: QEMU splits it at commas, a log at its lines."""
    forms = {value, unquote(value)}
    if "," in value:
        forms |= {value.replace(",,", ","), *re.split(r"(?<!,),(?!,)", value)}
    # Only where a backslash makes a difference: there may be thousands of values.
    for quoted in (f'"{value}"', f'"{value.replace(chr(34), chr(92) + chr(34))}"') if "\\" in value else ():
        try:
            forms.add(str(json.loads(quoted, strict=False)))
        except ValueError:
            continue
    for form in forms | {json.dumps(form)[1:-1] for form in forms if not _PLAIN.fullmatch(form)}:
        for line in (form, *form.splitlines()):
            for shown in (line, line.strip()):
                if len(shown) >= SHORTEST:
                    yield shown


def _without_part(text: str, secret: str) -> str:
    """`text` without a part of a secret at its beginning or end, where a log was cut."""
    at = secret.find(text[:SHORTEST], max(1, len(secret) - len(text)))
    while len(text) >= SHORTEST and at != -1:
        if text.startswith(secret[at:]) and len(secret) - at >= SHORTEST:
            text = HIDDEN + text[len(secret) - at :]
            break
        at = secret.find(text[:SHORTEST], at + 1)
    at = secret.find(text[-SHORTEST:])
    while len(text) >= SHORTEST and at != -1:
        if text.endswith(secret[: at + SHORTEST]):
            return text[: -(at + SHORTEST)] + HIDDEN
        at = secret.find(text[-SHORTEST:], at + 1)
    return text
