"""The way to etcd, from the settings."""

from __future__ import annotations

from dataclasses import replace

from kvmsupervisor.adapters.etcd import EtcdConfig
from kvmsupervisor.config.settings import Settings
from kvmsupervisor.domain.timing import RENEWALS_PER_TTL


def etcd_config(settings: Settings) -> EtcdConfig:
    """The settings of etcd, in the form that the etcd client takes."""
    return EtcdConfig(
        endpoints=settings.etcd_endpoints,
        cacert=settings.etcd_cacert,
        cert=settings.etcd_cert,
        key=settings.etcd_key,
        username=settings.etcd_username,
        password_file=settings.etcd_password_file,
        # Of whoever has a session: a supervisor, or a container in single mode.
        renewed_every_s=settings.session_ttl_s / RENEWALS_PER_TTL,
    )


def web_writer_config(settings: Settings) -> EtcdConfig:
    """The way to etcd of what writes wishes for people who come by the page: as another user, where there is one."""
    found = replace(etcd_config(settings), impatient=True, renewed_every_s=0.0)
    if settings.web_etcd_cert is not None:
        found = replace(found, cert=settings.web_etcd_cert, key=settings.web_etcd_key)
    if settings.web_etcd_username is not None:
        found = replace(found, username=settings.web_etcd_username, password_file=settings.web_etcd_password_file)
    return found
