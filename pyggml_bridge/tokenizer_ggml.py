"""A tokenizer built from the tokenizer.ggml.* keys, for files without tokenizer.huggingface.json."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pyggml_bridge.errors import CQError
from pyggml_bridge.reader import Metadata, StringArray

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# Pre-tokenizers: patterns applied one after the other, each cutting every piece into its matches and what lies between
# them. The patterns are those of the models' own tokenizer.json; GGUF names them by tokenizer.ggml.pre.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_BY_CASE = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TAIL_SLASH = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*")
_TEKKEN = "|".join((*_WORD_BY_CASE, r"\p{N}", _TAIL_SLASH))
_GPT4O = "|".join((*(f"{word}{_SUFFIX}?" for word in _WORD_BY_CASE), r"\p{N}{1,3}", _TAIL_SLASH))
# Cased letters as DeepSeek's tokenizer lists them: a hand-made subset of Lu, Ll and Lt, so no property names it.
_CASED_LETTERS = re.sub(
    r"([0-9A-F]+) ?",
    r"\\x{\1}",
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943",
)
_CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_WIDE_PUNCTUATION = r"!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"
_DEEPSEEK_LLM = r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_WIDE_PUNCTUATION}]+", r"\s+$", _CJK, r"\p{N}+"
_DEEPSEEK_CODER = r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "mellum", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
}
# A piece that is a token as a whole is that token, even where the merges would build it otherwise.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken", "glm4"})
# Where tokenizer.ggml.add_bos_token is absent, these (and SentencePiece models) start a text with BOS.
BOS_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"})


def build(metadata: Metadata) -> Tokenizer:
    """Tokenizer of the kinds "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE); CQError for any other."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _string_array(metadata, "tokenizer.ggml.tokens")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens)
    else:
        raise CQError(f"tokenizer.ggml.model: {kind!r} is not supported (gpt2 and llama are)")
    _add_special_tokens(tokenizer, metadata, tokens)
    return tokenizer


def adds_bos(metadata: Metadata) -> bool:
    """Whether a text starts with BOS: the file's word, else the custom of its kind of tokenizer."""
    stored = metadata.get("tokenizer.ggml.add_bos_token")
    if stored is not None:
        return bool(stored)
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT


def adds_space_prefix(metadata: Metadata) -> bool:
    """Whether a space is put before a text: SentencePiece models do unless the file says otherwise."""
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", metadata.get("tokenizer.ggml.model") == "llama"))


def as_pre_tokenizer(patterns: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """Cuts by one pattern after the other, then bytes as characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def _byte_level_bpe(metadata: Metadata, tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise CQError(f"tokenizer.ggml.pre: pre-tokenizer {pre!r} is not known")
    merges = []
    for merge in _string_array(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise CQError(f"tokenizer.ggml.merges: {merge!r} is not a pair")
        merges.append((left, right))
    tokenizer = Tokenizer(_bpe(_ids(tokens), merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = as_pre_tokenizer(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata, tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CQError("tokenizer.ggml.scores: missing, or not one per token")
    ids = _ids(tokens)
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    if not 0 <= unknown < len(tokens):
        raise CQError(f"tokenizer.ggml.unknown_token_id: {unknown} is outside the vocabulary")
    types = metadata.get("tokenizer.ggml.token_type")
    kinds = types if isinstance(types, list) else []
    control = {token for token, kind in zip(tokens, kinds, strict=False) if kind in (UNKNOWN, CONTROL)}
    merges = _merges_by_score({token: i for token, i in ids.items() if token not in control}, scores)  # none makes one
    tokenizer = Tokenizer(_bpe(ids, merges, byte_fallback=True, fuse_unk=True, unk_token=tokens[unknown]))
    # The prefix goes before each stretch of text between special tokens, as SentencePiece sees them one by one.
    prefix = [normalizers.Prepend("▁")] if adds_space_prefix(metadata) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    return tokenizer


def _merges_by_score(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the adjacent pair whose union scores best; as a ranked list that is every split of every
    token into two tokens, best score first."""
    splits = [
        (token, token_id, cut)
        for token, token_id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    splits.sort(key=lambda split: (-scores[split[1]], split[1], -split[2]))
    return [(token[:cut], token[cut:]) for token, _, cut in splits]


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **options: bool | str) -> models.BPE:
    try:
        return models.BPE(ids, merges, **options)
    except Exception as error:  # the library raises bare exceptions, for instance for a merge outside the vocabulary
        raise CQError(f"tokenizer.ggml: {error}") from error


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str]) -> None:
    """Control tokens are recognised on request, user-defined ones always; neither goes through the normalizer."""
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CQError("tokenizer.ggml.token_type: missing, or not one per token")
    pairs = [(token, kind) for token, kind in zip(tokens, types, strict=True) if token]
    special = [token for token, kind in pairs if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user = [token for token, kind in pairs if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user])


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in reversed(list(enumerate(tokens)))}


def _string_array(metadata: Metadata, key: str) -> list[str]:
    value = metadata.get(key)
    strings = list(value) if isinstance(value, list | StringArray) else []
    if not strings or set(map(type, strings)) != {str}:
        raise CQError(f"{key}: missing, or not an array of strings")
    return strings
