"""The modes of a call, a problem or a kernel, as enums; a member's docstring says what the mode promises.

Members are strings, so that they equal the words that users write: `Method.RING == "ring"`.
"""

from enum import StrEnum


class Backend(StrEnum):
    """Implementation that computes an attention call."""

    TRITON = "triton"
    """Compiled Triton kernels, on an NVIDIA GPU: the default there."""
    INTERPRET = "interpret"
    """The same kernels, run on a CPU by Triton's interpreter: slow, for tests."""
    REFERENCE = "reference"
    """Dense attention in plain PyTorch or JAX: the default on a CPU."""


class KVLayout(StrEnum):
    """Order in which the K/V buffer holds the keys of a sequence."""

    GATHERED = "gathered"
    """Rank after rank, as an all-gather delivers K/V: each rank's slot holds its early and its late chunks."""
    PEER = "peer"
    """The early and the late chunks of one rank only, as they travel around the ring."""
    CONTIGUOUS = "contiguous"
    """Every sequence in position order."""
    HALO = "halo"
    """The halo of each chunk of a rank, received from a neighbour, followed by the first rows of that chunk."""


class Layout(StrEnum):
    """The unit that is cut into `2 * W` chunks; each rank holds two of the chunks."""

    DOCUMENT = "document"
    """Every document: all ranks have equal work, and documents are padded to multiples of `2 * W` tokens."""
    ROW = "row"
    """Each packed row as a whole: documents of any length lie anywhere in it, and ranks may have unequal work."""


class Method(StrEnum):
    """Way in which K/V reach the ranks whose queries attend to them."""

    ALLGATHER = "allgather"
    """Gathers K/V of a few heads from all ranks, while the GPU computes attention of the heads before them."""
    RING = "ring"
    """Passes K/V of all heads from rank to rank: memory does not grow with the number of ranks."""
    HALO = "halo"
    """Sends the last rows of each chunk to the next chunk's rank, for windows no longer than a chunk."""

    @property
    def kv_layout(self) -> KVLayout:
        """The layout of the K/V buffers that kernels read with this method; it decides the tables of the batch."""
        layouts = {Method.ALLGATHER: KVLayout.GATHERED, Method.RING: KVLayout.PEER, Method.HALO: KVLayout.HALO}
        return layouts[self]


class Operation(StrEnum):
    """The part of an attention step that one kernel computes."""

    FORWARD = "forward"
    """Output and lse: a program owns a tile of query rows."""
    DKDV = "dkdv"
    """Gradients of K and V: a program owns a tile of keys."""
    DQ = "dq"
    """Gradient of Q: a program owns a tile of query rows."""
    FUSED_BACKWARD = "fused_backward"
    """All three gradients in one kernel: a program owns a tile of keys. Programs add to dQ in turns or in any order."""

    @property
    def owns_keys(self) -> bool:
        """True if a program owns a tile of keys and loops over query rows, False if it does the opposite."""
        return self in (Operation.DKDV, Operation.FUSED_BACKWARD)


class LengthClass(StrEnum):
    """The length of a problem's sequences, in the classes that have different tiles."""

    LONG = "long"
    """One sequence has enough tiles to fill a GPU several times."""
    FEW_ROWS = "few"
    """One sequence has too few tiles to fill a GPU, but its chunks fill blocks of keys."""
    SHORT = "short"
    """Chunks do not fill blocks of 128 keys."""
