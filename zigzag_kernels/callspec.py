"""`CallSpec`: the options of an attention call as one frozen value, passed from the public call to the launches."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass

from .checks import (
    check_attention_chunk,
    check_flag,
    check_layout,
    check_method,
    check_softcap,
    check_softmax_scale,
    check_window_size,
    python_value,
)
from .modes import Layout, Method

NO_WINDOW = -1, -1


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """The options of one attention call besides its arrays; equal options are equal values.

    Fields have the meaning of the arguments of `zigzag_attention`, with their defaults filled in. `heads_k_stride` None
    leaves the stride to `heuristics.choose_heads_k_stride`; `grad_reduce_dtype` is the name of a dtype; `backend` is
    one of `modes.Backend`.

    `causal` and `window_size` spell each mask in only one way: the right side of a causal window is -1, and a window
    that ends with the row's own token has `causal=True`. `has_lengths` says that the batch has real lengths, so that
    documents end before their padding. In a batch of two parts, the first `whole_tokens` rows of each rank belong to
    its `whole_documents`; if `whole_tokens` is 0, all documents are split. Method "halo" sets `halo`, the number of
    rows before a chunk that the chunk's rows may see, and `halo_rows`, the rows of one message to a neighbour
    (`halo.with_halo`); for other methods both are 0.
    """

    causal: bool
    softmax_scale: float
    backend: str
    method: Method = Method.ALLGATHER
    heads_k_stride: int | None = None
    grad_reduce_dtype: str = "float32"
    deterministic: bool = True
    window_size: tuple[int, int] = NO_WINDOW
    attention_chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    return_max_logits: bool = False
    layout: Layout = Layout.DOCUMENT
    has_lengths: bool = False
    whole_tokens: int = 0
    whole_documents: int = 0
    halo: int = 0
    halo_rows: int = 0

    def __hash__(self):
        """Return a hash of the few fields that usually differ; eager calls look up their transport with this hash."""
        return hash((self.causal, self.softmax_scale, self.window_size))

    @property
    def has_range(self) -> bool:
        """True if a window or chunks of attention hide keys that the causal or full mask leaves visible."""
        return self.window_size != NO_WINDOW or self.attention_chunk > 0

    @property
    def key(self) -> str:
        """The spec as text, for `from_key`: a PyTorch operator accepts a string, but no object of a Python class."""
        return _key(self)

    @staticmethod
    def from_key(key: str) -> "CallSpec":
        """Return the spec that has this `key`."""
        return _from_key(key)


@functools.lru_cache(maxsize=1024)
def _key(spec: CallSpec) -> str:
    return json.dumps(dataclasses.asdict(spec))


@functools.lru_cache(maxsize=1024)
def _from_key(key: str) -> CallSpec:
    fields = json.loads(key)
    members = {"method": Method(fields["method"]), "layout": Layout(fields["layout"])}
    return CallSpec(**fields | members | {"window_size": tuple(fields["window_size"])})


def make_call_spec(
    *,
    head_dim: int,
    backend: str,
    causal: bool = True,
    softmax_scale: float | None = None,
    method: str = Method.ALLGATHER,
    heads_k_stride: int | None = None,
    grad_reduce_dtype: str | None = None,
    deterministic: bool = True,
    window_size: tuple[int | None, int | None] = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    has_sinks: bool = False,
    return_max_logits: bool = False,
    layout: str = Layout.DOCUMENT,
    has_lengths: bool = False,
    whole_tokens: int = 0,
    whole_documents: int = 0,
) -> CallSpec:
    """Check the options of a call on arrays of `head_dim`, and return them as a `CallSpec`.

    `softmax_scale` None means `1 / sqrt(head_dim)`, and `grad_reduce_dtype` None means "float32". Raises `ValueError`
    for a value that no call accepts; `make_problem` checks the options that depend on the arrays.
    """
    causal, deterministic = check_flag("causal", causal), check_flag("deterministic", deterministic)
    check_method(method)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(head_dim, 1))  # make_problem refuses a head_dim below 1
    softmax_scale = check_softmax_scale(softmax_scale)
    heads_k_stride = python_value(heads_k_stride)
    # Only an int is a valid cache key: True and 1.0 equal 1 and would find its plan; arrays compare by element.
    if heads_k_stride is not None and type(heads_k_stride) is not int:
        raise ValueError(f"heads_k_stride: expected an int or None, got {heads_k_stride!r}")
    left, right = check_window_size(window_size)
    if causal or right == 0:
        causal, right = True, -1
    return CallSpec(
        causal=causal,
        softmax_scale=softmax_scale,
        backend=backend,
        method=Method(method),
        heads_k_stride=heads_k_stride,
        grad_reduce_dtype="float32" if grad_reduce_dtype is None else grad_reduce_dtype,
        deterministic=deterministic,
        window_size=(left, right),
        attention_chunk=check_attention_chunk(attention_chunk),
        softcap=check_softcap(softcap),
        has_sinks=has_sinks,
        return_max_logits=check_flag("return_max_logits", return_max_logits),
        layout=check_layout(layout),
        has_lengths=has_lengths,
        whole_tokens=whole_tokens,
        whole_documents=whole_documents,
    )
