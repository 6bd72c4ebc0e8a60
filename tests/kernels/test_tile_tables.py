"""The tile tables: every entry within its budget, which table a GPU uses, and the file that replaces entries."""

import itertools
import json

import pytest

from zigzag_kernels.families import FAMILIES, choose_tiles, family_of, kernels_by_name
from zigzag_kernels.modes import Backend, LengthClass, Operation
from zigzag_kernels.portable.family import PORTABLE
from zigzag_kernels.tiles import override
from zigzag_kernels.tiles.config import HEAD_DIMS, KernelId, TileConfig

TARGETS = {"sm_80": "8.0", "sm_86": "8.6", "sm_90": "9.0"}  # the interpreter has no budgets
DTYPES = {"16-bit": "bfloat16", "32-bit": "float32"}
FORWARD, DQ = KernelId("portable", Operation.FORWARD), KernelId("portable", Operation.DQ)
ENTRIES = [
    pytest.param(architecture, DTYPES[width], kernel, head_dim, id=f"{architecture.name} {width} {name} {head_dim}")
    for family in FAMILIES
    for architecture in family.architectures
    if architecture.name in TARGETS
    for width, tiles in architecture.tiles.items()
    for name, kernel in kernels_by_name().items()
    if kernel.family == family.name
    for head_dim in tiles.get(kernel, ())
]


def test_every_architecture_has_every_portable_kernel():
    for architecture, dtype, kernel, head_dim in itertools.product(
        PORTABLE.architectures, DTYPES.values(), PORTABLE.kernels, HEAD_DIMS
    ):
        assert architecture.tiles_of(kernel, head_dim, dtype), (architecture.name, dtype, kernel, head_dim)
    assert {architecture.name for architecture in PORTABLE.architectures} == {*TARGETS, "interpret"}
    assert {kernel.operation for kernel in PORTABLE.kernels} == set(Operation) - {Operation.FUSED_BACKWARD}


@pytest.mark.parametrize(("architecture", "dtype", "kernel", "head_dim"), ENTRIES)
def test_every_entry_fits_its_budget(architecture, dtype, kernel, head_dim):
    target = TARGETS[architecture.name]
    chosen = choose_tiles(kernel, head_dim, dtype, target)
    assert chosen == architecture.tiles_of(kernel, head_dim, dtype)
    assert family_of(kernel).fits(kernel, chosen, head_dim, dtype, target) is None
    assert choose_tiles(kernel, head_dim - 8, dtype, target) == chosen


