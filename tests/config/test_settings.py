"""Settings: where they come from, what stops the start, and that the papers tell the truth about them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from kvmsupervisor.config.load import SettingsError, load_settings, origins
from kvmsupervisor.config.settings import SETTINGS, Settings
from kvmsupervisor.config.values import (
    Accel,
    CgroupKind,
    EtcdWallKind,
    Listen,
    LogFormat,
    LogLevel,
    MigrationKind,
    ReturnKind,
    Unfenced,
)
from kvmsupervisor.domain.keys import Layout

ROOT = Path(__file__).parents[2]
MISSING = Path("/nonexistent/kvmsupervisor.toml")


def load(environ: dict[str, str] | None = None, *, default_config: Path = MISSING) -> Settings:
    """Load with a host that is called node1 and has 4 CPUs."""
    return load_settings(environ or {}, default_config=default_config, hostname=lambda: "node1", cpus=lambda: 4)


def problems_of(environ: dict[str, str], *, default_config: Path = MISSING) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(environ, default_config=default_config)
    assert str(refused.value).splitlines() == [str(problem) for problem in refused.value.problems]
    return [str(problem) for problem in refused.value.problems]


def problem_of(environ: dict[str, str], *, default_config: Path = MISSING) -> str:
    (problem,) = problems_of(environ, default_config=default_config)
    return problem


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "kvmsupervisor.toml"


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """Path of a file that can be read."""
    path = tmp_path / "secret"
    path.write_text("x\n")
    return str(path)


def test_defaults() -> None:
    """Law: without any setting these are the values, worked out from the host and from each other."""
    found = load()
    assert found == Settings(
        etcd_endpoints=("http://127.0.0.1:2379",),
        etcd_cacert=None,
        etcd_cert=None,
        etcd_key=None,
        etcd_username=None,
        etcd_password_file=None,
        lock="/kvm/%i/lock",
        bridge_if=None,
        spice_addr="127.0.0.1",
        hostname=found.hostname,
        prefix="/kvm",
        facts_prefix="/kvmsupervisor",
        run_dir=Path("/run/kvmsupervisor"),
        listen=Listen(host="0.0.0.0", port=9746),
        web_listen=Listen(host="127.0.0.1", port=9747),
        web_names=None,
        web_config=None,
        web_people=None,
        web_trusted_proxy=None,
        web_etcd_username=None,
        web_etcd_password_file=None,
        web_etcd_cert=None,
        web_etcd_key=None,
        web_url=None,
        web_peer_ca=None,
        web_peer_cert=None,
        web_peer_key=None,
        console_group=None,
        accel=Accel.AUTO,
        qemu="qemu-system-x86_64",
        qemu_user=None,
        qemu_uids=None,
        qemu_sees=None,
        etcd_wall=EtcdWallKind.AUTO,
        cgroup=CgroupKind.AUTO,
        extra_flags=None,
        bridge_helper=None,
        memory_reserve_mib=512,
        state_dir=Path("/var/lib/kvmsupervisor"),
        disk_dir=Path("/var/lib/kvmsupervisor/disks"),
        image_dir=Path("/var/lib/kvmsupervisor/images"),
        image_max_bytes=256 << 30,
        ovmf_code=None,
        ovmf_vars=None,
        media_root=None,
        media_cacert=None,
        media_inward_redirects=False,
        ceph_conf=None,
        ceph_id=None,
        supervisor_ceph_id=None,
        allow_unfenced=False,
        unfenced=Unfenced.PIN,
        takeover_wait_s=60.0,
        migration=MigrationKind.AUTO,
        migration_listen=None,
        migration_bandwidth_mib=0,
        migration_parallel=1,
        drain_any=False,
        return_=ReturnKind.ASKED,
        session_ttl_s=15,
        shutdown_timeout_s=120.0,
        start_timeout_s=60.0,
        settle_s=0.5,
        start_parallel=8,
        mass_removal_window_s=10.0,
        log_level=LogLevel.INFO,
        log_format=LogFormat.AUTO,
        log_max_bytes=1 << 20,
        log_keep=3,
        demo_once=False,
        config=MISSING,
    )
    assert found.hostname == "node1"
    assert found.layout == Layout()


def test_derived_defaults_follow_the_prefix() -> None:
    """Law: another prefix takes the lock and the facts with it."""
    found = load({"KVM_PREFIX": "/lab/vms/"})
    assert found.layout == Layout(prefix="/lab/vms", facts="/lab/vmssupervisor", lock="/lab/vms/%i/lock")


def test_environment_over_file_over_defaults(toml: Path) -> None:
    """Law: a variable wins over the file and the file over the default; numbers may stand bare."""
    toml.write_text(
        'session_ttl = 20\nsettle = 0.25\naccel = "tcg"\nbridge_if = "br0"\netcd_endpoints = ["http://a:1", "b:2"]\n'
    )
    found = load({"KVM_ACCEL": " kvm ", "BRIDGE_IF": ""}, default_config=toml)
    assert (found.session_ttl_s, found.settle_s, found.accel) == (20, 0.25, Accel.KVM)
    assert found.bridge_if == "br0"
    assert found.etcd_endpoints == ("http://a:1", "http://b:2")
    assert found.config == toml
    assert load({"KVM_CONFIG": str(toml)}).session_ttl_s == 20


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("ETCD_ENDPOINTS", "https://A:1/, 10.0.0.2:2379", "etcd_endpoints", ("https://a:1", "http://10.0.0.2:2379")),
        ("ETCD_ENDPOINTS", "etcd1,https://[::1]", "etcd_endpoints", ("http://etcd1:2379", "https://[::1]:2379")),
        ("LOCK", "/locks/%i", "lock", "/locks/%i"),
        ("BRIDGE_IF", "qemu0", "bridge_if", "qemu0"),
        ("SPICE_ADDR", "::1", "spice_addr", "::1"),
        ("SPICE_ADDR", "node1.lan", "spice_addr", "node1.lan"),
        ("KVM_HOSTNAME", "other", "hostname", "other"),
        ("KVM_FACTS_PREFIX", "/facts/", "facts_prefix", "/facts"),
        ("KVM_RUN_DIR", "/run/k/", "run_dir", Path("/run/k")),
        ("KVM_LISTEN", "[::]:0", "listen", Listen(host="::", port=0)),
        ("KVM_LISTEN", "localhost:80", "listen", Listen(host="localhost", port=80)),
        ("KVM_LISTEN", "off", "listen", None),
        ("KVM_LISTEN", " ", "listen", None),
        ("KVM_QEMU", "/opt/qemu", "qemu", "/opt/qemu"),
        ("KVM_SESSION_TTL", "2", "session_ttl_s", 2),
        ("KVM_SHUTDOWN_TIMEOUT", "1.5", "shutdown_timeout_s", 1.5),
        ("KVM_START_PARALLEL", "3", "start_parallel", 3),
        ("KVM_LOG_MAX_BYTES", "64K", "log_max_bytes", 65_536),
        ("KVM_LOG_MAX_BYTES", "1 MiB", "log_max_bytes", 1 << 20),
        ("KVM_LOG_MAX_BYTES", "5000", "log_max_bytes", 5000),
        ("KVM_LOG_LEVEL", "debug", "log_level", LogLevel.DEBUG),
        ("KVM_UNFENCED", "guard", "unfenced", Unfenced.GUARD),
        ("KVM_DEMO_ONCE", "1", "demo_once", True),
    ],
)
def test_good_values(variable: str, text: str, field: str, value: object) -> None:
    """Law: each setting arrives in its own form."""
    assert getattr(load({variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ETCD_ENDPOINTS", ""),
        ("ETCD_ENDPOINTS", "http://a:1,"),
        ("ETCD_ENDPOINTS", "ftp://a:1"),
        ("ETCD_ENDPOINTS", "http://a:1/v3"),
        ("ETCD_ENDPOINTS", "http://a:99999"),
        ("ETCD_ENDPOINTS", "http://u:p@a:1"),
        ("ETCD_ENDPOINTS", "http://[::1"),
        ("ETCD_ENDPOINTS", "http://a b:1"),
        ("ETCD_PASSWORD_FILE", "/nonexistent/password"),
        ("ETCD_PASSWORD_FILE", "relative"),
        ("ETCD_PASSWORD_FILE", "/"),
        ("ETCD_CACERT", "/a\0b"),
        ("LOCK", "/kvm/lock"),
        ("LOCK", "/kvm/%i/%i"),
        ("LOCK", "/kvm/%n/lock"),
        ("LOCK", "kvm/%i/lock"),
        ("LOCK", "/kvm/%i/lock/"),
        ("LOCK", "/kvm/%i/ram"),
        ("LOCK", "/kvmsupervisor/instances/%i"),
        ("BRIDGE_IF", "a/b"),
        ("SPICE_ADDR", "300.1.1.1"),
        ("SPICE_ADDR", "::g"),
        ("SPICE_ADDR", "a,disable-ticketing=on"),
        ("KVM_HOSTNAME", "a b"),
        ("KVM_PREFIX", ""),
        ("KVM_PREFIX", "/"),
        ("KVM_PREFIX", "kvm"),
        ("KVM_PREFIX", "/a//b"),
        ("KVM_PREFIX", "/a b"),
        ("KVM_PREFIX", "/%i"),
        ("KVM_FACTS_PREFIX", "/kvm"),
        ("KVM_FACTS_PREFIX", "/kvm/facts"),
        ("KVM_RUN_DIR", "run"),
        ("KVM_RUN_DIR", "/run/../k"),
        ("KVM_RUN_DIR", "/run/a-name-that-is-too-long-for-it"),
        ("KVM_LISTEN", "9746"),
        ("KVM_LISTEN", ":9746"),
        ("KVM_LISTEN", "::1:9746"),
        ("KVM_LISTEN", "127.0.0.1:65536"),
        ("KVM_LISTEN", "[::g]:1"),
        ("KVM_ACCEL", "KVM"),
        ("KVM_QEMU", "./qemu"),
        ("KVM_QEMU", "a\nb"),
        ("KVM_SESSION_TTL", "1"),
        ("KVM_SESSION_TTL", "2.5"),
        ("KVM_SHUTDOWN_TIMEOUT", "nan"),
        ("KVM_START_TIMEOUT", "0"),
        ("KVM_SETTLE", "61"),
        ("KVM_START_PARALLEL", "0"),
        ("KVM_MASS_REMOVAL_WINDOW", "-1"),
        ("KVM_LOG_LEVEL", "loud"),
        ("KVM_LOG_FORMAT", "xml"),
        ("KVM_LOG_MAX_BYTES", "1"),
        ("KVM_LOG_MAX_BYTES", "2G"),
        ("KVM_LOG_MAX_BYTES", "many"),
        ("KVM_LOG_KEEP", "-1"),
        ("KVM_UNFENCED", "kill"),
        ("KVM_DEMO_ONCE", "yes"),
    ],
)
def test_bad_values(variable: str, text: str) -> None:
    """Law: a bad value is one problem, which begins with the variable and never repeats a password."""
    said = [line for line in problems_of({variable: text}) if "needs it" not in line and "do nothing" not in line]
    assert len(said) == 1
    assert said[0].startswith(f"{variable}: found ")
    assert "u:p" not in said[0]


def test_every_problem_is_named_at_once(toml: Path) -> None:
    """Law: unknown names, bad values and what contradicts itself, in the environment and the file, all at once."""
    toml.write_text('session_tll = 1\nprefix = "kvm"\nsettle = true\n')
    said = problems_of(
        {
            "KVM_CONFIG": str(toml),
            "KVM_HOSTNMAE": "a",
            "KVM_LOCK": "/kvm/%i/lock",
            "KVM_FROBNICATE": "1",
            "KVM_ACCEL": "hvf",
            "ETCD_USERNAME": "kvm",
            "LD_LIBRARY_PATH": "/x",
        }
    )
    assert said == [
        "KVM_FROBNICATE: found an unknown variable; no setting has this name; docs/settings.md lists them all",
        "KVM_HOSTNMAE: found an unknown variable; did you mean KVM_HOSTNAME?",
        "KVM_LOCK: found an unknown variable; did you mean LOCK?",
        f"{toml}: session_tll: found an unknown key; did you mean session_ttl?",
        f"{toml}: prefix: found 'kvm'; it is a key prefix such as /kvm: begins with '/', no '//', "
        "no white space, no '%'",
        "KVM_ACCEL: found 'hvf'; it is auto, kvm or tcg",
        f"{toml}: settle: found 'True'; it is a string or a number",
        "ETCD_PASSWORD_FILE: found nothing; ETCD_USERNAME is set and needs it",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ETCD_CA_CERT", "ETCD_CACERT"),
        ("ETCD_ENDPOINT", "ETCD_ENDPOINTS"),
        ("ETCD_PASSWORD", "ETCD_PASSWORD_FILE"),
        ("ETCD_USER_NAME", "ETCD_USERNAME"),
    ],
)
def test_slips_of_etcd_variables(name: str, meant: str) -> None:
    """Law: a slip that would turn TLS or authentication off in silence stops the start."""
    assert problem_of({name: "x"}) == f"{name}: found an unknown variable; did you mean {meant}?"


def test_variables_of_others_are_left_alone() -> None:
    """Law: what etcd itself and container platforms put into the environment does not matter."""
    names = ("ETCD_NAME", "ETCD_PORT", "ETCD_CERT_FILE", "ETCD_KEY_FILE", "ETCD_SERVICE_HOST", "ETCD_DATA_DIR")
    assert load(dict.fromkeys((*names, "ETCDCTL_CACERT", "LOCKS", "KVMX"), "x")) == load()


def test_etcd_options_come_in_pairs(secret: str) -> None:
    """Law: certificate and key, user and password need each other."""
    https = {"ETCD_ENDPOINTS": "https://a:2379"}
    for one, other in (("ETCD_CERT", "ETCD_KEY"), ("ETCD_KEY", "ETCD_CERT"), ("ETCD_PASSWORD_FILE", "ETCD_USERNAME")):
        assert problem_of({**https, one: secret}) == f"{other}: found nothing; {one} is set and needs it"
    both = load({**https, "ETCD_CERT": secret, "ETCD_KEY": secret, "ETCD_CACERT": secret})
    assert both.etcd_cert == both.etcd_key == both.etcd_cacert == Path(secret)


def test_guests_with_clients_of_their_own_need_one_beside() -> None:
    """Law: with %i in CEPH_ID the supervisor's own client is named, and is one for all."""
    assert problem_of({"CEPH_ID": "kvm-%i"}) == (
        "KVM_SUPERVISOR_CEPH_ID: found nothing; CEPH_ID is kvm-%i, the users of guests: this names the user of their "
        "supervisor, such as kvm"
    )
    said = problem_of({"CEPH_ID": "kvm-%i", "KVM_SUPERVISOR_CEPH_ID": "kvm-%i"})
    assert said == "KVM_SUPERVISOR_CEPH_ID: found 'kvm-%i'; it is one user for all instances, without %i"
    both = load({"CEPH_ID": "kvm-%i", "KVM_SUPERVISOR_CEPH_ID": "kvm"})
    assert (both.ceph_id, both.supervisor_ceph_id) == ("kvm-%i", "kvm")
    assert load({"CEPH_ID": "kvm"}).supervisor_ceph_id is None


