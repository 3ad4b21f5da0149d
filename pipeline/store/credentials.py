"""S3 credentials from where AWS's own tools keep them: profiles, SSO, assumed roles, a cloud machine's role.

obstore itself reads the environment only. For the rest it asks boto3, which also renews credentials that expire;
loading boto3 takes 0.4 s, so it is left alone where the environment answers. Credentials are found on each machine
anew, and are never written into an address, an artifact or a pickle.
"""

from __future__ import annotations

import os
from typing import Any

from pipeline.errors import StoreError

_IN_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",  # public buckets
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def s3_options(address: str) -> dict[str, Any]:
    """What to hand to obstore for a bucket, beside what it reads from the environment itself.

    Raises:
        StoreError: there are no credentials anywhere, or they cannot be used, as after an SSO session has expired.
            Said at once, where obstore would repeat the request for a minute.
    """
    if any(os.environ.get(name) for name in _IN_ENVIRONMENT):
        return {}
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            raise StoreError(
                f"store {address}: there are no credentials for it (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE to a profile of the AWS command line; AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        provider = Boto3CredentialProvider(session)
        provider()
    except (BotoCoreError, ClientError) as error:
        raise StoreError(
            f"store {address}: its credentials cannot be used: {error} "
            "(correct AWS_PROFILE and its profile in ~/.aws; for SSO, sign in again with `aws sso login`)"
        ) from error
    region = os.environ.get("AWS_REGION") or session.region_name
    return {"credential_provider": provider} | ({"region": region} if region else {})
