"""Ceph through its tools, with a real cluster: what is asked, who is shut out, and each way in which it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from kvmsupervisor.adapters.ceph import (
    FENCE_MIN_S,
    FENCE_S,
    Ceph,
    CephAccess,
    CephAway,
    CephError,
    CephFailed,
    CephRefused,
    NoSuchImage,
)
from kvmsupervisor.domain.ceph import PRIMARIES, Client, ImageInfo
from kvmsupervisor.domain.ceph_versions import too_old
from kvmsupervisor.domain.spec import RbdDisk
from tests.support.ceph import CLIENT_CAPS, POOL
from tests.support.ceph import Ceph as Cluster
from tests.support.ceph import CephError as ClusterError
from tests.support.rbd_qemu import RbdQemu

LIMIT_S = 30.0
SAYS_SO = "echo 'blocklisting it until 2030-01-01T00:00:00.0+0000 (1 sec)' >&2"
NOBODY = "192.0.2.1:0/4242"
"""Addresses of a network for documentation: no client of ours."""


def access(cluster: Cluster, user: str) -> CephAccess:
    return CephAccess(user=user, conf=str(cluster.conf))


@pytest.fixture(scope="module")
def vm(ceph: Cluster) -> CephAccess:
    """The client that docs/ceph.md tells operators to make."""
    ceph.new_client("vm", CLIENT_CAPS)
    return access(ceph, "vm")


@pytest.fixture
def image(ceph_image: str) -> RbdDisk:
    return RbdDisk(pool=POOL, image=ceph_image)


@pytest.fixture
def away(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> Iterator[None]:
    """The cluster without its monitor; what is needed of it was made before."""
    ceph.stop_mon()
    yield
    ceph.cont_mon()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a shell script in the place of a tool: for what our cluster never says."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return put


def running(word: str) -> list[int]:
    """The living processes that have `word` among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if word.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110 - /proc has no events
            await asyncio.sleep(0.005)


# --- images ---------------------------------------------------------------------------------------------------


