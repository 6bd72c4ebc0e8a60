"""Attention between ranks inside what PyTorch users wrap around it: compile, checkpointing, DDP, FSDP2, meshes."""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import zigzag_torch
from tests.support.commands import ROOT
from tests.support.machine import GPU
from tests.support.processes import run_ranks
from zigzag_kernels.callspec import make_call_spec

pytestmark = pytest.mark.skipif(GPU, reason="gloo groups, on a CPU")
METHODS = ("allgather", "ring")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CU_SEQLENS = torch.tensor([0, 16, 24], dtype=torch.int32)
TOTAL = 24


def whole_batch(seed=0):
    """q, k, v, dout of the batch that is to be dealt out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOTAL, heads, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def results(function, q, k, v, dout):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def local_batch(rank, world_size, dtype):
    return [zigzag_torch.shard(x, CU_SEQLENS, rank, world_size).to(dtype) for x in whole_batch()]


def check_transformations(rank, world_size, backend):
    warnings.simplefilter("ignore")  # dynamo's own
    group = dist.group.WORLD
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "cp"))["cp"]
    # Operators of the kernels have tensors of two types if these are rounded.
    tensors = local_batch(rank, world_size, torch.bfloat16 if backend == "interpret" else torch.float32)
    for method in METHODS:

        def attend(q, k, v, method=method):
            batch = zigzag_torch.prepare_batch(CU_SEQLENS, group=group, method=method, backend=backend)
            return zigzag_torch.zigzag_attention(q * 2, k, v, batch, group=group, method=method, backend=backend)

        def unprepared(q, k, v, method=method):
            return zigzag_torch.zigzag_attention(q * 2, k, v, CU_SEQLENS, group=mesh, method=method, backend=backend)

        def checkpointed(q, k, v, attend=attend):
            return torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)

        expected = results(attend, *tensors)
        assert_same(results(torch.compile(attend, fullgraph=True, backend="aot_eager"), *tensors), expected)
        if backend == "reference":  # the operators are called alike, and sooner done
            assert_same(results(torch.compile(unprepared, fullgraph=True, backend="aot_eager"), *tensors), expected)
            assert_same(results(checkpointed, *tensors), expected)


def check_calls(rank, world_size):
    warnings.simplefilter("ignore")  # dynamo's own
    group = dist.group.WORLD
    check_registration(local_batch(rank, world_size, torch.bfloat16), rank, world_size, group)
    check_shapes(rank, world_size, group)
    check_documentation(rank, world_size, group)


def check_registration(tensors, rank, world_size, group):
    """The operators are what torch wants them to be."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.zigzag
    q, k, v, dout = tensors
    name, leaves = group.group_name, [x.clone().requires_grad_() for x in (q, k, v)]
    for method in METHODS:
        batch = zigzag_torch.prepare_batch(CU_SEQLENS, group=group, method=method, backend="interpret")
        call = make_call_spec(head_dim=HEAD_DIM, backend="interpret", method=method)
        tables, constants = (batch.segments, batch.sequences), (call.key, world_size, name)
        torch.library.opcheck(ops.parallel_forward, (*leaves, *tables, *constants), test_utils=tests)
        out, lse = ops.parallel_forward(q, k, v, *tables, *constants)
        backward = q, k, v, out, lse, dout, None, *tables, *constants
        torch.library.opcheck(ops.parallel_backward, backward, test_utils=tests)
        sinks = torch.zeros(HEADS, requires_grad=True)
        ranged = {"window_size": (3, -1), "has_sinks": True, "return_max_logits": True}
        call = make_call_spec(head_dim=HEAD_DIM, backend="interpret", method=method, **ranged)
        constants = call.key, world_size, name, sinks
        torch.library.opcheck(ops.parallel_forward, (*leaves, *tables, *constants), test_utils=tests)
        out, (lse, _) = ops.parallel_forward(q, k, v, *tables, *constants)
        backward = q, k, v, out.detach(), lse.detach(), dout, None, *tables, *constants[:3], sinks.detach()
        torch.library.opcheck(ops.parallel_backward, backward, test_utils=tests)
        constants = constants[:3]
    rank = torch.tensor([rank], dtype=torch.int32)
    arguments = CU_SEQLENS, CU_SEQLENS, rank, name, "prepare_batch", CU_SEQLENS[1:], "row, 1 of 24 tokens"
    torch.library.opcheck(ops.common_rank, arguments, test_utils=tests)
    torch.library.opcheck(ops.largest_of_ranks, (torch.ones(3), name), test_utils=tests)
    torch.library.opcheck(ops.agreed_rank, (rank, q, k, v, 2, False, *constants), test_utils=tests)
    torch.library.opcheck(ops.all_gather, (leaves[0], world_size, name), test_utils=tests)
    torch.library.opcheck(ops.reduce_scatter, (q, world_size, name), test_utils=tests)
    torch.library.opcheck(ops.shift, (leaves[0], 1, name), test_utils=tests)


