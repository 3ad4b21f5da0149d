"""From a YAML file to a validated pipeline. Imports of `pipeline` only the contract (stage, errors)."""
