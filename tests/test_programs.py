"""Every program that is run, and what keys and settings can say to it: decision record 0021."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from kvmsupervisor.adapters.ceph import Ceph, CephAccess, CephError
from kvmsupervisor.adapters.ceph.access import located
from kvmsupervisor.adapters.cgroup.scope import WAIT
from kvmsupervisor.adapters.cgroup.tree import ENTER
from kvmsupervisor.adapters.network import HELPERS, NetworkTrouble, open_tap
from kvmsupervisor.config import values as setting_values
from kvmsupervisor.domain.ceph import client_address
from kvmsupervisor.domain.keys import InstanceId, parse_id
from kvmsupervisor.domain.parse_keys import parse_wish
from kvmsupervisor.domain.records import Unfit
from kvmsupervisor.domain.spec import RawValue, RbdDisk, Spec
from kvmsupervisor.domain.words import is_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvmsupervisor"
RECORD = ROOT / "docs" / "decisions" / "0021-words-that-reach-programs.md"

patient = settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
"""For laws that start programs."""

# --- the list is complete -------------------------------------------------------------------------------------

RUNNERS = re.compile(
    r"create_subprocess_(exec|shell)|subprocess_(exec|shell)|Popen|check_call|check_output|getoutput|getstatusoutput|"
    r"execv?p?e?|execlp?e?|spawn[vl]p?e?|posix_spawnp?|system|popen|fork|forkpty|StartTransientUnit"
)
"""What starts a program, by its name in `os`, `subprocess`, `asyncio`, `pty`, or systemd's."""

MODULES = {"os", "subprocess", "asyncio", "pty", "loop"}


def runs_programs(source: str) -> Iterator[int]:
    """Lines in which a module starts a program, or takes the name of what does."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in MODULES:
                if RUNNERS.fullmatch(name) or (module, name) in {("subprocess", "run"), ("subprocess", "call")}:
                    yield node.lineno
            case ast.Attribute(attr="subprocess_exec" | "subprocess_shell"):
                yield node.lineno
            case ast.ImportFrom(module="subprocess" | "pty") | ast.Import(names=[ast.alias(name="pty")]):
                yield node.lineno
            case ast.ImportFrom(module="os" | "asyncio", names=names) if any(RUNNERS.fullmatch(n.name) for n in names):
                yield node.lineno
            case ast.Constant(value="StartTransientUnit"):
                yield node.lineno


def listed() -> set[str]:
    """The modules in the table of the decision record."""
    rows = [line for line in RECORD.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}


def test_every_module_that_runs_a_program_is_on_record() -> None:
    """Law: who starts a program says in decision record 0021 which, and how its words are kept in order."""
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if any(runs_programs(path.read_text()))}
    assert found == listed()


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(['x'])",
        "from subprocess import run",
        "os.execvp('x', [])",
        "os.system('x')",
        "from os import posix_spawn",
        "asyncio.create_subprocess_exec('x')",
        "asyncio.get_running_loop().subprocess_shell(None, 'x')",
        "import pty",
        "call(manager, 'StartTransientUnit')",
    ],
)
def test_each_way_to_run_a_program_is_found(source: str) -> None:
    """The check above can fail."""
    assert list(runs_programs(source)) == [1]


def test_no_program_is_run_by_a_shell() -> None:
    """Law: no string of ours is read by a shell as its language but the two prefixes, which are constants."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert not any(word.arg == "shell" for word in node.keywords), f"{path}:{node.lineno}"
            if isinstance(node, ast.Tuple) and [getattr(e, "value", None) for e in node.elts[:2]] == ["/bin/sh", "-c"]:
                assert isinstance(node.elts[2], ast.Name), f"{path}:{node.lineno}"


# --- what is let through --------------------------------------------------------------------------------------

HOSTILE = "-=,:;@%$&|*?~#'\"`\\(){}[]<>! .ab\n\t\0\x7fé/"
_texts = st.text(st.sampled_from(HOSTILE), min_size=1, max_size=16) | st.sampled_from(
    [
        "--log-file=x/y",
        "--mon-host=v1:192.0.2.1:6789/x",
        "-x/y",
        "x/-y",
        "$(id)/b",
        "`id`/b",
        "a/b;id",
        "a/b,c",
        "--/--",
    ]
)


def _spec(**texts: str) -> Spec | None:
    keys = {name.replace("_1", "/1").encode(): RawValue(text.encode(), 1) for name, text in texts.items()}
    return parse_wish(InstanceId("vm"), {b"ram": RawValue(b"64", 1), **keys}).spec


@st.composite
def _images(draw: st.DrawFn) -> RbdDisk:
    """Images that a key may name."""
    pool, image = draw(_texts), draw(_texts)
    spec = _spec(rbd=f"{pool}/{image}")
    assume(spec is not None and spec.rbd is not None)
    assert spec is not None
    assert spec.rbd is not None
    return spec.rbd


