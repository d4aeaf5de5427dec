"""`make cluster-demo`: a cluster on one machine, shown to a person; `KVM_DEMO_ONCE=1` runs it as a test.

`apart` gives it a world of its own, which ends with it. `cluster` is what runs there: etcd, Ceph, hosts, guests.
`scenes` says what happens, and what each scene promises; `board` is what is to be seen of that, `view` draws it.
Nothing of the package knows it.
"""
