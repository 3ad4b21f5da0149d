"""`for_each`: stages that are written once and stand in the pipeline once for each value of a variable.

    for_each:
      encoder: [random, dsa]
      seed: [0, 1]
    stages:
      "{encoder}_{seed}": {uses: pretrain, seed: "{seed}", ...}
      "knn_{encoder}_{seed}": {uses: classify_knn, encoder: "{encoder}_{seed}", ...}

A stage stands for every combination of the variables that its name holds. In its values they are replaced likewise; a
value that is nothing but a variable keeps that one's type.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.document import Complaints, Key, Node, merge, nearest

KEY = "for_each"
VARIABLE = re.compile(r"\{([a-z][a-z0-9_]*)\}")

Values = Mapping[str, Any]  # variable -> its value in one copy of a stage


def repeated(root: Node, complaints: Complaints) -> Node:
    """The document with every such stage written out, and without `for_each`.

    A stage of the file that has the name of a copy changes this copy, as a file changes one that it extends.

    Args:
        root: the document.
        complaints: where broken rules go.
    """
    if not isinstance(root.value, dict):
        return root
    variables = _variables(root.value.get(KEY), complaints)
    stages = root.child("stages")
    if stages is None or not isinstance(stages.value, dict):
        return _without_key(root)
    copies: dict[str, Node] = {}
    for name, node in stages.value.items():
        path = ("stages", name)
        used = dict.fromkeys(VARIABLE.findall(name))
        unknown = [variable for variable in used if variable not in variables]
        if unknown:
            remedy = nearest(unknown[0], variables) or f"list its values: {KEY}: {{{unknown[0]}: [...]}}"
            complaints.add(path, f"the name has {{{unknown[0]}}}, and {KEY} has no such variable", remedy, node.place)
            continue
        for values in _combinations({variable: variables[variable] for variable in used}):
            own = str(_filled(name, values))
            written = _copy(node, path, values, variables, complaints)
            if own in copies and written.value is not None:
                written = merge(copies[own], written)
            copies[own] = written
    return _without_key(Node({**root.value, "stages": Node(copies, stages.place)}, root.place))


def _without_key(root: Node) -> Node:
    return Node({key: node for key, node in root.value.items() if key != KEY}, root.place)


def _variables(node: Node | None, complaints: Complaints) -> dict[str, list[Any]]:
    """The values of each variable."""
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        remedy = f"{KEY}: {{encoder: [one, other]}}"
        complaints.add(KEY, f"must be a mapping of variables, got {node.plain()!r}", remedy, node.place)
        return {}
    found: dict[str, list[Any]] = {}
    for name, listed in node.value.items():
        values = listed.plain() if isinstance(listed.value, list) else None
        if not VARIABLE.fullmatch(f"{{{name}}}"):
            complaints.add((KEY, name), f"{name!r} is no name of a variable", "use a-z, 0-9 and _", listed.place)
        elif not values or any(isinstance(value, bool | list | dict | None) for value in values):
            complaints.add((KEY, name), "must be a list of words or numbers, with at least one", "", listed.place)
        elif len({str(value) for value in values}) < len(values):
            complaints.add((KEY, name), f"lists a value twice: {values}", "keep one of them", listed.place)
        else:
            found[name] = values
    return found


def _combinations(variables: Mapping[str, list[Any]]) -> Iterator[Values]:
    for values in itertools.product(*variables.values()):
        yield dict(zip(variables, values, strict=True))


def _copy(
    node: Node, path: tuple[Key, ...], values: Values, variables: Mapping[str, list[Any]], complaints: Complaints
) -> Node:
    """The node with the variables of one copy filled in."""
    if isinstance(node.value, dict):
        if unquoted := _unquoted(node, variables):
            rule = f"{{{unquoted}}} is a mapping in YAML"
            complaints.add(path, rule, f'write it in quotes: "{{{unquoted}}}"', node.place)
            return node
        inside: Any = {k: _copy(n, (*path, k), values, variables, complaints) for k, n in node.value.items()}
    elif isinstance(node.value, list):
        inside = [_copy(n, (*path, i), values, variables, complaints) for i, n in enumerate(node.value)]
    elif isinstance(node.value, str):
        missing = [name for name in VARIABLE.findall(node.value) if name in variables and name not in values]
        if missing:
            rule = f"holds {{{missing[0]}}}, which the stage's name does not"
            complaints.add(path, rule, f"put {{{missing[0]}}} into the stage's name: there is one for each", node.place)
        inside = _filled(node.value, values)
    else:
        return node
    return Node(inside, node.place, node.removes)


def _unquoted(node: Node, variables: Mapping[str, list[Any]]) -> str:
    """The variable that somebody wrote without quotes: `{encoder}` is a mapping with one empty value."""
    [*keys] = node.value
    alone = keys[0] if len(keys) == 1 else ""
    return alone if alone in variables and node.value[alone].value is None else ""


def _filled(text: str, values: Values) -> Any:
    """The text with variables replaced; the value itself where the text is nothing else."""
    whole = VARIABLE.fullmatch(text)
    if whole and whole[1] in values:
        return values[whole[1]]
    return VARIABLE.sub(lambda found: str(values.get(found[1], found[0])), text)
