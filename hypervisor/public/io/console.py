"""The console ring (xen/include/public/io/console.h, xencons_interface), one page, gref 0 of every domain.

    in[1024]  @0     [DOM0] keys for the guest          u32 in_cons @3072 [DOM], in_prod @3076 [DOM0]
    out[2048] @1024  [DOM]  what the guest prints       u32 out_cons @3080 [DOM0], out_prod @3084 [DOM]
"""

from __future__ import annotations

IN, IN_BYTES = 0, 1024
OUT, OUT_BYTES = 1024, 2048
IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = 3072, 3076, 3080, 3084
