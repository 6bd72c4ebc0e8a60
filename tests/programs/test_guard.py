"""The guard sees a launch that has changed, and nothing where nothing has: `programs/guard`, without compiling."""

import json

import pytest

from tests.programs.guard import __main__ as guard
from tests.programs.guard import compiled

CASE = "w1-full"  # float16, head_dim 24
TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("framework", guard.FRAMEWORKS)
def test_a_changed_tile_is_reported(tmp_path, monkeypatch, capsys, framework):
    selection = {"frameworks": [framework], "targets": ["9.0", "interpret"], "cases": [CASE], "kernels": []}

    def write(name):
        made, _ = guard.record(selection, report=lambda text: None)
        path = tmp_path / name
        path.write_text(json.dumps(made | {"triton": "unknown"}))
        return str(path)

    before, again = write("before.json"), write("again.json")
    assert guard.main(["compare", before, again]) == 0
    assert "no difference" in capsys.readouterr().out
    tiles = tmp_path / "tiles.json"
    tiles.write_text(json.dumps({"sm_90": {"16-bit": {"forward": {"64": TILES}}}}))
    monkeypatch.setenv("ZIGZAG_KERNEL_CONFIG", str(tiles))
    assert guard.main(["compare", before, write("after.json")]) == 1
    report = capsys.readouterr().out
    assert "attention_forward: constexprs: BLOCK_M 128 -> 64, BLOCK_N 64 -> 32" in report
    assert f"{framework} | 9.0 | {CASE} | gathered" in report
    assert "interpret" not in report
    assert "backward" not in report


def test_what_a_function_is_called_does_not_count_and_what_it_does_counts():
    def ptx(helper, register):
        return f"""
        .visible .entry kernel(.param .u64 kernel_param_0)
        .loc 1 20 5 // here.py:20
        $L__tmp3:
        call.uni {helper}, (%r{register});
        @%p1 bra $L__BB0_2;
        mov.b32 %r{register}, 7; // a comment
        .func  (.param .b32 func_retval0) {helper}(.param .b32 x)
        ret;
        """

    text = compiled.normalised(ptx("one.module.helper__i32", 1))
    assert text == compiled.normalised(ptx("another.module.helper__i32", 1))
    assert text != compiled.normalised(ptx("one.module.helper__i32", 2))
    assert compiled.opcodes(text) == {"call.uni": 1, "bra": 1, "mov.b32": 1, "ret": 1}
