"""Documents and bytes before and behind a filter."""

from dataclasses import dataclass


@dataclass
class Counts:
    """What went into a filter and what came out of it; added up over parts and shards."""

    documents_in: int = 0
    bytes_in: int = 0
    """Length in UTF-8."""
    documents_out: int = 0
    bytes_out: int = 0

    def take(self, text: str, result: str | None) -> None:
        """Count one document that the filter made `result` of, None if it was dropped."""
        size = len(text.encode())
        self.documents_in += 1
        self.bytes_in += size
        if result is not None:
            self.documents_out += 1
            self.bytes_out += size if result is text else len(result.encode())

    def add(self, other: "Counts") -> None:
        """Add what another part counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
