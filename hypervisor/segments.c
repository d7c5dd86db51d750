/* Descriptors that a guest may have in a table that the processor would load. */
#include "tables.h"

#define SEGMENT_END 0xfc000000ull /* a 32-bit segment ends below the top 64 MB of its 4 GiB, as in xen 1.0 */

/* Not present; or code or data of rings 1 to 3 that does not reach into the hypervisor's addresses. Gates and system segments
 * are refused: a gate enters where it likes. Of 64-bit code, base and limit are ignored by hardware, and here. */
int32_t descriptor_is_safe(uint64_t d)
{
    uint64_t base = (d >> 16 & 0xffffff) | (d >> 56 & 0xff) << 24;
    uint64_t limit = (d & 0xffff) | (d >> 32 & 0xf0000);
    uint64_t last = d >> 55 & 1 ? limit << 12 | 0xfff : limit;
    int code = d >> 43 & 1, expands_down = !code && (d >> 42 & 1);

    if (!(d >> 47 & 1))
        return 1;
    if (!(d >> 44 & 1) || !(d >> 45 & 3))
        return 0;
    if (code && (d >> 53 & 1))
        return 1;
    if (expands_down)
        return 0; /* it reaches up from its limit, to 64 KiB or 4 GiB */
    return base + last < SEGMENT_END;
}
