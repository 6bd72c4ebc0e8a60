"""The program of `make demo`: checks the kernels in both frameworks, trains a small model in both, draws demo.png."""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tqdm import tqdm

import figures
import model_jax
import model_torch
import zigzag_jax
import zigzag_torch
from model import Sizes, initial_weights
from tests.support import closeness, oracle
from text import Room, batches

ROOT = Path(__file__).parents[1]

# One packed batch of three sequences, dealt out to four ranks that this one device plays in turn.
WORLD_SIZE, LENGTHS, HEADS, KV_HEADS, HEAD_DIM = 4, (120, 8, 64), 4, 2, 32
RESULTS = ("out", "lse", "dq", "dk", "dv")
CONTEXT, STEPS, LEARNING_RATE = 256, 100, 3e-3
ROOM = Room(tokens=512, documents=8, longest=CONTEXT)
# Nats a byte. Both compute in float32 and sum in another order, which makes 2e-6 in these steps. Attention on inputs
# rounded to tf32 makes 2e-4, RoPE angles wrong by 1% make 7e-3, and a mask that ignores the documents 1e-1.
TOLERANCE = 2e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--picture", type=Path, default=ROOT / "demo.png", help="where to draw (default demo.png)")
    options = parser.parse_args()
    steps, picture = options.steps, options.picture
    if steps < 1:
        parser.error(f"--steps: expected at least 1, got {steps}")
    if not picture.parent.is_dir():
        parser.error(f"--picture: expected a file in a folder that exists, got {picture}")
    started = time.perf_counter()
    device = choose_device()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"PyTorch {torch.__version__}, JAX {jax.__version__}, {where}\n")
    right = check_kernels(device)
    losses = train(device, steps)
    close = compare(losses)
    figures.save_demo(picture, losses, TOLERANCE)
    print(f"\n{picture.name} shows the layout, the work of each rank and the losses.")
    print(f"{'All is well' if right and close else 'FAILED'}, after {time.perf_counter() - started:.0f} s.")
    return 0 if right and close else 1


def choose_device() -> str:
    """Return the device of both frameworks: "cuda" if both see a GPU, else "cpu".

    Call it before triton or a GPU is used.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both share the GPU
    os.environ.setdefault("NPROC", "16")  # with two threads, jax 0.10 can wait for ever inside a host callback
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_float32_matmul_precision("highest")
    if os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available():
        if jax.default_backend() == "gpu":
            return "cuda"
        print(f"PyTorch sees a GPU and JAX does not (pip install 'jax[cuda13]=={jax.__version__}'): using the CPU.")
    os.environ["TRITON_INTERPRET"] = "1"
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(1)  # products this small gain nothing from a second thread, and JAX uses it
    return "cpu"


def check_kernels(device: str) -> bool:
    """Every rank's out, lse and gradients in both frameworks: as right as the tests ask, and the same bits."""
    backend = "triton" if device == "cuda" else "interpret"
    lengths = [16 * length for length in LENGTHS] if device == "cuda" else LENGTHS  # several tiles a chunk
    cu_seqlens = np.array([0, *itertools.accumulate(lengths)], np.int32)
    total = int(cu_seqlens[-1])
    print(f'The kernels (backend "{backend}") against float64: {WORLD_SIZE} ranks in turn, sequences of')
    print(
        f"{', '.join(map(str, lengths))} tokens, {HEADS} heads over {KV_HEADS}, head_dim {HEAD_DIM}. Relative errors,"
    )
    print("beside those of a plain computation in the same type:\n")
    print("  type      result    PyTorch        JAX   plain NumPy   same bits   verdict")
    right = True
    for dtype in ("float32", "bfloat16"):
        rng = np.random.default_rng(0)
        shapes = {"q": (total, HEADS, HEAD_DIM), "k": (total, KV_HEADS, HEAD_DIM)}
        shapes |= {"v": shapes["k"], "dout": shapes["q"], "dlse": (total, HEADS)}
        inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        inputs |= {name: inputs[name].astype(dtype).astype(np.float32) for name in ("q", "k", "v", "dout")}
        ours = attend_torch(inputs, cu_seqlens, dtype, device, backend)
        theirs = attend_jax(inputs, cu_seqlens, dtype, backend)
        exact = attend_numpy(inputs, cu_seqlens, oracle.EXACT)
        plain = attend_numpy(inputs, cu_seqlens, oracle.straightforward(dtype))
        for name in RESULTS:
            error = [closeness.errors(x[name], exact[name])["Frobenius norm"] for x in (ours, theirs, plain)]
            same = ours[name].tobytes() == theirs[name].tobytes()
            try:
                closeness.assert_close(name, ours[name], exact[name], plain[name])
                closeness.assert_close(name, theirs[name], exact[name], plain[name])
                verdict = "right" if same else "DIFFERENT"
            except AssertionError as problem:
                verdict = f"WRONG: {problem}"
            right &= verdict == "right"
            print(
                f"  {dtype:<9} {name:<6} {error[0]:>10.1e} {error[1]:>10.1e} {error[2]:>13.1e}"
                f"   {'yes' if same else 'NO':<9}   {verdict}"
            )
    return right


