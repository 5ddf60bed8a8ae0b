"""Data sets that the `datasets` library opens."""

from collections.abc import Iterator
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.huggingface import HuggingFaceDatasetReader

from data_pipeline.readers.reading import Origin, record_document
from data_pipeline.sources.base import Fields, SourceError


class HubReader(HuggingFaceDatasetReader):
    """Rows of a Hugging Face data set: by name, from a directory of data files, or from one that `save_to_disk` wrote.

    Args:
        origin: its name and licence.
        options: arguments of `datasets.load_dataset`.
        saved: it is a directory that `save_to_disk` wrote.
        streaming: read rows as they come in place of downloading first.
        limit: most rows of each task; -1 reads all.
        fields: columns of the text and what is known of it.
        kind: "prose" or "code".
    """

    def __init__(
        self,
        origin: Origin,
        options: dict[str, Any],
        saved: bool,
        streaming: bool,
        limit: int,
        fields: Fields,
        kind: str,
    ):
        super().__init__(
            origin.name,
            dataset_options=None if saved else options,
            streaming=streaming and not saved,
            limit=limit,
            load_from_disk=saved,
        )
        self.origin = origin
        self.fields = fields
        self.kind = kind

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        yield from self.rows(rank, world_size)

    def rows(self, rank: int, world_size: int) -> Iterator[Document]:
        """The rows of one task.

        Raises:
            SourceError: `datasets` cannot open or read them; says what it found.
        """
        try:
            yield from super().run(None, rank, world_size)
        except Exception as error:  # of any type: the library hands on those of every format it reads
            raise SourceError(
                f"{self.origin.name} cannot be read as a data set: {type(error).__name__}: {error}\nCheck its name, "
                "subset, split and files; its files can also be read one by one, with jsonl or parquet as the source."
            ) from error

    def get_document_from_dict(self, data: dict[str, Any], source_file: str, id_in_file: int | str) -> Document:
        return record_document(self.origin, str(id_in_file), self.kind, data, self.fields)
