"""The GGUF keys: every one that a file gets or that the runner reads, its value type, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeAlias

from gguf import GGUFValueType, GGUFWriter

from pyggml_bridge.errors import CQError

VERSION = 2
KeyValue: TypeAlias = int | float | str | list[int] | list[float] | list[str]  # bool is an int
Keys: TypeAlias = dict[str, KeyValue]
ARCHITECTURE = "<architecture>"  # in a key's name: stands for the value of general.architecture

_U8, _U32, _U64 = GGUFValueType.UINT8, GGUFValueType.UINT32, GGUFValueType.UINT64
_I32, _F32, _BOOL = GGUFValueType.INT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY


class Key(str, Enum):
    """A key is its name in the file; `of` fills in the architecture. type: of its value; item: of an array's items.

    The keys below `cq.` are ours (docs/format.md). All others are llama.cpp's but for two of Phi-MoE that it does not
    read, `attn_factor_long` and `router_jitter_noise`.
    """

    type: GGUFValueType
    item: GGUFValueType | None
    meaning: str

    def __new__(cls, name: str, kind: GGUFValueType, meaning: str, item: GGUFValueType | None = None) -> Key:
        """From a row of the table."""
        key = str.__new__(cls, name)
        key._value_, key.type, key.meaning, key.item = name, kind, meaning, item
        return key

    __str__ = str.__str__

    def of(self, architecture: str) -> str:
        """The name in a file of this architecture."""
        return self.value.replace(ARCHITECTURE, architecture)

    CQ_VERSION = "cq.version", _U32, "version of the format"
    CQ_BITS = "cq.bits", _U32, "bits per index of most clustered weights"
    CQ_GROUP_SIZE = "cq.group_size", _I32, "columns that share a codebook, -1: the row"
    CQ_CODEBOOK_ROWS = "cq.codebook_rows", _U32, "rows that share codebooks; 1 without it"
    CQ_SCALE_GROUP = "cq.scale_group", _I32, "columns that share a group scale, -1: there are none"
    CQ_ACTIVATION_BITS = "cq.activation_bits", _U32, "8 or 4; 8 without it"
    CQ_HADAMARD_FFN_DOWN = "cq.hadamard.ffn_down", _U32, "columns per block of the transform before ffn_down, 0: none"
    CQ_EOS_TOKEN_IDS = "cq.eos_token_ids", _ARRAY, "every id that ends a generation", _I32
    CQ_CALIBRATION_TOKENS = "cq.calibration.tokens", _U32, "tokens of the calibration text that were used"
    CQ_CALIBRATION_FILE = "cq.calibration.file", _STRING, "name of the calibration text"
    CQ_ROTATION = "cq.rotation", _STRING, "rotation of the residual stream: learned, random or none"
    CQ_METHOD = "cq.method", _STRING, "method of conversion: full or paper"
    CQ_SEED = "cq.seed", _U64, "seed of the conversion"
    CQ_CONVERTER = "cq.converter", _STRING, "program that wrote the file, and its version"

    GENERAL_ARCHITECTURE = "general.architecture", _STRING, "architecture that names the keys and tensors"
    GENERAL_TYPE = "general.type", _STRING, "kind of file: model"
    GENERAL_NAME = "general.name", _STRING, "name of the model"
    GENERAL_FILE_TYPE = "general.file_type", _U32, "LlamaFileType of a file in one stock type"
    GENERAL_QUANTIZATION_VERSION = "general.quantization_version", _U32, "version of ggml's types"
    GENERAL_ALIGNMENT = "general.alignment", _U32, "divides every tensor's offset; 32 without it"
    SAMPLING_TEMP = "general.sampling.temp", _F32, "recommended temperature"
    SAMPLING_TOP_K = "general.sampling.top_k", _U32, "most candidates, 0: all"
    SAMPLING_TOP_P = "general.sampling.top_p", _F32, "probability that the candidates have together"
    SAMPLING_MIN_P = "general.sampling.min_p", _F32, "a candidate's probability relative to the best one's"
    SAMPLING_PENALTY_REPEAT = "general.sampling.penalty_repeat", _F32, "penalty of tokens that occurred, 1: none"
    SAMPLING_PENALTY_LAST_N = "general.sampling.penalty_last_n", _I32, "tokens that the penalty looks back, -1: all"

    VOCAB_SIZE = "<architecture>.vocab_size", _U32, "rows of the embedding"
    CONTEXT_LENGTH = "<architecture>.context_length", _U32, "positions the model was trained for"
    EMBEDDING_LENGTH = "<architecture>.embedding_length", _U32, "width of the residual stream"
    BLOCK_COUNT = "<architecture>.block_count", _U32, "layers"
    FEED_FORWARD_LENGTH = "<architecture>.feed_forward_length", _U32, "width of a dense FFN"
    LEADING_DENSE_BLOCK_COUNT = "<architecture>.leading_dense_block_count", _U32, "layers before those with experts"
    HEAD_COUNT = "<architecture>.attention.head_count", _U32, "query heads"
    HEAD_COUNT_KV = "<architecture>.attention.head_count_kv", _U32, "key and value heads"
    KEY_LENGTH = "<architecture>.attention.key_length", _U32, "columns of a cached key"
    VALUE_LENGTH = "<architecture>.attention.value_length", _U32, "columns of a cached value"
    KEY_LENGTH_MLA = "<architecture>.attention.key_length_mla", _U32, "columns of a key after expansion"
    VALUE_LENGTH_MLA = "<architecture>.attention.value_length_mla", _U32, "columns of a value after expansion"
    Q_LORA_RANK = "<architecture>.attention.q_lora_rank", _U32, "width of the queries' latent, 0: none"
    KV_LORA_RANK = "<architecture>.attention.kv_lora_rank", _U32, "width of the keys' and values' latent"
    LAYER_NORM_RMS_EPSILON = "<architecture>.attention.layer_norm_rms_epsilon", _F32, "added to the norms' mean square"
    SLIDING_WINDOW = "<architecture>.attention.sliding_window", _U32, "keys that attention sees"
    ROPE_DIMENSION_COUNT = "<architecture>.rope.dimension_count", _U32, "rotated columns of a head"
    ROPE_FREQ_BASE = "<architecture>.rope.freq_base", _F32, "base of the frequencies"
    ROPE_SCALING_TYPE = "<architecture>.rope.scaling.type", _STRING, "none, linear, yarn or longrope"
    ROPE_SCALING_FACTOR = "<architecture>.rope.scaling.factor", _F32, "times longer than the model was trained for"
    ROPE_SCALING_ORIGINAL = "<architecture>.rope.scaling.original_context_length", _U32, "positions before scaling"
    ROPE_SCALING_ATTN_FACTOR = "<architecture>.rope.scaling.attn_factor", _F32, "factor of cos and sin"
    ROPE_SCALING_ATTN_FACTOR_LONG = "<architecture>.rope.scaling.attn_factor_long", _F32, "for long sequences"
    YARN_BETA_FAST = "<architecture>.rope.scaling.yarn_beta_fast", _F32, "turns from which on frequencies are kept"
    YARN_BETA_SLOW = "<architecture>.rope.scaling.yarn_beta_slow", _F32, "turns up to which frequencies are scaled"
    YARN_LOG_MULTIPLIER = "<architecture>.rope.scaling.yarn_log_multiplier", _F32, "0.1 mscale_all_dim"
    EXPERT_COUNT = "<architecture>.expert_count", _U32, "experts of a layer"
    EXPERT_USED_COUNT = "<architecture>.expert_used_count", _U32, "experts of a token"
    EXPERT_FEED_FORWARD_LENGTH = "<architecture>.expert_feed_forward_length", _U32, "width of an expert"
    EXPERT_SHARED_COUNT = "<architecture>.expert_shared_count", _U32, "experts that every token goes to"
    EXPERT_SHARED_FEED_FORWARD_LENGTH = "<architecture>.expert_shared_feed_forward_length", _U32, "their width"
    EXPERT_WEIGHTS_SCALE = "<architecture>.expert_weights_scale", _F32, "factor of the routing weights"
    EXPERT_WEIGHTS_NORM = "<architecture>.expert_weights_norm", _BOOL, "whether chosen experts' weights sum to 1"
    EXPERT_GATING_FUNC = "<architecture>.expert_gating_func", _U32, "scores of the router, 1: softmax"
    EXPERT_GROUP_COUNT = "<architecture>.expert_group_count", _U32, "groups of experts"
    EXPERT_GROUP_USED_COUNT = "<architecture>.expert_group_used_count", _U32, "groups that a token may use"
    ROUTER_JITTER_NOISE = "<architecture>.router_jitter_noise", _F32, "SparseMixer's tolerance"

    TOKENIZER_JSON = "tokenizer.huggingface.json", _STRING, "text of tokenizer.json, before all tokenizer.ggml keys"
    CHAT_TEMPLATE = "tokenizer.chat_template", _STRING, "Jinja template of a conversation"
    NAMED_CHAT_TEMPLATE = "tokenizer.chat_template.<name>", _STRING, "another template, such as tool_use"
    CHAT_TEMPLATES = "tokenizer.chat_templates", _ARRAY, "names of the other templates", _STRING
    TOKENIZER_MODEL = "tokenizer.ggml.model", _STRING, "kind of BPE: gpt2 or llama"
    TOKENIZER_PRE = "tokenizer.ggml.pre", _STRING, "pre-tokenizer, by llama.cpp's names"
    TOKENS = "tokenizer.ggml.tokens", _ARRAY, "text of every token", _STRING
    TOKEN_TYPE = "tokenizer.ggml.token_type", _ARRAY, "TokenType of every token", _I32
    PRECOMPILED_CHARSMAP = "tokenizer.ggml.precompiled_charsmap", _ARRAY, "table of T5's normalizer", _U8
    TOKEN_TYPE_COUNT = "tokenizer.ggml.token_type_count", _U32, "number of BERT's token types"
    SCORES = "tokenizer.ggml.scores", _ARRAY, "score of every token", _F32
    MERGES = "tokenizer.ggml.merges", _ARRAY, "pairs that BPE merges, first ones first", _STRING
    ADDED_TOKENS = "tokenizer.ggml.added_tokens", _ARRAY, "tokens beside the vocabulary", _STRING
    BOS_TOKEN_ID = "tokenizer.ggml.bos_token_id", _U32, "begins a text"
    EOS_TOKEN_ID = "tokenizer.ggml.eos_token_id", _U32, "ends a text"
    EOT_TOKEN_ID = "tokenizer.ggml.eot_token_id", _U32, "ends a turn"
    EOM_TOKEN_ID = "tokenizer.ggml.eom_token_id", _U32, "ends a message"
    UNKNOWN_TOKEN_ID = "tokenizer.ggml.unknown_token_id", _U32, "stands for what no token covers"
    SEPARATOR_TOKEN_ID = "tokenizer.ggml.seperator_token_id", _U32, "between texts; llama.cpp spells it so"
    PADDING_TOKEN_ID = "tokenizer.ggml.padding_token_id", _U32, "fills up a batch"
    CLS_TOKEN_ID = "tokenizer.ggml.cls_token_id", _U32, "begins BERT's texts"
    MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id", _U32, "stands for a token to be guessed"
    PREFIX_TOKEN_ID = "tokenizer.ggml.prefix_token_id", _U32, "fill-in-the-middle, old name"
    SUFFIX_TOKEN_ID = "tokenizer.ggml.suffix_token_id", _U32, "fill-in-the-middle, old name"
    MIDDLE_TOKEN_ID = "tokenizer.ggml.middle_token_id", _U32, "fill-in-the-middle, old name"
    FIM_PRE_TOKEN_ID = "tokenizer.ggml.fim_pre_token_id", _U32, "fill-in-the-middle: before the gap"
    FIM_SUF_TOKEN_ID = "tokenizer.ggml.fim_suf_token_id", _U32, "fill-in-the-middle: after the gap"
    FIM_MID_TOKEN_ID = "tokenizer.ggml.fim_mid_token_id", _U32, "fill-in-the-middle: the gap"
    FIM_PAD_TOKEN_ID = "tokenizer.ggml.fim_pad_token_id", _U32, "fill-in-the-middle: padding"
    FIM_REP_TOKEN_ID = "tokenizer.ggml.fim_rep_token_id", _U32, "fill-in-the-middle: repository"
    FIM_SEP_TOKEN_ID = "tokenizer.ggml.fim_sep_token_id", _U32, "fill-in-the-middle: file"
    ADD_BOS_TOKEN = "tokenizer.ggml.add_bos_token", _BOOL, "whether every text gets it"
    ADD_EOS_TOKEN = "tokenizer.ggml.add_eos_token", _BOOL, "whether every text gets it"
    ADD_SEP_TOKEN = "tokenizer.ggml.add_sep_token", _BOOL, "whether every text gets it"
    ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix", _BOOL, "whether a space comes before every text"
    REMOVE_EXTRA_WHITESPACES = "tokenizer.ggml.remove_extra_whitespaces", _BOOL, "whether a text loses them first"


_BY_NAME = {key.value: key for key in Key}


def is_known(name: str) -> bool:
    """Whether the table has a key of this name, which is not one of an architecture's."""
    return _in_table(name) in _BY_NAME


def _in_table(name: str) -> str:
    """The name that the table has for a key, which is of no architecture."""
    return Key.NAMED_CHAT_TEMPLATE.value if name.startswith(f"{Key.CHAT_TEMPLATE.value}.") else name


def find_key(name: str, architecture: str = ARCHITECTURE) -> Key:
    """The key of this name in a file of this architecture; CQError if the table has none."""
    own = f"{architecture}."
    known = f"{ARCHITECTURE}.{name.removeprefix(own)}" if name.startswith(own) else _in_table(name)
    if known not in _BY_NAME:
        raise CQError(f"the key {name} is unknown: no type of its value stands in the table of keys")
    return _BY_NAME[known]


def add_keys(writer: GGUFWriter, architecture: str, keys: Mapping[str, KeyValue]) -> None:
    """Add these to the header, each in its own type; names have the architecture, or its placeholder.

    An empty array is left out, as gguf-py cannot write one. CQError for an unknown key.
    """
    for name, value in keys.items():
        key = name if isinstance(name, Key) else find_key(name, architecture)
        if not isinstance(value, list) or value:
            writer.add_key_value(name.replace(ARCHITECTURE, architecture), value, key.type, key.item)
