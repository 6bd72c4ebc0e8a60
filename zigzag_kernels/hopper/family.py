"""The Hopper family: kernels in Gluon for compute capability 9.0, with tiles, budgets and launches of their own."""

from dataclasses import replace

from ..checks import DTYPE_BYTES
from ..family import Draft, Family
from ..heuristics import SMALL_HEAD_DIM
from ..launch import Launch, Output
from ..modes import LengthClass, Operation
from ..problem import Problem
from ..tiles.config import Architecture, KernelId, TileConfig, block_d, not_power_of_two
from ..tiles.sm_90 import SM_90
from . import rules

WARPGROUPS = {Operation.FORWARD: 4, Operation.DKDV: 3, Operation.DQ: 3, Operation.FUSED_BACKWARD: 2}
"""Most warpgroups that share the rows or keys of a program; the registers of each are in the kernels."""
FEW_KEYS = 128  # of a tile of dK/dV
FUSED_WRITERS = {64: 2, 128: 1}
"""Writers of a program that takes turns, by the rows of a block of the fused kernel: docs/log/hopper.md."""
FEW_FUSED_ROWS = min(FUSED_WRITERS)
DESCRIPTOR_BYTES = 128  # of global memory for each descriptor that a program makes for the copy engine
ELEMENTS = 4096  # numbers that a program of the two kernels around the fused one takes


