"""What can be set: of each setting its name, its parser, its default and its explanation.

`check-config`, the example file and the page of the settings are held against `SETTINGS`. How a value is found
is the business of `config/settings.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvmsupervisor.config import values as read
from kvmsupervisor.domain import values
from kvmsupervisor.domain.frozen import frozen

DEFAULT_CONFIG = Path("/etc/kvmsupervisor/kvmsupervisor.toml")


@frozen(kw_only=True)
class Setting:
    """One setting, as `describe` tells it.

    Attributes:
        name: the field of `Settings`.
        env: the environment variable.
        toml_key: the key of the TOML file, None when only the environment can say it.
        default: as text that could be written; None when there is none, or when it is worked out.
        shown_default: the default for people.
        example: a value for the example file, where `default` is None.
        help: one or two sentences.
        parse: from text without surrounding white space; raises `Unfit`.
        may_be_empty: whether empty text means something.
    """

    name: str
    env: str
    toml_key: str | None
    default: str | None
    shown_default: str
    example: str
    help: str
    parse: Callable[[str], object]
    may_be_empty: bool = False


def _setting(
    name: str,
    parse: Callable[[str], object],
    help_text: str,
    *,
    default: str | None = None,
    shown: str | None = None,
    example: str = "",
    kvm: bool = True,
    in_file: bool = True,
    may_be_empty: bool = False,
) -> Setting:
    """A setting, its names made of that of the field: `settle_s` is `KVM_SETTLE` and `settle`."""
    word = name.removesuffix("_s").removesuffix("_mib")
    return Setting(
        name=name,
        env=f"KVM_{word}".upper() if kvm else word.upper(),
        toml_key=word if in_file else None,
        default=default,
        shown_default=shown or default or "not set",
        example=default or example,
        help=help_text,
        parse=parse,
        may_be_empty=may_be_empty,
    )


SETTINGS: tuple[Setting, ...] = (
    _setting(
        "etcd_endpoints",
        read.endpoints,
        "URLs of etcd's members, separated by commas. HOST:PORT is taken as http.",
        default="http://127.0.0.1:2379",
        kvm=False,
    ),
    _setting(
        "etcd_cacert",
        read.file,
        "Certificates of the authority that etcd's own certificates are checked against (PEM).",
        example="/etc/kvmsupervisor/etcd-ca.pem",
        kvm=False,
    ),
    _setting(
        "etcd_cert",
        read.file,
        "This client's certificate (PEM). Needs ETCD_KEY.",
        example="/etc/kvmsupervisor/etcd-client.pem",
        kvm=False,
    ),
    _setting(
        "etcd_key",
        read.file,
        "The key of ETCD_CERT (PEM).",
        example="/etc/kvmsupervisor/etcd-client-key.pem",
        kvm=False,
    ),
    _setting(
        "etcd_username",
        read.line,
        "User of etcd's own authentication. Needs ETCD_PASSWORD_FILE.",
        example="kvm",
        kvm=False,
    ),
    _setting(
        "etcd_password_file",
        read.file,
        "File that holds the password of ETCD_USERNAME; a line feed at its end does not count.",
        example="/etc/kvmsupervisor/etcd-password",
        kvm=False,
    ),
    _setting(
        "lock",
        read.lock,
        "Key of an instance's lock; %i stands for its id. The same on all hosts.",
        shown="KVM_PREFIX + /%i/lock",
        example="/kvm/%i/lock",
        kvm=False,
    ),
    _setting(
        "bridge_if",
        values.interface_name,
        "Bridge of the NICs of instances without the key bridge.",
        example="br0",
        kvm=False,
    ),
    _setting(
        "spice_addr",
        read.address,
        "Address on which the SPICE servers of guests listen, without the key spice_addr.",
        default="127.0.0.1",
        kvm=False,
    ),
    _setting(
        "hostname",
        values.host_name,
        "Name of this host: instances whose key host holds exactly this run here.",
        shown="the host's name",
        example="node1",
    ),
    _setting("prefix", read.key_prefix, "Prefix of the wishes in etcd. The same on all hosts.", default="/kvm"),
    _setting(
        "facts_prefix",
        read.key_prefix,
        "Prefix of sessions and statuses in etcd, outside KVM_PREFIX. The same on all hosts.",
        shown="KVM_PREFIX with supervisor appended",
        example="/kvmsupervisor",
    ),
    _setting(
        "run_dir",
        read.run_dir,
        "Folder of what a successor needs to adopt running guests: the host's, on a tmpfs.",
        default="/run/kvmsupervisor",
    ),
    _setting(
        "listen",
        read.listen,
        "Address and port of the HTTP server, IPv6 in brackets; empty or off for none.",
        default="0.0.0.0:9746",
        may_be_empty=True,
    ),
    _setting(
        "accel",
        values.choice(read.Accel, "it"),
        "Accelerator: kvm, tcg (slow, works anywhere) or auto (kvm where /dev/kvm works).",
        default="auto",
    ),
    _setting("qemu", read.program, "QEMU's program, a name or an absolute path.", default="qemu-system-x86_64"),
    _setting(
        "qemu_user",
        read.user,
        "User that QEMU runs as, confined by seccomp, without any privilege. Empty: as the supervisor, not confined.",
        shown="qemu, where that user exists",
        example="qemu",
        may_be_empty=True,
    ),
    _setting(
        "cgroup",
        values.choice(read.CgroupKind, "it"),
        "What QEMU lives in: systemd (a scope in machine.slice), cgroup (the host's tree), none, or auto (tries them).",
        default="auto",
    ),
    _setting(
        "extra_flags",
        read.flags,
        "Which QEMU options the key extra_flags may hold: any, none, or a list of options separated by commas.",
        default="any",
    ),
    _setting(
        "bridge_helper",
        read.program_file,
        "QEMU's program qemu-bridge-helper, which plugs NICs into bridges.",
        shown="looked for where distributions install it",
        example="/usr/lib/qemu/qemu-bridge-helper",
    ),
    _setting(
        "memory_reserve_mib",
        read.ram_mib,
        "Memory that is kept for the host: guests that would not fit into the rest wait.",
        default="512M",
    ),
    _setting(
        "state_dir",
        read.absolute,
        "Folder of what outlives a boot: UEFI variables of machines without a disk in Ceph.",
        default="/var/lib/kvmsupervisor",
    ),
    _setting(
        "ovmf_code",
        read.file,
        "UEFI firmware for firmware=uefi. Needs KVM_OVMF_VARS.",
        shown="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_CODE_4M.fd",
    ),
    _setting(
        "ovmf_vars",
        read.file,
        "The UEFI variables that new machines begin with, made for KVM_OVMF_CODE.",
        shown="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    _setting(
        "media_root",
        read.absolute,
        "Folder below which the key cloud-config may name files (file:///...). Without it only http and https.",
        example="/etc/kvmsupervisor/user-data",
    ),
    _setting(
        "media_cacert",
        read.file,
        "Certificates of authorities (PEM), beside the system's, that servers of user data are checked against.",
        example="/etc/kvmsupervisor/media-ca.pem",
    ),
    _setting(
        "media_inward_redirects",
        read.switch,
        "1: a server of user data may redirect to this host's own addresses (loopback, link-local), too.",
        default="0",
    ),
    _setting(
        "ceph_conf",
        read.absolute,
        "Ceph's configuration file.",
        shown="librbd's own default, /etc/ceph/ceph.conf",
        example="/etc/ceph/ceph.conf",
        kvm=False,
    ),
    _setting(
        "ceph_id",
        read.ceph_user,
        "Name of the Ceph user, without client. before it.",
        shown="librbd's own default, admin",
        example="kvm",
        kvm=False,
    ),
    _setting(
        "allow_unfenced",
        read.switch,
        "1: images without exclusive-lock may be used, although a client that is frozen then leaves no trace.",
        default="0",
    ),
    _setting(
        "unfenced",
        values.choice(read.Unfenced, "it"),
        "What becomes of machines whose disks cannot be fenced when this host's session has run out: pin (they run on) "
        "or guard (they are killed, also while an upgrade takes longer than KVM_SESSION_TTL).",
        default="pin",
    ),
    _setting(
        "takeover_wait_s",
        values.seconds(0, 3600, "it"),
        "Seconds that a takeover waits while Ceph says that the disks are in use: the host may have lost etcd only.",
        default="60",
    ),
    _setting(
        "session_ttl_s",
        values.integer(2, 3600, "it"),
        "Seconds after which a host that has gone silent counts as gone.",
        default="15",
    ),
    _setting(
        "shutdown_timeout_s",
        values.seconds(0, values.SHUTDOWN_TIMEOUT_MAX_S, "it"),
        "Seconds that a guest has to shut down before it is forced, without the key shutdown_timeout.",
        default="120",
    ),
    _setting(
        "start_timeout_s",
        values.seconds(1, 3600, "it"),
        "Seconds within which a started QEMU must answer.",
        default="60",
    ),
    _setting(
        "settle_s",
        values.seconds(0, 60, "it"),
        "Seconds that new or changed keys must be quiet before their guest first runs: people write them one by one. "
        "Keys that came in one transaction, or whose `host` was written last, are complete: their guest runs at once.",
        default="0.5",
    ),
    _setting(
        "start_parallel",
        values.integer(1, 1024, "it"),
        "How many QEMUs are being started at one time.",
        shown="twice the number of CPUs",
        example="8",
    ),
    _setting(
        "mass_removal_window_s",
        values.seconds(0, 3600, "it"),
        "Seconds within which the removal of more than half of this host's running instances (and more than two) is "
        "held for confirmation.",
        default="10",
    ),
    _setting(
        "log_level",
        values.choice(read.LogLevel, "it"),
        "The least that is logged: debug, info, warning or error.",
        default="info",
    ),
    _setting(
        "log_format",
        values.choice(read.LogFormat, "it"),
        "json, console, or auto: console on a terminal, else json.",
        default="auto",
    ),
    _setting(
        "log_max_bytes",
        read.log_size,
        "Size at which the logs of QEMU and of the console are rotated, in bytes or with K, M or G (of 1024).",
        default="1M",
    ),
    _setting(
        "log_keep",
        values.integer(0, 100, "it"),
        "How many rotated logs of each kind are kept.",
        default="3",
    ),
    _setting(
        "config",
        read.absolute,
        "The TOML file. Without this variable it may be missing.",
        default=str(DEFAULT_CONFIG),
        in_file=False,
    ),
    _setting(
        "demo_once",
        read.switch,
        "1: `kvmsupervisor demo` ends when its guest has said hello and was shut down.",
        default="0",
        in_file=False,
    ),
)
