"""`Parts`: the offsets of a rank's whole documents and of the split documents, as a plan of documents has them."""

from typing import NamedTuple

import torch

from zigzag_kernels.checks import check_int
from zigzag_kernels.documents import DocumentPlan
from zigzag_kernels.layout import MAX_OFFSET, impossible

from .arguments import check_device, check_int32


class Parts(NamedTuple):
    """The two parts of a rank's rows: whole documents and their padding, then chunks of split documents.

    `prepare_batch` takes it in place of `cu_seqlens`. The tensors are int32 and on one device.

    Attributes:
        whole_cu_seqlens: `[N + 1]`, offsets of this rank's whole documents in its rows.
        split_cu_seqlens: `[M + 1]`, offsets of the split documents over all ranks, with the padding of each.
        split_lengths: `[M]`, real tokens of the split documents.
        whole_tokens: rows of each rank for whole documents, padding included.
        tokens: rows of each rank.
    """

    whole_cu_seqlens: torch.Tensor
    split_cu_seqlens: torch.Tensor
    split_lengths: torch.Tensor
    whole_tokens: int
    tokens: int

    @staticmethod
    def of_plan(plan: DocumentPlan, rank: int, device: torch.device | str | int | None = None) -> "Parts":
        """Return the parts of `rank` in a plan, on `device`, by default the CPU."""
        offsets = plan.whole_cu_seqlens(rank), plan.split_cu_seqlens, plan.split_lengths
        whole, split, lengths = (torch.tensor(x, dtype=torch.int32, device=device or "cpu") for x in offsets)
        return Parts(whole, split, lengths, plan.whole_tokens, plan.tokens)

    def checked(self) -> "Parts":
        """Return these parts; `ValueError` for types, shapes or sizes that no plan has."""
        whole, split, _, whole_tokens, tokens = self
        tokens = check_int("tokens", tokens, 0, MAX_OFFSET, "a number of rows")
        check_int("whole_tokens", whole_tokens, 0, tokens, f"a number of the {tokens} rows")
        for name, x in (("whole_cu_seqlens", whole), ("split_cu_seqlens", split)):
            check_int32(name, x)
        check_device("whole_cu_seqlens", whole, "split_cu_seqlens", split)
        return self

    @property
    def fault(self) -> torch.Tensor:
        """Whether the whole documents do not fit into their rows: a tensor that nobody has read."""
        whole = self.whole_cu_seqlens
        return impossible(whole, whole.new_zeros(1), 1, self.whole_tokens)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (cu_seqlens, real lengths or None) of both parts as one, for a single rank.

        The padding between the parts is one more document, without real tokens.
        """
        if self.whole_tokens == self.tokens:
            return self.whole_cu_seqlens, None
        nothing = self.split_lengths.new_zeros(1)
        offsets = torch.cat((self.whole_cu_seqlens, self.split_cu_seqlens + self.whole_tokens))
        return offsets, torch.cat((self.whole_cu_seqlens.diff(), nothing, self.split_lengths))
