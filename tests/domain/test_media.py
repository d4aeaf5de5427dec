"""User data: its kind, and the documents that stand beside it on media."""

from __future__ import annotations

import contextlib
import gzip
import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsupervisor.domain import media
from kvmsupervisor.domain.keys import InstanceId
from kvmsupervisor.domain.media import MediumKind, NotUserData, detect, instance_id, media_url, shown_url, without_user
from kvmsupervisor.domain.values import Unfit

WEB1 = InstanceId("web1")
MACHINE = UUID("0c8b3f0e-9a3c-4ef4-a1f2-0d3f6f2f7a55")

IGNITION = b'{"ignition": {"version": "3.4.0"}}'
MIME = b'Content-Type: multipart/mixed; boundary="b"\nMIME-Version: 1.0\n\n--b\n'


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"#cloud-config\nhostname: a\n", MediumKind.CLOUD_CONFIG),
        (b"#cloud-config\r\n", MediumKind.CLOUD_CONFIG),
        (b"\n #Cloud-Config\n", MediumKind.CLOUD_CONFIG),
        ("#cloud-config\n# ä\n".encode(), MediumKind.CLOUD_CONFIG),
        (b"#!/bin/sh\n", MediumKind.SCRIPT),
        (b"#!/bin/sh\n\xff\xfe", MediumKind.SCRIPT),
        (MIME, MediumKind.MULTIPART),
        (b"mime-version: 1.0\n", MediumKind.MULTIPART),
        (b"#cloud-config-archive\n[]", MediumKind.OTHER),
        (b"#cloud-config-jsonp\n[]", MediumKind.OTHER),
        (b"#include\nhttps://host/a\n", MediumKind.OTHER),
        (b"#include-once\nhttps://host/a\n", MediumKind.OTHER),
        (b"#cloud-boothook\n#!/bin/sh\n", MediumKind.OTHER),
        (b"#part-handler\n", MediumKind.OTHER),
        (b"## template: jinja\n#cloud-config\n", MediumKind.OTHER),
        (b"#ps1_sysnative\n", MediumKind.OTHER),
        (b"rem cmd\r\n", MediumKind.OTHER),
        (gzip.compress(b"#cloud-config\n", mtime=0), MediumKind.OTHER),
        (gzip.compress(MIME + b"x" * 200_000, mtime=0), MediumKind.OTHER),
        (IGNITION, MediumKind.IGNITION),
        (b"\n" + IGNITION + b"\n", MediumKind.IGNITION),
        (b'{"ignition": {"version": "2.3.0"}, "storage": {}}', MediumKind.IGNITION),
        (b'{"ignition": {"version": "3.6.0-experimental"}}', MediumKind.IGNITION),
    ],
)
def test_what_guests_understand_is_told_apart(data: bytes, kind: MediumKind) -> None:
    """Law: whatever cloud-init, cloudbase-init or Ignition takes is taken, and only Ignition is Ignition."""
    assert detect(data) is kind


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found nothing, 0 bytes; user data begins with #cloud-config"),
        (b" \n\t", "found white space only; user data begins"),
        (b"\xef\xbb\xbf#cloud-config\n", "found a byte order mark at the beginning; save the file as UTF-8 without"),
        (b"\x7fELF\x02\x01\xff", "found 7 bytes that are no text (not UTF-8 at byte 6); user data begins"),
        (b"#cloud-config\n\xff", "found cloud-config that is not UTF-8 at byte 14; cloud-config is YAML in UTF-8"),
        (b"<!DOCTYPE html><p>Log in", "found an HTML page; see whether the URL leads to the file itself"),
        (b"hostname: a\nusers: []\n", "found YAML without a first line that says what it is; cloud-config begins with"),
        (b"# Mine\n#cloud-config\n", "found #cloud-config behind other lines; it is the first line"),
        (b"variant: fcos\nversion: 1.5.0\n", "found Butane YAML; make Ignition JSON of it with the program butane"),
        (b"hello", "found text of 5 bytes with an unknown beginning; user data begins"),
        (b'{"users": []}', "found JSON without ignition.version; Ignition JSON is an object"),
        (b'{"ignition": []}', "found JSON without ignition.version; Ignition JSON is"),
        (b'{"ignition": {"version": 3}}', "found Ignition JSON of an unknown version; ignition.version is text such"),
        (b'{"ignitionVersion": 1}', "found Ignition JSON of version 1; convert it to version 3"),
        (b"[]", "found JSON that is not an object; Ignition JSON is"),
        (b'{"ignition":\n}', "found JSON that is damaged (line 2, column 1: Expecting value); Ignition JSON is"),
        (b'{"a": "\xff"}', "found JSON that is not UTF-8 at byte 7; Ignition JSON is"),
        (b"[" * 100_000, "found JSON that cannot be read; Ignition JSON is"),
        (b"[" + b"9" * 5_000 + b"]", "found JSON that cannot be read; Ignition JSON is"),
        (b"\x1f\x8b\x08\x00damaged", "found gzip that is damaged; pack the user data again"),
        (gzip.compress(IGNITION, mtime=0), "found gzip with JSON in it; Ignition JSON is given as it is, not packed"),
        (gzip.compress(b"", mtime=0), "found gzip with nothing, 0 bytes in it; user data begins"),
        (
            gzip.compress(gzip.compress(b"#!", mtime=0), mtime=0),
            "found gzip with 22 bytes that are no text (not UTF-8 at byte 1) in it",
        ),
    ],
)
def test_what_no_guest_understands_is_refused(data: bytes, message: str) -> None:
    """Law: the error says what was found and what would be right."""
    with pytest.raises(NotUserData) as caught:
        detect(data)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, Unfit)


