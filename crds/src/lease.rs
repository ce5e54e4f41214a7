//! The lease record of `/run/plat/leases`.
