"""Device protocols: what a frontend and a backend say to each other. The hypervisor knows none of them."""
