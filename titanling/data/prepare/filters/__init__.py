"""Filters of documents: what the preparation calls. Free of torch; heavy libraries are imported when one is built."""

from titanling.data.prepare.filters.chain import Filters, Steps, TokenFilters, check_filters, open_hashes
from titanling.data.prepare.filters.duplicates import HashFilter

__all__ = ["Filters", "HashFilter", "Steps", "TokenFilters", "check_filters", "open_hashes"]
