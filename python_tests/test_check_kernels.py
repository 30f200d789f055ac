"""`make cuda` must fail on a spill, on a missing kernel and on a product without tensor cores."""

import check_kernels
import pytest
import sass

GEMM = "_ZN3spo4cuda9head_gemmINS0_11MmaMultiplyIfEEEEvv"
HOPPER = "_ZN3spo4cuda12sm90_productINS0_8Sm90GemmIfEEEEvv"
COLD = "_ZN3spo4cuda12_GLOBAL__N_111select_rowsIdEEvPKd"


def entry(symbol, arch, registers, stores, loads, shared=""):
    return f"""ptxas info    : Compiling entry function '{symbol}' for '{arch}'
ptxas info    : Function properties for {symbol}
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}, 400 bytes cmem[0]
ptxas info    : Compile time = 80.1 ms
"""


def errors(*entries):
    report = check_kernels.parse_report("".join(entries).splitlines())
    return check_kernels.spill_errors(report, ("head_gemm", "sm90_product"))


HOT = (entry(GEMM, "sm_80", 128, 0, 0), entry(HOPPER, "sm_90a", 168, 0, 0))


def test_no_spills_no_errors():
    assert errors(*HOT, entry(COLD, "sm_80", 40, 8, 8)) == []


@pytest.mark.parametrize("stores, loads", [(8, 0), (0, 4)])
def test_a_spill_in_any_variant_fails(stores, loads):
    found = errors(*HOT, entry(GEMM, "sm_121", 255, stores, loads))
    assert found == [f"{GEMM} for sm_121: {stores + loads} bytes of spills"]


def test_a_hot_kernel_that_is_gone_fails():
    assert errors(HOT[0]) == ["sm90_product: not in the report"]


def test_the_last_build_counts():
    assert errors(entry(GEMM, "sm_80", 255, 64, 64), *HOT) == []


def test_table_has_the_largest_numbers_of_each_kernel():
    entries = HOT + (entry(GEMM + "2", "sm_80", 96, 0, 0, ", 2048 bytes smem"),)
    text = check_kernels.table(check_kernels.parse_report("".join(entries).splitlines()))
    row = next(line for line in text.splitlines() if line.startswith("head_gemm"))
    assert row.split() == ["head_gemm", "sm_80", "2", "128", "0", "2048"]


def test_names_are_found_in_mangled_ones():
    assert [check_kernels.base_name(name) for name in (GEMM, HOPPER, COLD, "_Z3fooi", "bar")] == [
        "head_gemm",
        "sm90_product",
        "select_rows",
        "foo",
        "bar",
    ]


SASS = f"""\t\tFunction : {HOPPER}
        /*0040*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
\t\tFunction : {HOPPER}2
        /*0040*/  FFMA R1, R2, R3, R4 ;
"""


def test_every_variant_needs_tensor_cores():
    bodies = dict(sass.functions(SASS.splitlines()))
    counts = {symbol: sass.count(body, "HGMMA") for symbol, body in bodies.items()}
    assert counts == {HOPPER: 2, HOPPER + "2": 0}
    found = check_kernels.instruction_errors(counts, "sm90_product", "sm_90a", "HGMMA")
    assert found == [f"{HOPPER}2 for sm_90a: no HGMMA"]
    missing = check_kernels.instruction_errors(counts, "head_gemm", "sm_80", "HMMA")
    assert missing == ["no function of the sm_80 code matches head_gemm"]


def body(text):
    """Instructions at 0, 0x10, .., the last of them the next tile's product."""
    lines = [f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(text.split(" ; "))]
    return next(sass.functions(["Function : f", *lines]))[1]


# After a product: a branch over a bias with its load, then two exponentials, and the next tile.
WHOLE = (
    "HGMMA.64x256x16.F32 R24, R4 ; @P0 BRA 0x50 ; LDG.E R8, [R2.64] ; FADD R4, R4, R8 ; "
    "FADD R5, R5, R8 ; MUFU.EX2 R4, R4 ; MUFU.EX2 R5, R5 ; @P1 BRA 0x90 ; EXIT ; BRA 0x0"
)


def test_an_epilogue_is_counted_along_the_way_that_does_the_work_and_nothing_else():
    found = sass.epilogue(body(WHOLE), ("MUFU.EX2",), 2)
    assert found == (5 / sass.ELEMENTS, 0)  # the branch, two exponentials, two jumps or an exit
    assert sass.epilogue(body(WHOLE), ("LDG", "MUFU"), 3) == (8 / sass.ELEMENTS, 1)
    assert sass.epilogue(body(WHOLE), ("MUFU.EX2",), 3).instructions == 0  # there is no such way


def test_loads_that_are_on_their_way_together_are_one_round_trip():
    together = "HGMMA R24, R4 ; LDG.E R8, [R2.64] ; LDG.E.64 R10, [R2.64] ; FADD R4, R8, R11 ; EXIT"
    one_by_one = "HGMMA R24, R4 ; LDG.E R2, [R2.64] ; LDG.E R8, [R2] ; FADD R4, R8, R11 ; EXIT"
    work = ("FADD",)
    assert sass.epilogue(body(together), work, 1).round_trips == 1
    assert sass.epilogue(body(one_by_one), work, 1).round_trips == 2


def test_a_loop_on_the_way_is_passed_once():
    text = "HGMMA R24, R4 ; MUFU.EX2 R4, R4 ; @P0 BRA 0x10 ; STG.E [R2.64], R4 ; EXIT"
    assert sass.epilogue(body(text), ("STG",), 1) == (4 / sass.ELEMENTS, 0)


def test_an_epilogue_over_its_limit_fails(monkeypatch):
    limit = check_kernels.Limit("Whole", ("MUFU.EX2",), 2, 5 / sass.ELEMENTS, 0, 1)
    monkeypatch.setattr(check_kernels, "LIMITS", (limit,))
    bodies = {"12sm90_productIWhole": body(WHOLE)}
    lines, errors = check_kernels.epilogue_report(bodies)
    assert errors == [] and lines[1].split() == ["Whole", "0.0", "0", "0"]
    tight = limit._replace(instructions=4 / sass.ELEMENTS)
    monkeypatch.setattr(check_kernels, "LIMITS", (tight, limit._replace(name="Gone")))
    errors = check_kernels.epilogue_report(bodies)[1]
    assert ["instructions an element" in e or "no such epilogue" in e for e in errors] == [True] * 2
    monkeypatch.setattr(check_kernels, "LIMITS", (limit._replace(amount=3),))
    assert "no way through it" in check_kernels.epilogue_report(bodies)[1][0]
