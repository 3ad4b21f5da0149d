"""Sent with every job: starts `tessera` on a node of the cluster, or says in one line what that node lacks.

Runs on whatever Python the node has, so it uses nothing that is newer than Python 3.8.
"""

import importlib.util
import os
import sys

NEEDED = (
    "boto3 cv2 filelock mlflow numpy obstore optuna pandas PIL psutil pyarrow pydantic ray rich safetensors timm torch "
    "torchvision typer yaml"
)


def complaint() -> str:
    """What the node lacks; empty where it has all."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return f"the job's Python is {version} ({sys.executable}), and Tessera needs 3.11 to 3.13"
    missing = [name for name in NEEDED.split() if importlib.util.find_spec(name) is None]
    if missing:
        return f"the job's Python ({sys.executable}, {version}) has no {', '.join(missing)}"
    return ""


if __name__ == "__main__":
    problem = complaint()
    if problem:
        remedy = "install Tessera's requirements on the cluster's nodes, or name another Python with --python"
        sys.exit(f"error: {problem} ({remedy})")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from pipeline.cli.main import main

    sys.exit(main())
