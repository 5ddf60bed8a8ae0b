"""`python -m tools.lineage path=runs/demo/export`: from an artifact back to the text it was made from.

Each manifest names its inputs by path and id. The walk follows the paths and compares: an input that was made anew
since, is gone, or whose files are not those that were recorded breaks the line, and is shown where it does.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf import entry
from conf.registry import register
from data_pipeline.artifact import Artifact, ArtifactError
from launchers.display import duration, headline

WHOLE, BROKEN = 0, 1


@register("", "lineage_schema")
@dataclass(frozen=True)
class LineageConfig:
    """Show what an artifact was made from, and whether that still holds.

    Args:
        path: directory of the artifact.
        verify: read every recorded file and compare checksums; otherwise only sizes are compared.
    """

    path: str = MISSING
    verify: bool = True


@dataclass
class Node:
    """One artifact in the line.

    Args:
        path: its directory.
        artifact: its manifest; None where it cannot be read.
        faults: what is wrong with it or with the link that led here, in words.
        inputs: name -> node.
        repeated: it was reached before by another way, and its inputs are shown there.
    """

    path: Path
    artifact: Artifact | None
    faults: list[str] = field(default_factory=list)
    inputs: dict[str, "Node"] = field(default_factory=dict)
    repeated: bool = False

    def walk(self) -> Iterator["Node"]:
        """This node and everything it was made from."""
        yield self
        for node in self.inputs.values():
            yield from node.walk()


def trace(path: Path, verify: bool = True) -> Node:
    """The line of an artifact, as far back as its manifests lead."""
    return _trace(path, None, verify, {})


def _trace(path: Path, expected: str | None, verify: bool, seen: dict[Path, Node]) -> Node:
    place = path.resolve()
    if place in seen:
        node = Node(path, seen[place].artifact, repeated=True)
    else:
        try:
            node = Node(path, Artifact.read(path))
        except ArtifactError as error:
            node = Node(path, None, [str(error)])
        seen[place] = node
        if node.artifact:
            node.faults += node.artifact.damage(contents=verify)
            for name, link in node.artifact.inputs.items():
                node.inputs[name] = _trace(path / link["path"], link["id"], verify, seen)
    if node.artifact and expected not in (None, node.artifact.id):
        node.faults.append(f"made anew since: {expected} was used, {node.artifact.id} is there now")
    return node


def show(node: Node, verify: bool) -> None:
    """Print the line as a tree."""
    from rich.console import Console
    from rich.tree import Tree

    def grow(tree: Tree, name: str, node: Node) -> None:
        branch = tree.add(_label(name, node, verify))
        for key, child in node.inputs.items():
            grow(branch, key, child)

    root = Tree(_label("", node, verify))
    for key, child in node.inputs.items():
        grow(root, key, child)
    width = None if sys.stdout.isatty() else 500  # a file is not folded
    Console(highlight=False, width=width).print(root)


def _label(name: str, node: Node, verify: bool) -> Any:
    from rich.text import Text

    text = Text(f"{name}: " if name else "", style="dim")
    text.append(_near(node.path), style="bold")
    if artifact := node.artifact:
        text.append(f"  {artifact.kind} {artifact.id[:8]}", style="cyan")
        if node.repeated:
            text.append("  (see above)", style="dim")
        else:
            facts = [f"recipe {artifact.recipe[:8]}", duration(artifact.duration_s), headline(artifact)]
            text.append("  " + ", ".join(fact for fact in facts if fact), style="")
    for fault in node.faults:
        text.append("\n✗ " + fault, style="red")
    if node.artifact and not node.faults and not node.repeated:
        count = len(node.artifact.files)
        text.append(f"  ✓ {count} file{'' if count == 1 else 's'} {'verified' if verify else 'present'}", style="green")
    return text


def _near(path: Path) -> str:
    """Relative to where the person stands, when it lies below."""
    place = path.resolve()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def main(config: LineageConfig, resolved: dict[str, Any]) -> int:
    Artifact.read(config.path)  # a clear refusal where there is nothing to trace
    node = trace(Path(config.path), config.verify)
    show(node, config.verify)
    return BROKEN if any(n.faults for n in node.walk()) else WHOLE


if __name__ == "__main__":
    entry.run("lineage", LineageConfig, main)
