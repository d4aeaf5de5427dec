"""A cloud image as publishers make them: Debian 13 with cloud-init and sshd on one partition, which a BIOS boots."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.support.nspawn import ROOT, debian_root

IMAGES = ROOT / ".cache" / "images"

USER = "ubuntu"
"""The user that its cloud-init makes: that of the image which README.md names."""

PACKAGES = "linux-image-cloud-amd64,systemd-sysv,udev,dbus,netplan.io,cloud-init,openssh-server,sudo,extlinux"

MAKE = r"""
set -eu
work=$1 tree=$2
truncate -s 2G "$work/disk"
echo '2048,,L,*' | sfdisk --quiet "$work/disk"
loop=$(losetup --find --show --offset $((2048 * 512)) --sizelimit $((2 * 1024 * 1024 * 1024 - 2048 * 512)) "$work/disk")
trap 'umount --recursive --lazy "$work/root" 2>/dev/null || true; losetup --detach "$loop"' EXIT
mkfs.ext4 -q -O ^64bit,^metadata_csum -L cloudimg-rootfs "$loop"
mkdir "$work/root"
mount "$loop" "$work/root"
cp -a "$tree/." "$work/root"
root=$work/root
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/machine-id"
: >"$root/etc/machine-id"
echo 'LABEL=cloudimg-rootfs / ext4 defaults 0 1' >"$root/etc/fstab"
cat >"$root/etc/cloud/cloud.cfg.d/10-user.cfg" <<EOF
system_info: { default_user: { name: $3, gecos: $3, shell: /bin/bash, lock_passwd: true } }
EOF
mkdir "$root/boot/extlinux"
cat >"$root/boot/extlinux/extlinux.conf" <<EOF
DEFAULT linux
LABEL linux
  KERNEL /$(cd "$root" && echo boot/vmlinuz-*)
  INITRD /$(cd "$root" && echo boot/initrd.img-*)
  APPEND root=LABEL=cloudimg-rootfs ro console=ttyS0 systemd.show_status=0
EOF
# It looks up which device the folder is on.
for one in dev proc sys; do mount --rbind "/$one" "$root/$one"; done
chroot "$root" extlinux --install /boot/extlinux
for one in dev proc sys; do umount --recursive "$root/$one"; done
dd if="$root/usr/lib/EXTLINUX/mbr.bin" of="$work/disk" conv=notrunc bs=440 count=1 status=none
umount "$root"
qemu-img convert -O qcow2 "$work/disk" "$work/image"
"""


def cloud_image() -> Path:
    """The image, qcow2; made if it is not there yet. Takes root, and some minutes."""
    path = IMAGES / "cloud-trixie.qcow2"
    if not path.exists():
        tree = debian_root("trixie", "trixie-cloud", PACKAGES)
        IMAGES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=IMAGES) as work:
            # In a mount namespace of its own: no mount is left, however it ends.
            apart = ("unshare", "--mount", "--propagation=private")
            subprocess.run([*apart, "sh", "-c", MAKE, "sh", work, tree, USER], check=True)
            (Path(work) / "image").rename(path)
    return path