class Hopper(Family):
    """Warp-specialised kernels that load tiles by the copy engine (TMA): see docs/explain/hopper-kernels.md."""

    name = "hopper"
    variable = "ZIGZAG_HOPPER"
    switches = (rules.TURNS,)
    architectures = (SM_90,)

    def can_run(self, problem: Problem, operation: Operation, dout_strides: tuple[int, int] | None) -> bool:
        return rules.can_run(problem, operation, dout_strides)

    def is_faster(self, problem: Problem, operation: Operation) -> bool:
        return rules.is_faster(problem, operation)

    def length_class(self, problem: Problem) -> LengthClass:
        return rules.length_class(problem)

    def fit_tiles(self, problem: Problem, operation: Operation, config: TileConfig) -> TileConfig:
        if operation is Operation.FUSED_BACKWARD and config.BLOCK_M > FEW_FUSED_ROWS and problem.call.softcap > 0:
            # Caps leave no registers for more rows.
            return replace(config, BLOCK_M=FEW_FUSED_ROWS, num_stages=config.num_stages + 1)
        if operation is Operation.DKDV and rules.wants_few_keys(problem):
            return replace(config, BLOCK_N=min(config.BLOCK_N, FEW_KEYS))
        if operation.owns_keys or rules.is_wide(problem.head_dim):
            return config
        fitted = config
        if rules.is_narrow(problem):
            fitted = _for_few_blocks(operation, problem.head_dim, config)
        elif rules.length_class(problem) is LengthClass.LONG and rules.has_moderate_walks(problem, operation):
            fitted = _for_moderate_walks(operation, problem.head_dim, config)
        kernel = self.choose_kernel(problem, operation)
        # Tiles of a file of the user may leave no room for the rows of a second head.
        if self.fits(kernel, fitted, problem.head_dim, problem.dtype, problem.target):
            return replace(fitted, heads_together=config.heads_together)
        return fitted

    def shared_memory(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> int:
        """Return an upper bound of the bytes of shared memory of one program.

        A program keeps its own tiles and has `num_stages` blocks of its loop in flight. It also needs barriers, and
        room in which each warpgroup's results change their layout.
        """
        operation, size = kernel.operation, DTYPE_BYTES[dtype]
        row = block_d(head_dim) * size
        own, streamed = config.BLOCK_M, config.BLOCK_N
        if operation.owns_keys:
            own, streamed = streamed, own
        stays, passes, other = 2 * row, 2 * row, 1024 + own // 64 * 2048
        if operation is Operation.FORWARD:  # Q, of two heads where a program takes several; K and V
            stays = row * min(config.heads_together, 2)
        elif operation.owns_keys:  # K and V; Q, dO and up to four numbers a row
            passes += 16
        if rules.is_wide(head_dim):
            other = 1024  # results change their layout in registers
            if operation is Operation.DQ:  # a stage is a block of K or of V
                passes = row
            elif operation.owns_keys:  # two blocks of probabilities
                other = 512 + 2 * own * streamed * 4
        if operation is Operation.FUSED_BACKWARD:  # dS of two blocks, and dQ on its way out
            other += streamed * (2 * own * size + block_d(head_dim) * 4)
        return own * stays + config.num_stages * streamed * passes + other

    def exceeds(
        self, kernel: KernelId, config: TileConfig, head_dim: int, dtype: str, architecture: Architecture
    ) -> str | None:
        operation = kernel.operation
        wide = rules.is_wide(head_dim)
        one_head = operation is Operation.FUSED_BACKWARD or (wide and operation is not Operation.FORWARD)
        if config.heads_together > 1 and one_head:
            return "1 as heads_together"
        own, streamed = ("BLOCK_N", "BLOCK_M") if operation.owns_keys else ("BLOCK_M", "BLOCK_N")
        sizes = [64 * groups for groups in range(2, WARPGROUPS[operation] + 1)]
        if wide:
            sizes = [64 if operation.owns_keys else 128]
        if getattr(config, own) not in sizes or config.num_warps != 4:
            return f"{own} {' or '.join(map(str, sizes))} and num_warps 4"
        if operation is Operation.FUSED_BACKWARD and config.BLOCK_M not in FUSED_WRITERS:
            return f"BLOCK_M {' or '.join(map(str, FUSED_WRITERS))}"
        if config.num_stages == 1:  # a consumer waits for a block while it still uses the block before
            return "2 or more as num_stages"
        return not_power_of_two(config, streamed)

    def make_launches(self, draft: Draft) -> tuple[Launch, ...]:
        operation = draft.kernel.operation
        constexprs = {"STAGES": draft.config.num_stages}
        resources = {"num_warps": draft.config.num_warps, "scratch": 2 * DESCRIPTOR_BYTES}
        if operation is Operation.FUSED_BACKWARD:
            return _fused_launches(draft, constexprs, resources)
        if draft.problem.ranged and draft.problem.slots > 1 and not operation.owns_keys:
            resources["scratch"] += DESCRIPTOR_BYTES  # for the block with the last key
        constexprs["HEADS_TOGETHER"] = draft.heads_together
        return (draft.launch(_load_kernel(operation), constexprs, **resources),)


def _for_few_blocks(operation: Operation, head_dim: int, config: TileConfig) -> TileConfig:
    """Return `config` for programs with few blocks of keys, which serve several heads, one after the other."""
    if operation is Operation.FORWARD:
        heads = 8 if head_dim <= SMALL_HEAD_DIM else 4
        return replace(config, tiles_together=0, heads_together=max(config.heads_together, heads))
    return config if head_dim <= SMALL_HEAD_DIM else replace(config, tiles_together=0)


def _for_moderate_walks(operation: Operation, head_dim: int, config: TileConfig) -> TileConfig:
    """Return `config` for long sequences whose programs gain by serving several heads, one after the other."""
    if operation is Operation.FORWARD:
        return replace(config, heads_together=max(config.heads_together, 4))
    return replace(config, tiles_together=1, heads_together=4) if head_dim <= SMALL_HEAD_DIM else config


def _load_kernel(operation: Operation):
    """Return the kernel of `operation`; importing it needs one of `rules.TRITON`."""
    if operation is Operation.FORWARD:
        from .forward import attention_forward_hopper

        return attention_forward_hopper
    if operation is Operation.DKDV:
        from .dkdv import backward_dkdv_hopper

        return backward_dkdv_hopper
    from .dq import backward_dq_hopper

    return backward_dq_hopper


def _fused_launches(draft: Draft, constexprs: dict[str, int], resources: dict[str, int]) -> tuple[Launch, ...]:
    from .fused import backward_fused_hopper
    from .sums import clear_sums, finish_dq

    problem = draft.problem
    segments, _ = problem.table_entries
    # A row of a box is permuted in shared memory by 32 columns (128 bytes), which must all be there.
    columns = -(-problem.head_dim // 32) * 32
    heads = problem.window * problem.group
    row = heads * columns
    sums, cleared = Output("sums", (problem.tokens, heads, columns), "float32"), row
    side, writers = 0, 0  # by `tiles_together`, in any order
    if rules.takes_turns(problem):
        side, cleared = rules.heads_side_by_side(problem), row + heads  # a counter for each row and head
        sums = Output("sums", (problem.tokens * cleared,), "float32")
        writers = FUSED_WRITERS[draft.config.BLOCK_M]
    elements = {"target": problem.target, "num_warps": 8}
    clear = Launch(
        kernel=clear_sums,
        inputs=("q",),
        scalars={"T": problem.tokens},
        outputs=(sums,),
        constexprs={"ROW": cleared, "BLOCK": ELEMENTS},
        grid=(max(1, -(-problem.tokens * cleared // ELEMENTS)), 1, 1),
        **elements,
    )
    finish = Launch(
        kernel=finish_dq,
        inputs=("sums", "segments", "into_dq"),
        scalars={"n_segments": segments, "T": problem.tokens, "first_kv_head": draft.scalars["first_kv_head"]},
        outputs=(Output("dq", (problem.tokens, problem.heads, problem.head_dim), problem.dtype),),
        constexprs={
            "ROW": row,
            "HEADS": problem.heads,
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "COLUMNS": columns,
            "SOFTMAX_SCALE": problem.call.softmax_scale,
            "BLOCK": ELEMENTS,
        },
        grid=(max(1, -(-problem.tokens * row // ELEMENTS)), 1, 1),
        in_place={"dq": "into_dq"},
        **elements,
    )
    draft = replace(draft, outputs=tuple(sums if output.name == sums.name else output for output in draft.outputs))
    constexprs = constexprs | {"COLUMNS": columns, "SIDE": side, "WRITERS": writers}
    # A writer needs a descriptor too, and in any order there is one.
    resources = resources | {"scratch": resources["scratch"] + max(writers, 1) * DESCRIPTOR_BYTES}
    return clear, draft.launch(backward_fused_hopper, constexprs, **resources), finish


HOPPER = Hopper()