def test_tls_needs_https(secret: str) -> None:
    """Law: certificates that would not be used are a problem; one https endpoint is enough to use them."""
    assert "with http endpoints it would do nothing" in problem_of({"ETCD_CACERT": secret})
    load({"ETCD_CACERT": secret, "ETCD_ENDPOINTS": "http://a:1,https://b:1"})


def test_the_lock_may_lie_elsewhere() -> None:
    """Law: locks may lie below the facts, if not among the sessions and statuses."""
    assert load({"LOCK": "/kvmsupervisor/locks/%i"}).layout.locks_prefix() == "/kvmsupervisor/locks/"


def test_listen_as_text() -> None:
    """Law: an address is written as it was read, IPv6 in brackets."""
    assert [str(load({"KVM_LISTEN": text}).listen) for text in ("[::1]:80", "0.0.0.0:80")] == [
        *("[::1]:80", "0.0.0.0:80")
    ]


def test_the_prefix_does_not_lie_below_the_facts() -> None:
    """Law: neither prefix lies below the other."""
    assert problem_of({"KVM_PREFIX": "/a/kvm", "KVM_FACTS_PREFIX": "/a"}).startswith("KVM_FACTS_PREFIX: ")


def test_run_dir_just_fits() -> None:
    """Law: the longest socket path below the run directory has at most 107 bytes."""
    longest = "/" + "r" * (107 - len("/" + "i" * 63 + "/qmp-spare.sock") - 1)
    assert load({"KVM_RUN_DIR": longest}).run_dir == Path(longest)
    assert "at most 28 bytes" in problem_of({"KVM_RUN_DIR": longest + "r"})


