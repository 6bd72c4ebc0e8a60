"""The modes that a call, a problem or a kernel can be in, each with the promise that it makes.

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
    """Rank-major, as an all-gather delivers them: each rank's slot holds its early and its late chunks."""
    PEER = "peer"
    """The early and the late chunks of one rank alone, as they travel around a ring."""
    CONTIGUOUS = "contiguous"
    """Every sequence in position order."""
    HALO = "halo"
    """The halo before each chunk of a rank, which a neighbour sends, and the rank's own rows behind it."""


class Layout(StrEnum):
    """The unit that is cut into `2 * W` chunks; each rank holds two of the chunks."""

    DOCUMENT = "document"
    """Every document: work is equal on all ranks, and lengths are multiples of `2 * W`, after padding."""
    ROW = "row"
    """Each packed row as a whole: documents of any length lie anywhere in it, and work may be unequal."""


class Method(StrEnum):
    """Way in which K/V reach the ranks whose queries attend to them."""

    ALLGATHER = "allgather"
    """Gathers K/V of a few heads from all ranks while the heads before them are attended."""
    RING = "ring"
    """Passes K/V of all heads from rank to rank: memory does not grow with the number of ranks."""
    HALO = "halo"
    """Sends the last rows of each chunk to the next chunk's rank, for windows no longer than a chunk."""

    @property
    def kv_layout(self) -> KVLayout:
        """Layout of the K/V buffers that the kernels read, and so of the tables that they need."""
        layouts = {Method.ALLGATHER: KVLayout.GATHERED, Method.RING: KVLayout.PEER, Method.HALO: KVLayout.HALO}
        return layouts[self]


class Operation(StrEnum):
    """Part of an attention step that one kernel of a family computes."""

    FORWARD = "forward"
    """Output and lse: a program owns a tile of query rows."""
    DKDV = "dkdv"
    """Gradients of K and V: a program owns a tile of keys."""
    DQ = "dq"
    """Gradient of Q: a program owns a tile of query rows."""
    FUSED_BACKWARD = "fused_backward"
    """All three gradients in one kernel, summed in no fixed order: a program owns a tile of keys."""

    @property
    def owns_keys(self) -> bool:
        """True if a program owns a tile of keys and passes over query rows, not the other way round."""
        return self in (Operation.DKDV, Operation.FUSED_BACKWARD)


class LengthClass(StrEnum):
    """Length of the sequences of a problem, as the choice of tiles distinguishes it."""

    LONG = "long"
    """One sequence has tiles enough to fill a GPU several times."""
    FEW_ROWS = "few"
    """One sequence does not fill a GPU, though its chunks fill blocks of keys."""
    SHORT = "short"
    """Chunks do not fill blocks of 128 keys."""
