"""Reading machine code: what is an instruction, what a loop."""

from tests.kernels.sass import LINE, Instruction, loops

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
     /* 0x000fe20000000800 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;  /* 0x0000000402027981 */
        /*0020*/              @!P0 BRA 0x40 ;  /* 0x0000000000108947 */
        /*0030*/                   CALL.REL.NOINC 0x90 ;  /* 0x0000002400f87944 */
        /*0040*/               @P1 BRA 0x10 ;  /* 0xffffffe800bc8947 */
        /*0050*/                   EXIT ;  /* 0x000000000000794d */
        /*0060*/                   BRA 0x60 ;  /* 0xfffffffc00fc7947 */
"""


def test_a_loop_lies_between_a_backward_branch_and_its_target() -> None:
    lines = [LINE.match(line) for line in CODE.splitlines()]
    code = [Instruction(int(m[1], 16), m[2], m[3]) for m in lines if m]
    assert [each.name for each in code] == [
        *("LDC", "LDG.E", "BRA", "CALL.REL.NOINC", "BRA", "EXIT", "BRA")
    ]
    (body,) = loops(code)
    assert [each.address for each in body] == [0x10, 0x20, 0x30, 0x40]