def attend_torch(inputs: dict, cu_seqlens: np.ndarray, dtype: str, device: str, backend: str) -> dict[str, np.ndarray]:
    """{name: float32 array} for each of RESULTS, the rows of all ranks behind one another; `inputs` are global."""
    cu_seqlens = torch.tensor(cu_seqlens, device=device)
    q, k, v, dout = (torch.tensor(inputs[x], device=device).to(getattr(torch, dtype)) for x in ("q", "k", "v", "dout"))
    dlse = torch.tensor(inputs["dlse"], device=device)

    def local(x, rank):
        return zigzag_torch.shard(x, cu_seqlens, rank, WORLD_SIZE)

    def gathered(x):
        return torch.cat([local(x, rank) for rank in range(WORLD_SIZE)]).requires_grad_()

    ranks = []
    for rank in range(WORLD_SIZE):
        qkv = local(q, rank).requires_grad_(), gathered(k), gathered(v)
        results = zigzag_torch.zigzag_attention_gathered(
            *qkv, cu_seqlens, rank, WORLD_SIZE, return_lse=True, backend=backend
        )
        gradients = torch.autograd.grad(results, qkv, (local(dout, rank), local(dlse, rank).T))
        ranks.append([x.detach().float().cpu().numpy() for x in (*results, *gradients)])
    return _joined(ranks)


def attend_jax(inputs: dict, cu_seqlens: np.ndarray, dtype: str, backend: str) -> dict[str, np.ndarray]:
    """Return the results in JAX, like `attend_torch`; compiled once, because the rank and the lengths are data."""
    q, k, v, dout = (jnp.asarray(inputs[x], dtype) for x in ("q", "k", "v", "dout"))
    dlse = jnp.asarray(inputs["dlse"])

    @jax.jit
    def attend(cu_seqlens, rank):
        def local(x, rank):
            return zigzag_jax.shard(x, cu_seqlens, rank, WORLD_SIZE)

        def gathered(x):
            return jnp.concatenate([local(x, rank) for rank in range(WORLD_SIZE)])

        def attention(q, k, v):
            return zigzag_jax.zigzag_attention_gathered(
                q, k, v, cu_seqlens, rank, WORLD_SIZE, return_lse=True, backend=backend
            )

        results, pullback = jax.vjp(attention, local(q, rank), gathered(k), gathered(v))
        return *results, *pullback((local(dout, rank), local(dlse, rank).T))

    ranks = [attend(cu_seqlens, np.int32(rank)) for rank in range(WORLD_SIZE)]
    return _joined([[np.asarray(x, np.float32) for x in results] for results in ranks])


def attend_numpy(inputs: dict, cu_seqlens: np.ndarray, arithmetic: oracle.Arithmetic) -> dict[str, np.ndarray]:
    """Return the results of the tests' oracle, which shares no code with the packages, like `attend_torch`."""
    ranks = []
    for rank in range(WORLD_SIZE):
        rows = oracle.zigzag_rows(cu_seqlens, rank, WORLD_SIZE)
        cotangents = {"dout": inputs["dout"][rows], "dlse": inputs["dlse"][rows].T}
        ranks.append(
            oracle.rank_attention(
                inputs["q"], inputs["k"], inputs["v"], cu_seqlens, rank, WORLD_SIZE, True,
                **cotangents, arithmetic=arithmetic,
            )
        )  # fmt: skip
    return _joined(ranks)


def _joined(ranks: list) -> dict[str, np.ndarray]:
    """Return the rows of all ranks behind one another; the rows of `lse [heads, T]` are its last axis."""
    return {
        name: np.concatenate(results, axis=1 if name == "lse" else 0)
        for name, results in zip(RESULTS, zip(*(rank[: len(RESULTS)] for rank in ranks), strict=True), strict=True)
    }


def train(device: str, steps: int) -> dict[str, np.ndarray]:
    """The loss before each step in both frameworks, from the same weights on the same text."""
    sizes = Sizes()
    weights = initial_weights(sizes)
    trainers = {
        "PyTorch": model_torch.trainer(weights, sizes, LEARNING_RATE, ROOM, device),
        "JAX": model_jax.trainer(weights, sizes, LEARNING_RATE, ROOM),
    }
    parameters = sum(x.size for x in jax.tree.leaves(weights))
    print(
        f"\nTraining {parameters:,} parameters on Python's standard library, {ROOM.tokens} bytes a step:\n", flush=True
    )
    losses = {name: np.zeros(steps) for name in trainers}
    text = itertools.islice(batches(ROOM, CONTEXT), steps)
    with tqdm(text, total=steps, unit="step", disable=None) as progress:  # None: no bar where it would fill a log
        for i, documents in enumerate(progress):
            for name, trainer in trainers.items():
                losses[name][i] = trainer(documents)
            progress.set_postfix({name: f"{values[i]:.3f}" for name, values in losses.items()})
    return losses


def compare(losses: dict[str, np.ndarray]) -> bool:
    """Prints some of both curves and their largest difference; whether that is small enough and the loss fell."""
    ours, theirs = losses["PyTorch"], losses["JAX"]
    difference = np.abs(ours - theirs)
    print("  step      PyTorch          JAX   difference")
    for step in np.unique(np.linspace(1, len(ours), 11).round().astype(int)):
        print(f"  {step:>4} {ours[step - 1]:>12.6f} {theirs[step - 1]:>12.6f} {difference[step - 1]:>12.1e}")
    close = bool((difference <= TOLERANCE).all())  # False for NaN
    print(f"\nLargest difference {difference.max():.1e} at step {difference.argmax() + 1}: ", end="")
    print(f"{'within' if close else 'NOT WITHIN'} the tolerance of {TOLERANCE:g} nats a byte.")
    last = ours[-10:].mean()
    fell = bool(last <= ours[0])
    print(f"The loss {'fell' if fell else 'DID NOT FALL'}: {ours[0]:.2f} at first, {last:.2f} in the last steps.")
    return close and fell


if __name__ == "__main__":
    sys.exit(main())
