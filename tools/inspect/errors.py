"""What cannot be shown."""

from conf.errors import LongrunError


class InspectError(LongrunError):
    """The document, sample or step does not exist, or what would show it is gone."""


class NotFoundError(InspectError):
    """A corpus does not have the document."""
