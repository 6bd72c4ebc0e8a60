"""Plans of documents as tensors: the offsets, rows and positions of a rank in a plan."""

from typing import NamedTuple

import torch

from zigzag_kernels.batch_checks import check_halo, check_parts
from zigzag_kernels.checks import check_int
from zigzag_kernels.documents import DocumentPlan, fingerprint
from zigzag_kernels.halo import HostSizes, sizes_of_documents
from zigzag_kernels.layout import MAX_OFFSET, is_invalid_batch

from .arguments import check_device, check_int32, check_tensor


class Parts(NamedTuple):
    """The two parts of a rank's rows: whole documents and their padding, then chunks of split documents.

    `prepare_batch` takes `Parts` in place of `cu_seqlens`. The tensors are int32 and on one device.

    Attributes:
        whole_cu_seqlens: `[N + 1]`, offsets of this rank's whole documents in its rows.
        split_cu_seqlens: `[M + 1]`, offsets of the split documents over all ranks, including their padding.
        split_lengths: `[M]`, real tokens of the split documents.
        whole_tokens: rows of each rank for whole documents, including padding.
        tokens: rows of each rank.
        shortest_chunk: rows of the shortest chunk of a split document that needs a full halo, 0 if unknown.
    """

    whole_cu_seqlens: torch.Tensor
    split_cu_seqlens: torch.Tensor
    split_lengths: torch.Tensor
    whole_tokens: int
    tokens: int
    shortest_chunk: int = 0

    @staticmethod
    def of_plan(plan: DocumentPlan, rank: int, device: torch.device | str | int | None = None) -> "Parts":
        """Return the parts of `rank` in a plan, on `device`, by default the CPU."""
        offsets = plan.whole_cu_seqlens(rank), plan.split_cu_seqlens, plan.split_lengths
        whole, split, lengths = (torch.tensor(x, dtype=torch.int32, device=device or "cpu") for x in offsets)
        shortest = sizes_of_documents(*offsets[1:], plan.world_size).shortest_chunk
        return Parts(whole, split, lengths, plan.whole_tokens, plan.tokens, shortest)

    def checked(self) -> "Parts":
        """Return these parts; `ValueError` for types, shapes or sizes that no plan has."""
        whole, split, _, whole_tokens, tokens, shortest = self
        tokens = check_int("tokens", tokens, 0, MAX_OFFSET, "a number of rows")
        check_int("whole_tokens", whole_tokens, 0, tokens, f"a number of the {tokens} rows")
        check_int("shortest_chunk", shortest, 0, MAX_OFFSET, "a number of rows")
        for name, x in (("whole_cu_seqlens", whole), ("split_cu_seqlens", split)):
            check_int32(name, x)
        check_device("whole_cu_seqlens", whole, "split_cu_seqlens", split)
        return self

    def values(self, world_size: int, halo: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return the values of `split_cu_seqlens` and of `split_lengths`; `ValueError` for values that no plan has.

        The host reads them. `halo` is (rows of a halo, promised longest real length), for `check_halo`.
        """
        whole, offsets, real = (x.tolist() for x in self[:3])
        check_parts(whole, offsets, real, world_size, self.whole_tokens, self.tokens)
        check_halo(offsets, real, world_size, None, halo)
        return offsets, real

    @property
    def sizes(self) -> HostSizes | None:
        """The sizes of the split documents; None if the host does not know their chunks."""
        rows, documents = self.tokens - self.whole_tokens, self.split_lengths.shape[0]
        return HostSizes(rows, documents, 0, self.shortest_chunk) if self.shortest_chunk else None

    @property
    def fault(self) -> torch.Tensor:
        """A boolean tensor, true if the whole documents do not fit into their rows; the host does not read it."""
        whole = self.whole_cu_seqlens
        return is_invalid_batch(whole, whole.new_zeros(1), 1, self.whole_tokens)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (cu_seqlens, real lengths or None) of a single rank, with both parts as one batch.

        The padding between the parts becomes one more document, without real tokens.
        """
        if self.whole_tokens == self.tokens:
            return self.whole_cu_seqlens, None
        nothing = self.split_lengths.new_zeros(1)
        offsets = torch.cat((self.whole_cu_seqlens, self.split_cu_seqlens + self.whole_tokens))
        return offsets, torch.cat((self.whole_cu_seqlens.diff(), nothing, self.split_lengths))


def with_identity(lengths: torch.Tensor, plan: object) -> torch.Tensor:
    """Return `lengths [M]`, followed by two hash numbers of `plan` if it is a plan of documents.

    Ranks compare these numbers, because the lengths of split documents do not say which rank has which whole documents.
    """
    if not isinstance(plan, DocumentPlan):
        return lengths
    number = fingerprint(plan.lengths, [plan.key])
    return torch.cat((lengths, lengths.new_tensor([number >> 33, (number & 0xFFFFFFFF) >> 1])))


def _rank_on_host(rank: int | torch.Tensor) -> int:
    if isinstance(rank, torch.Tensor):
        raise ValueError("rank: expected an int with a plan, whose rows the host knows, got a tensor")
    return rank


def shard_by_plan(x: torch.Tensor, plan: DocumentPlan, rank: int | torch.Tensor) -> torch.Tensor:
    """Return the rows of `rank` from the concatenated documents `x [tokens of all documents, ...]`; padding is 0."""
    check_tensor("x", x)
    rows = torch.tensor(plan.rows(_rank_on_host(rank)), dtype=torch.int64)
    if not x.ndim or x.shape[0] != sum(plan.lengths):
        raise ValueError(f"x: expected the {sum(plan.lengths)} tokens of the plan, got shape {tuple(x.shape)}")
    padding = (rows < 0).to(x.device)
    taken = x[rows.clamp(min=0).to(x.device)] if len(x) else x.new_zeros((len(rows), *x.shape[1:]))
    return taken.masked_fill(padding.view(-1, *(1,) * (x.ndim - 1)), 0)


def unshard_by_plan(x: torch.Tensor, plan: DocumentPlan) -> torch.Tensor:
    """Return the rows `x [W * T, ...]` of all ranks in the order of the documents, without padding."""
    check_tensor("x", x)
    total = plan.world_size * plan.tokens
    if not x.ndim or x.shape[0] != total:
        raise ValueError(f"x: expected the {total} rows of all ranks in the plan, got shape {tuple(x.shape)}")
    rows = [plan.rows(rank) for rank in range(plan.world_size)]
    return x[order_of_tokens(torch.tensor(rows, dtype=torch.int64, device=x.device).flatten())]


def positions_of_plan(plan: DocumentPlan, rank: int | torch.Tensor, tokens: int | None) -> torch.Tensor:
    """Return `[T]` int32, the position of every row of `rank` in its document, on the CPU; 0 for padding."""
    if tokens not in (None, plan.tokens):
        raise ValueError(f"tokens: expected None or those of the plan, {plan.tokens}, got {tokens}")
    return torch.tensor(plan.positions(_rank_on_host(rank)), dtype=torch.int32)


def order_of_tokens(rows: torch.Tensor) -> torch.Tensor:
    """Return the row that holds each token; `rows` has the token of each row, or -1 for padding.

    The host waits for the result.
    """
    held = (rows >= 0).nonzero().flatten()
    order = torch.empty_like(held)
    order[rows[held]] = held
    return order