def check_documentation(rank, world_size, group):
    """What docs/guide/several-gpus-torch.md prints, as printed."""
    text = (ROOT / "docs" / "guide" / "several-gpus-torch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "zigzag_torch" in block)
    names = {}
    exec(block, names)
    q, k, v, _ = whole_batch()
    lengths = torch.tensor([0, 5, 24], dtype=torch.int32)
    for method in METHODS:
        out, positions = names["attention_of_a_step"](q, k, v, lengths, 1, method)
        padded = torch.tensor([0, 8, 28], dtype=torch.int32)
        assert positions.tolist() == zigzag_torch.position_ids(padded, rank, world_size).tolist()
        gathered = torch.empty(28, HEADS, HEAD_DIM)
        dist.all_gather(list(gathered.chunk(world_size)), out, group=group)
        whole = zigzag_torch.unpad(zigzag_torch.unshard(gathered, padded, world_size), lengths, world_size)
        torch.testing.assert_close(whole, zigzag_torch.zigzag_attention(q, k, v, lengths))


def check_shapes(rank, world_size, group):
    """Equal lengths as a batch dimension are a packed batch, and one sequence needs no lengths."""
    q, k, v, _ = whole_batch()
    lengths = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    mine = [zigzag_torch.shard(x, lengths, rank, world_size) for x in (q, k, v)]
    batched = [x.unflatten(0, (3, 4)) for x in mine]
    for method in METHODS:
        packed, lse = zigzag_torch.zigzag_attention(*mine, lengths, group=group, method=method, return_lse=True)
        out, batched_lse = zigzag_torch.zigzag_attention(*batched, group=group, method=method, return_lse=True)
        assert_same((out.flatten(0, 1), batched_lse.transpose(0, 1).flatten(1)), (packed, lse))
        one = torch.tensor([0, 24], dtype=torch.int32)
        mine_of_one = [zigzag_torch.shard(x, one, rank, world_size) for x in (q, k, v)]
        out = zigzag_torch.zigzag_attention(*mine_of_one, group=group, method=method)
        whole = zigzag_torch.shard(zigzag_torch.zigzag_attention(q, k, v), one, rank, world_size)
        torch.testing.assert_close(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["interpret", "reference"])
def test_compile_and_checkpointing(backend, tmp_path):
    run_ranks(2, tmp_path, check_transformations, backend)


def test_operators_shapes_and_documentation(tmp_path):
    run_ranks(2, tmp_path, check_calls)


class Model(torch.nn.Module):
    """One layer whose attention crosses the ranks of `group`."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, 8)

    def forward(self, x, cu_seqlens, **options):
        q, k, v = self.qkv(x).unflatten(1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), 1)
        return self.out(zigzag_torch.zigzag_attention(q, k, v, cu_seqlens, **options).flatten(1))


def model_and_gradients():
    """A model, a batch for each of two data-parallel groups, and the sums of the gradients of both on one device."""
    torch.manual_seed(0)
    model, batches = Model(), torch.randn(2, TOTAL, 8)
    for x in batches:
        model(x, CU_SEQLENS).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return model, batches, gradients


def check_models(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match=r"1-D DeviceMesh, got 2 dimensions, named \('dp', 'cp'\).* mesh\['cp'\]"):
        zigzag_torch.zigzag_attention(*whole_batch()[:3], group=mesh)
    for method in METHODS:
        for wrap in (DistributedDataParallel, fully_shard):
            model, batches, expected = model_and_gradients()
            x = zigzag_torch.shard(batches[mesh["dp"].get_local_rank()], CU_SEQLENS, mesh["cp"].get_local_rank(), 2)
            wrapped = wrap(model)
            batch = zigzag_torch.prepare_batch(CU_SEQLENS, group=mesh["cp"], method=method)
            wrapped(x, batch, group=mesh["cp"], method=method).square().sum().backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            if wrap is fully_shard:
                gradients = [x.full_tensor() for x in gradients]
            # Both take the mean over all four ranks; each rank's loss is of its own rows.
            assert_close([world_size * x for x in gradients], expected)


def test_ddp_and_fsdp2_over_a_mesh(tmp_path):
    run_ranks(4, tmp_path, check_models)
