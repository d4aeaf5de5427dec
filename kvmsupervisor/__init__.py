"""Runs the QEMU/KVM virtual machines that etcd keys ask for. Start reading at docs/architecture.md."""

__version__ = "0.1.0"