def test_a_host_that_has_no_usable_name() -> None:
    """Law: a host's own name is held to the rule, and the problem says which setting mends it."""
    with pytest.raises(SettingsError, match=r"^KVM_HOSTNAME: found nothing, and the host calls itself 'a b'; set it"):
        load_settings({}, default_config=MISSING, hostname=lambda: "a b")
    assert load_settings({"KVM_HOSTNAME": "a"}, default_config=MISSING, hostname=lambda: "a b").hostname == "a"


def test_unknown_number_of_cpus() -> None:
    """Law: a host that does not know its CPUs counts as having one."""
    assert load_settings({}, default_config=MISSING, hostname=lambda: "a", cpus=lambda: None).start_parallel == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prefix = ", "no TOML"),
        (b"\xff", "no TOML"),
        (b"[etcd]\nendpoints = 1", "etcd: found an unknown key"),
        (b"KVM_RUN_DIR = '/x'", "KVM_RUN_DIR: found an unknown key; did you mean run_dir?"),
        (b"demo_once = 1", "demo_once: found an unknown key"),
        (b"config = '/x'", "config: found an unknown key"),
        (b"prefix = []", "prefix: found '[]'; it is a string or a number"),
        (b"lock = 1979-05-27", "it is a string or a number"),
        (b"etcd_endpoints = [1]", "it is a list of strings, or a string"),
        (b"etcd_endpoints = []", "it is not empty"),
        (b"bridge_if = ''", "it is not empty"),
    ],
)
def test_bad_files(toml: Path, content: bytes, said: str) -> None:
    """Law: a file that is no TOML, has a key that nobody knows or a value of the wrong kind stops the start."""
    toml.write_bytes(content)
    problem = problem_of({}, default_config=toml)
    assert problem.startswith(str(toml))
    assert said in problem


