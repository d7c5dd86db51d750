/* What one end of a channel may cost the other: a token bucket of EVT_BURST signals that gets one every `pace_ns`, kept as the
 * one number `due`, when the next signal is paid for. It lies so far back that a full bucket has EVT_BURST signals before it
 * reaches now. */
#ifndef RING1_PACE_H
#define RING1_PACE_H

#include "hv.h"

/* 0: a signal now, which is paid for; else when the next one is. */
static inline int64_t pace(struct evt_port *port, int64_t pace_ns, int64_t now)
{
    int64_t full = now - (EVT_BURST - 1) * pace_ns;

    if (port->due < full)
        port->due = full;
    if (port->due > now)
        return port->due;
    port->due += pace_ns;
    return 0;
}

#endif