async def test_an_image_is_described(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> None:
    """Law 5: size and features, with exactly the capabilities that the documentation gives."""
    info = await Ceph(vm).image_info(image)
    assert info == ImageInfo(size=8 << 20, features=frozenset({"layering", "exclusive-lock"}))
    assert info.has_exclusive_lock
    ceph.rbd_create(f"{POOL}/{image.image}-bare", features="layering")
    bare = await Ceph(vm).image_info(RbdDisk(pool=POOL, image=f"{image.image}-bare"))
    assert not bare.has_exclusive_lock


async def test_from_where_an_image_is_read(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> None:
    """Law 5: as this client would read it, wherever that is set; what is set for the image counts most."""
    cluster, setting = Ceph(vm), "rbd_read_from_replica_policy"
    assert await cluster.read_policy(image) == PRIMARIES
    ceph.ceph("config", "set", "client.vm", setting, "balance")
    try:
        assert await cluster.read_policy(image) == "balance"
        ceph.rbd("config", "image", "set", image.name, setting, "localize", name="vm")
        assert await cluster.read_policy(image) == "localize"
        ceph.rbd("config", "image", "set", image.name, setting, PRIMARIES, name="vm")
        assert await cluster.read_policy(image) == PRIMARIES
    finally:
        ceph.ceph("config", "rm", "client.vm", setting)


async def test_names_are_names(ceph: Cluster, vm: CephAccess) -> None:
    """Law: what has a meaning in `POOL/IMAGE@SNAP` stays part of the name."""
    ceph.rbd("create", "--pool", POOL, "--image", "an image", "--size", "1M")
    assert (await Ceph(vm).image_info(RbdDisk(pool=POOL, image="an image"))).size == 1 << 20
    with pytest.raises(CephError):
        await Ceph(vm).image_info(RbdDisk(pool=POOL, image="an image@snap"))


async def test_what_is_not_there_is_named(vm: CephAccess) -> None:
    """Law: pool and image are told apart; each question that names an image says so."""
    cluster = Ceph(vm)
    for ask in (cluster.image_info, cluster.read_policy, cluster.watchers, cluster.lock_owners):
        with pytest.raises(NoSuchImage, match=r"no such image: `rbd .* --pool=rbd --image=gone`: rbd: error"):
            await ask(RbdDisk(pool=POOL, image="gone"))
        with pytest.raises(NoSuchImage, match="no such pool: "):
            await ask(RbdDisk(pool="lake", image="gone"))


async def test_an_image_is_imported_once_and_as_a_whole(
    ceph: Cluster, vm: CephAccess, image: RbdDisk, tmp_path: Path
) -> None:
    """Law: `<image>.nvram` is made unless it is there, with exclusive-lock, and what a cut-off left is taken away."""
    (tmp_path / "vars").write_bytes(b"variables" * 1000)
    target = RbdDisk(pool=POOL, image=f"{image.image}.nvram")
    ceph.rbd_create(f"{POOL}/{target.image}.new", size="1M")
    assert await Ceph(vm).import_image(target, tmp_path / "vars")
    info = await Ceph(vm).image_info(target)
    assert (info.size, info.has_exclusive_lock) == (9000, True)
    ceph.rbd("export", f"{POOL}/{target.image}", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "vars").read_bytes()
    (tmp_path / "vars").write_bytes(b"other")
    assert not await Ceph(vm).import_image(target, tmp_path / "vars")
    assert (await Ceph(vm).image_info(target)).size == 9000
    assert f"{target.image}.new" not in ceph.rbd("ls", POOL).split()


async def test_what_a_cut_off_import_has_open_is_waited_for(
    ceph: Cluster, vm: CephAccess, image: RbdDisk, tmp_path: Path
) -> None:
    """Law: an import that was killed counts as open for 30 s; that is "wait", and nothing is made meanwhile."""
    (tmp_path / "vars").write_bytes(b"variables")
    target = RbdDisk(pool=POOL, image=f"{image.image}.nvram")
    aside = RbdDisk(pool=POOL, image=f"{target.image}.new")
    ceph.rbd_create(str(aside))
    async with RbdQemu(ceph, aside):
        with pytest.raises(CephAway, match="somebody has it open"):
            await Ceph(vm).import_image(target, tmp_path / "vars")
    with pytest.raises(NoSuchImage):
        await Ceph(vm).image_info(target)
    await Ceph(vm).fence(await Ceph(vm).watchers(aside))
    assert await Ceph(vm).import_image(target, tmp_path / "vars")


async def test_an_import_without_a_file_leaves_nothing(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> None:
    """Law: no half image under the name that is looked for."""
    target = RbdDisk(pool=POOL, image=f"{image.image}.nvram")
    with pytest.raises(CephError):
        await Ceph(vm).import_image(target, Path("/nonexistent"))
    assert target.image not in ceph.rbd("ls", POOL).split()


# --- shutting out ---------------------------------------------------------------------------------------------


async def test_a_fence_is_added_and_read_back(vm: CephAccess) -> None:
    """Law 4: each address, IPv6 and v2 ones too, for at least 30 days; again is no error."""
    cluster = Ceph(vm)
    await cluster.fence(["192.0.2.9:0/9", "v2:192.0.2.9:0/10", "[2001:db8::1]:0/11", "192.0.2.9:0/9"])
    await cluster.fence(["any:192.0.2.9:0/9"])
    assert {"192.0.2.9:0/9", "192.0.2.9:0/10", "[2001:db8::1]:0/11"} <= set(await cluster.blocklist_ls())
    assert FENCE_S >= FENCE_MIN_S == 30 * 86_400


async def test_an_entry_that_is_there_keeps_its_time_but_for_a_fence(ceph: Cluster, vm: CephAccess) -> None:
    """Law 4: Ceph does not prolong an entry by adding it again; a fence replaces one that ends too early."""
    ceph.ceph("osd", "blocklist", "add", "192.0.2.3:0/1", "3600")
    cluster, client = Ceph(vm), Client("192.0.2.3:0/1")
    before = (await cluster.blocklist_ls())[client]
    promised = (await cluster.blocklist_add([client], FENCE_S))[client]
    assert (await cluster.blocklist_ls())[client] == before < promised
    await cluster.fence([client])
    assert (await cluster.blocklist_ls())[client] >= promised


async def test_a_short_entry_that_cannot_be_replaced_is_no_fence(ceph: Cluster) -> None:
    """Law 4: with `profile rbd` alone an entry cannot be replaced: that is an error with its cause, not a fence."""
    ceph.ceph("osd", "blocklist", "add", "192.0.2.3:0/2", "3600")
    ceph.new_client("plain", CLIENT_CAPS | {"mon": "profile rbd"})
    cluster = Ceph(access(ceph, "plain"))
    with pytest.raises(CephRefused, match=r"client\.plain \(its capabilities do not allow it\): .*blocklist rm 192"):
        await cluster.fence(["192.0.2.3:0/2"])
    await cluster.fence(["192.0.2.3:0/3"])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:0/0", "127.0.0.0/8", "", "--help"])
async def test_a_whole_host_is_never_shut_out(ceph: Cluster, address: str) -> None:
    """FENCING: a bare IP would hit everything there, OSDs included; nothing else of the call is added either."""
    cluster = Ceph(access(ceph, "admin"))
    for call in (cluster.fence, cluster.blocklist_add, cluster.blocklist_rm):
        with pytest.raises(CephFailed, match="exactly one client"):
            await call([NOBODY, address])
    assert NOBODY not in ceph.blocklist()


async def test_what_the_capabilities_allow(ceph: Cluster, vm: CephAccess) -> None:
    """Law 4: those of docs/ceph.md are enough to add, list and remove single clients, and for no whole host."""
    page = (Path(__file__).parents[2] / "docs" / "ceph.md").read_text()
    for service, caps in CLIENT_CAPS.items():
        assert f"{service} '{caps}'" in page
    await Ceph(vm).blocklist_add(["192.0.2.2:0/1"], 60)
    await Ceph(vm).blocklist_rm(["192.0.2.2:0/1"])
    assert "192.0.2.2:0/1" not in await Ceph(vm).blocklist_ls()
    with pytest.raises(ClusterError, match="access denied"):
        ceph.ceph("osd", "blocklist", "add", "192.0.2.2", "60", "--id", "vm")


async def test_a_fence_that_is_not_listed_is_none(vm: CephAccess, tool: Callable[[str, str], None]) -> None:
    """Law 4: what the monitors do not list afterwards is not fenced, whatever they said before."""
    others = '[{"addr":"192.0.2.1:0/424","until":"2030-01-01T00:00:00.0+0000"}][]'
    tool("ceph", f"case $3 in ls) echo '{others}';; *) {SAYS_SO};; esac")
    with pytest.raises(CephFailed, match=f"does not name {NOBODY}"):
        await Ceph(vm).fence([NOBODY])
    await Ceph(vm).fence([])


async def test_one_failed_addition_is_told_as_itself(vm: CephAccess, tool: Callable[[str, str], None]) -> None:
    """Law 4: one of several that cannot be added fails the fence, by the tool's words."""
    tool("ceph", f'case $4 in *:0/2) echo "Error EIO: out of luck" >&2; exit 5;; *) {SAYS_SO};; esac')
    with pytest.raises(CephFailed, match=r"blocklist add 192.0.2.1:0/2.*: Error EIO: out of luck"):
        await Ceph(vm).fence(["192.0.2.1:0/1", "192.0.2.1:0/2", "192.0.2.1:0/3"])


async def test_a_fence_adds_what_it_has_not_added_yet(
    vm: CephAccess, tool: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Law 4: a try after one that was given up goes on from there, and looks whether all is there."""
    one, other = "192.0.2.1:0/1", "192.0.2.1:0/2"
    listed = [{"addr": address, "until": "2099-01-01T00:00:00.0+0000"} for address in (one, other)]
    calls = tmp_path / "calls"
    tool("ceph", f"echo $3 $4 >>{calls}; case $3 in ls) echo '{json.dumps(listed)}[]';; *) {SAYS_SO};; esac")
    cluster = Ceph(vm)
    await cluster.fence([one])
    await cluster.fence([one, other])
    told = [line.removesuffix("--id=vm").strip() for line in calls.read_text().splitlines()]
    assert [line.partition(" --")[0] for line in told] == [f"add {one}", "ls", f"add {other}", "ls"]


async def test_a_fence_that_somebody_took_away_is_made_again(ceph: Cluster, vm: CephAccess) -> None:
    """Law 4: an entry that was added here is believed in only while it is listed."""
    cluster = Ceph(vm)
    await cluster.fence([NOBODY])
    ceph.ceph("osd", "blocklist", "rm", NOBODY)
    await cluster.fence([NOBODY])
    assert NOBODY in ceph.blocklist()
    ceph.ceph("osd", "blocklist", "rm", NOBODY)


async def test_a_tool_that_is_slow_gets_more_time(vm: CephAccess, tool: Callable[[str, str], None]) -> None:
    """A host that is too busy for a tool's start would give it up for ever; an answer makes it impatient again."""
    tool("ceph", "sleep 0.5; echo '[][]'")
    cluster = Ceph(vm, answer_s=0.1)
    told = []
    while True:
        try:
            await cluster.blocklist_ls()
            break
        except CephAway as error:
            told.append(str(error).rpartition(" took ")[2])
    assert told[:3] == ["longer than 0.1 s", "longer than 0.2 s", "longer than 0.4 s"]
    tool("ceph", "exec sleep 3600")
    with pytest.raises(CephAway, match=r"longer than 0\.1 s"):
        await cluster.blocklist_ls()


# --- how it fails ---------------------------------------------------------------------------------------------


async def test_without_monitors_it_is_away(away: None, vm: CephAccess, image: RbdDisk) -> None:
    """Law 4: no answer in time is "wait", for each tool; the tool is gone then."""
    client = f"192.0.2.1:0/{os.getpid()}"  # which no other worker's test asks for
    calls: tuple[Callable[[Ceph], Awaitable[object]], ...] = (
        lambda cluster: cluster.image_info(image),
        lambda cluster: cluster.watchers(image),
        lambda cluster: cluster.fence([client]),
    )
    for call in calls:
        with pytest.raises(CephAway, match=r"took longer than 0\.3 s"):
            await call(Ceph(vm, answer_s=0.3))
    assert running(f"--image={image.image}") == []
    assert running(client) == []


async def test_a_cancelled_question_leaves_nothing(away: None, vm: CephAccess, image: RbdDisk) -> None:
    """Law: the tool is killed and reaped before the cancellation reaches the caller."""
    question = asyncio.create_task(Ceph(vm).watchers(image))
    await until(lambda: running(f"--image={image.image}"))
    question.cancel()
    with pytest.raises(asyncio.CancelledError):
        await question
    assert running(f"--image={image.image}") == []


async def test_a_tool_does_not_outlive_its_caller(away: None, vm: CephAccess, image: RbdDisk) -> None:
    """Law: the kernel kills the tool when the process that asks is killed, also while no monitor answers."""
    ask = (
        "import asyncio\n"
        "from kvmsupervisor.adapters.ceph import Ceph, CephAccess\n"
        "from kvmsupervisor.domain.spec import RbdDisk\n"
        f"access = CephAccess(user={vm.user!r}, conf={vm.conf!r})\n"
        f"asyncio.run(Ceph(access).watchers(RbdDisk(pool={image.pool!r}, image={image.image!r})))\n"
    )
    asking = await asyncio.create_subprocess_exec(sys.executable, "-c", ask)
    await until(lambda: running(f"--image={image.image}"))
    asking.kill()
    assert await asking.wait() == -signal.SIGKILL
    await until(lambda: not running(f"--image={image.image}"))


async def test_the_cluster_comes_back(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> None:
    """Law: an outage leaves no state here; the next question is answered."""
    ceph.stop_mon()
    try:
        with pytest.raises(CephAway):
            await Ceph(vm, answer_s=0.2).image_info(image)
    finally:
        ceph.cont_mon()
    assert (await Ceph(vm).image_info(image)).has_exclusive_lock


async def test_a_client_that_cannot_be(ceph: Cluster, image: RbdDisk, tmp_path: Path) -> None:
    """Law: no keyring, a wrong key, too few capabilities, no ceph.conf: an operator has to mend it, and reads what."""
    key = "AQB+FgZrUhUVKRAA/0QT+i4tqGb/QTOa0U8Ddg=="
    (tmp_path / "wrong").write_text(f"[client.vm]\n\tkey = {key}\n")
    ceph.new_client("weak", {"mon": "allow r", "osd": "profile rbd pool=another"})
    conf = str(ceph.conf)
    for who, why in (
        (CephAccess(user="nobody", conf=conf), r"client\.nobody \(its keyring is not there"),
        (CephAccess(user="vm", conf=conf, keyring=str(tmp_path / "wrong")), "its key is wrong"),
        (CephAccess(user="weak", conf=conf), "its capabilities do not allow it"),
        (CephAccess(conf="/nonexistent/ceph.conf"), r"ceph\.conf is not there"),
    ):
        with pytest.raises(CephRefused, match=why) as refused:
            await Ceph(who).image_info(image)
        assert key not in str(refused.value)
        with pytest.raises(CephRefused, match=why):
            await Ceph(who).blocklist_add([NOBODY])
    assert NOBODY not in ceph.blocklist()


async def test_a_client_without_any_capability_for_osds(ceph: Cluster, image: RbdDisk) -> None:
    """Law: Ceph 16 refuses it, Ceph 18 never answers it; an operator reads of the capability either way."""
    ceph.new_client("shut-out", {"mon": "allow r"})
    with pytest.raises(CephError) as told:
        await Ceph(CephAccess(user="shut-out", conf=str(ceph.conf)), answer_s=3.0).image_info(image)
    if isinstance(told.value, CephAway):
        assert "though its monitors do: no OSD does, or client.shut-out has no capability for OSDs" in str(told.value)
    else:
        assert isinstance(told.value, CephRefused)
        assert "its capabilities do not allow it" in str(told.value)


async def test_osds_that_do_not_answer(ceph: Cluster, vm: CephAccess, image: RbdDisk) -> None:
    """Law 4: it is "wait" as without monitors, and the message tells the two apart."""
    ceph.stop_osd()
    try:
        with pytest.raises(CephAway, match=r"though its monitors do: no OSD does, or client\.vm has no capability"):
            await Ceph(vm, answer_s=6.0).watchers(image)
    finally:
        ceph.thaw()


async def test_without_the_tools(vm: CephAccess, image: RbdDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a missing program is named, with the package that has it."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CephRefused, match=r"cannot start setpriv: no such program in PATH; it is in util-linux"):
        await Ceph(vm).image_info(image)


async def test_an_old_cluster_is_named(vm: CephAccess, tool: Callable[[str, str], None]) -> None:
    """Law: a cluster that still calls it `blacklist` is too old, and the message says so."""
    tool("ceph", 'printf "no valid command found; 1 closest matches:\\nosd blacklist ls\\n" >&2; exit 22')
    with pytest.raises(CephFailed, match="Ceph 16 or newer is needed"):
        await Ceph(vm).blocklist_ls()


@pytest.mark.parametrize("answer", ["", "nonsense", '{"watchers":[{"address":"?"}]}', "[]"])
async def test_nonsense_is_not_believed(vm: CephAccess, tool: Callable[[str, str], None], answer: str) -> None:
    """Law 3: an answer that is not understood is no answer."""
    tool("rbd", f"printf '%s' '{answer}'")
    with pytest.raises(CephFailed, match=r"`rbd status .*` says what is not understood: "):
        await Ceph(vm).watchers(RbdDisk(pool=POOL, image="x"))


async def test_the_tools_do_not_inherit_what_is_ours(
    vm: CephAccess, tool: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: variables of our Python or with secrets of ours do not reach programs for the system's Python."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("ETCD_PASSWORD_FILE", "/ours")
    tool("rbd", f"""env > {tmp_path}/env; echo '{{"watchers":[]}}'""")
    assert await Ceph(vm).watchers(RbdDisk(pool=POOL, image="x")) == frozenset()
    assert "/ours" not in (tmp_path / "env").read_text()


# --- the key --------------------------------------------------------------------------------------------------


async def test_the_key_is_found_where_the_client_would_look(ceph: Cluster, vm: CephAccess, tmp_path: Path) -> None:
    """Law: from the keyring that is set, otherwise from where ceph.conf says; it is the one that the cluster has."""
    key = ceph.ceph("auth", "get-key", "client.vm").strip()
    assert await Ceph(vm).key() == key
    (tmp_path / "keys").write_text(f"[client.vm]\nkey = {key}\n")
    assert await Ceph(CephAccess(user="vm", conf="/none", keyring=str(tmp_path / "keys"))).key() == key


async def test_a_missing_key_is_named_with_the_places(ceph: Cluster, tmp_path: Path) -> None:
    """Law: every place that was looked at, and why it is not there."""
    with pytest.raises(CephRefused, match=r"no key for client\.nobody \(.*client\.nobody\.keyring: No such file"):
        await Ceph(access(ceph, "nobody")).key()
    (tmp_path / "keys").write_text("[client.other]\n")
    with pytest.raises(CephRefused, match=r"keys: it has no key of \[client\.vm\]"):
        await Ceph(CephAccess(user="vm", keyring=str(tmp_path / "keys"))).key()


@pytest.mark.parametrize("hostile", ["--log-file={}/made", "-c{}/made", "--mon-host=v1:192.0.2.1:6789", "-"])
async def test_no_name_is_an_option_of_the_tool(ceph: Cluster, vm: CephAccess, hostile: str, tmp_path: Path) -> None:
    """Law: what a key says is an argument; the tool neither writes the file nor asks the monitor that it names."""
    name = hostile.format(tmp_path)
    for image in (RbdDisk(pool=name, image="a"), RbdDisk(pool=POOL, image=name)):
        with pytest.raises(NoSuchImage):
            await Ceph(vm).image_info(image)
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240 - it is one look


async def test_versions_are_told(vm: CephAccess) -> None:
    """Law: the client that fences may ask for the versions of all daemons; those of Debian 12 and 13 are too old."""
    found = await Ceph(vm).versions()
    assert found
    assert too_old(found) is not None
