"""The source files of Python's own library: code that is there without a download."""

import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.registry import register
from data_pipeline.sources.base import CODE, Source

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep


@register("corpus/source", "standard_library")
@dataclass(frozen=True)
class StandardLibrary(Source):
    """Source files of the Python that runs this.

    Args:
        exclude: shell patterns of paths, beginning with "/" at the library's root, that are left out.
    """

    exclude: list[str] = field(
        default_factory=lambda: ["*/site-packages/*", "*/test/*", "*/tests/*", "*/idle_test/*", "/encodings/*"]
    )

    def state(self) -> Any:
        return sys.version.split()[0]

    def readers(self, cache: Path) -> "list[PipelineStep]":
        from data_pipeline.readers.reading import Origin, Selection
        from data_pipeline.readers.text import TextFileReader

        root = Path(sysconfig.get_path("stdlib"))
        selection = Selection((), tuple(CODE), tuple(self.exclude))
        names = [str(file.relative_to(root)) for file in sorted(root.rglob("*.py"))]
        version = sys.version.split()[0]
        origin = Origin("Python standard library", version, "PSF-2.0", "https://docs.python.org/3/library/", str(root))
        return [TextFileReader([(origin, [name for name in names if selection.kind(name)])], selection)]