@pytest.mark.parametrize(
    ("kernel", "config", "refused"),
    [
        ("forward", (256, 256, 4, 4), "bytes of shared memory, the GPU has"),
        ("forward", (256, 16, 1, 1), "registers a thread, the GPU has 255"),
        ("forward", (48, 32, 4, 2), "a power of two as BLOCK_M"),
        ("backward_dq", (64, 64, 4, 1, 0, 2), "1 as heads_together"),
        ("hopper_dq", (192, 64, 4, 2, 0, 2), None),
        ("hopper_dq", (192, 48, 4, 2), "a power of two as BLOCK_N"),
        ("hopper_dq", (256, 64, 4, 2), "BLOCK_M 128 or 192 and num_warps 4"),
        ("hopper_dkdv", (64, 128, 8, 2), "BLOCK_N 128 or 192 and num_warps 4"),
        ("hopper_fused", (64, 128, 4, 2, 0, 2), "1 as heads_together"),
        ("hopper_forward", (192, 128, 4, 6), None),
        ("hopper_forward", (192, 128, 4, 6, 0, 2), "bytes of shared memory, the GPU has"),  # queries of two heads
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(kernel, config, refused):
    kernel = kernels_by_name()[kernel]
    found = family_of(kernel).fits(kernel, TileConfig(*config), 64, "bfloat16", "9.0")
    assert found is None if refused is None else refused in found


@pytest.mark.parametrize(
    ("target", "name"),
    [("8.0", "sm_80"), ("8.6", "sm_86"), ("8.7", "sm_80"), ("8.9", "sm_86"), ("9.0", "sm_90"), ("10.0", "sm_90"),
     ("12.0", "sm_86"), ("interpret", "interpret")],
)  # fmt: skip
def test_which_table_a_gpu_uses(target, name):
    assert PORTABLE.architecture(target).name == name


def test_every_kernel_has_a_name_of_its_own():
    """These are the names that users have in their files."""
    assert [*kernels_by_name()] == [
        "forward", "backward_dkdv", "backward_dq", "hopper_forward", "hopper_forward_few", "hopper_forward_short",
        "hopper_dkdv", "hopper_dkdv_short", "hopper_fused", "hopper_dq", "hopper_dq_few", "hopper_dq_short",
    ]  # fmt: skip
    assert kernels_by_name()["hopper_dq_few"] == KernelId("hopper", Operation.DQ, LengthClass.FEW_ROWS)


TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def write_override(tmp_path, monkeypatch):
    """Return a function that writes an override file and puts it in force."""
    count = itertools.count()

    def write(tables):
        path = tmp_path / f"tiles{next(count)}.json"
        path.write_text(json.dumps(tables))
        monkeypatch.setenv(override.VARIABLE, str(path))

    return write


def test_an_override_replaces_one_entry_alone(write_override):
    before = choose_tiles(DQ, 64, "bfloat16", "9.0")
    interpreted = choose_tiles(FORWARD, 64, "bfloat16", Backend.INTERPRET)
    write_override({"sm_90": {"16-bit": {"forward": {"64": TILES}}}})
    assert choose_tiles(FORWARD, 64, "bfloat16", "9.0") == TileConfig(**TILES)
    assert choose_tiles(FORWARD, 40, "float16", "9.0") == TileConfig(**TILES)  # rounded up to 64
    assert choose_tiles(FORWARD, 64, "bfloat16", "8.0") != TileConfig(**TILES)
    assert choose_tiles(DQ, 64, "bfloat16", "9.0") == before
    assert choose_tiles(FORWARD, 64, "bfloat16", Backend.INTERPRET) == interpreted


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"sm_70": {}}, "expected architecture sm_90, sm_80, sm_86, got 'sm_70'"),
        ({"sm_90": {"16-bit": {"sideways": {}}}}, "expected kernel forward, .* got 'sideways'"),
        ({"sm_90": {"8-bit": {}}}, "expected width 16-bit, 32-bit, got '8-bit'"),
        ({"sm_90": {"16-bit": {"forward": {"96": TILES}}}}, "expected head_dim 64, 128, 256, got '96'"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"BLOCK_M": 40}}}}}, "BLOCK_M: expected a multiple of 16"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"BLOCK_M": 48}}}}}, "needs a power of two as BLOCK_M"),
        (
            {"sm_90": {"16-bit": {"forward": {"64": TILES | {"warps": 4}}}}},
            "expected the fields .* got 'warps'",
        ),
        (
            {"sm_90": {"16-bit": {"forward": {"64": TILES | {"heads_together": 0}}}}},
            "heads_together: .* positive .* got 0",
        ),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"tiles_together": -1}}}}}, "tiles_together: .* got -1"),
        ({"sm_90": {"16-bit": {"forward": {"64": TILES | {"num_stages": 40}}}}}, "shared memory, the GPU has"),
    ],
)
def test_a_bad_override_says_what_is_wrong(write_override, tables, message):
    write_override(tables)
    with pytest.raises(ValueError, match=message):
        choose_tiles(FORWARD, 64, "bfloat16", "9.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a file that can be read, got No such file or directory"),
        ("", "expected JSON, got: Expecting value"),
        ("{'sm_90': {}}", "expected JSON, got: Expecting property name"),
        (b"\xff", "expected JSON, got: 'utf-8' codec can't decode"),
        pytest.param("[" * 100_000, "expected JSON, got: ", id="deeply nested"),
        ("null", "expected an object of architecture names, got None"),
        ("[]", r"expected an object of architecture names, got \[\]"),
        ('{"sm_90": 1}', "sm_90: expected an object of width names, got 1"),
        ('{"sm_90": {"16-bit": []}}', r"sm_90: 16-bit: expected an object of kernel names, got \[\]"),
        ('{"sm_90": {"16-bit": {"forward": 64}}}', "forward: expected an object of head_dim names, got 64"),
        (
            '{"sm_90": {"16-bit": {"forward": {"64": [64, 32]}}}}',
            "64: expected an object with the fields of tiles",
        ),
        ('{"sm_90": {"16-bit": {"forward": {"64": {}}}}}', "64: expected a field BLOCK_M, got none"),
        ('{"sm_90": {}, "sm_90": {}}', "expected every name once in its place, got 'sm_90' twice"),
        (
            '{"sm_80": {"16-bit": {"backward_dq": {"64": {"BLOCK_M": 1}}}}}',
            "64: expected a field BLOCK_N, got BLOCK_M",
        ),
    ],
)
def test_a_file_that_is_none_names_the_variable(tmp_path, monkeypatch, text, message):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv(override.VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"ZIGZAG_KERNEL_CONFIG: .*tiles.json: .*{message}"):
        choose_tiles(FORWARD, 64, "bfloat16", "9.0")


def test_a_head_dim_without_tiles_is_named():
    with pytest.raises(LookupError, match=r"there is no hopper_fused for head_dim 256 on 9\.0"):
        choose_tiles(kernels_by_name()["hopper_fused"], 256, "bfloat16", "9.0")
    with pytest.raises(LookupError, match=r"the hopper kernels have no tiles for 8\.0"):
        choose_tiles(kernels_by_name()["hopper_forward"], 128, "bfloat16", "8.0")
