"""What `continue` asks of the stage whose training goes on: the rules that a plan checks. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.stage import Feed, edges, unfingerprinted
from stages.pretrain.config.pretrain import PretrainConfig
from stages.training.settings import OptimizerSettings

CONTINUE = "continue"  # the field, as YAML has it
# May differ between the two stages: how long, and by what schedule. All else makes the kept state meaningless.
SCHEDULE = [key for key in OptimizerSettings.model_fields if key.startswith(("lr", "warmup", "weight_decay"))]
FREE = {"steps", "epochs", "stop_at", "keep_state", CONTINUE, *(f"optimizer.{key}" for key in SCHEDULE)}


def continuing_problems(config: PretrainConfig, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
    """What keeps a stage from going on where another has ended.

    Args:
        config: of the stage that continues.
        feeds: dotted field path -> what feeds it.

    Yields:
        (field path, what is wrong, what to do), as `Stage.mismatches` does.
    """
    feed = feeds[CONTINUE]
    before = feed.config
    if not isinstance(before, PretrainConfig):
        yield CONTINUE, f"{feed.stage} trains nothing", "name a pretrain stage, or start from its encoder with `init`"
        return
    if not before.keep_state:
        yield (
            CONTINUE,
            f"{feed.stage} does not keep the state of its training (keep_state is false)",
            f"set stages.{feed.stage}.keep_state to true (it then trains anew), or start from its encoder with `init`",
        )
    for key in ("steps", "epochs"):
        now, then = getattr(config, key), getattr(before, key)
        if now is not None and then is not None and now <= then:
            yield (
                key,
                f"{feed.stage} has trained for {then:g} {key} already, and this is the length of both together",
                f"give more than {then:g}, or leave `continue` out",
            )
    same = f"give this stage the settings of {feed.stage}; only length, schedule and resources may differ"
    for path, now, then in _differences(_compared(config), _compared(before)):
        yield path, f"is {_shown(now)}, and {feed.stage}, whose training goes on here, has {_shown(then)}", same
    for path, own in feeds.items():
        other = feed.inputs.get(path)
        if path != CONTINUE and other is not None and other.fingerprint != own.fingerprint:
            yield path, f"{own.stage} is another input than {other.stage}, which {feed.stage} was trained with", same


def _compared(config: PretrainConfig) -> dict[str, Any]:
    """The settings that must be equal. Inputs are compared by what they hold, not by name."""
    plain: dict[str, Any] = config.model_dump(mode="json", by_alias=True, serialize_as_any=True)
    for edge in edges(config):
        _set(plain, edge.path.split("."), "an input")
    for path in [*FREE, *unfingerprinted(config)]:
        _set(plain, path.split("."), None)
    return plain


def _set(settings: Any, path: list[str], value: Any) -> None:
    *parents, last = path
    for key in parents:
        settings = settings[int(key)] if isinstance(settings, list) else settings.get(key)
        if settings is None:
            return
    settings[last] = value


def _differences(now: Any, then: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path and both values of what differs; of two backbones or methods with different names, only the name."""
    if isinstance(now, dict) and isinstance(then, dict):
        keys = ["name"] if now.get("name") != then.get("name") else [*now, *(key for key in then if key not in now)]
        for key in keys:
            yield from _differences(now.get(key), then.get(key), f"{path}.{key}" if path else key)
    elif now != then:
        yield path, now, then


def _shown(value: Any) -> str:
    text = {None: "not set", True: "true", False: "false"}.get(value) if not isinstance(value, dict | list) else None
    text = text or str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
