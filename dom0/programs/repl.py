"""A Python prompt inside a locked domain: `ring1 run --repl`. The name `kernel` is this domain's kernel.

`await` works at the prompt: statements are compiled with top-level await and run as a coroutine of this kernel.
"""

from __future__ import annotations

import ast
import code
import inspect
import sys
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from domain.kernel import Kernel

CTRL_D = "\x04"


class Prompt(code.InteractiveInterpreter):
    """Compiles what was typed; `run` runs it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__({"kernel": kernel, "__name__": "__guest__"})
        self.compile.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self._ready: CodeType | None = None

    def runcode(self, code: CodeType) -> None:
        self._ready = code

    async def run(self) -> None:
        if self._ready is None:
            return
        statements, self._ready = self._ready, None
        try:
            value = eval(statements, self.locals)
            if inspect.iscoroutine(value):
                await value
        except SystemExit:
            raise
        except BaseException:
            self.showtraceback()


async def main(kernel: Kernel) -> None:
    prompt, lines = Prompt(kernel), list[str]()
    print(f"Python {sys.version.split()[0]} in domain {kernel.domid}, locked. `kernel` is yours; exit() or ctrl-D ends it.")
    while True:
        kernel.console.write("... " if lines else ">>> ")
        line = (await kernel.console.readline()).rstrip("\r\n")
        over = line.endswith(CTRL_D)
        lines.append(line.removesuffix(CTRL_D) + "\n" * over)  # the end of the input ends a block too
        if not prompt.runsource("\n".join(lines), "<console>"):
            lines = []
            await prompt.run()
        if over:
            return
