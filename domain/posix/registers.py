"""The registers of a program, 27 words in the order of Linux's struct user_regs_struct (arch/x86/include/asm/user_64.h)."""

from __future__ import annotations

R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, ORIG_RAX, RIP, CS, EFLAGS, RSP, SS = range(21)
FS_BASE, GS_BASE, DS, ES, FS, GS = range(21, 27)
COUNT = 27

USER_CS, USER_SS = 0x33, 0x2B
FLAG_IF, FLAG_TF, FLAG_DF, FLAG_RF = 1 << 9, 1 << 8, 1 << 10, 1 << 16
USER_FLAGS = 0x50DD5  # what sigreturn may set: CF PF AF ZF SF TF DF OF RF AC (arch/x86/kernel/signal_64.c FIX_EFLAGS)
WORD = (1 << 64) - 1


def start(rip: int, rsp: int) -> list[int]:
    """Those of a new program."""
    registers = [0] * COUNT
    registers[RIP], registers[RSP], registers[CS], registers[SS] = rip, rsp, USER_CS, USER_SS
    registers[EFLAGS] = FLAG_IF | 2
    return registers
