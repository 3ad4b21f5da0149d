"""Which artifact came from which: back to the sources, and forward to everything made from it.

All of it is read from the manifests. MLflow shows the same, but nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.tree import Tree

    from pipeline.store.artifact import Artifact

SOURCE = "source"


@dataclass(frozen=True)
class LineageNode:
    """An artifact ("kind/fingerprint"), or a source outside the store ("source:ADDRESS")."""

    id: str
    kind: str
    stage: str = ""
    fingerprint: str = ""
    address: str = ""
    created: str = ""
    rows: int = 0
    missing: bool = False  # a manifest names it, but it is not in the store

    def to_json(self) -> dict[str, Any]:
        """One entry of `nodes` in what `tessera lineage --json` prints."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        if self.kind == SOURCE:
            return f"source {self.address}"
        text = f"{self.stage or '?'}  {self.kind}/{self.fingerprint[:12]}"
        text += f"  {self.rows} rows" if self.rows else ""
        return text + ("  (not in the store)" if self.missing else f"  {self.created[:16].replace('T', ' ')}")


@dataclass(frozen=True)
class Link:
    """`source` went into `target` through the config field `field`."""

    source: str
    target: str
    field: str

    def to_json(self) -> dict[str, str]:
        """One entry of `edges` in what `tessera lineage --json` prints."""
        return {"from": self.source, "to": self.target, "field": self.field}


@dataclass
class Graph:
    """Artifacts and sources, and what went into what."""

    nodes: dict[str, LineageNode] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    @classmethod
    def of(cls, artifacts: Iterable[Artifact]) -> Graph:
        """The graph of these artifacts, with the inputs and sources that their manifests name."""
        graph = cls()
        for artifact in artifacts:
            manifest, own = artifact.manifest, artifact.name
            graph.nodes[own] = LineageNode(
                own,
                artifact.kind,
                manifest.stage,
                artifact.fingerprint,
                artifact.address,
                manifest.created,
                artifact.rows,
            )
            graph.links += [Link(name, own, path) for path, name in manifest.inputs.items()]
            for path, source in manifest.sources.items():
                address = str(source["address"])
                graph.nodes[f"{SOURCE}:{address}"] = LineageNode(f"{SOURCE}:{address}", SOURCE, address=address)
                graph.links.append(Link(f"{SOURCE}:{address}", own, path))
        for link in graph.links:
            if link.source not in graph.nodes:
                kind, _, fingerprint = link.source.partition("/")
                graph.nodes[link.source] = LineageNode(link.source, kind, fingerprint=fingerprint, missing=True)
        return graph

    def into(self, node: str) -> list[Link]:
        """The links that end at a node."""
        return [link for link in self.links if link.target == node]

    def out_of(self, node: str) -> list[Link]:
        """The links that start at a node."""
        return [link for link in self.links if link.source == node]

    def around(self, node: str) -> Graph:
        """The node, all that it was made from, and all that was made from it; nothing beside these."""
        kept: list[Link] = []
        for step, end in ((self.into, "source"), (self.out_of, "target")):
            waiting, seen = [node], set()
            while waiting:
                current = waiting.pop()
                for link in step(current):
                    if link not in kept:
                        kept.append(link)
                    if (reached := getattr(link, end)) not in seen:
                        seen.add(reached)
                        waiting.append(reached)
        ids = dict.fromkeys([node, *(end for link in kept for end in (link.source, link.target))])
        return Graph({id: self.nodes[id] for id in ids}, kept)

    def to_json(self) -> dict[str, Any]:
        """What `tessera lineage --json` prints, without the target."""
        return {
            "nodes": [node.to_json() for node in self.nodes.values()],
            "edges": [link.to_json() for link in self.links],
        }


def tree(graph: Graph, node: str) -> Tree:
    """Two branches below the node: what it was made from, and what was made from it."""
    from rich.text import Text
    from rich.tree import Tree

    def grow(branch: Tree, at: str, *, back: bool, drawn: set[str]) -> None:
        for link in graph.into(at) if back else graph.out_of(at):
            other = link.source if back else link.target
            again = other in drawn
            label = Text.assemble(
                (f"{link.field}: ", "dim"), str(graph.nodes[other]), (" (above)" if again else "", "dim")
            )
            child = branch.add(label)
            if not again:
                drawn.add(other)
                grow(child, other, back=back, drawn=drawn)

    root = Tree(Text(str(graph.nodes[node]), style="bold"))
    for title, back in (("made from", True), ("went into", False)):
        if graph.into(node) if back else graph.out_of(node):
            grow(root.add(Text(title, style="italic")), node, back=back, drawn={node})
    return root
