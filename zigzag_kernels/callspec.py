"""The options of an attention call in one frozen value, which travels from the public call to the launches."""

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

    Fields mean what the arguments of `zigzag_attention` mean, with their defaults filled in. `heads_k_stride` None
    leaves the stride to `heuristics.choose_heads_k_stride`; `grad_reduce_dtype` is the name of a dtype; `backend` is
    one of `modes.Backend`.

    A mask has only one spelling in `causal` and `window_size`: a causal window has no right side, and a window that
    ends with its own token is causal. `has_lengths` says that the batch has real lengths, so that documents end before
    their padding. In a batch of two parts `whole_tokens` rows of each rank, the first ones, are for its
    `whole_documents`, which no other rank has a part of; 0 rows: all documents are split. `halo` and `halo_rows` are 0
    unless K/V of halos alone move: the rows before a chunk that its rows may see, and the rows that a message to a
    neighbour has (`halo.with_halo`).
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
        """Return a hash of a few fields that differ between calls; eager calls look transports up by it."""
        return hash((self.causal, self.softmax_scale, self.window_size))

    @property
    def has_range(self) -> bool:
        """True if a window or chunks of attention hide keys that the causal or full mask leaves visible."""
        return self.window_size != NO_WINDOW or self.attention_chunk > 0

    @property
    def key(self) -> str:
        """The spec as text, for `from_key`: operators of PyTorch take strings, and no values of Python classes."""
        return _key(self)

    @staticmethod
    def from_key(key: str) -> "CallSpec":
        """Return the spec whose `key` this is."""
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
    """Return the checked `CallSpec` of a call on arrays of `head_dim`.

    `softmax_scale` None is `1 / sqrt(head_dim)`, and `grad_reduce_dtype` None is "float32". Raises `ValueError` for a
    value that no call accepts; `make_problem` checks the values that depend on the arrays.
    """
    causal, deterministic = check_flag("causal", causal), check_flag("deterministic", deterministic)
    check_method(method)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(head_dim, 1))  # make_problem refuses a head_dim below 1
    softmax_scale = check_softmax_scale(softmax_scale)
    heads_k_stride = python_value(heads_k_stride)
    # True and 1.0 equal 1, so that plans kept for 1 would serve them; an array compares element by element.
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
