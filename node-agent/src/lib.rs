//! plat-agent
