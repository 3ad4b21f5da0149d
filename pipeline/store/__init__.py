"""The artifact store on a disk or in a bucket: writing, reading, checking, leases, garbage.

Imports of `pipeline` only `errors` and `progress`. Stages use two of its modules: `artifact` and `writer`.
"""
