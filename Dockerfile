# The supervisor with QEMU and Ceph's clients. Size, and what makes it: docs/container.md.
#
# No BuildKit is needed. Without arguments it supervises; arguments that begin with '-' are QEMU's (single mode);
# anything else is a command of kvmsupervisor.
ARG BASE=debian:trixie-slim

# --- the wheels ---------------------------------------------------------------------------------------------------
FROM ${BASE} AS build
RUN apt-get -qq update \
 && apt-get -qq install --yes --no-install-recommends ca-certificates python3-pip python3-setuptools python3-wheel >/dev/null
COPY deploy/requirements.lock /build/
# Nothing but what the lock names by its hash; what has no wheel is built with Debian's own setuptools.
RUN python3 -m pip wheel --quiet --no-cache-dir --require-hashes --no-deps --no-build-isolation \
        --wheel-dir /wheels --requirement /build/requirements.lock
COPY pyproject.toml README.md LICENSE /build/
COPY kvmsupervisor /build/kvmsupervisor
RUN python3 -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels /build
# A virtual environment without pip: Debian's Python is in both stages at the same place.
RUN python3 -c 'import venv; venv.create("/opt/kvmsupervisor", with_pip=False)' \
 && python3 -m pip --quiet --python /opt/kvmsupervisor install --no-cache-dir --no-index --no-deps /wheels/*.whl

# --- the image ----------------------------------------------------------------------------------------------------
FROM ${BASE}
# Before any package takes the numbers: those of Fedora, so that a folder's owner means the same on both.
RUN groupadd --system --gid 36 kvm \
 && groupadd --system --gid 107 qemu \
 && useradd --system --uid 107 --gid qemu --groups kvm --home-dir / --shell /usr/sbin/nologin qemu
# QEMU with what the guests have (SPICE and QXL are packages of their own since Debian 13) and the RBD block driver;
# qemu-img; `ceph` and `rbd`; UEFI firmware; setpriv (util-linux) and modprobe. Taken out again, 0.3 GB in all: the
# compiler and drivers of 3D graphics (loaded only by displays with gl=on, which a host without a screen has not), the
# 32-bit and microvm programs beside qemu-system-x86_64, CephFS repair and object gateway tools, translations.
RUN apt-get -qq update \
 && apt-get -qq install --yes --no-install-recommends \
        python3-minimal libpython3-stdlib ca-certificates \
        qemu-system-x86 qemu-system-modules-spice qemu-block-extra qemu-utils \
        ceph-common ovmf util-linux kmod iproute2 nftables >/dev/null \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
        /usr/share/doc /usr/share/man /usr/share/locale /usr/share/iso-codes \
        /usr/lib/*/libLLVM*.so* /usr/lib/*/libgallium-*.so /usr/lib/*/libz3.so* \
        /usr/bin/qemu-system-i386 /usr/bin/qemu-system-x86_64-microvm \
        /usr/bin/radosgw-admin /usr/bin/cephfs-journal-tool /usr/bin/cephfs-data-scan /usr/bin/cephfs-table-tool
COPY --from=build /opt/kvmsupervisor /opt/kvmsupervisor
ENV PATH=/opt/kvmsupervisor/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 LANG=C.UTF-8

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kvmsupervisor" \
      org.opencontainers.image.description="Runs the QEMU/KVM virtual machines that etcd keys ask for" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

EXPOSE 9746
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["python3", "-m", "kvmsupervisor.cli.health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["kvmsupervisor-container"]
