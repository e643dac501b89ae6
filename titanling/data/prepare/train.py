"""Trains BPE tokenizers, of bytes or of characters, and saves them as directories in Hugging Face's layout."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split

from titanling.data.prepare.bpe import train_bpe
from titanling.data.prepare.tokenizer import plain_ids, save_tokenizer, vocabulary_size
from titanling.errors import UserError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
KINDS = ("byte-level", "byte-fallback")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""Byte tokens of a byte-fallback tokenizer, as SentencePiece and Hugging Face spell them."""

# How Qwen2's tokenizers cut text into words; digits stand alone. The pattern matters: fast backends know this one.
SPLIT_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words of a byte-fallback tokenizer: letters, digits, punctuation or other white space, with the spaces before them.
# Where a word ends depends on the two characters there alone, so no merge reaches across, and the trained tokenizer
# gives the same ids without this pattern.
WORDS = r" *[\p{L}\p{M}]+|%s| *[^\s\p{L}\p{M}\p{N}]+| *[^\S ]+| +"


@dataclass(frozen=True)
class Recipe:
    """What a tokenizer is like, besides its size and its text. Raises `UserError` for what contradicts itself."""

    kind: str = "byte-level"
    """"byte-level": BPE over bytes, as GPT-2 and Llama 3. "byte-fallback": BPE over characters, a rare one is written
    as its UTF-8 bytes, as Llama 2; every space is kept as it is."""
    split_digits: bool = False
    """Every digit is a token of its own."""
    bos_token: str = BEGIN_OF_TEXT
    eos_token: str = END_OF_TEXT
    """Closes each document."""
    pad_token: str | None = None
    special_tokens: tuple[str, ...] = ()
    """Further special tokens; their ids follow those of bos, eos and pad."""
    pad_to_multiple: int = 1
    """Reserved tokens make the vocabulary a multiple of this."""
    character_coverage: float = 0.9995
    """byte-fallback: share of the text's characters that are tokens; the others are written as bytes."""
    model_max_length: int = 131072
    """What tokenizer_config.json says; nothing is cut."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"--kind {self.kind}: must be one of {', '.join(KINDS)}")
        counts = Counter(self.all_special_tokens)
        for token, count in counts.items():
            if count > 1:
                raise UserError(f"special token {token}: given {count} times; name each once")
            if not token or token != token.strip():
                raise UserError(f'special token "{token}": is empty or begins or ends with white space; rename it')
            if token in BYTES or token.startswith("<|reserved_"):
                raise UserError(f"special token {token}: this name is taken by the tokenizer's own; rename it")
        for name, least in (("pad_to_multiple", 1), ("model_max_length", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least} or more")
        if not 0 < self.character_coverage <= 1:
            raise UserError(f"--character-coverage {self.character_coverage}: must be above 0 and at most 1")

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """In the order of their ids, from 0 on."""
        return (*self.named_tokens.values(), *self.special_tokens)

    @property
    def named_tokens(self) -> dict[str, str]:
        """Those with a role, under Hugging Face's names."""
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        return {name: token for name, token in named.items() if token is not None}


DEFAULT = Recipe()


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str, recipe: Recipe = DEFAULT) -> int:
    """Train a tokenizer and save it as `directory`; return the size of its vocabulary.

    That is `vocab_size` (special tokens and bytes included; fewer if the text is short) and what
    `recipe.pad_to_multiple` adds. transformers' AutoTokenizer loads the directory; it appears whole or not at all.
    The same texts in the same order give the same bytes. Encoding adds no special tokens, and decoding gives back
    every text exactly. "byte-fallback" iterates over `texts` twice.
    Raises `UserError` if `vocab_size` does not hold the bytes, special tokens and characters, and if plain text could
    give a special token.
    """
    special = list(recipe.all_special_tokens)
    _check_size(vocab_size, len(BYTES) + len(special), f"256 bytes and {len(special)} special tokens")
    if recipe.kind == "byte-level":
        tokenizer = _train_byte_level(texts, vocab_size, special, recipe.split_digits)
    else:
        tokenizer = _train_byte_fallback(texts, vocab_size, special, recipe)
    _check_special_tokens(tokenizer, special)
    missing = -vocabulary_size(tokenizer) % recipe.pad_to_multiple
    tokenizer.add_special_tokens([f"<|reserved_{number}|>" for number in range(missing)])
    save_tokenizer(tokenizer, directory, recipe.named_tokens | {"model_max_length": recipe.model_max_length})
    return vocabulary_size(tokenizer)


def _train_byte_level(texts: Iterable[str], vocab_size: int, special: list[str], split_digits: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if split_digits:
        words = Split(Regex(SPLIT_DIGITS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    train_bpe(tokenizer, texts, trainer)
    return tokenizer


def _train_byte_fallback(texts: Iterable[str], vocab_size: int, special: list[str], recipe: Recipe) -> Tokenizer:
    """SentencePiece's kind of BPE, but spaces stay spaces: its "▁" for a space could not be told from a real ▁."""
    alphabet = _alphabet(texts, recipe.character_coverage)
    own = len(BYTES) + len(special)
    needed = f"256 bytes, {len(special)} special tokens and {len(alphabet)} characters (fewer: --character-coverage)"
    _check_size(vocab_size, own + len(alphabet), needed)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Split(Regex(WORDS % (r"\p{N}" if recipe.split_digits else r" *\p{N}+")), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - own, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    train_bpe(trained, texts, trainer)
    model = json.loads(trained.to_str())["model"]
    # The byte tokens enter behind the special ones. A learned token cannot be named as one of them: a word that has
    # "<" and digits is none.
    tokens = [*special, *BYTES, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return tokenizer


def _alphabet(texts: Iterable[str], coverage: float) -> list[str]:
    """The most frequent characters that make up `coverage` of the text."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    left = coverage * counts.total()
    alphabet = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0:
            break
        alphabet.append(character)
        left -= count
    return alphabet


def _check_special_tokens(tokenizer: Tokenizer, special: list[str]) -> None:
    """A text that mentions a special token must be able to, without being taken for it."""
    tokenizer.encode_special_tokens = True
    for token in special:
        if plain_ids(tokenizer, token) == [tokenizer.token_to_id(token)]:
            raise UserError(
                f"special token {token}: is also a word or character of the text, which would be taken for it; give"
                f" another, such as <|{token.lower()}|>"
            )
    tokenizer.encode_special_tokens = False


def _check_size(vocab_size: int, least: int, needed: str) -> None:
    if vocab_size < least:
        raise UserError(f"vocabulary of {vocab_size}: too small for {needed}; make it {least} or more (--vocab-size)")
