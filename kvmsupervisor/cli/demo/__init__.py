"""`demo`: etcd, a supervisor and a guest that boots, on this machine, with nothing else needed."""
