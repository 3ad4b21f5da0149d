"""S3 credentials from where AWS's own tools keep them; obstore itself reads the environment only.

Found on each machine anew and never written into an address, an artifact or a pickle.
"""

from __future__ import annotations

import configparser
import os
import socket
from pathlib import Path

from pipeline.errors import StoreError

_IN_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",  # public buckets
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_MACHINE_ROLE = ("169.254.169.254", 80)  # where a cloud machine asks for its own role


def s3_options(address: str) -> dict[str, str]:
    """What to tell obstore beside the environment: keys and region of the profile in ~/.aws, if that is where they are.

    Raises: StoreError at once when there are no credentials anywhere, in place of a minute of retries.
    """
    if any(os.environ.get(name) for name in _IN_ENVIRONMENT):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    keys = _section("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile)
    named = profile if profile == "default" else f"profile {profile}"
    settings = {**_section("AWS_CONFIG_FILE", "~/.aws/config", named), **keys}
    options = {
        option: settings[key]
        for option, key in (
            ("access_key_id", "aws_access_key_id"),
            ("secret_access_key", "aws_secret_access_key"),
            ("session_token", "aws_session_token"),
            ("region", "region"),
        )
        if key in settings and not (option == "region" and os.environ.get("AWS_REGION"))
    }
    if "access_key_id" not in options and not _machine_has_role():
        raise StoreError(
            f"store {address}: there are no credentials for it (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE to a profile in ~/.aws/credentials; AWS_SKIP_SIGNATURE=true for a public bucket)"
        )
    return options


def _section(variable: str, default: str, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)  # a secret may hold a percent sign
    try:
        parser.read(Path(os.environ.get(variable, default)).expanduser())
    except configparser.Error:
        return {}
    return dict(parser[section]) if parser.has_section(section) else {}


def _machine_has_role() -> bool:
    try:
        socket.create_connection(_MACHINE_ROLE, timeout=1.0).close()
    except OSError:
        return False
    return True