CEPH_USERS = [user for user in ("kvm", "a,b", "a=b", "a'b", "a$b", "é") if setting_values.ceph_user(user)]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which `rbd` and `ceph` write down their words, each ended by a NUL."""
    for name in ("rbd", "ceph"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >>{tmp_path}/asked\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "asked"


OWN_WORDS = {
    *("rbd", "info", "status", "config", "image", "lock", "ls", "rm", "rename", "import", "ceph", "osd", "blocklist"),
    *("--format", "json", "--no-progress", "--image-feature", "layering", "exclusive-lock"),
}


@patient
@given(image=_images(), user=st.sampled_from(CEPH_USERS))
def test_what_a_key_says_to_ceph_is_a_value(asked: Path, image: RbdDisk, user: str) -> None:
    """Law: each word that Ceph's tools get is ours, or begins with an option's name and `=`, behind which it is."""
    asked.unlink(missing_ok=True)

    async def ask() -> None:
        ceph = Ceph(CephAccess(user=user))
        for question in (ceph.image_info, ceph.read_policy, ceph.watchers, ceph.lock_owners):
            with pytest.raises(CephError):
                await question(image)

    asyncio.run(ask())
    words = asked.read_text().split("\0")[:-1]
    values = {f"--pool={image.pool}", f"--image={image.image}", f"--id={user}"}
    values |= {f"--namespace={image.namespace}"} if image.namespace else set()
    assert set(words) - OWN_WORDS == values


def _rbd(*words: str, folder: Path) -> str:
    """What the real one says that has no cluster."""
    command = ["rbd", "info", *words, "--format", "json", "--id=x", "--conf=/dev/null"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr


@patient
@given(image=_images())
def test_the_real_rbd_takes_it_for_a_value(tmp_path: Path, image: RbdDisk) -> None:
    """Law: rbd itself fails where it would connect to its cluster, neither at a word before, and makes no file."""
    said = _rbd(*located(image), folder=tmp_path)
    assert "couldn't connect to the cluster" in said
    assert list(tmp_path.iterdir()) == []


def test_the_real_rbd_would_take_it_for_an_option(tmp_path: Path) -> None:
    """The law above can fail: as a word of its own such a text is one."""
    assert "unrecognised option" in _rbd("--no-such-option=x/y", folder=tmp_path)
    _rbd(f"--log-file={tmp_path}/made", "--log-to-file=true", folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("program", ["own", "real"])
@patient
@given(name=_texts)
def test_what_a_key_says_to_the_bridge_helper_is_a_value(tmp_path: Path, program: str, name: str) -> None:
    """Law: a bridge's name is behind `--br=`, and one word; the real helper refuses it by its list, not by its form."""
    spec = _spec(mac="52:54:00:00:00:01", bridge=name)
    assume(spec is not None)
    assert spec is not None
    assert spec.bridge is not None
    helper, asked = tmp_path / "helper", tmp_path / "asked"
    helper.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{asked}\n')
    helper.chmod(0o755)
    if program == "real":
        helper = next(path for path in HELPERS if path.exists())
    with pytest.raises(NetworkTrouble) as refused:
        asyncio.run(open_tap(spec.bridge, helper=helper, acl=tmp_path / "bridge.conf"))
    if program == "real":
        assert "sage:" not in str(refused.value)
    else:
        use, fd, bridge = asked.read_text().split("\0")[:-1]
        assert (use, fd.partition("=")[0], bridge) == ("--use-vnet", "--fd", f"--br={spec.bridge}")


@patient
@given(words=st.lists(st.text(st.sampled_from(HOSTILE.replace("\0", "")), max_size=12), max_size=5))
def test_the_shell_before_qemu_reads_no_word(words: list[str]) -> None:
    """Law: both prefixes hand on every word as it is."""
    show = ("/bin/sh", "-c", 'printf "%s\\0" "$@"', "sh")
    # A cgroup's file, which is the second one's standard input, takes any bytes.
    through = f"exec 0>/dev/null; {ENTER}"
    for prefix, spoken in ((("/bin/sh", "-c", WAIT, "sh"), b"\n"), (("/bin/sh", "-c", through, "sh"), b"")):
        done = subprocess.run([*prefix, *show, *words], input=spoken, capture_output=True, check=True)
        # printf prints its form once when there is nothing to be printed.
        assert done.stdout.decode().split("\0")[:-1] == (words or [""])


UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")
"""What systemd takes for a unit's name (unit_name_is_valid in its basic/unit-name.c)."""


@given(instance=_texts | st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,80}\Z"), incarnation=_texts)
def test_a_units_name_is_one(instance: str, incarnation: str) -> None:
    """Law: what is taken for an id and an incarnation makes the name of a unit, of a cgroup and of a folder."""
    if parse_id(instance) is not None:
        assert UNIT.fullmatch(f"kvm-{instance}-00000000-0000-0000-0000-000000000000.scope")
        assert "/" not in instance
        assert not instance.startswith((".", "-", "_"))
    if is_name(incarnation):
        assert UNIT.fullmatch(incarnation[:200])


@given(st.text(st.sampled_from("0123456789abcdef:./[]-v% \n,"), max_size=30) | st.text(max_size=20))
def test_an_address_from_outside_is_one_client(text: str) -> None:
    """Law: what Ceph or a lock in etcd calls a client becomes an argument in one form only, or none."""
    try:
        address = client_address(text)
    except Unfit:
        return
    assert re.fullmatch(r"(?:[0-9.]+|\[[0-9a-f:.]+\]):[0-9]+/[1-9][0-9]*", address)
