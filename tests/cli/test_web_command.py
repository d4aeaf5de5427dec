"""`web`: what stops its start."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from kvmsupervisor.cli.main import cli


def test_files_of_no_use_stop_the_start(tmp_path: Path) -> None:
    """With every problem of all of them, before anything is asked of etcd or listened on."""
    (tmp_path / "web.yml").write_text("tls_server_confg: {}\nbasic_auth_users: {a: b}\n")
    (tmp_path / "people.yml").write_text("operators: []\n")
    settings = {
        "KVM_CONFIG": "/dev/null",
        "KVM_WEB_CONFIG": str(tmp_path / "web.yml"),
        "KVM_WEB_PEOPLE": str(tmp_path / "people.yml"),
        "KVM_WEB_ETCD_USERNAME": "operator",
        "KVM_WEB_ETCD_PASSWORD_FILE": str(tmp_path / "gone"),
    }
    done = CliRunner().invoke(cli, ["web"], env=settings)
    assert done.exit_code == 1
    for said in (
        "KVM_WEB_CONFIG: ",
        "did you mean tls_server_config?",
        "a has no bcrypt hash",
        "KVM_WEB_PEOPLE: ",
        "did you mean operator?",
        "KVM_WEB_ETCD_PASSWORD_FILE: it is ",
    ):
        assert said in done.stderr


def test_halves_of_pairs_are_told(tmp_path: Path) -> None:
    """As for the other users of etcd."""
    done = CliRunner().invoke(cli, ["web"], env={"KVM_CONFIG": "/dev/null", "KVM_WEB_ETCD_USERNAME": "operator"})
    assert done.exit_code == 1
    assert "KVM_WEB_ETCD_PASSWORD_FILE" in done.stderr
    wrong = {"KVM_CONFIG": "/dev/null", "KVM_WEB_TRUSTED_PROXY": "10.0.0.1/8"}
    done = CliRunner().invoke(cli, ["web"], env=wrong)
    assert "they are IP addresses or networks" in done.stderr