_BEGINNINGS = st.sampled_from(
    [b"", b"#cloud-config", b"#!", b"{", b"[", b'{"ignition":', b"\x1f\x8b\x08", b"\xef\xbb\xbf", b"mime-version:"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["ignition", "version", "a"]), inner),
)
_BYTES = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__add__, _BEGINNINGS, st.binary(max_size=300)),
    _JSON.map(lambda value: json.dumps(value).encode()),
    st.builds(gzip.compress, st.binary(max_size=300)),
    st.builds(lambda data, cut: gzip.compress(data, mtime=0)[:cut], st.binary(max_size=300), st.integers(0, 300)),
)


@given(_BYTES)
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    """Law: `detect` returns a kind or raises `NotUserData`, whatever the bytes."""
    with contextlib.suppress(NotUserData):
        assert detect(data) in MediumKind


@given(st.text(alphabet=st.characters(categories=["L"], max_codepoint=0x24F), min_size=12, max_size=40))
def test_messages_repeat_nothing_of_the_data(secret: str) -> None:
    """Law: user data may hold secrets, so no message repeats it."""
    for data in (f"password: {secret}", f'{{"a": "{secret}"', f'{{"ignition": {{"version": "{secret}"}}}}', secret):
        with pytest.raises(NotUserData) as caught:
            detect(data.encode())
        assert secret not in str(caught.value)


def test_the_instance_id_changes_with_the_user_data_only() -> None:
    """Law: a guest configures itself anew exactly when its user data, or the machine, is another."""
    first = instance_id(MACHINE, b"#cloud-config\n")
    assert first == UUID("b4f3ccd9-3ede-5814-abed-6e2eede41b88") == instance_id(MACHINE, b"#cloud-config\n")
    assert first != instance_id(MACHINE, b"#cloud-config\n\n")
    assert first != instance_id(UUID(int=1), b"#cloud-config\n")


def test_both_media_say_the_same() -> None:
    """Law: NoCloud and config-drive name the same instance, whose host name is the instance's id, and hold the data."""
    data = b"#cloud-config\n"
    name = str(instance_id(MACHINE, data))
    seed, drive = media.nocloud(WEB1, MACHINE, data), media.config_drive(WEB1, MACHINE, data)
    assert seed == {"user-data": data, "meta-data": f'instance-id: {name}\nlocal-hostname: "web1"\n'.encode()}
    assert drive["openstack/latest/user_data"] == data
    assert json.loads(drive["openstack/latest/meta_data.json"]) == {"uuid": name, "hostname": "web1", "name": "web1"}
    assert set(drive) == {"openstack/latest/user_data", "openstack/latest/meta_data.json"}


def test_network_config_is_there_only_when_given() -> None:
    """Law: an empty network-config would take the guest's network away, so there is none without one."""
    assert "network-config" not in media.nocloud(WEB1, MACHINE, b"#!")
    assert media.nocloud(WEB1, MACHINE, b"#!", b"version: 2\n")["network-config"] == b"version: 2\n"


@pytest.mark.parametrize(
    "text",
    [
        *("", "host/path", "ftp://host/a", "http:///a", "http://host:0/", "http://host:x/", "http://host:99999/"),
        *("file://other/a", "file:a", "http://ho st/", "http://host/ä", "http://host/\n", "http://[::1/"),
        *("http://u:secret/word@host/", "http://u:secret#word@host/", "http://u:secret?word@host/"),
    ],
)
def test_what_is_no_url_is_refused_without_repeating_it(text: str) -> None:
    """Law: the message says what is right, and shows no password that was not written as it should be."""
    with pytest.raises(Unfit, match="http://HOST/PATH") as caught:
        media_url(text)
    assert "secret" not in str(caught.value)
    assert "word@" not in str(caught.value)
    assert "secret" not in shown_url(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a/b.yaml", "https://host/a/b.yaml"),
        ("http://user:pass@host:8080/a", "http://…@host:8080/a"),
        ("http://user@host/a@b", "http://…@host/a@b"),
        ("https://host/a?token=secret#part", "https://host/a?…"),
        ("file:///srv/a", "file:///srv/a"),
        ("nothing", "nothing"),
        ("http://u:a?b@c@host/x", "http://…"),
        ("http://host:0/x?mail=a@b&token=secret", "http://…"),
        ("user:secret@host/x?a=b", "…@host/x?…"),
    ],
)
def test_shown_urls_hide_what_may_be_secret(text: str, shown: str) -> None:
    """Law: neither user nor password nor query of a URL is in a message."""
    assert shown_url(text) == shown


def test_a_url_without_its_user_leads_to_the_same_place() -> None:
    """Law: a new password does not make another source."""
    assert without_user("http://u:p@host:1/a?b=c") == without_user("http://u:q@host:1/a?b=c") == "http://host:1/a?b=c"
    assert without_user("nothing") == "nothing"
