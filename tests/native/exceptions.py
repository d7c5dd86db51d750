"""What the cases of exceptions_*.c say, and what those die of that are not to come to their end."""

from __future__ import annotations

POWEROFF = "poweroff"
KERNEL, DOUBLE = "0x2000001[0-9a-f]{5}", "double fault: no stack at "


def none(vector: str) -> str:
    """Why a domain ends that has no handler of it."""
    return rf"no handler for vector {vector} at {KERNEL}, error code 0x0"


def lines(text: str) -> list[str]:
    """A case's own lines; where a line has a |, either will do."""
    return [line.strip() for line in text.strip().splitlines()]


# name, vector, error code, how far behind the instruction
EACH = {
    "every": """
        div 0 0 0
        int1 1 0 1|int1 1 0 0
        int3 3 0 1
        int-3 3 0 2
        int-4 4 0 2
        ud2 6 0 0
        into 6 0 0
        bound 6 0 0
        stack 12 0 0
        not-canonical 13 0 0
    """,
    "privileged": "\n".join(f"{name} 13 0 0" for name in (
        "cli", "sti", "hlt", "cr3", "cr0", "lgdt", "lidt", "in", "out", "rdmsr", "wrmsr", "invlpg", "clts", "swapgs",
    )) + "\nselector 13 24 0",
    "arithmetic": "x87 16 0 0\nsimd 19 0 0\nalignment 17 0 0",
    "page-faults": "write 14 6 0\nread 14 4 0\nwrite-code 14 7 0",
    "steps": "5 step 1 0 5\nstep-onto 6 0 0\n256",
    "software": """
        dpl0 13 642 0
        dpl 80 0 2
        dpl 80 0 2
        dpl 80 0 2
        again 13 642 0
        page-fault 13 114 0
        bounds 5 0 2
        debug 1 0 2
        last 13 2042 0
        last 255 0 2
        none 13 642 0
    """,
    "frame": "kept 0 0 1024 40 40",
    "direct": "100000",
}  # fmt: skip
IRETQ = "null-cs {0} 0 0\n{1}\ncs {0} 16 0\n{1}\nss {0} 24 0\n{1}\nrip {0} 0 0\n{1}"
FORGED = "good 6 0 0\ncs {0} 0 0|cs {0} 16 0\nss {0} 0 0|ss {0} 16 0\nrip {0} 0 0"  # some processors name the selector
RETURNS = {
    "sigreturn": FORGED.format(13),
    "sigreturn-failsafe": "0 0\n" + FORGED.format(257) + "\nunreadable 257 0 0\nkernel's\nnot-canonical 257 0 0\nkernel's",
    "iretq": IRETQ.format(13, "interrupted"),
    "iretq-failsafe": "0\n" + IRETQ.format(257, "interrupted"),
    "iretq-failsafe-stack": "0 0\n" + IRETQ.format(257, "kernel's"),
    "flags": "nt 6 0 0\n16384 ac 6 0 0\n262144 all 6 0 0\n278784 512",
    # saved in the frame, in the handler, afterwards: of a handler that does not mask events and of one that does, with the mask
    # 0 and 1 before; of a page fault's that does
    "masks": "0 0 0 0 1 1 1 1 1 1 1 1 0 1 1",
}
EVENTS = {
    # how many; the mask in the frame, in the callback, afterwards; pending
    "events": "1 0 1 0 0 2 0 1 0 0 3 0 1 0 0",
    "events-masked": "0 1 0 0 1 1 0 1",
    "events-nobody": "0 1 1 0 1 0 1",
}
SURVIVED = {
    "table": "\n".join([" ".join(["-22 stands"] * 8)] * 3) + "\n-14 0 fast -22 -22 -22 -22 0",
    "changes": "all both",
    "stack-lost-page": "1 filled 6 0 0",
    "called": "0 14 14\nafter 6 0 0",
}
SAID = {name: lines(text) for name, text in {**EACH, **RETURNS, **EVENTS, **SURVIVED}.items()}

# name: what it says before, what it dies of
REASONS = {
    "store": (["store 14 6 0"], r"page fault at guest address 0x7ffc004030 \(write\): not mapped, and no handler"),
    "handler-faults": (["0"], rf"{DOUBLE}{KERNEL} for vector 6 \(invalid opcode\) at {KERNEL}"),
    "handler-nowhere": (["0"], r"page fault at guest address 0x10 \(execute\): not mapped, and no handler"),
    "handler-data": (["0"], r"page fault at guest address 0x1[0-9a-f]{5} \(execute\): not mapped, and no handler"),
    "handler-outside": (["0"], "page fault outside the windows, at 0x40, error code 0x14, instruction 0x40"),
    "handler-on-top": (["-22"], none(r"6 \(invalid opcode\)")),
    **{
        f"stack-{name}": ([], rf"{DOUBLE}{at} for vector 6 \(invalid opcode\) at {KERNEL}")
        for name, at in {
            "null": "0x1000", "0": "0x0", "not-canonical": "0x8000000000000000", "last": "0xffffffffffffffff",
            "commands": "0x207ffc001800", "traps": "0x207ffc005000", "shared-info": "0x208000000000",
            "below-top": "0x207ffc000096", "code": KERNEL, "page-table": KERNEL, "grants": "0x204000001000",
            "entry-code": "0x[0-9a-f]+",
        }.items()
    },
    "sigreturn-unreadable": ([], rf"{DOUBLE}0x200000000040 for vector 13 \(general protection\) at {KERNEL}"),
    "events-stack": ([], rf"{DOUBLE}0x1000 for the event callback at {KERNEL}"),
    "called-outside": ([], "page fault outside the windows, at 0x[0-9a-f]{2}, error code 0x4, instruction 0x[0-9a-f]+"),
    "spoiled": ([], "SIGSEGV: a forbidden memory access"),  # it could not even say so
    "none-div": ([], none(r"0 \(divide error\)")),
    "none-ud2": ([], none(r"6 \(invalid opcode\)")),
    "none-cli": ([], none(r"13 \(general protection\)")),
    "none-int3": ([], none(r"3 \(breakpoint\)")),
    "none-outside": ([], rf"page fault outside the windows, at 0x8, error code 0x6, instruction {KERNEL}"),
}  # fmt: skip


def as_expected(name: str, said: list[str]) -> bool:
    """Whether a case said what it must."""
    wanted = SAID[name] if name in SAID else REASONS[name][0]
    return len(said) == len(wanted) and all(line in want.split("|") for line, want in zip(said, wanted, strict=True))
