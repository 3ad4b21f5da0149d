"""What an exported encoder needs beside its weights: the file that computes its features, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact

WEIGHTS = ("encoder.safetensors", "filter.safetensors")
CODE = "hubconf.py"  # where torch.hub looks for it

SNIPPET = """\
import torch

encoder = torch.hub.load("{folder}", "encoder", source="local")  # needs torch, timm and safetensors
images = torch.rand(2, 3, encoder.image_size, encoder.image_size)  # RGB in 0..1
with torch.inference_mode():
    vector, feature_map = encoder(encoder.normalise(images))
"""

_README = """\
# Encoder {stage}

{backbone}, trained with {method} by Tessera ({artifact}). In this folder:

```python
{snippet}```

- `vector` is (images, {vector_width}).
- `feature_map` is (images, {width}, rows, columns): {rows} x {columns} cells for images of {side} x {side}. One cell
  stands for {stride} x {stride} pixels{multiples}.

They are the features that Tessera's evaluations see. `encoder` is a torch module, frozen and on the CPU: move it with
`.to(device)`.

| file | |
| --- | --- |
| `encoder.safetensors` | weights of the timm model that `encoder.json` describes, under timm's own names |
{filter_row}| `encoder.json` | timm name and arguments, normalisation, widths |
| `hubconf.py` | computes the features; readable, and the same code as Tessera's |
"""


def complete(artifact: Artifact, folder: Path) -> list[Path]:
    """Adds code and README to the exported files of an encoder, having made the encoder from them.

    Args:
        artifact: of kind `encoder`.
        folder: holds its files under their plain names. The numbers in its encoder.json are brought up to date.

    Returns: the files added.
    Raises: UsageError if the files do not make an encoder.
    """
    unknown = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in WEIGHTS]
    if unknown:
        raise UsageError(
            f"{artifact.name} has parts that an exported encoder cannot hold: {', '.join(unknown)} (it is a timm model "
            "and an object-aware filter; use this one with the package that made it)"
        )
    try:
        facts, shown = _try_out(folder)
    except Exception as error:  # other settings, other shapes, another format: the user gets one kind of error
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"{artifact.name} has parts that an exported encoder cannot hold: {type(error).__name__}: {first} "
            "(export it with the version of Tessera that made it: `tessera artifacts show` says which)"
        ) from error
    (folder / "encoder.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    readme = _README.format(
        stage=artifact.manifest.stage or "",
        artifact=artifact.name,
        backbone=facts["timm"]["name"],
        method=facts["method"] or "no method",
        snippet=SNIPPET.format(folder="."),
        filter_row="" if facts["filter"] is None else "| `filter.safetensors` | weights of the object-aware filter |\n",
        **shown,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / CODE).write_bytes(Path(__file__).with_name("feature_extractor.py").read_bytes())
    return [folder / CODE, folder / "README.md"]


def _try_out(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts of encoder.json with true numbers, and what the README says of a forward pass."""
    import torch

    from stages.models.feature_extractor import encoder

    facts = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    if facts["format"] != 1:
        raise ValueError(f"format {facts['format']} of encoder.json")
    made = encoder(str(folder))
    side = made.image_size
    with torch.inference_mode():
        vector, map_BDhw = made(torch.zeros(1, 3, side, side))
    _, width, rows, columns = map_BDhw.shape
    numbers = {"width": width, "vector_width": vector.shape[1], "stride": made.stride}
    multiples = f", and sides are multiples of {made.stride}" if made.is_vit else ""
    return {**facts, **numbers}, {**numbers, "rows": rows, "columns": columns, "side": side, "multiples": multiples}