def test_named_files_must_exist(tmp_path: Path) -> None:
    """Law: the file that KVM_CONFIG names must exist and be a file; the default one may be missing."""
    assert problem_of({"KVM_CONFIG": str(MISSING)}) == f"KVM_CONFIG: found '{MISSING}'; it names a file that exists"
    assert "no readable file" in problem_of({}, default_config=tmp_path)


def test_each_setting_is_whole() -> None:
    """Law: each field of `Settings` has an explanation, an example and a variable of its own; times say their unit."""
    assert [setting.name for setting in SETTINGS] == [field.name for field in fields(Settings)]
    assert len({setting.env for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.help.endswith(".")
        assert setting.example
        assert setting.name.endswith("_s") == setting.help.startswith("Seconds ")


def test_page_and_example_file_are_the_declarations() -> None:
    """Law: docs/settings.md and config/kvmsupervisor.toml tell every setting as it is declared."""
    told = subprocess.run(
        [sys.executable, ROOT / "tools" / "settings-pages", "--check"], capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


def test_origins(toml: Path) -> None:
    """Law: where a setting comes from is where `load_settings` reads it, empty variables included."""
    toml.write_text("bridge_if = 'br0'\nsession_ttl = 20\n")
    environ = {"BRIDGE_IF": "", "KVM_LISTEN": "", "KVM_ACCEL": "tcg", "KVM_CONFIG": str(toml)}
    found = origins(environ)
    assert load(environ).bridge_if == "br0"
    assert {name: origin for name, origin in found.items() if origin != "default"} == {
        "bridge_if": str(toml),
        "session_ttl_s": str(toml),
        "listen": "environment",
        "accel": "environment",
        "config": "environment",
    }


def test_the_example_file_holds_the_defaults(toml: Path) -> None:
    """Law: with its comment signs taken away, each setting that has a fixed default has that default."""
    example = (ROOT / "config" / "kvmsupervisor.toml").read_text()
    assert tomllib.loads(example) == {}
    lines = re.findall(r"^#(\w+ = .*)$", example, flags=re.MULTILINE)
    fixed = {setting.toml_key for setting in SETTINGS if setting.default is not None}
    toml.write_text("\n".join(line for line in lines if line.split(" = ")[0] in fixed))
    assert load({"KVM_CONFIG": str(toml)}) == load({}, default_config=toml)
    found, default = load({}, default_config=toml), load()
    assert {f.name for f in fields(Settings) if getattr(found, f.name) != getattr(default, f.name)} == {"config"}
