"""The portable family, which can run every problem, on every supported GPU and in the interpreter."""

from ..checks import DTYPE_BYTES
from ..family import Draft, Family
from ..heuristics import SUMS_TOGETHER_HEAD_DIM
from ..launch import Launch
from ..modes import Backend, Operation
from ..problem import Problem
from ..tiles.config import REGISTERS_PER_THREAD, Architecture, KernelId, TileConfig, block_d, not_power_of_two
from ..tiles.interpret import INTERPRET
from ..tiles.sm_80 import SM_80
from ..tiles.sm_86 import SM_86
from ..tiles.sm_90 import SM_90


class Portable(Family):
    """Triton kernels that are the same for every GPU: only their tile sizes differ."""

    name = "portable"
    architectures = (SM_90, SM_80, SM_86, INTERPRET)

    def can_run(self, problem: Problem, operation: Operation, dout_strides: tuple[int, int] | None) -> bool:
        return operation is not Operation.FUSED_BACKWARD

    def is_faster(self, problem: Problem, operation: Operation) -> bool:
        return True  # this family is the last entry of FAMILIES, so there is no other kernel to compare with

    def shared_memory(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> int:
        """Return an upper bound of the shared memory of one program, in bytes.

        A program holds its own tiles, and `num_stages` blocks that its loop loads. On GPUs whose matrix instructions
        take no operands from registers, it also holds scores or one more block, whichever is larger.
        """
        size = DTYPE_BYTES[dtype]
        row = block_d(head_dim) * size
        scores = 0
        if not architecture.operands_from_registers or size == 4:
            scores = max(2 * config.BLOCK_M * config.BLOCK_N * size, min(config.BLOCK_M, config.BLOCK_N) * row)
        if kernel.operation is Operation.DKDV:  # holds K and V; the loop loads Q, dO and, for each row, delta and lse2
            return 2 * config.BLOCK_N * row + config.num_stages * config.BLOCK_M * (2 * row + 8) + scores
        own_tiles = 1 if kernel.operation is Operation.FORWARD else 2  # holds Q, for dQ also dO; the loop loads K and V
        return own_tiles * config.BLOCK_M * row + config.num_stages * config.BLOCK_N * 2 * row + scores

    def exceeds(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> str | None:
        if config.heads_together > 1:
            return "1 as heads_together"
        if refused := not_power_of_two(config, "BLOCK_M", "BLOCK_N"):
            return refused
        need = registers(kernel.operation, config, head_dim, sums_apart(head_dim, dtype, architecture))
        if need > REGISTERS_PER_THREAD:
            return f"{need} registers a thread, the GPU has {REGISTERS_PER_THREAD}"
        return None

    def make_launches(self, draft: Draft) -> tuple[Launch, ...]:
        from .dkdv import backward_dkdv
        from .dq import backward_dq
        from .forward import attention_forward

        problem, config = draft.problem, draft.config
        constexprs = {"INTERPRET": problem.target == Backend.INTERPRET}
        resources = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if draft.kernel.operation is not Operation.DKDV:
            kernel = attention_forward if draft.kernel.operation is Operation.FORWARD else backward_dq
            return (draft.launch(kernel, constexprs, **resources),)
        apart = sums_apart(problem.head_dim, problem.dtype, self.architecture(problem.target))
        return tuple(
            draft.launch(backward_dkdv, constexprs | {"HAS_DK": has_dk, "HAS_DV": has_dv}, **resources)
            for has_dk, has_dv in (((True, False), (False, True)) if apart else ((True, True),))
        )


def sums_apart(head_dim: int, dtype: str, architecture: Architecture) -> bool:
    """Return whether dK and dV are computed by separate launches.

    Above `SUMS_TOGETHER_HEAD_DIM`, the sums of both would leave too few registers for a tile of efficient size.
    """
    return architecture.sums_apart and head_dim > SUMS_TOGETHER_HEAD_DIM and DTYPE_BYTES[dtype] == 2


def registers(operation: Operation, config: TileConfig, head_dim: int, apart: bool) -> int:
    """Return the registers that a thread needs for float32 sums and one tile of scores."""
    rows = config.BLOCK_M
    if operation is Operation.DKDV:
        rows = config.BLOCK_N if apart else 2 * config.BLOCK_N
    return (block_d(head_dim) * rows + config.BLOCK_M * config.BLOCK_N) // (32 * config.num_warps)


PORTABLE = Portable()
