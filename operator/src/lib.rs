//! plat-operator
