//! plat-cni
