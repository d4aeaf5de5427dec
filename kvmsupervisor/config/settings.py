"""The settings of a host: each is declared once, as a field of `Settings`.

The dataclass, `load_settings`, `check-config`, docs/settings.md and config/kvmsupervisor.toml come from these
declarations; `make settings` writes the last two. `config/load.py` finds the values.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from kvmsupervisor.config import values as read
from kvmsupervisor.config.declaration import Setting, optional_setting, setting
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
from kvmsupervisor.domain import values
from kvmsupervisor.domain.flags import AllowedFlags
from kvmsupervisor.domain.frozen import frozen
from kvmsupervisor.domain.keys import HostName, Layout
from kvmsupervisor.domain.local_disk import disk_size
from kvmsupervisor.domain.uids import DEFAULT_UIDS, UidRange

DEFAULT_CONFIG = Path("/etc/kvmsupervisor/kvmsupervisor.toml")

DISK_DIR = Path("/var/lib/kvmsupervisor/disks")
"""Folder of the disks that are files, unless a host says otherwise."""

IMAGE_DIR = Path("/var/lib/kvmsupervisor/images")
"""Folder of the image library's files, likewise."""


@frozen(kw_only=True)
class Settings:
    """All settings, parsed. Times are in seconds and end in `_s`."""

    etcd_endpoints: tuple[str, ...] = setting(
        read.endpoints,
        "URLs of etcd's members, separated by commas. HOST:PORT is taken as http.",
        default="http://127.0.0.1:2379",
        kvm=False,
    )
    etcd_cacert: Path | None = optional_setting(
        read.file,
        "Certificates of the authority that etcd's own certificates are checked against (PEM).",
        example="/etc/kvmsupervisor/etcd-ca.pem",
        kvm=False,
    )
    etcd_cert: Path | None = optional_setting(
        read.file,
        "This client's certificate (PEM). Needs ETCD_KEY.",
        example="/etc/kvmsupervisor/etcd-client.pem",
        kvm=False,
    )
    etcd_key: Path | None = optional_setting(
        read.file,
        "The key of ETCD_CERT (PEM).",
        example="/etc/kvmsupervisor/etcd-client-key.pem",
        kvm=False,
    )
    etcd_username: str | None = optional_setting(
        read.line,
        "User of etcd's own authentication. Needs ETCD_PASSWORD_FILE.",
        example="kvm",
        kvm=False,
    )
    etcd_password_file: Path | None = optional_setting(
        read.file,
        "File that holds the password of ETCD_USERNAME; a line feed at its end does not count.",
        example="/etc/kvmsupervisor/etcd-password",
        kvm=False,
    )
    lock: str = setting(
        read.lock,
        "Key of an instance's lock; %i stands for its id. The same on all hosts.",
        worked_out="KVM_PREFIX + /%i/lock",
        example="/kvm/%i/lock",
        kvm=False,
    )
    bridge_if: str | None = optional_setting(
        values.interface_name,
        "Bridge of the NICs of instances without the key bridge.",
        example="br0",
        kvm=False,
    )
    spice_addr: str = setting(
        read.address,
        "Address on which the SPICE servers of guests listen, without the key spice_addr.",
        default="127.0.0.1",
        kvm=False,
    )
    hostname: HostName = setting(
        read.hostname,
        "Name of this host. The instances whose key host has exactly this value run here.",
        worked_out="the host's name",
        example="node1",
    )
    prefix: str = setting(
        read.key_prefix,
        "Prefix of the wishes in etcd. The same on all hosts.",
        default="/kvm",
    )
    facts_prefix: str = setting(
        read.key_prefix,
        "Prefix of sessions and statuses in etcd, outside KVM_PREFIX. The same on all hosts.",
        worked_out="KVM_PREFIX with supervisor appended",
        example="/kvmsupervisor",
    )
    run_dir: Path = setting(
        read.run_dir,
        "Folder of the files that a successor needs to adopt running guests. It lies on a tmpfs of the host.",
        default="/run/kvmsupervisor",
    )
    listen: Listen | None = setting(
        read.listen,
        "Address and port of the HTTP server, IPv6 in brackets; empty or off for none.",
        default="0.0.0.0:9746",
        may_be_empty=True,
    )
    web_listen: Listen = setting(
        read.web_listen,
        "Address and port of `kvmsupervisor web`, IPv6 in brackets. It shows the cluster to whoever reaches it.",
        default="127.0.0.1:9747",
    )
    web_names: tuple[str, ...] | None = optional_setting(
        read.web_names,
        "Names by which browsers call `kvmsupervisor web`, separated by commas, beside IP addresses, localhost and "
        "KVM_HOSTNAME; * for any. Another name is refused: a page from elsewhere could have it point here.",
        unset="no other",
        example="vms.example.org",
    )
    web_config: Path | None = optional_setting(
        read.absolute,
        "Web configuration file of `kvmsupervisor web`, in the format of Prometheus' exporters: TLS, client "
        "certificates, users and bcrypt hashes. Read again when it changes.",
        unset="plain HTTP, and nobody is asked who they are",
        example="/etc/kvmsupervisor/web.yml",
    )
    web_people: Path | None = optional_setting(
        read.absolute,
        "File that says who may do more than look on that page (roles), and has the tokens of programs. Read again "
        "when it changes.",
        unset="everybody may look, and no more",
        example="/etc/kvmsupervisor/web-people.yml",
    )
    web_trusted_proxy: tuple[str, ...] | None = optional_setting(
        read.networks,
        "Addresses or networks, separated by commas, of proxies whose X-Remote-User names the person, and whose "
        "X-Forwarded-For the client. Whoever reaches the page from there can be anybody.",
        unset="no proxy's word is taken",
        example="10.0.0.2",
    )
    web_etcd_username: str | None = optional_setting(
        read.line,
        "User of etcd as whom that page writes wishes, with the role operator, beside ETCD_USERNAME, as whom it "
        "reads. Needs KVM_WEB_ETCD_PASSWORD_FILE.",
        unset="as it reads",
        example="web-operator",
    )
    web_etcd_password_file: Path | None = optional_setting(
        read.absolute,
        "File that holds the password of KVM_WEB_ETCD_USERNAME.",
        example="/etc/kvmsupervisor/web-etcd-password",
    )
    web_etcd_cert: Path | None = optional_setting(
        read.absolute,
        "Certificate (PEM) as whose owner that page writes wishes, beside ETCD_CERT. Needs KVM_WEB_ETCD_KEY.",
        unset="as it reads",
        example="/etc/kvmsupervisor/web-operator.pem",
    )
    web_etcd_key: Path | None = optional_setting(
        read.absolute,
        "The key of KVM_WEB_ETCD_CERT (PEM).",
        example="/etc/kvmsupervisor/web-operator-key.pem",
    )
    web_url: str | None = optional_setting(
        read.web_url,
        "Where the page of this host answers the pages of other hosts, for consoles of guests that run here. The "
        "supervisor publishes it.",
        unset="only this host's own page has consoles of its guests",
        example="https://node1.example.org:9747",
    )
    web_peer_ca: Path | None = optional_setting(
        read.absolute,
        "CA (PEM) of the certificates of other hosts' pages.",
        example="/etc/kvmsupervisor/web-ca.pem",
    )
    web_peer_cert: Path | None = optional_setting(
        read.absolute,
        "Certificate (PEM) that this page shows to those of other hosts, which know it as cert:NAME.",
        example="/etc/kvmsupervisor/web-node1.pem",
    )
    web_peer_key: Path | None = optional_setting(
        read.absolute,
        "The key of KVM_WEB_PEER_CERT (PEM).",
        example="/etc/kvmsupervisor/web-node1-key.pem",
    )
    console_group: str | None = optional_setting(
        read.group,
        "Group whose members may ask the supervisor for consoles of its guests, by name or number: that of the user of "
        "`kvmsupervisor web`. Empty: nobody but root may.",
        unset="kvmsupervisor-consoles, where that exists",
        example="kvmsupervisor-consoles",
        may_be_empty=True,
    )
    accel: Accel = setting(
        values.choice(read.Accel, "it"),
        "Accelerator: kvm, tcg (slow, works anywhere) or auto (kvm where /dev/kvm works).",
        default="auto",
    )
    qemu: str = setting(
        read.program,
        "QEMU's program, a name or an absolute path.",
        default="qemu-system-x86_64",
    )
    qemu_user: str | None = optional_setting(
        read.user,
        "One user that all QEMUs run as, instead of a user for each. Empty: as the supervisor, not confined.",
        unset="a user for each, from KVM_QEMU_UIDS",
        example="qemu",
        may_be_empty=True,
    )
    qemu_uids: UidRange | None = optional_setting(
        read.uids,
        "Range of user and group ids, first-last, from which each QEMU has one of its own. No account, container or "
        "other supervisor of this host may use them.",
        unset=str(DEFAULT_UIDS),
        example=str(DEFAULT_UIDS),
    )
    qemu_sees: tuple[str, ...] | None = optional_setting(
        read.paths,
        "Further folders and files, separated by commas, that all QEMUs see, for reading: backing files of images that "
        "extra_flags names, or a QEMU's libraries in an unusual place. / is everything, which opens this wall.",
        unset="nothing more",
        example="/srv/images,/opt/qemu",
    )
    etcd_wall: EtcdWallKind = setting(
        values.choice(EtcdWallKind, "it"),
        "Whether a rule of the host's packet filter (nftables, a table of its own) keeps QEMUs from etcd's ports and "
        "from KVM_LISTEN's: auto (where nft and the rights for it are there) or off.",
        default="auto",
    )
    cgroup: CgroupKind = setting(
        values.choice(read.CgroupKind, "it"),
        "Where QEMU processes live: systemd (a scope in machine.slice), cgroup (the host's tree), none, or auto (tries "
        "these in turn).",
        default="auto",
    )
    extra_flags: AllowedFlags | None = optional_setting(
        read.flags,
        "Which QEMU options the key extra_flags may hold: any, none, or a list of options separated by commas. Where "
        "QEMU is root, any lets writers of keys do anything on this host.",
        unset="any; none where QEMU runs as root (KVM_QEMU_USER is empty)",
        example="any",
    )
    bridge_helper: Path | None = optional_setting(
        read.program_file,
        "Path of QEMU's program qemu-bridge-helper, which plugs NICs into bridges.",
        unset="looked for where distributions install it",
        example="/usr/lib/qemu/qemu-bridge-helper",
    )
    memory_reserve_mib: int = setting(
        read.ram_mib,
        "Memory that is kept for the host. A guest that does not fit into the rest waits.",
        default="512M",
    )
    state_dir: Path = setting(
        read.absolute,
        "Folder of the files that outlive a boot: UEFI variables of machines without a disk in Ceph, and events.",
        default="/var/lib/kvmsupervisor",
    )
    disk_dir: Path = setting(
        read.absolute,
        "Folder of disks that are files (disk/<n>=file:NAME). One that is named here has to be there.",
        default=str(DISK_DIR),
    )
    image_dir: Path = setting(
        read.absolute,
        "Folder in which images of the library (from=NAME) are kept. One named here has to be there, mode 0700.",
        default=str(IMAGE_DIR),
    )
    image_max_bytes: int = setting(
        disk_size,
        "The largest image that is fetched, and the largest disk that one may expand to, with M, G or T (of 1024).",
        default="256G",
    )
    ovmf_code: Path | None = optional_setting(
        read.file,
        "UEFI firmware for firmware=uefi. Needs KVM_OVMF_VARS.",
        unset="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_CODE_4M.fd",
    )
    ovmf_vars: Path | None = optional_setting(
        read.file,
        "UEFI variables that a new machine begins with, made for KVM_OVMF_CODE.",
        unset="looked for where distributions install it",
        example="/usr/share/OVMF/OVMF_VARS_4M.fd",
    )
    media_root: Path | None = optional_setting(
        read.absolute,
        "Folder below which cloud-config, and images of the library, may name files (file:///...). Without it only "
        "http and https work.",
        example="/etc/kvmsupervisor/user-data",
    )
    media_cacert: Path | None = optional_setting(
        read.file,
        "Certificates of further authorities (PEM), beside the system's, for servers of user data and images.",
        example="/etc/kvmsupervisor/media-ca.pem",
    )
    media_inward_redirects: bool = setting(
        read.switch,
        "1: a server of user data or images may redirect to this host's own addresses, too (loopback, link-local).",
        default="0",
    )
    ceph_conf: Path | None = optional_setting(
        read.absolute,
        "Ceph's configuration file.",
        unset="librbd's own default, /etc/ceph/ceph.conf",
        example="/etc/ceph/ceph.conf",
        kvm=False,
    )
    ceph_id: str | None = optional_setting(
        read.ceph_user,
        "Name of the Ceph user, without client. before it. With %i, which stands for an instance's id, each QEMU is a "
        "user of its own, and this host's tools are that of KVM_SUPERVISOR_CEPH_ID.",
        unset="librbd's own default, admin",
        example="kvm",
        kvm=False,
    )
    supervisor_ceph_id: str | None = optional_setting(
        read.ceph_user,
        "Name of the Ceph user that looks at images, makes them and shuts clients out. Needed where CEPH_ID holds %i.",
        unset="CEPH_ID",
        example="kvm",
    )
    allow_unfenced: bool = setting(
        read.switch,
        "1: images may be used without exclusive-lock, although a frozen client of such an image leaves no trace, and "
        "images of which replicas are read, although a guest may read there what is written anew a moment later.",
        default="0",
    )
    unfenced: Unfenced = setting(
        values.choice(read.Unfenced, "it"),
        "What happens to machines whose disks cannot be fenced when this host's session has run out: pin (they run on) "
        "or guard (they are killed, also when an upgrade takes longer than KVM_SESSION_TTL).",
        default="pin",
    )
    takeover_wait_s: float = setting(
        values.seconds(0, 3600, "it"),
        "Seconds that a takeover waits while Ceph says that the disks are in use: their host may have lost only etcd.",
        default="60",
    )
    migration: MigrationKind = setting(
        values.choice(read.MigrationKind, "it"),
        "How a running machine moves to another host: auto (while it runs where both hosts can; else it is stopped "
        "here and started there), live (only while it runs), cold (never so). Needs KVM_MIGRATION_LISTEN.",
        default="auto",
    )
    migration_listen: Listen | None = setting(
        read.migration_listen,
        "Address and port of this host on which running machines of other hosts come in; the other hosts must reach "
        "it. Empty or off: machines move cold.",
        default="off",
        may_be_empty=True,
    )
    migration_bandwidth_mib: int = setting(
        values.integer(0, 1 << 20, "it"),
        "The most MiB in a second that are sent for one machine that moves; 0 for no limit.",
        default="0",
    )
    migration_parallel: int = setting(
        values.integer(1, 64, "it"),
        "How many running machines leave this host, and come to it, at one time. Drains and returns keep to it, too.",
        default="1",
    )
    drain_any: bool = setting(
        read.switch,
        "1: when this host drains, any host with room may run the machines without the key hosts. Those with it go to "
        "the hosts that it names.",
        default="0",
    )
    return_: ReturnKind = setting(
        values.choice(read.ReturnKind, "it"),
        "Whether machines of this host that a drain or a failover has placed elsewhere come back by themselves while "
        "they run, once it is in service: auto, or asked (only by `undrain --return`).",
        default="asked",
    )
    session_ttl_s: int = setting(
        values.integer(2, 3600, "it"),
        "Seconds after which a silent host counts as gone.",
        default="15",
    )
    shutdown_timeout_s: float = setting(
        values.seconds(0, values.SHUTDOWN_TIMEOUT_MAX_S, "it"),
        "Seconds that a guest without the key shutdown_timeout has to shut down before it is forced.",
        default="120",
    )
    start_timeout_s: float = setting(
        values.seconds(1, 3600, "it"),
        "Seconds within which a started QEMU must answer QMP.",
        default="60",
    )
    settle_s: float = setting(
        values.seconds(0, 60, "it"),
        "Seconds that new or changed keys must be quiet before their guest first runs: people write them one by one. "
        "Keys that came in one transaction, or whose `host` was written last, are complete: their guest runs at once.",
        default="0.5",
    )
    start_parallel: int = setting(
        values.integer(1, 1024, "it"),
        "How many QEMUs may be starting at one time.",
        worked_out="twice the number of CPUs",
        example="8",
    )
    mass_removal_window_s: float = setting(
        values.seconds(0, 3600, "it"),
        "Seconds within which the removal of more than half of this host's running instances (and more than two) is "
        "held for confirmation.",
        default="10",
    )
    log_level: LogLevel = setting(
        values.choice(read.LogLevel, "it"),
        "Lowest level that is logged: debug, info, warning or error.",
        default="info",
    )
    log_format: LogFormat = setting(
        values.choice(read.LogFormat, "it"),
        "json, console, or auto: console on a terminal, else json.",
        default="auto",
    )
    log_max_bytes: int = setting(
        read.log_size,
        "Size at which the logs of QEMU and of the console are rotated, in bytes or with K, M or G (of 1024).",
        default="1M",
    )
    log_keep: int = setting(
        values.integer(0, 100, "it"),
        "How many rotated logs of each kind are kept.",
        default="3",
    )
    config: Path = setting(
        read.absolute,
        "Path of the TOML file. The default file may be missing; a file named here must exist.",
        default=str(DEFAULT_CONFIG),
        in_file=False,
    )
    demo_once: bool = setting(
        read.switch,
        "1: `kvmsupervisor demo` ends by itself once its guest has booted and was shut down.",
        default="0",
        in_file=False,
    )

    @property
    def layout(self) -> Layout:
        """Where things lie in etcd."""
        return Layout(prefix=self.prefix, facts=self.facts_prefix, lock=self.lock)


SETTINGS = tuple(Setting(name=one.name, **one.metadata) for one in fields(Settings))
"""Every setting, in the order in which they are explained."""
