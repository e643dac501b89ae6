"""Repairs text that was decoded as something that it was not."""

from collections.abc import Callable

from titanling.config.schema import FixTextFilter
from titanling.data.prepare.filters.extras import import_extra


def fix_text(settings: FixTextFilter) -> Callable[[str], str | None]:
    """Makes the text what it was before a wrong decoding. Raises `UserError` without ftfy."""
    ftfy = import_extra("ftfy", "ftfy", 'data.prepare.filters: kind = "fix_text"')
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        remove_terminal_escapes=False,
        normalization=None if settings.normalization == "none" else settings.normalization,
        explain=False,
    )

    def apply(text: str) -> str | None:
        fixed = ftfy.fix_text(text, config)
        return text if fixed == text else fixed or None

    return apply
