"""The `tessera` command. May import every other room of `pipeline`; none of them imports this one."""
