"""`spice`: the file that opens a display, and what people are told beside it."""

from __future__ import annotations

import configparser
import ctypes
import stat
from pathlib import Path

import pytest

from kvmsupervisor.domain.host import HostSession
from kvmsupervisor.domain.keys import HostName
from kvmsupervisor.domain.status import Phase
from tests.cli.conftest import World

PASSWORD = "spice_password"  # noqa: S105 - the name of the key


def read(text: str) -> dict[str, str]:
    """The entries of a .vv file."""
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",))
    parser.read_string(text)
    assert parser.sections() == ["virt-viewer"]
    return dict(parser["virt-viewer"])


@pytest.fixture
def shown(world: World) -> World:
    """A machine with a display on beta; the command runs on alpha."""
    world.host("alpha", "beta")
    world.running("web1", "beta", spice_port="5901")
    return world


def session(world: World, host: str, url: str) -> None:
    value = HostSession(host=host, version="1", url=url, boot_id="b")
    world.etcd.write(world.layout.session_key(HostName(host)), value.to_json())


def test_a_display_on_loopback_of_another_host(shown: World) -> None:
    """Law: the file points to the tunnel's end, and the tunnel's command is told, where it does not disturb a pipe."""
    result = shown.run("spice", "web1")
    assert result.exit_code == 0
    found = read(result.stdout)
    assert (found["type"], found["host"], found["port"]) == ("spice", "127.0.0.1", "5901")
    assert found["title"] == "web1 on beta - %d"
    assert found["delete-this-file"] == "1"
    assert "password" not in found
    assert "ssh -N -L 5901:127.0.0.1:5901 beta" in result.stderr


def test_a_display_on_loopback_of_this_host(shown: World) -> None:
    """Law: nobody needs a tunnel to the machine that he sits at."""
    shown.environ["KVM_HOSTNAME"] = "beta"
    result = shown.run("spice", "web1")
    assert read(result.stdout)["host"] == "127.0.0.1"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("spice_addr", "url", "address"),
    [
        ("0.0.0.0", "http://192.0.2.5:9746", "192.0.2.5"),
        ("::", "http://[2001:db8::5]:9746", "2001:db8::5"),
        ("0.0.0.0", "http://127.0.0.1:9746", "beta"),
        ("0.0.0.0", "", "beta"),
        ("0.0.0.0", "http://[::", "beta"),
        ("192.0.2.77", "http://192.0.2.5:9746", "192.0.2.77"),
    ],
)
def test_a_display_that_the_network_reaches(shown: World, spice_addr: str, url: str, address: str) -> None:
    """Law: an address of its own is used; one that listens everywhere is found by its supervisor's URL."""
    shown.keys("web1", spice_addr=spice_addr)
    session(shown, "beta", url)
    result = shown.run("spice", "web1")
    assert read(result.stdout)["host"] == address
    assert "ssh" not in result.stderr


def test_the_host_s_setting_holds_without_a_key(shown: World) -> None:
    """Law: without spice_addr it is SPICE_ADDR, as seen here."""
    shown.environ["SPICE_ADDR"] = "0.0.0.0"
    assert read(shown.run("spice", "web1").stdout)["host"] == "beta"


def test_a_tunnel_to_ipv6_loopback(shown: World) -> None:
    """Law: the tunnel's far end is where the server listens."""
    shown.keys("web1", spice_addr="::1")
    result = shown.run("spice", "web1")
    assert read(result.stdout)["host"] == "127.0.0.1"
    assert "-L 5901:[::1]:5901 beta" in result.stderr


def glib_reads(text: str, key: str) -> str:
    """A string of a key file, as the viewers' own library reads it."""
    glib = ctypes.CDLL("libglib-2.0.so.0")
    glib.g_key_file_new.restype = ctypes.c_void_p
    glib.g_key_file_get_string.restype = ctypes.c_char_p
    file = ctypes.c_void_p(glib.g_key_file_new())
    data = text.encode()
    assert glib.g_key_file_load_from_data(file, data, ctypes.c_size_t(len(data)), 0, None)
    found = glib.g_key_file_get_string(file, b"virt-viewer", key.encode(), None)
    assert isinstance(found, bytes)
    glib.g_key_file_free(file)
    return found.decode()


@pytest.mark.parametrize("password", [r"p\n=a;s[s]#", "a\tb c", "ä€ \\s", "#1", "[x]", "\\"])
def test_a_password_is_written_as_key_files_have_it(shown: World, password: str) -> None:
    """Law: GLib, which viewers read the file with, finds the very password."""
    shown.keys("web1", **{PASSWORD: f" {password} "})
    text = shown.run("spice", "web1").stdout
    assert glib_reads(text, "password") == password
    assert glib_reads(text, "title") == "web1 on beta - %d"


def test_a_file_is_its_owner_s_alone(shown: World, tmp_path: Path) -> None:
    """Law: mode 0600, also where others could read what was there; nothing else is left in the folder."""
    file = tmp_path / "web1.vv"
    file.write_text("old")
    file.chmod(0o644)
    shown.keys("web1", **{PASSWORD: "secret"})
    result = shown.run("spice", "web1", "-o", str(file))
    assert (result.exit_code, result.stdout) == (0, "")
    assert read(file.read_text()).get("password") == "secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    assert shown.run("spice", "web1", "-o", str(tmp_path / "no" / "web1.vv")).exit_code == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "web2 has no SPICE display"),
        ({"display": "std"}, "shows its display in a browser"),
        ({"spice_port": "0"}, "not a port"),
        ({"spice_port": "٥٩"}, "not a port"),
        ({"spice_port": "5901\x1b[31m"}, "not a port"),
        ({"spice_port": "5901", "spice_addr": "a\nb"}, "spice_addr is"),
        ({"spice_port": "5901", "spice_password": "a\nb"}, "line break"),
    ],
)
def test_no_display(shown: World, keys: dict[str, str], words: str) -> None:
    """Law: exit code 1 with a sentence, nothing on standard output."""
    shown.keys("web2", host="beta", ram="1G", **keys)
    result = shown.run("spice", "web2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr
    assert "\x1b" not in result.stderr


def test_no_instance_and_no_host(shown: World) -> None:
    """Law: exit code 1 with a sentence that says which."""
    assert "there is no instance web9" in shown.run("spice", "web9").stderr
    shown.keys("web2", ram="1G", spice_port="5902")
    result = shown.run("spice", "web2")
    assert result.exit_code == 1
    assert "no host" in result.stderr


def test_doubts_are_told(shown: World) -> None:
    """Law: a machine that is down, or runs with another display, still gets its file, and its reader the truth."""
    shown.status("web1", "beta", Phase.RUNNING, pid=1, pending=("spice_port",))
    result = shown.run("spice", "web1")
    assert result.exit_code == 0
    assert "spice_port of web1 changed: the file is right from its next restart on" in result.stderr
    shown.status("web1", "beta", Phase.STOPPED, "its key power is off")
    assert "web1 is stopped: its key power is off" in shown.run("spice", "web1").stderr
