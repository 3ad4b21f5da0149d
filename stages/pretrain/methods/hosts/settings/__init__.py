"""What a config says about each host, one file for each. Imports `stages/pretrain/config` only, no torch."""
