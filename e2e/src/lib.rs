//! plat-e2e
