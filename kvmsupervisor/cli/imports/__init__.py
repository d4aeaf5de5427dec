"""`import`: machines of libvirt and of Proxmox VE as keys, and every part of them that has no key."""
