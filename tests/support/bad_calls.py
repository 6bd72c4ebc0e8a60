"""The arguments of every public function: a good value of each, and the values that it does not take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

import zigzag_jax
import zigzag_torch

WORLD_SIZE, TOKENS, OFFSETS = 2, 8, [0, 4, 16]


class Torch:
    package = zigzag_torch

    @staticmethod
    def array(x):
        return torch.tensor(x)


class Jax:
    package = zigzag_jax
    array = staticmethod(jnp.asarray)


def ones(*shape):
    return np.ones(shape, np.float32)


NEVER = {
    "text": "text", "bytes": b"0", "object": object(), "dict": {"a": 1}, "set": {1}, "function": len, "class": int,
    "complex": 1j, "ellipsis": ..., "slice": slice(0, 4), "nested": [[0, 4], [0]], "generator": (x for x in ()),
    "strings": ["0", "4"], "none in list": [None], "range": range(3), "module": np, "exception": ValueError("x"),
    "bytearray": bytearray(b"1"),
}  # fmt: skip
"""Values that no argument takes."""
NUMBERS = {"nan": float("nan"), "inf": float("inf"), "half": 0.5, "minus": -1, "huge": 2**70, "minus huge": -(2**70)}
BAD = {
    "array": {"none": None, "number": 1, "float": 1.5, "flag": True, "list": [1.0], "empty": [], "tuple": (1.0, 2.0)},
    "flag": {"none": None, "zero": 0, "one": 1, "float": 1.0, "empty": [], "list": [True], **NUMBERS},
    "int": {"flag": True, "float": 1.0, "list": [1], "tuple": (1,), "empty": [], "false": False, **NUMBERS},
    "offsets": {
        "none": None, "number": 1, "float": 1.5, "flag": True, "empty": [], "floats": [0.0, 4.0],
        "flags": [False, True], "huge": [0, 2**40], "late": [4, 16], "decrease": [0, 16, 12], "uneven": [0, 5, 16],
        "minus": [0, -4],
        "nans": [0.0, float("nan")],
    },
    "scale": {"flag": True, "zero": 0, "tiny": 1e-320, "large": 1e300, "list": [1.0], "empty": [], **NUMBERS},
    "name": {"number": 0, "flag": True, "empty": "", "list": ["triton"], "float": 1.5, "other": "Reference"},
    "none": {"number": 1, "flag": True, "float": 1.5, "empty": [], "list": [0]},
    "list": {"none": None, "number": 1, "float": 1.5, "flag": True, "empty": [], "list": [0], "tuple": (1.5,)},
    "window": {
        "none": None, "number": 1, "float": 1.5, "flag": True, "empty": [], "one": (1,), "three": (1, 2, 3),
        "minus": (-2, 0), "flags": (True, 1), "floats": (1.5, 2.0), "huge": (0, 2**70), "texts": ("1", "2"),
    },
    "fill": {"none": None, "list": [1], "tuple": (), "empty": []},
}  # fmt: skip
"""Further values that arguments of each kind do not take."""
OF_KIND = {
    "rows": "array", "packed rows": "array", "optional array": "array", "int32": "offsets", "packed offsets": "offsets",
    "real lengths": "offsets", "zero": "scale",
}  # fmt: skip
"""Kinds that take what another kind takes, with differences that `bad_values` knows."""
ARRAYS = {
    "0-d": np.float32(1) * np.ones(()), "bool": np.ones((2, 3), bool), "complex array": np.ones(4, np.complex64),
    "no rows": ones(0), "5-d": ones(1, 1, 1, 1, 1), "float64": np.ones((3, 1, 7)), "other": ones(3, 5, 7),
}  # fmt: skip
"""Arrays that no argument takes."""


def attention_arguments(local):
    rows = TOKENS if local else WORLD_SIZE * TOKENS
    return {
        "q": ("array", ones(TOKENS, 4, 16)), "k": ("array", ones(rows, 2, 16)), "v": ("array", ones(rows, 2, 16)),
        "cu_seqlens": ("offsets", OFFSETS if not local else [0, 4, 8]),
    }  # fmt: skip


OPTIONS = {
    "window_size": ("window", (5, -1)), "attention_chunk": ("int", 4), "softcap": ("scale", 2.0),
    "sinks": ("optional array", ones(4)), "return_max_logits": ("flag", True), "layout": ("name", "document"),
    "causal": ("flag", True), "softmax_scale": ("scale", 0.5), "return_lse": ("flag", True),
    "backend": ("name", "reference"), "deterministic": ("flag", True),
}  # fmt: skip
BETWEEN = {"method": ("name", "allgather"), "heads_k_stride": ("int", 1), "grad_reduce_dtype": ("name", None)}
X, LENGTHS = {"x": ("rows", ones(16, 3))}, {"cu_seqlens": ("offsets", OFFSETS)}
RANK, SIZE = {"rank": ("int", 1)}, {"world_size": ("int", WORLD_SIZE)}
BOTH = {
    "zigzag_attention_gathered": {**attention_arguments(False), **RANK, **SIZE, **OPTIONS},
    "zigzag_attention": {**attention_arguments(True), **BETWEEN, **OPTIONS},
    "prepare_batch": {
        **LENGTHS, **RANK, **SIZE, "method": ("name", "ring"), "backend": ("name", "reference"),
        "lengths": ("real lengths", [4, 9]), "layout": ("name", "document"),
    },
    "shard": {**X, **LENGTHS, **RANK, **SIZE},
    "unshard": {**X, **LENGTHS, **SIZE},
    "position_ids": {**LENGTHS, **RANK, **SIZE, "tokens": ("int", 8)},
    "local_cu_seqlens": {**LENGTHS, **SIZE},
    "pad_to_zigzag": {**X, **LENGTHS, **SIZE, "total": ("int", 20), "value": ("fill", 7.0)},
    "unpad": {**X, **LENGTHS, **SIZE},
    "validate": {**LENGTHS, **SIZE, "total": ("int", 16)},
    "cu_seqlens_from_segment_ids": {
        "segment_ids": ("array", np.array([1, 1, 2])), "max_sequences": ("int", 3),
        "positions": ("optional array", np.array([0, 1, 0])), "return_lengths": ("flag", False),
    },
    "cu_seqlens_from_position_ids": {"position_ids": ("array", np.array([0, 1, 0])), "max_sequences": ("int", 3)},
    "plan_documents": {
        "lengths": ("ignored", [4, 9]), **SIZE, "tokens": ("int", 12), "split_above": ("int", 5),
        "split_tokens": ("int", 6), "window_size": ("window", (5, -1)), "attention_chunk": ("int", 4),
        "causal": ("flag", True), "max_documents": ("int", 2), "max_split": ("int", 2),
    },
    "token_mean_loss": {
        "logits": ("array", ones(8, 5)), "labels": ("array", np.ones(8, np.int32)), "num_targets": ("int", 8),
    },
    "merge_partials": {"out": ("array", ones(2, 8, 4, 16)), "lse": ("array", ones(2, 4, 8))},
}  # fmt: skip
ROW = {"layout": ("name", "row"), "row_length": ("int", 16)}
PACKED = {"cu_seqlens": ("packed offsets", [0, 5, 16])}
PACKED_X = {"x": ("packed rows", ones(16, 3))}
IN_ROWS = {
    "zigzag_attention_gathered": {
        **attention_arguments(False),
        **PACKED,
        **RANK,
        **SIZE,
        **OPTIONS,
        "layout": ("name", "row"),
    },
    "prepare_batch": {**PACKED, **RANK, **SIZE, **ROW, "rows": ("int", 1), "lengths": ("real lengths", [5, 4])},
    "shard": {**PACKED_X, **PACKED, **RANK, **SIZE, **ROW},
    "unshard": {**PACKED_X, **PACKED, **SIZE, **ROW},
    "position_ids": {**PACKED, **RANK, **SIZE, "tokens": ("int", 8), **ROW},
    "local_cu_seqlens": {**PACKED, **SIZE, **ROW, **RANK},
    "pad_to_zigzag": {**PACKED_X, **PACKED, **SIZE, "total": ("int", 16), "value": ("fill", 7.0), **ROW},
    "unpad": {**PACKED_X, **PACKED, **SIZE, "layout": ("name", "row")},
    "validate": {**PACKED, **SIZE, "total": ("int", 16), **ROW, "lengths": ("real lengths", [5, 4])},
}
"""Helpers of the row layout, where lengths are no multiples of anything."""
SEGMENTS = {
    "segment_ids": ("array", np.array([[1, 1, 2, 2, 2, 0, 0, 0]])),
    "positions": ("optional array", np.array([[0, 1, 0, 1, 2, 0, 0, 0]])), "max_segments": ("int", 3),
    "layout": ("name", "row"), "method": ("name", "ring"), "backend": ("name", "reference"),
    "window_size": ("window", (5, -1)), "attention_chunk": ("int", 4),
}  # fmt: skip
SEGMENTED = {name: ("array", ones(1, 8, heads, 16)) for name, heads in {"q": 4, "k": 2, "v": 2}.items()}
ONLY_JAX = {
    "make_zigzag_attention": {
        "mesh": ("none", None), "axis": ("name", "cp"), "head_axis": ("name", "tp"), "batch_axis": ("name", "dp"),
    },
    "prepare_segments": SEGMENTS,
    "segmented_attention": {
        **SEGMENTED, **SEGMENTS, "heads_k_stride": BETWEEN["heads_k_stride"],
        **{name: x for name, x in OPTIONS.items() if name not in (*SEGMENTS, "return_max_logits")},
    },
    "lower_for": {"target": ("name", "9.0")},
}  # fmt: skip
PAIR = {"chunk_idx_0": ("int", 0), "chunk_idx_1": ("int", 3)}
IGNORED = dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "local_k_slice"), ("ignored", 8))
UNSUPPORTED = {"dropout_p": ("zero", 0.0), "window_size": ("list", (-1, -1)), "alibi_slopes": ("none", None)}
PUBLISHED = {
    **UNSUPPORTED, "softmax_scale": ("scale", 0.5), "causal": ("flag", True), "deterministic": ("flag", False),
    "return_attn_probs": ("flag", True), "n_chunks": ("int", 2), "heads_k_stride": ("int", 1), **IGNORED,
    "cu_seqlens_q": ("int32", [0, 4, 8]), "cu_seqlens_k": ("int32", [0, 4, 8]),
}  # fmt: skip
GROUPED = {
    "chunk_q_list": ("list", None), "chunk_cu_seqlens_q_list": ("list", None), "chunk_indices_list": ("list", None),
    "kv_buffer": ("array", ones(2, 16, 2, 16)), "kv_slices": ("list", None), "nheads": ("int", 4),
    "head_dim": ("int", 16), "softmax_scale": ("scale", 0.5), **UNSUPPORTED, "causal": ("flag", True),
    "deterministic": ("flag", False), "world_size": ("int", 2), "cu_seqlens_k": ("int32", [0, 2, 8]),
}  # fmt: skip
ROWS = {name: ("array", ones(8, heads, 16)) for name, heads in {"q": 4, "k": 2, "v": 2}.items()}
ONLY_TORCH = {
    "zigzag_llama3_flash_attn_varlen_func": {**ROWS, **PUBLISHED},
    "zigzag_llama3_flash_attn_varlen_kvpacked_func": {
        "q": ROWS["q"], "kv": ("array", ones(8, 2, 2, 16)), **PUBLISHED,
    },
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func": {"qkv": ("array", ones(8, 3, 2, 16)), **PUBLISHED},
    "split_q_by_zigzag_chunk_index": {
        "q": ROWS["q"], "cu_seqlens_q": ("int32", [0, 2, 8]), **SIZE, "rank": ("int", 0), "n_chunks": ("int", 2),
    },
    "rearrange_kv_from_zigzag_to_contiguous": {
        "kv_buffer": GROUPED["kv_buffer"], **SIZE, "cu_seqlens": ("int32", [0, 2, 8]),
    },
    "compute_kv_slices_for_groups": {
        "cu_seqlens_k": ("int32", [0, 2, 8]), **PAIR, **SIZE, "chunk_cu_seqlens_q_list": ("list", None),
        "n_chunks": ("int", 2),
    },
    "execute_grouped_attention": GROUPED,
    "replace_grouped_attention_with_fused_triton_v2": {**GROUPED, **PAIR},
    "fused_zigzag_llama3_flash_attn_forward_v2": {
        "q0": ROWS["q"], "q1": ROWS["q"], "k": ("array", ones(32, 2, 16)), "v": ("array", ones(32, 2, 16)),
        "cu_seqlens_q0": ("int32", [0, 8]), "cu_seqlens_q1": ("int32", [0, 8]), "cu_seqlens_k": ("int32", [0, 32]),
        "chunk_idx_0": ("int", 0), "chunk_idx_1": ("int", 3), "total_chunks": ("int", 4),
        "softmax_scale": ("scale", 0.5), "causal": ("flag", True),
    },
    "shard_documents": {
        "documents": ("ignored", [[1, 2, 3], [4, 5]]), **RANK, **SIZE, "tokens": ("int", 8),
        "max_documents": ("int", 4), "layout": ("name", "document"),
    },
    "ZigzagCollator": {**RANK, **SIZE, "tokens": ("int", 8), "max_documents": ("int", 4), "layout": ("name", "row")},
    "unshard_group": {"x": ("array", ones(8, 5)), "batch": ("ignored", None)},
    "profile_report": {"reset": ("flag", False)},
    "ZigzagConfig": dict.fromkeys(("use_fused_triton_v2", "verify_correctness", "profile_kernels"), ("flag", False)),
}  # fmt: skip
FUNCTIONS = [(Torch, name, arguments) for name, arguments in {**BOTH, **ONLY_TORCH}.items()]
FUNCTIONS += [(Jax, name, arguments) for name, arguments in {**BOTH, **ONLY_JAX}.items()]
FUNCTIONS += [(framework, name, arguments) for framework in (Torch, Jax) for name, arguments in IN_ROWS.items()]
OPTIONAL = {
    "head_axis",
    "batch_axis",
    "softmax_scale",
    "backend",
    "heads_k_stride",
    "grad_reduce_dtype",
    "tokens",
    "total",
    "positions",
    "lengths",
    "row_length",
    "split_above",
    "split_tokens",
    "max_documents",
    "max_split",
}
"""Arguments for which None is a value."""
MAY_BE_NONE = {
    ("zigzag_attention", "cu_seqlens"),
    ("prepare_segments", "segment_ids"),
    ("segmented_attention", "segment_ids"),
}
"""Functions and arguments of theirs for which None is a value too."""
NOT_READ = {"replace_grouped_attention_with_fused_triton_v2": ("kv_slices", "chunk_cu_seqlens_q_list")}
"""Lists that the fused path does not read: it computes the same whatever they are."""


@functools.cache
def lists_of_groups():
    """The lists that the published functions hand to one another, of rank 0."""
    local = torch.tensor([0, 2, 8], dtype=torch.int32)
    rows, offsets, indices = zigzag_torch.split_q_by_zigzag_chunk_index(torch.ones(8, 4, 16), local, 2, 0)
    slices = zigzag_torch.compute_kv_slices_for_groups(local, 0, 3, 2, offsets)
    names = "chunk_q_list", "chunk_cu_seqlens_q_list", "chunk_indices_list", "kv_slices"
    return dict(zip(names, (rows, offsets, indices, slices), strict=True))


def good_arguments(framework, name, arguments):
    values = {}
    for argument, (kind, value) in arguments.items():
        if value is None and argument in lists_of_groups():
            value = lists_of_groups()[argument]
        elif kind in ("offsets", "packed offsets", "real lengths", "int32"):
            value = framework.array(np.array(value, np.int32))
        elif isinstance(value, np.ndarray):
            value = framework.array(value)
        values[argument] = value
    if name == "make_zigzag_attention":
        values["mesh"] = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("cp", "tp", "dp"))
    if name == "zigzag_attention" and framework is Torch:
        values["group"] = None
    if name == "unshard_group":
        values["batch"] = zigzag_torch.shard_documents([[1, 2, 3, 4], [5, 6]], 0, 1, tokens=8)
    return values


def bad_values(framework, name, argument, kind):
    """Return values that `argument` does not take, by name."""
    values = dict(NEVER)
    if kind == "fill" or (kind == "list" and argument == "window_size"):
        values.pop("range")
    values |= BAD[OF_KIND.get(kind, kind)]
    values |= {f"array {shape}": framework.array(x) for shape, x in ARRAYS.items() if shape != "float64"}
    if argument in OPTIONAL or (name, argument) in MAY_BE_NONE or kind == "none" or (kind == "optional array"):
        values.pop("none", None)
    if kind in ("int", "scale", "flag", "fill") and framework is Torch:
        values["jax array"] = jnp.ones(3)
    if kind == "zero":
        values = {key: x for key, x in values.items() if key != "zero"} | {"tenth": 0.1}
    if kind in ("rows", "packed rows"):  # of any type and number of dimensions
        for key in ("bool", "5-d", "other", "complex array", "no rows"):
            values.pop(f"array {key}")
        values |= {"15 rows": framework.array(ones(15, 2)), "row by row": framework.array(ones(2, 16))}
    if kind == "packed rows":  # which may be beside one another
        values.pop("row by row")
    if kind in ("offsets", "packed offsets", "real lengths", "int32"):
        lists = {key: x for key, x in BAD["offsets"].items() if isinstance(x, list) and key not in ("empty", "huge")}
        values |= {f"array of {key}": framework.array(np.array(x)) for key, x in lists.items()}
        if name in ("pad_to_zigzag", "unpad", "zigzag_attention") or kind == "packed offsets":
            values = {key: x for key, x in values.items() if "uneven" not in key}
        if name == "local_cu_seqlens":
            values.pop("minus", None)
    if kind == "name" and argument in ("method", "backend"):
        values["float64"] = "float64"
    if argument == "softcap":
        values = {key: x for key, x in values.items() if key not in ("half", "zero")} | {"minus one half": -0.5}
    if argument == "softmax_scale":
        values = {key: x for key, x in values.items() if key not in ("half", "huge")} | {"minus one half": -0.5}
    return values
